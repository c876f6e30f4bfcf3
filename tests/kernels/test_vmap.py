"""`torch.func.vmap` of every operation: what a loop gives, by one call of a kernel where calls can be one.

On a CPU the kernels run in Triton's interpreter; on a GPU, where TRITON_INTERPRET=0 is set, compiled.
"""

import pytest
import torch
from lamina.kernels import (
    DistanceBias,
    TableBias,
    additive_attention,
    additive_scores,
    deformable_sampling,
    dot_product_attention,
    extract_glimpses,
    low_rank_attention,
    lsh_attention,
    lsh_buckets,
    nearest_code,
    packed_attention,
    use_backend,
)
from lamina.kernels.dot_product_attention import attention_weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("kernels_device")

# How many are mapped over; batch, heads, queries, keys, size of a head.
V, B, H, L, S, D = 3, 2, 1, 5, 7, 8
SHAPES = [(2, 3), (1, 2)]


def whole(numbers: Tensor, end: int) -> Tensor:
    return numbers.abs().mul(3).long().remainder(end)


def attend(query, key, value, mask, bias, lengths):
    options = {"mask": mask > 0, "bias": bias, "key_lengths": whole(lengths, S)}
    return dot_product_attention(query, key, value, **options)


def attend_from_table(query, key, value, table):
    places = torch.arange(L) + S - 1, torch.arange(S)
    return dot_product_attention(query, key, value, score_bias=TableBias(table, *places))


def attend_nearby(query, key, value, coefficients):
    options = {"score_bias": DistanceBias(coefficients), "window": (3, 1)}
    return dot_product_attention(query, key, value, **options)


def attend_in_a_pack(query, key, value):
    starts = torch.tensor([0, 2, L])
    return packed_attention(query, key, value, starts, longest=(3, 3))


def weigh(query, key, mask, bias):
    return attention_weights(query, key, mask=mask > 0, bias=bias)


def attend_additively(query, key, energy, value, mask, bias):
    return additive_attention(query, key, energy, value, mask=mask > 0, bias=bias)


def sample(value, locations, weights):
    return deformable_sampling(value, SHAPES, locations, weights)


def attend_to_columns(query, key, value, mask):
    return low_rank_attention(query, key, value, key_mask=mask > 0)


def attend_by_hash(query_key, value, buckets):
    return lsh_attention(query_key, value, whole(buckets, 4), num_buckets=4, chunk_size=2, is_causal=True)


def look(images, locations):
    return extract_glimpses(images, locations, 2, 2)


def hash_tokens(query_key, rotations):
    return lsh_buckets(query_key, rotations, num_buckets=4)


TOKENS, KEYS, SAMPLES = (B, H, L, D), (B, H, S, D), (B, L, H, 2, 3)
ROWS, COLUMNS, ENERGY = (B, L, D), (B, S, D), (D,)
# By name: an operation, the shapes of what it takes, and along which dimensions that is mapped over. Where
# something is mapped that the batch does not have for itself, each call stands alone.
TOGETHER = {
    "attention": (
        attend,
        [TOKENS, KEYS, KEYS, (B, 1, L, S), (B, H, L, S), (B,)],
        [(0, 0, 0, 0, 0, 0), (1, 3, None, 0, 2, 0), (None, None, 0, None, None, None)],
    ),
    "attention, a bias for all": (
        attend,
        [TOKENS, KEYS, KEYS, (1, 1, L, S), (1, H, 1, S), (B,)],
        [(0, 0, 0, None, None, None), (0, None, None, 0, 0, None)],
    ),
    "attention, a table": (attend_from_table, [TOKENS, KEYS, KEYS, (H, L + S)], [(0, 0, 1, None)]),
    "attention, a window": (attend_nearby, [TOKENS, KEYS, KEYS, (H,)], [(0, 0, 0, None)]),
    "weights": (weigh, [TOKENS, KEYS, (1, 1, L, S), (B, H, L, S)], [(0, 0, 0, 0), (None, 2, None, None)]),
    "additive attention": (
        attend_additively,
        [ROWS, COLUMNS, ENERGY, (B, S, 3), (B, 1, S), (1, L, S)],
        [(0, 0, None, 0, None, None), (2, 1, None, 3, 0, 0)],
    ),
    "additive scores": (additive_scores, [ROWS, COLUMNS, ENERGY], [(0, 0, None), (None, 1, None)]),
    "deformable sampling": (
        sample,
        [(B, 8, H, D), (*SAMPLES, 2), SAMPLES],
        [(0, 0, 0), (1, None, None), (None, 3, 0)],
    ),
    "low-rank attention": (
        attend_to_columns,
        [TOKENS, KEYS, KEYS, (B, S)],
        [(0, 0, 0, 0), (0, None, 2, None)],
    ),
    "LSH attention": (attend_by_hash, [TOKENS, TOKENS, (B, H, 3, L)], [(0, 0, 0), (None, 1, None)]),
    "glimpses": (look, [(B, 3, 5, 4), (B, 2, 2)], [(0, 0), (None, 1)]),
    "hashing": (hash_tokens, [TOKENS, (H, D, 3, 2)], [(0, None), (2, None)]),
}
ALONE = {
    "attention, a table": (attend_from_table, [TOKENS, KEYS, KEYS, (H, L + S)], [(0, None, None, 0)]),
    "attention, a window": (attend_nearby, [TOKENS, KEYS, KEYS, (H,)], [(None, None, 0, 0)]),
    "packed attention": (attend_in_a_pack, [(L, H, D)] * 3, [(0, 0, 0), (1, None, 0)]),
    "additive scores": (additive_scores, [ROWS, COLUMNS, ENERGY], [(0, 0, 0), (None, None, 0)]),
    "hashing": (hash_tokens, [TOKENS, (H, D, 3, 2)], [(0, 0), (None, 1)]),
    "nearest code": (nearest_code, [(B, L, D), (S, D)], [(1, 0), (0, None)]),
}


class Calls(TorchDispatchMode):
    """How often each operation of this library is called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (name := function.name()).startswith("lamina::"):
            self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def cases(given):
    return [
        pytest.param(operation, shapes, dims, id=f"{name} {dims}")
        for name, (operation, shapes, all_dims) in given.items()
        for dims in all_dims
    ]


def draw(shapes, in_dims) -> list[Tensor]:
    return [
        torch.randn(shape if dim is None else (*shape[:dim], V, *shape[dim:]))
        for shape, dim in zip(shapes, in_dims, strict=True)
    ]


def check(operation, shapes, in_dims, backend: str = "triton") -> dict[str, int]:
    """That it equals a loop, with its gradients; returns how often its operations were called."""
    inputs = [t.requires_grad_() for t in draw(shapes, in_dims)]
    with use_backend(backend), Calls() as calls:
        actual = torch.func.vmap(operation, in_dims)(*inputs)
    counts = dict(calls.counts)
    each = [[t] * V if dim is None else t.unbind(dim) for t, dim in zip(inputs, in_dims, strict=True)]
    with use_backend(backend):
        expected = torch.stack([operation(*one) for one in zip(*each, strict=True)])
    torch.testing.assert_close(actual, expected)
    if expected.requires_grad:
        cotangent = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, inputs, cotangent, materialize_grads=True, allow_unused=True),
            torch.autograd.grad(expected, inputs, cotangent, materialize_grads=True, allow_unused=True),
            atol=1e-4,
            rtol=1e-4,
        )
    return counts


@pytest.mark.parametrize(("operation", "shapes", "in_dims"), cases(TOGETHER))
def test_is_one_call_in_a_larger_batch(operation, shapes, in_dims, unwritten_memory_is_nan):
    counts = check(operation, shapes, in_dims)
    assert counts
    assert set(counts.values()) == {1}


@pytest.mark.parametrize(("operation", "shapes", "in_dims"), cases(ALONE))
def test_is_a_call_for_each_where_they_cannot_be_one(operation, shapes, in_dims, unwritten_memory_is_nan):
    counts = check(operation, shapes, in_dims)
    assert counts
    assert set(counts.values()) == {V}


@pytest.mark.parametrize(("operation", "shapes", "in_dims"), cases({"": TOGETHER["deformable sampling"]}))
def test_the_bags_of_a_cpu(operation, shapes, in_dims):
    assert check(operation, shapes, in_dims, "torch") == {"lamina::deformable_sampling_bags": 1}


def test_within_another():
    query, key, value = torch.randn(V, 2, *TOKENS), torch.randn(V, *KEYS), torch.randn(2, *KEYS)
    attend_each = lambda q, k, v: dot_product_attention(q, k, v, window=(2, 2))  # noqa: E731
    with use_backend("triton"):
        actual = torch.func.vmap(torch.func.vmap(attend_each, (0, None, 0)), (0, 0, None))(query, key, value)
        for a in range(V):
            for b in range(2):
                torch.testing.assert_close(actual[a, b], attend_each(query[a, b], key[a], value[b]))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_is_as_random_as_is_asked_for(randomness):
    tokens = torch.randn(TOKENS).expand(V, *TOKENS)

    def operation(query):
        return dot_product_attention(query, query, query, dropout=0.5)

    with use_backend("triton"):
        first, second, third = torch.func.vmap(operation, randomness=randomness)(tokens)
    assert torch.equal(first, second) == torch.equal(second, third) == (randomness == "same")


DIFFERENTIABLE = {n: (*TOGETHER[n][:2], TOGETHER[n][2][:1]) for n in TOGETHER if n != "hashing"}


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("operation", "shapes", "in_dims"), cases(DIFFERENTIABLE))
@pytest.mark.filterwarnings("ignore:.* does not run on:UserWarning")
def test_derivatives_by_torch_func_are_the_definitions(operation, shapes, in_dims, backend):
    """As per-sample gradients are taken: each sample's alone, all at once."""
    inputs = draw(shapes, in_dims)

    def loss(*inputs):
        return operation(*inputs).pow(3).sum()

    outcomes = []
    for path in backend, "reference":
        with use_backend(path):
            outcomes.append(torch.func.vmap(torch.func.grad(loss), in_dims)(*inputs))
    torch.testing.assert_close(*outcomes)
    inputs = [t if dim is None else t.select(dim, 1) for t, dim in zip(inputs, in_dims, strict=True)]
    with use_backend(backend):
        torch.testing.assert_close(torch.func.grad(loss)(*inputs), outcomes[1][1])


def test_many_cotangents_at_once():
    """The backward pass is mapped over alone."""
    inputs = [torch.randn(TOKENS, requires_grad=True) for _ in range(3)]
    with use_backend("triton"):
        out = dot_product_attention(*inputs, window=(2, 2))
    cotangents = torch.randn(V, *TOKENS)
    actual = torch.autograd.grad(out, inputs, cotangents, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(out, inputs, c, retain_graph=True) for c in cotangents]
    torch.testing.assert_close(actual, tuple(torch.stack(parts) for parts in zip(*each, strict=True)))

"""reformer-pytorch's whole model with its weights and buckets: logits, and gradients through its own stack.

In float64 to 1e-5: its keys have unit length exactly, ours add 1e-6 to the mean square, as the authors' do.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from lamina.kernels import lsh_buckets
from lamina.layers.lsh_attention import seeded_normals
from lamina.models import Reformer, ReformerConfig
from torch import Tensor, nn

LM = pytest.importorskip("reformer_pytorch").ReformerLM
OURS = ReformerConfig(
    vocab_size=13,
    dim=12,
    depth=3,
    layers=("lsh",),
    num_heads=2,
    head_dim=5,
    hidden_dim=48,
    axial_shape=None,
    max_length=32,
    chunk_size=4,
    num_hashes=3,
    num_buckets=6,
    scaling="root",
    circular=True,
    streams="mean",
    activation="gelu",
    dropout=0.0,
    norm_eps=1e-5,
)
IDS = torch.randint(13, (2, 24), generator=torch.Generator().manual_seed(1))
KINDS = {
    "causal": ({}, {}),
    "both sides": ({"causal": False}, {"is_causal": False}),
    "axial positions": (
        {"absolute_position_emb": False, "axial_position_emb": True, "axial_position_shape": (4, 8)},
        {"axial_shape": (4, 8), "axial_dims": None},
    ),
    "full attention": ({"use_full_attn": True}, {"chunk_size": 24, "num_hashes": 1, "num_buckets": 1}),
    "feed-forward in chunks": ({"ff_chunks": 5}, {"chunk_feed_forward": 5}),
    "kept activations": ({"reverse_thres": 100}, {"reversible": False}),
}


def their_model(**options) -> nn.Module:
    options = {
        "dim_head": 5,
        "bucket_size": 4,
        "n_hashes": 3,
        "ff_chunks": 1,
        "causal": True,
        "absolute_position_emb": True,
        **options,
    }
    model = LM(13, 12, 3, 32, heads=2, **options).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    for index, block in enumerate(model.reformer.layers.blocks):
        attention = block.f.net.fn
        nn.init.normal_(attention.toqk.weight, std=2.0)  # long queries, beside which 1e-6 is little
        nn.init.zeros_(attention.to_out.bias)  # which ours has not
        attention.lsh_attn.hash_vectors = partial(our_buckets, index)
    return model


def our_buckets(seed: int, n_buckets: int, vectors: Tensor, **_) -> Tensor:
    """As ours hashes: vectors (B H, L, D), each round's buckets behind those of the one before."""
    vectors = vectors.unflatten(0, (2, 2))
    rotations = seeded_normals(torch.tensor(seed), (2, vectors.shape[-1], 3, n_buckets // 2))
    buckets = lsh_buckets(vectors, rotations, num_buckets=n_buckets)
    return (buckets + n_buckets * torch.arange(3)[:, None]).flatten(2).flatten(0, 1)


def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their names to ours; their blocks stand twice in the state dict, as reversible ones and as others."""
    names = {"token_emb.weight": "embedding.weight", "pos_emb.emb.weight": "positions.weight"}
    names |= {f"norm.{kind}": f"norm.{kind}" for kind in ("weight", "bias")}
    names |= {f"out.1.{kind}": f"head.{kind}" for kind in ("weight", "bias")}
    for axis in range(2):
        names[f"pos_emb.weights.{axis}"] = f"positions.weights.{axis}"
    for index in range(OURS.depth):
        theirs, ours = f"reformer.layers.blocks.{index}.", f"blocks.blocks.{index}."
        for kind in "weight", "bias":
            names[f"{theirs}f.net.norm.{kind}"] = f"{ours}first.norm.{kind}"
            names[f"{theirs}g.net.norm.{kind}"] = f"{ours}second.norm.{kind}"
            names[f"{theirs}g.net.fn.fn.w1.{kind}"] = f"{ours}second.layer.up.{kind}"
            names[f"{theirs}g.net.fn.fn.w2.{kind}"] = f"{ours}second.layer.down.{kind}"
        for name, mine in {"toqk": "query_key", "tov": "value", "to_out": "out"}.items():
            names[f"{theirs}f.net.fn.{name}.weight"] = f"{ours}first.layer.{mine}.weight"
    found = {names[name]: tensor for name, tensor in tensors.items() if name in names}
    return {name: t.reshape(-1, t.shape[-1]) if "positions" in name else t for name, t in found.items()}


def load(ours: Reformer, theirs: nn.Module) -> None:
    """Every parameter; the seeds are ours already."""
    seeds = {name: t for name, t in ours.state_dict().items() if name.endswith("hash_seed")}
    ours.load_state_dict(seeds | moved(theirs.state_dict()))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_reformer_pytorch(kind):
    of_theirs, of_ours = KINDS[kind]
    theirs = their_model(**of_theirs).train()
    ours = Reformer(replace(OURS, **of_ours), dtype=torch.float64).train()
    load(ours, theirs)
    expected, actual = theirs(IDS), ours(IDS)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(actual)
    expected.backward(cotangent)  # autograd.grad does not see what their reversible layers accumulate
    wanted = moved({name: p.grad for name, p in named(theirs)})
    got = torch.autograd.grad(actual, list(ours.parameters()), cotangent)
    for (name, _), gradient in zip(ours.named_parameters(), got, strict=True):
        scale = wanted[name].abs().max()
        assert scale > 0, name
        torch.testing.assert_close(
            gradient,
            wanted[name],
            rtol=1e-5,
            atol=1e-5 * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None]


@pytest.mark.parametrize("changes", [{"scaling": "unit"}, {"circular": False}])
def test_each_switch_is_needed(changes):
    """So that a parity above is of the switch, and not of weights to which it makes no difference."""
    theirs = their_model().eval()
    ours = Reformer(replace(OURS, **changes), dtype=torch.float64).eval()
    load(ours, theirs)
    assert not torch.allclose(ours(IDS), theirs(IDS), rtol=1e-2, atol=1e-2)

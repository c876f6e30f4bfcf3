"""One signature for every attention: each takes each other's place in a block, a stack and a model.

What an attention cannot honour is not in its signature; what is in it is kept. Each is asked that here.
"""

import inspect
from collections.abc import Callable
from functools import partial

import lamina.layers
import pytest
import torch
from lamina.blocks import DecoderBlock, Encoder, EncoderBlock
from lamina.layers import (
    AdditiveAttention,
    AxialAttention,
    GaussianAttention,
    LocalAttention,
    LowRankAttention,
    LSHAttention,
    MultiHeadAttention,
    WindowAttention,
    pack,
    unpack,
)
from lamina.models import ViT, create_model
from lamina.viz import capture_attention
from torch import Tensor, nn

DIM, HEADS, LENGTH = 12, 2, 9

OPTIONS = {
    MultiHeadAttention: {},
    GaussianAttention: {"windows": [2.0, 5.0]},
    LocalAttention: {"window": 4},
    LowRankAttention: {"max_length": 17, "rank": 5},
    LSHAttention: {"chunk_size": 4, "num_buckets": 4, "num_hashes": 3},
    WindowAttention: {"window": 2},
    AxialAttention: {},
}
MAKERS: dict[str, Callable[..., nn.Module]] = {
    made.__name__: partial(made, **options) for made, options in OPTIONS.items()
}
MAKERS["AdditiveAttention"] = lambda dim, heads, **factory: AdditiveAttention(dim, dim, 5, **factory)

every_attention = pytest.mark.parametrize("name", sorted(MAKERS))


def accepts(name: str, *arguments: str) -> bool:
    """Whether the attention has these in its signature and does not refuse them with a reason."""
    refused = {"LowRankAttention": {"is_causal"}}.get(name, set())
    made = MAKERS[name](DIM, HEADS)
    return set(arguments) <= set(inspect.signature(made.forward).parameters) - refused


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return module.double().eval()


def tokens(batch: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def test_every_attention_is_asked():
    public = {name for name in lamina.layers.__all__ if name.endswith("Attention")}
    # Its queries look at points of feature maps, so it needs their positions beside the tokens.
    assert public - {"DeformableAttention"} == set(MAKERS)


@every_attention
def test_padding_has_no_influence_through_a_stack(name):
    encoder = randomised(Encoder(DIM, 2, HEADS, block=partial(EncoderBlock, attention=MAKERS[name])))
    x = tokens().requires_grad_()
    key_mask = torch.arange(LENGTH) < torch.tensor([[9], [6], [1]])
    out = encoder(x, key_mask=key_mask)
    cotangent = torch.randn_like(out) * key_mask[..., None]
    (grad,) = torch.autograd.grad(out, x, cotangent)
    assert grad[~key_mask].count_nonzero() == 0
    assert (grad[key_mask] != 0).any(-1).all()
    other = torch.where(key_mask[..., None], x, 100 * tokens())
    torch.testing.assert_close(encoder(other, key_mask=key_mask)[key_mask], out[key_mask])


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", sorted(n for n in MAKERS if accepts(n, "packing")))
def test_packed_tokens_equal_padded_ones_through_a_stack(name, norm_first):
    """Outputs, and the gradients of the tokens and of every parameter; the second sequence is empty."""
    block = partial(EncoderBlock, attention=MAKERS[name], norm_first=norm_first)
    encoder = randomised(Encoder(DIM, 2, HEADS, block=block))
    x = tokens().requires_grad_()
    key_mask = torch.arange(LENGTH) < torch.tensor([[9], [0], [4]])
    packed, packing = pack(x, key_mask)
    expected, actual = encoder(x, key_mask=key_mask), unpack(encoder(packed, packing=packing), key_mask)
    torch.testing.assert_close(actual[key_mask], expected[key_mask])
    assert actual[~key_mask].count_nonzero() == 0
    cotangent, of = torch.randn_like(expected) * key_mask[..., None], [x, *encoder.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(actual, of, cotangent), torch.autograd.grad(expected, of, cotangent)
    )


@pytest.mark.parametrize("name", sorted(n for n in MAKERS if not accepts(n, "packing")))
def test_an_attention_that_takes_no_packed_tokens_says_so(name):
    encoder = randomised(Encoder(DIM, 2, HEADS, block=partial(EncoderBlock, attention=MAKERS[name])))
    packed, packing = pack(tokens(), torch.ones(3, LENGTH, dtype=torch.bool))
    with pytest.raises(TypeError, match=f"{name}.forward.* unexpected keyword argument 'packing'"):
        encoder(packed, packing=packing)


@every_attention
def test_a_sequence_without_keys_passes_nothing_and_is_finite(name):
    attention = randomised(MAKERS[name](DIM, HEADS))
    x = tokens().requires_grad_()
    key_mask = torch.ones(3, LENGTH, dtype=torch.bool)
    key_mask[1] = False
    out = attention(x, key_mask=key_mask)
    (grad,) = torch.autograd.grad(out, x, torch.randn_like(out))
    assert out.isfinite().all()
    assert grad.isfinite().all()
    assert grad[1].count_nonzero() == 0
    torch.testing.assert_close(out[1], out[1, :1].expand(LENGTH, -1))  # the bias of a projection, if any
    assert attention.weights(x, key_mask=key_mask)[1].count_nonzero() == 0


@pytest.mark.parametrize("name", sorted(n for n in MAKERS if accepts(n, "is_causal")))
def test_the_future_has_no_influence(name):
    block = randomised(EncoderBlock(DIM, HEADS, attention=MAKERS[name]))
    x = tokens().requires_grad_()
    out = block(x, is_causal=True)
    (grad,) = torch.autograd.grad(out[:, :5], x, torch.randn_like(out[:, :5]))
    assert grad[:, 5:].count_nonzero() == 0
    assert (grad[:, :5] != 0).any(-1).all()
    if name != "LSHAttention":  # where it hashes to depends on all tokens: only the weights are causal
        later = torch.cat([x[:, :5], tokens()[:, 5:]], 1)
        torch.testing.assert_close(block(later, is_causal=True)[:, :5], out[:, :5])


@every_attention
def test_weights_are_seen_with_the_shape_of_all(name):
    attention = randomised(MAKERS[name](DIM, HEADS))
    x = tokens()
    with capture_attention(attention) as record:
        attention(x)
    (weights,) = record[""]
    heads = 1 if weights.ndim == 3 else weights.shape[1] // HEADS
    assert weights.shape[0] == 3
    assert weights.shape[-2:] == (LENGTH, LENGTH)
    assert heads >= 1
    if name != "LowRankAttention":  # its rows are what each value receives
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


@pytest.mark.parametrize("name", sorted(n for n in MAKERS if accepts(n, "key")))
def test_cross_attention_sees_the_memory_alone(name):
    block = randomised(DecoderBlock(DIM, HEADS, cross_attention=MAKERS[name]))
    x, memory = tokens(2), tokens(2, 7)
    memory_mask = torch.arange(7) < torch.tensor([[7], [4]])
    out = block(x, memory, memory_key_mask=memory_mask)
    other = torch.where(memory_mask[..., None], memory, 100 * torch.randn_like(memory))
    torch.testing.assert_close(block(x, other, memory_key_mask=memory_mask), out)
    assert not torch.allclose(block(x, 2 * memory, memory_key_mask=memory_mask), out)


@pytest.mark.parametrize("made", OPTIONS, ids=lambda made: made.__name__)
def test_every_attention_makes_a_vision_transformer_that_is_saved(made, tmp_path):
    attention = partial(made, **OPTIONS[made])
    model = randomised(create_model("vit_digits", pool="mean", attention=attention)).float()
    images = torch.randn(2, 1, 8, 8)
    logits = model(images)
    logits.backward(torch.randn_like(logits))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.save_pretrained(tmp_path)
    assert torch.equal(ViT.from_pretrained(tmp_path).eval()(images), logits)

"""Encoder and decoder blocks and their stacks: PyTorch with the same weights, swapped parts, decoding."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.blocks import Decoder, DecoderBlock, Encoder, EncoderBlock
from lamina.layers import AdditiveAttention, DropPath, FeedForward, MultiHeadAttention, RotaryPositions
from torch import Tensor, nn

DIM, HEADS, HIDDEN = 8, 2, 11
seeds = st.integers(0, 2**31)
ffn = partial(FeedForward, hidden_dim=HIDDEN, activation=nn.ReLU)


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, dtype=torch.float64)


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


def attention_state(name: str, attention: MultiHeadAttention) -> dict[str, Tensor]:
    """Our projections under the names of `nn.MultiheadAttention`."""
    parts = attention.query, attention.key, attention.value
    return {
        f"{name}.in_proj_weight": torch.cat([p.weight for p in parts]),
        f"{name}.in_proj_bias": torch.cat([p.bias for p in parts]),
        f"{name}.out_proj.weight": attention.out.weight,
        f"{name}.out_proj.bias": attention.out.bias,
    }


def torch_state(block: EncoderBlock | DecoderBlock) -> dict[str, Tensor]:
    """Our block's weights under the names of PyTorch's layer."""
    state = attention_state("self_attn", block.attention)
    norms = [block.attention_norm, block.feed_forward_norm]
    if isinstance(block, DecoderBlock):
        state |= attention_state("multihead_attn", block.cross_attention)
        norms.insert(1, block.cross_attention_norm)
    for i, module in enumerate(norms, 1):
        state |= {f"norm{i}.weight": module.weight, f"norm{i}.bias": module.bias}
    for i, module in enumerate((block.feed_forward.up, block.feed_forward.down), 1):
        state |= {f"linear{i}.weight": module.weight, f"linear{i}.bias": module.bias}
    return state


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_equals_torch(norm_first):
    block = partial(EncoderBlock, feed_forward=ffn, norm_first=norm_first)
    ours = randomised(Encoder(DIM, 3, HEADS, block=block))
    layer = nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, 0.0, batch_first=True, norm_first=norm_first)
    theirs = nn.TransformerEncoder(layer, 3, nn.LayerNorm(DIM), enable_nested_tensor=False).double()
    for mine, other in zip(ours.blocks, theirs.layers, strict=True):
        other.load_state_dict(torch_state(mine))
    theirs.norm.load_state_dict(ours.norm.state_dict())
    tokens, mask = x(2, 5).requires_grad_(), torch.ones(5, 5).tril().bool()
    key_mask = torch.arange(5) < torch.tensor([[5], [3]])
    expected = theirs(tokens, mask=~mask, src_key_padding_mask=~key_mask)
    actual = ours(tokens, mask=mask, key_mask=key_mask)
    torch.testing.assert_close(actual, expected)
    cotangent = x(2, 5)
    torch.testing.assert_close(
        torch.autograd.grad(actual, tokens, cotangent), torch.autograd.grad(expected, tokens, cotangent)
    )


@pytest.mark.parametrize("norm_first", [False, True])
def test_decoder_equals_torch(norm_first):
    block = partial(DecoderBlock, feed_forward=ffn, norm_first=norm_first)
    ours = randomised(Decoder(DIM, 2, HEADS, block=block, norm=None))
    layer = nn.TransformerDecoderLayer(DIM, HEADS, HIDDEN, 0.0, batch_first=True, norm_first=norm_first)
    theirs = nn.TransformerDecoder(layer, 2).double()
    for mine, other in zip(ours.blocks, theirs.layers, strict=True):
        other.load_state_dict(torch_state(mine))
    tokens, memory = x(2, 5).requires_grad_(), x(2, 7).requires_grad_()
    memory_key_mask = torch.arange(7) < torch.tensor([[7], [2]])
    memory_mask = torch.rand(5, 7) < 0.8
    memory_mask[:, 0] = True
    expected = theirs(
        tokens,
        memory,
        tgt_mask=~torch.ones(5, 5).tril().bool(),
        memory_mask=~memory_mask,
        memory_key_padding_mask=~memory_key_mask,
    )
    actual = ours(tokens, memory, is_causal=True, memory_mask=memory_mask, memory_key_mask=memory_key_mask)
    torch.testing.assert_close(actual, expected)
    cotangent = x(2, 5)
    torch.testing.assert_close(
        torch.autograd.grad(actual, (tokens, memory), cotangent),
        torch.autograd.grad(expected, (tokens, memory), cotangent),
    )


@given(seed=seeds, steps=st.lists(st.integers(1, 3), min_size=1, max_size=4), padding=st.integers(0, 2))
def test_decoding_by_steps_equals_one_pass(seed, steps, padding):
    torch.manual_seed(seed)
    rotary = partial(MultiHeadAttention, rotary=RotaryPositions(DIM // HEADS))
    decoder = randomised(Decoder(DIM, 2, HEADS, block=partial(DecoderBlock, attention=rotary)))
    encoder = randomised(Encoder(DIM, 2, HEADS, block=partial(EncoderBlock, attention=rotary)))
    length, memory = sum(steps), x(2, 5)
    tokens, key_mask = x(2, length), torch.arange(length) >= torch.tensor([[0], [padding]])
    expected = (
        decoder(tokens, memory, key_mask=key_mask, is_causal=True),
        encoder(tokens, key_mask=key_mask, is_causal=True),
    )
    caches, at, outputs = (decoder.make_cache(), encoder.make_cache()), 0, ([], [])
    with torch.no_grad():
        for n in steps:
            new, seen = tokens[:, at : at + n], key_mask[:, : at + n]
            outputs[0].append(decoder(new, memory, key_mask=seen, is_causal=True, cache=caches[0]))
            outputs[1].append(encoder(new, key_mask=seen, is_causal=True, cache=caches[1]))
            at += n
    for parts, whole in zip(outputs, expected, strict=True):
        torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_a_reordered_cache_is_another_batch():
    decoder = randomised(Decoder(DIM, 2, HEADS))
    tokens, memory, rows = x(3, 4), x(3, 5), torch.tensor([2, 0, 2])
    with torch.no_grad():
        cache = decoder.make_cache()
        decoder(tokens[:, :3], memory, is_causal=True, cache=cache)
        for kept in cache:
            kept.reorder(rows)
        last = decoder(tokens[rows, 3:], memory[rows], is_causal=True, cache=cache)
        whole = decoder(tokens[rows], memory[rows], is_causal=True)
    torch.testing.assert_close(last, whole[:, 3:])


def additive(dim: int, num_heads: int, **factory) -> AdditiveAttention:
    return AdditiveAttention(dim, dim, 5, **factory)


class WithoutMasks(nn.Module):
    """An attention that can honour nothing."""

    def forward(self, query: Tensor, key: Tensor | None = None) -> Tensor:
        return (query if key is None else key).mean(1, keepdim=True).expand_as(query)


@pytest.mark.parametrize("attention", [additive, WithoutMasks(), lambda *sizes, **factory: WithoutMasks()])
def test_any_attention_fits(attention):
    block = randomised(EncoderBlock(DIM, HEADS, attention=attention))
    decoder = randomised(DecoderBlock(DIM, HEADS, attention=attention, cross_attention=attention))
    tokens, memory = x(2, 5), x(2, 3)
    expected = tokens + block.attention(block.attention_norm(tokens))
    expected = expected + block.feed_forward(block.feed_forward_norm(expected))
    torch.testing.assert_close(block(tokens), expected)
    assert decoder(tokens, memory).shape == tokens.shape


@pytest.mark.parametrize(
    "given_mask",
    [{"mask": torch.ones(5, 5).bool()}, {"key_mask": torch.ones(2, 5).bool()}, {"is_causal": True}],
)
def test_what_an_attention_cannot_honour_it_refuses(given_mask):
    block = EncoderBlock(DIM, HEADS, attention=WithoutMasks()).double()
    with pytest.raises(TypeError, match=next(iter(given_mask))):
        block(x(2, 5), **given_mask)


def test_by_default_blocks_are_pre_norm_of_eight_heads_and_drop_nothing():
    for block in EncoderBlock(16), DecoderBlock(16), Encoder(16, 1).blocks[0], Decoder(16, 1).blocks[0]:
        assert block.norm_first
        assert block.attention.num_heads == 8
        assert block.drop_path.probability == 0
        assert {m.p for m in block.modules() if isinstance(m, nn.Dropout)} == {0.0}


def test_every_token_is_seen_unless_causal_is_asked():
    tokens, memory, order = x(2, 5), x(2, 3), torch.tensor([3, 1, 4, 0, 2])
    encoder, decoder = randomised(Encoder(DIM, 2, HEADS)), randomised(Decoder(DIM, 2, HEADS))
    torch.testing.assert_close(encoder(tokens[:, order]), encoder(tokens)[:, order])
    torch.testing.assert_close(decoder(tokens[:, order], memory), decoder(tokens, memory)[:, order])


def test_drop_path_grows_with_depth():
    for stack in Encoder(DIM, 5, HEADS, drop_path=0.4), Decoder(DIM, 5, HEADS, drop_path=0.4):
        rates = [block.drop_path.probability for block in stack.blocks]
        assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert Encoder(DIM, 1, HEADS, drop_path=0.4).blocks[0].drop_path.probability == 0.0


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_dropped_path_leaves_the_input(norm_first):
    block = EncoderBlock(DIM, HEADS, norm=_no_norm, norm_first=norm_first, drop_path=1.0)
    tokens = x(2, 5)
    assert isinstance(block.drop_path, DropPath)
    torch.testing.assert_close(block.double().train()(tokens), tokens)


def _no_norm(dim: int, **factory) -> nn.Module:
    return nn.Identity()


def test_dropout_is_on_each_branch_in_training():
    block = EncoderBlock(DIM, HEADS, dropout=0.5, norm=_no_norm).double()
    nn.init.zeros_(block.feed_forward.down.weight)
    nn.init.zeros_(block.feed_forward.down.bias)
    tokens = x(4, 50)
    branch = block(tokens) - tokens
    assert 0.4 < (branch == 0).double().mean() < 0.6
    assert (block.eval()(tokens) - tokens != 0).all()


def test_the_final_norm_is_a_choice():
    tokens = x(2, 5)
    normed = Encoder(DIM, 1, HEADS).double()(tokens)
    torch.testing.assert_close(normed.mean(-1), torch.zeros(2, 5).double(), atol=1e-7, rtol=0)
    assert isinstance(Encoder(DIM, 1, HEADS, norm=None).norm, nn.Identity)
    assert isinstance(Decoder(DIM, 1, HEADS, norm=nn.RMSNorm).norm, nn.RMSNorm)


def test_each_depth_has_a_block_of_its_own():
    encoder = Encoder(DIM, 3, HEADS)
    assert len({id(p) for p in encoder.parameters()}) == len(list(encoder.parameters()))
    with pytest.raises(ValueError, match="block must make a new block at each call, got a module"):
        Encoder(DIM, 3, HEADS, block=EncoderBlock(DIM, HEADS))


def test_a_cache_of_another_depth_is_refused():
    for stack, inputs in (Encoder(DIM, 2, HEADS), (x(1, 2),)), (Decoder(DIM, 2, HEADS), (x(1, 2), x(1, 3))):
        with pytest.raises(ValueError, match="cache must have one entry a block, 2, got 1"):
            stack.double()(*inputs, cache=stack.make_cache()[:1])

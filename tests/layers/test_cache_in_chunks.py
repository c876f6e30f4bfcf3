"""Local and LSH attention, step by step: the new tokens get what the last ones of the whole pass would."""

import itertools

import pytest
import torch
from lamina.layers import KeyValueCache, LocalAttention, LSHAttention, RotaryPositions
from torch import Tensor, nn

WIDE = {"dtype": torch.float64}
LOCAL = {"window": 4, **WIDE}
HASHED = {"chunk_size": 4, "num_hashes": 3, **WIDE}
LAYERS = {
    "local": lambda **o: LocalAttention(8, 2, **LOCAL, **o),
    "local back": lambda **o: LocalAttention(8, 2, look_ahead=0, look_back=2, **LOCAL, **o),
    "local rotary": lambda **o: LocalAttention(8, 2, rotary=RotaryPositions(4), **LOCAL, **o),
    "local wide": lambda **o: LocalAttention(8, 2, head_dim=5, bias=False, **LOCAL, **o),
    "lsh": lambda **o: LSHAttention(8, 2, **HASHED, **o),
    "lsh paper": lambda **o: LSHAttention(
        8, 2, same_bucket=True, deduplicate=True, num_buckets=4, **HASHED, **o
    ),
    "lsh original": lambda **o: LSHAttention(8, 2, circular=True, num_buckets=(2, 4), **HASHED, **o),
    "lsh wide": lambda **o: LSHAttention(
        8, 2, look_back=2, look_ahead=1, scale=0.3, head_dim=5, bias=True, **HASHED, **o
    ),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def draw(kind: str, **options) -> nn.Module:
    """A layer with weights of order one."""
    layer = LAYERS[kind](**options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@every_layer
@pytest.mark.parametrize("steps", [[1] * 19, [6, 1, 1, 5, 3, 1, 1, 1]], ids=str)
def test_new_tokens_are_the_last_of_all(kind, steps):
    layer, tokens, cache = draw(kind), x(2, 19, 8), KeyValueCache()
    for new, end in zip(steps, itertools.accumulate(steps), strict=True):
        out = layer(tokens[:, end - new : end], is_causal=True, cache=cache)
        torch.testing.assert_close(out, layer(tokens[:, :end], is_causal=True)[:, -new:])
        assert cache.length == end


@pytest.mark.parametrize("kind", ["local", "lsh"])
def test_a_cache_is_of_causal_attention_to_all(kind):
    layer, tokens = draw(kind), x(2, 5, 8)
    with pytest.raises(ValueError, match="is_causal must be set with a cache, got is_causal=False"):
        layer(tokens, cache=KeyValueCache())
    with pytest.raises(ValueError, match="key_mask must be None with a cache"):
        layer(tokens, is_causal=True, key_mask=torch.ones(2, 5, dtype=torch.bool), cache=KeyValueCache())


@pytest.mark.parametrize("kind", ["local", "lsh"])
def test_dropout_reaches_the_steps(kind):
    layer, cache, tokens = draw(kind, dropout=0.5), KeyValueCache(), x(1, 12, 8)
    with torch.no_grad():
        layer(tokens, is_causal=True, cache=cache)
        first = layer(tokens[:, :1], is_causal=True, cache=cache)
        cache.crop(12)
        assert not torch.equal(layer(tokens[:, :1], is_causal=True, cache=cache), first)

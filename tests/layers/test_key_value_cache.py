"""The cache: what goes in comes out, whatever the steps and whether gradients are wanted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import KeyValueCache

steps = st.lists(st.integers(1, 4), min_size=1, max_size=6)


@pytest.mark.parametrize("with_gradients", [False, True])
@given(steps=steps, seed=st.integers(0, 2**31))
def test_keeps_all_steps_in_order(with_gradients, steps, seed):
    torch.manual_seed(seed)
    keys = torch.randn(2, 3, sum(steps), 5, requires_grad=with_gradients)
    values = torch.randn(2, 3, sum(steps), 7)
    cache, at = KeyValueCache(), 0
    with torch.set_grad_enabled(with_gradients):
        for n in steps:
            kept = cache.update(keys[:, :, at : at + n], values[:, :, at : at + n])
            at += n
            assert cache.length == at
            for a, b in zip((*kept, cache.keys, cache.values), (keys, values) * 2, strict=True):
                assert torch.equal(a, b[:, :, :at])
    if with_gradients:
        cotangent = torch.randn_like(keys)
        (gradient,) = torch.autograd.grad(cache.keys, keys, cotangent)
        assert torch.equal(gradient, cotangent)


def test_what_a_caller_holds_is_never_written_into():
    with torch.no_grad():
        first, second = torch.randn(1, 1, 4, 2), torch.randn(1, 1, 3, 2)
        before = first.clone()
        cache = KeyValueCache()
        cache.update(first, first)
        cache.crop(1)
        cache.update(second, second)
    assert torch.equal(first, before)
    assert torch.equal(cache.keys, torch.cat([before[:, :, :1], second], 2))


def test_grows_by_doubling():
    with torch.no_grad():
        cache, buffers = KeyValueCache(), set()
        for _ in range(65):
            cache.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
            buffers.add(cache.keys.data_ptr())
    assert len(buffers) <= 8  # 1, 2, 4, … 128


def test_reorders_and_crops():
    cache = KeyValueCache()
    assert (cache.length, cache.keys, cache.values) == (0, None, None)
    cache.reorder(torch.tensor([0]))  # nothing kept yet: nothing to do
    keys, values = torch.randn(3, 2, 5, 7), torch.randn(3, 2, 5, 7)
    cache.update(keys, values)
    cache.reorder(torch.tensor([2, 0, 2, 1]))
    cache.crop(3)
    assert torch.equal(cache.keys, keys[[2, 0, 2, 1], :, :3])
    assert torch.equal(cache.values, values[[2, 0, 2, 1], :, :3])
    assert cache.length == 3
    cache.crop(3)
    assert cache.length == 3
    for length in -1, 4:
        with pytest.raises(ValueError, match=f"length must be between 0 and the 3 steps kept, got {length}"):
            cache.crop(length)

    cache.crop(0)
    assert cache.keys.shape == (4, 2, 0, 7)


@pytest.mark.parametrize("shape", [(2, 3, 1, 5), (1, 2, 1, 5), (1, 3, 1, 4)])
def test_another_shape_is_refused(shape):
    cache = KeyValueCache()
    cache.update(torch.zeros(1, 3, 2, 5), torch.zeros(1, 3, 2, 5))
    with pytest.raises(ValueError, match=r"keys must be .* like those kept, .*1, 3, 2, 5.* got"):
        cache.update(torch.zeros(shape), torch.zeros(shape))

"""Packed batches: what is taken out of a padded batch, and put back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import Packing, pack, unpack
from lamina.layers.packing import packed_places

seeds, sizes = st.integers(0, 2**31), st.integers(0, 5)


def test_padding_is_taken_out_row_by_row():
    tokens = torch.arange(12).view(3, 4)
    key_mask = torch.tensor([[True, False, True, False], [False] * 4, [True] * 4])
    packed, packing = pack(tokens, key_mask)
    assert packed.tolist() == [0, 2, 8, 9, 10, 11]
    assert packing.starts.tolist() == [0, 2, 2, 6]
    assert packing.starts.dtype is torch.int32
    assert packing.longest == 4
    assert unpack(packed, key_mask).tolist() == [[0, 0, 2, 0], [0] * 4, [8, 9, 10, 11]]


@given(seed=seeds, batch=sizes, length=sizes, share=st.sampled_from([0.0, 0.5, 1.0]))
def test_it_comes_back(seed, batch, length, share):
    torch.manual_seed(seed)
    tokens = torch.randn(batch, length, 3, 2, dtype=torch.float64, requires_grad=True)
    key_mask = torch.rand(batch, length) < share
    packed, packing = pack(tokens, key_mask)
    assert packed.equal(tokens[key_mask])
    assert packing.starts.diff().equal(key_mask.sum(1, dtype=torch.int32))
    again = unpack(packed, key_mask)
    assert again.equal(tokens * key_mask[..., None, None])
    cotangent = torch.randn_like(again)
    (grad,) = torch.autograd.grad(again, tokens, cotangent)
    assert grad.equal(cotangent * key_mask[..., None, None])


def test_each_token_knows_its_place():
    sequences, places = packed_places(Packing(torch.tensor([0, 0, 3, 3, 5, 5]), 3), 5)
    assert sequences.tolist() == [1, 1, 1, 3, 3]
    assert places.tolist() == [0, 1, 2, 0, 1]
    assert packed_places(Packing(torch.tensor([0, 0]), 0), 0)[1].shape == (0,)


def test_it_compiles_whole():
    def there_and_back(tokens, key_mask):
        return unpack(2 * pack(tokens, key_mask)[0], key_mask)

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, length in (3, 7), (2, 5):
        tokens, key_mask = torch.randn(batch, length, 3), torch.rand(batch, length) < 0.6
        assert compiled(tokens, key_mask).equal(there_and_back(tokens, key_mask))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack(torch.zeros(2, 3), torch.ones(2, 3)), "key_mask must be boolean with True where"),
        (lambda: pack(torch.zeros(2, 3), torch.ones(2, 4) > 0), r"key_mask must .*\(2, 3\), got \(2, 4\)"),
        (lambda: pack(torch.zeros(2, 3), torch.ones(1, 3) > 0), r"\(B, L\) = \(2, 3\), got \(1, 3\)"),
        (lambda: pack(torch.zeros(3), torch.ones(3) > 0), r"tokens must be \(B, L, ...\) and key_mask"),
        (lambda: unpack(torch.zeros(3), torch.ones(3) > 0), r"key_mask \(B, L\), got \(3,\)"),
        (lambda: unpack(torch.zeros(3), torch.ones(1, 3)), "key_mask must be boolean"),
        (lambda: unpack(torch.zeros(3), torch.ones(2, 2) > 0), "True in 3 places, one a token, got 4"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

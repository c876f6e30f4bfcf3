"""Convolution with standardised weights: its formula, and TensorFlow's padding."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import StandardizedConv2d
from lamina.layers.standardized_conv import pad_same
from torch.autograd import gradcheck


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel_size", [1, 2, 3])
def test_is_the_formula(kernel_size, stride):
    conv = StandardizedConv2d(2, 3, kernel_size, stride=stride, bias=True).double()
    x, k = torch.randn(2, 2, 7, 5).double(), kernel_size
    filters = conv.weight.detach().numpy()
    mean, std = filters.mean((1, 2, 3), keepdims=True), filters.std((1, 2, 3), keepdims=True)
    filters = (filters - mean) / (std + 1e-5)
    rows, cols = -(-7 // stride), -(-5 // stride)
    above, left = (max((n - 1) * stride + k - size, 0) // 2 for n, size in ((rows, 7), (cols, 5)))
    padded = np.zeros((2, 2, 7 + 4 * k, 5 + 4 * k))
    padded[:, :, above : above + 7, left : left + 5] = x
    expected = np.zeros((2, 3, rows, cols))
    for r in range(rows):
        for c in range(cols):
            window = padded[:, :, r * stride : r * stride + k, c * stride : c * stride + k]
            expected[:, :, r, c] = np.einsum("bikl,oikl->bo", window, filters) + conv.bias.detach().numpy()
    torch.testing.assert_close(conv(x), torch.from_numpy(expected))


@given(size=st.integers(1, 30), kernel=st.integers(1, 7), stride=st.integers(1, 4))
def test_padding_is_as_little_as_fits_and_more_behind(size, kernel, stride):
    padded = pad_same(torch.ones(1, 1, size, size), kernel, stride, value=7.0)[0, 0]
    places = (padded.shape[1] - kernel) // stride + 1
    assert places == -(-size // stride)
    after = padded.shape[1] - size
    row = padded[after // 2]
    ones = (row == 1).nonzero().flatten().tolist()
    assert ones == list(range(after // 2, after // 2 + size))
    if after:
        assert after == (places - 1) * stride + kernel - size


def test_has_no_bias_unless_asked():
    assert set(StandardizedConv2d(2, 3, 3).state_dict()) == {"weight"}


def test_scale_and_shift_of_a_filter_do_not_matter():
    conv, x = StandardizedConv2d(2, 3, 3, eps=0.0).double(), torch.randn(1, 2, 5, 5).double()
    expected = conv(x)
    with torch.no_grad():
        conv.weight.mul_(3.0).add_(1.0)
    torch.testing.assert_close(conv(x), expected)


def test_gradients():
    conv = StandardizedConv2d(2, 2, 2, stride=2).double()
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = conv.weight.detach().clone().requires_grad_()
    assert gradcheck(lambda x, w: torch.func.functional_call(conv, {"weight": w}, (x,)), (x, weight))

"""Frozen batch norm: torch's in evaluation, DETR's own, and what is frozen stays frozen."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lamina.layers import FrozenBatchNorm2d, freeze_batch_norms
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

DOUBLE = {"dtype": torch.float64}


def trained(channels: int, **options) -> nn.BatchNorm2d:
    """A batch norm whose every number is its own."""
    norm = nn.BatchNorm2d(channels, **options)
    for tensor in (*norm.parameters(), *norm.buffers()):
        tensor.data.copy_(
            torch.randn(tensor.shape).mul(10) if tensor.dim() == 0 else torch.randn(tensor.shape)
        )
    norm.running_var.abs_()
    return norm


@pytest.mark.parametrize("requires_grad", [False, True])
def test_is_the_formula(requires_grad):
    norm = FrozenBatchNorm2d.from_batch_norm(trained(3, eps=0.1, **DOUBLE))
    x = torch.randn(2, 3, 5, 7, **DOUBLE, requires_grad=requires_grad)
    state = {name: value.numpy() for name, value in norm.state_dict().items()}
    expected = np.empty(x.shape)
    for c in range(3):
        deviation = np.sqrt(state["running_var"][c] + 0.1)
        normed = (x.detach().numpy()[:, c] - state["running_mean"][c]) / deviation
        expected[:, c] = state["weight"][c] * normed + state["bias"][c]
    torch.testing.assert_close(norm(x).detach(), torch.from_numpy(expected))


@given(
    seed=st.integers(0, 2**31), batch=st.integers(0, 3), channels=st.integers(1, 5), side=st.integers(1, 5)
)
def test_is_the_batch_norm_of_torch_in_evaluation(seed, batch, channels, side):
    torch.manual_seed(seed)
    theirs = trained(channels, eps=1e-3, **DOUBLE).eval().requires_grad_(False)
    ours = FrozenBatchNorm2d.from_batch_norm(theirs).train()
    x = torch.randn(batch, channels, side, side + 1, **DOUBLE, requires_grad=True)
    cotangent = torch.randn_like(x)
    for layout in torch.contiguous_format, torch.channels_last:
        image = x.contiguous(memory_format=layout)
        y, expected = ours(image), theirs(image)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(ours(image.detach()), expected)
        torch.testing.assert_close(
            torch.autograd.grad(y, x, cotangent), torch.autograd.grad(expected, x, cotangent)
        )


def test_is_detrs():
    detr = pytest.importorskip("transformers.models.detr.modeling_detr")
    theirs, ours = detr.DetrFrozenBatchNorm2d(3), FrozenBatchNorm2d(3)
    theirs.load_state_dict(trained(3).state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 5, 7, requires_grad=True)
    cotangent = torch.randn_like(x)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x.detach()), theirs(x))
    torch.testing.assert_close(*(torch.autograd.grad(norm(x), x, cotangent) for norm in (ours, theirs)))


def test_nothing_trains():
    norm = FrozenBatchNorm2d.from_batch_norm(trained(3).train())
    assert norm.training
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(4, 3, 5, 7, requires_grad=True)
    first = norm(x)
    first.square().sum().backward()
    assert list(norm.parameters()) == []
    assert all(not t.requires_grad and t.grad is None for t in norm.buffers())
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(norm.eval()(x), first, rtol=0, atol=0)


def test_starts_as_the_identity():
    x = torch.randn(2, 3, 5, 7)
    torch.testing.assert_close(FrozenBatchNorm2d(3, eps=0.0)(x), x)
    torch.testing.assert_close(FrozenBatchNorm2d(3, eps=3.0)(x), x / 2)


def test_a_state_dict_of_torch_loads():
    theirs = nn.Sequential(trained(3))
    assert "0.num_batches_tracked" in theirs.state_dict()
    ours = nn.Sequential(FrozenBatchNorm2d(3))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 5, 7)
    torch.testing.assert_close(ours(x), theirs.eval()(x))
    assert list(ours[0].state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"0\.momentum"'):
        ours.load_state_dict({**theirs.state_dict(), "0.momentum": torch.ones(1)})
    without = {name: t for name, t in theirs.state_dict().items() if not name.endswith("var")}
    with pytest.raises(RuntimeError, match=r'Missing key.*"0\.running_var"'):
        ours.load_state_dict(without)


def test_a_copy_is_no_view():
    theirs = trained(3)
    ours = FrozenBatchNorm2d.from_batch_norm(theirs)
    before = copy.deepcopy(ours.state_dict())
    for tensor in (*theirs.parameters(), *theirs.buffers()):
        tensor.data.fill_(7)
    torch.testing.assert_close(ours.state_dict(), before)


def test_without_an_affine_part_it_is_one_and_zero():
    theirs, x = trained(3, affine=False).eval(), torch.randn(2, 3, 5, 7)
    torch.testing.assert_close(FrozenBatchNorm2d.from_batch_norm(theirs)(x), theirs(x))


def test_keeps_nothing_of_the_image_for_the_backward_pass():
    kept = []
    norm, x = FrozenBatchNorm2d(3), torch.randn(2, 3, 5, 7, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda _: None):
        norm(x)
    assert max(kept, default=0) <= 3


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype, wide, requires_grad):
    """Of a mean of 300 half precision leaves few digits; statistics may be in float32, as under autocast."""
    norm = FrozenBatchNorm2d(3, dtype=torch.float32 if wide else dtype)
    norm.running_mean.fill_(300)
    norm.running_var.fill_(3)
    x = (300 + torch.randn(2, 3, 5, 7)).to(dtype).requires_grad_(requires_grad)
    y = norm(x)
    assert y.dtype is dtype
    exact = FrozenBatchNorm2d(3, **DOUBLE)
    exact.load_state_dict(norm.state_dict())
    torch.testing.assert_close(y.double(), exact(x.double()), rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_gradients():
    norm = FrozenBatchNorm2d.from_batch_norm(trained(3, **DOUBLE))
    x = torch.randn(2, 3, 2, 3, **DOUBLE, requires_grad=True)
    assert gradcheck(norm, x)
    assert gradgradcheck(lambda x: norm(x).square(), x)


def test_freezes_every_batch_norm_of_a_module():
    shared = trained(5)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3),
        shared,
        nn.ModuleDict({"deep": nn.Sequential(nn.GroupNorm(1, 5), trained(5)), "again": shared}),
        nn.BatchNorm1d(5),
    )
    x, conv, last = torch.randn(2, 3, 7, 9), net[0], net[3]
    expected = net[2]["deep"].eval()(net[1].eval()(net[0](x)))
    frozen = freeze_batch_norms(net.train())
    assert frozen is net
    assert net[0] is conv
    assert net[3] is last
    assert isinstance(net[2]["deep"][1], FrozenBatchNorm2d)
    assert net[1] is net[2]["again"]
    assert not any(isinstance(part, nn.BatchNorm2d) for part in net.modules())
    assert net[1].training
    torch.testing.assert_close(net[2]["deep"](net[1](net[0](x))), expected)


def test_freezes_a_batch_norm_itself():
    norm = trained(3)
    frozen = freeze_batch_norms(norm.eval())
    assert isinstance(frozen, FrozenBatchNorm2d)
    assert not frozen.training
    torch.testing.assert_close(frozen.running_mean, norm.running_mean)


def test_without_statistics_nothing_can_be_frozen():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="must have running statistics, got track_running_stats=False"):
        freeze_batch_norms(net)
    assert isinstance(net[0], nn.BatchNorm2d)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 4, 5, 5), (2, 5, 5, 3)])
def test_wrong_images_are_named(shape):
    with pytest.raises(ValueError, match=r"x must be \(B, 3, H, W\), got"):
        FrozenBatchNorm2d(3)(torch.randn(shape))


def test_repr_tells_sizes():
    assert repr(FrozenBatchNorm2d(3)) == "FrozenBatchNorm2d(3, eps=1e-05)"

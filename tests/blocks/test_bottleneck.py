"""Bottleneck units and the network of them, against the formula and PyTorch's own parts."""

import torch
import torch.nn.functional as F
from lamina.blocks import Bottleneck, ResNet
from lamina.layers import StandardizedConv2d
from torch import nn


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


def test_a_unit_is_the_formula():
    unit, x = randomised(Bottleneck(3, 2, stride=2)), torch.randn(2, 3, 7, 5).double()
    y = F.relu(unit.norm1(unit.conv1(x)))
    y = F.relu(unit.norm2(unit.conv2(y)))
    y = unit.norm3(unit.conv3(y))
    conv, norm = unit.shortcut
    torch.testing.assert_close(unit(x), F.relu(norm(conv(x)) + y))
    assert unit.conv2.stride == conv.stride == (2, 2)
    assert unit.conv1.stride == unit.conv3.stride == (1, 1)


def test_a_unit_starts_as_its_shortcut():
    unit, x = Bottleneck(8, 2), torch.randn(2, 8, 7, 5)
    assert isinstance(unit.shortcut, nn.Identity)
    torch.testing.assert_close(unit(x), F.relu(x))


def test_convolution_and_norm_are_injected():
    def conv(i: int, o: int, k: int, stride: int = 1, **factory) -> nn.Module:
        return nn.Conv2d(i, o, k, stride, k // 2, bias=False, **factory)

    net = ResNet((1, 1), width=4, conv=conv, norm=nn.BatchNorm2d)
    kinds = {type(m) for m in net.modules()}
    assert nn.Conv2d in kinds
    assert nn.BatchNorm2d in kinds
    assert StandardizedConv2d not in kinds
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 32, 4, 4)


def test_resnet_50_is_as_large_as_published():
    """25,557,032 parameters with batch norm and a classifier of 1000, which has 2,049,000 of them."""

    def conv(i: int, o: int, k: int, stride: int = 1, **factory) -> nn.Module:
        return nn.Conv2d(i, o, k, stride, k // 2, bias=False, **factory)

    net = ResNet((3, 4, 6, 3), conv=conv, norm=nn.BatchNorm2d, device="meta")
    assert sum(p.numel() for p in net.parameters()) == 25_557_032 - 2_049_000
    assert (net.reduction, net.out_channels) == (32, 2048)


def test_each_stage_but_the_first_halves_the_size():
    for depths, size in ((), 8), ((1,), 8), ((1, 1), 4), ((1, 1, 1), 2):
        net = ResNet(depths, width=2)
        out = net(torch.randn(1, 3, 32, 32))
        assert out.shape == (1, net.out_channels, size, size)
        assert 32 // net.reduction == size


def test_pooling_ignores_its_padding():
    net = randomised(ResNet((), width=2))
    nn.init.constant_(net.norm.bias, 0.0)
    x = torch.randn(1, 3, 8, 8).double()
    inner = F.relu(net.norm(net.conv(x)))
    torch.testing.assert_close(net(x), F.max_pool2d(F.pad(inner, (0, 1, 0, 1)), 3, 2))

"""Windows of a grid with a relative position bias, projections included, beside Swin's of `transformers`.

The peer is the part of its block from the grid to the grid: pad, roll, cut, attend, put together.
"""

import pytest
import torch
from lamina.layers import RelativePositionBias, WindowAttention
from torch import Tensor, nn

# 512 windows of 8 heads, 64 places and 32 channels a head; Swin-T's first stage; TransGAN's 16 x 16 windows.
SIZES = {
    "512-windows": (8, 64, 64, 256, 8, 8),
    "swin-56": (4, 56, 56, 96, 3, 7),
    "transgan-64": (2, 64, 64, 256, 4, 16),
}


def peer(ours: WindowAttention, grid: tuple[int, int], implementation: str) -> nn.Module:
    swin = pytest.importorskip("transformers.models.swin.modeling_swin")
    config = swin.SwinConfig(window_size=ours.window[0], attention_probs_dropout_prob=0.0)
    config._attn_implementation = implementation
    block = swin.SwinLayer(config, ours.dim, grid, ours.num_heads, shift_size=ours.shift[0])
    pairs = [("q_proj", ours.query), ("k_proj", ours.key), ("v_proj", ours.value), ("o_proj", ours.out)]
    for name, projection in pairs:
        getattr(block.attention, name).load_state_dict(projection.state_dict())
    table = block.attention.relative_position_bias.relative_position_bias_table
    table.data.copy_(ours.relative_bias.weight.data)
    return SwinPart(block, grid)


class SwinPart(nn.Module):
    """The lines of `SwinLayer.forward` around its attention, without norms, residuals and the MLP."""

    def __init__(self, block: nn.Module, grid: tuple[int, int]) -> None:
        super().__init__()
        self.block, self.grid = block, grid
        self.attention = block.attention

    def forward(self, tokens: Tensor) -> Tensor:
        swin = pytest.importorskip("transformers.models.swin.modeling_swin")
        block, (height, width), channels = self.block, self.grid, tokens.shape[-1]
        image, _ = block.maybe_pad(tokens.view(len(tokens), height, width, channels), height, width)
        windows = swin.window_partition(block.cyclic_shift(image), block.window_size)
        windows = windows.view(-1, block.window_size**2, channels)
        mask = block.get_attn_mask(height, width, dtype=tokens.dtype, device=tokens.device)
        out = block.attention(windows, mask)[0].view(-1, block.window_size, block.window_size, channels)
        image = block.cyclic_shift(swin.window_reverse(out, block.window_size, height, width), reverse=True)
        return image.view(len(tokens), height * width, channels)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", ["lamina-beside-sdpa", "lamina-beside-eager", "transformers-sdpa"])
def bench_window_attention(benchmark, benchmark_op, how, sizes, shifted, direction):
    batch, rows, cols, dim, heads, window = sizes
    benchmark.group = f"WindowAttention {sizes} {'shifted' if shifted else 'plain'} {direction}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours = WindowAttention(dim, heads, window=window, shift=window // 2 if shifted else 0, grid=(rows, cols))
    theirs = peer(ours, (rows, cols), "eager" if how == "lamina-beside-eager" else "sdpa")
    timed, other = (ours, theirs) if how.startswith("lamina") else (theirs, ours)
    timed, other = timed.to(device).eval(), other.to(device).eval()
    backward = direction == "forward+backward"
    tokens = rows * cols
    benchmark_op(
        timed,
        [torch.randn(batch, tokens, dim)],
        backward=backward,
        parameters=trained(timed) if backward else (),
        reference=other,
        reference_parameters=trained(other) if backward else (),
        flops=(6 if backward else 2) * batch * tokens * (4 * dim**2 + 2 * window**2 * dim),
    )


def trained(module: nn.Module) -> list[Tensor]:
    """The parameters that take part: a Swin block has norms and an MLP besides."""
    return list((module.attention if isinstance(module, SwinPart) else module).parameters())


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("length", [128, 512])
@pytest.mark.parametrize("how", ["lamina", "transformers"])
def bench_relative_position_bias(benchmark, benchmark_op, how, length, direction):
    """T5's bias, from a length to (H, L, L). The one input is not read: it carries the device."""
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    benchmark.group = f"RelativePositionBias L{length} {direction}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    theirs = t5.T5Attention(t5.T5Config(is_decoder=False), has_relative_attention_bias=True, layer_idx=0)
    ours = RelativePositionBias(8, num_buckets=32)
    ours.load_state_dict(theirs.relative_attention_bias.state_dict())
    ours, theirs = ours.to(device), theirs.to(device)
    calls = {
        "lamina": (lambda x: ours(length, length) + x, [ours.weight]),
        "transformers": (
            lambda x: theirs.compute_bias(length, length)[0] + x,
            [theirs.relative_attention_bias.weight],
        ),
    }
    (timed, parameters), (other, others) = calls.pop(how), *calls.values()
    backward = direction == "forward+backward"
    benchmark_op(
        timed,
        [torch.zeros(1)],
        backward=backward,
        parameters=parameters if backward else (),
        reference=other,
        reference_parameters=others if backward else (),
    )

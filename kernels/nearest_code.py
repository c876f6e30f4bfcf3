"""The nearest code of a codebook (van den Oord et al., 2017, eq. 1), by Euclidean distance.

    index[n] = argmin_k  || x[n] - codebook[k] ||,  the lower index where two are as near

The definition compares the distances themselves. PyTorch's path compares |c_k|^2 - 2 x_n . c_k, which a
matrix product gives, for a few hundred vectors and codes at a time: the (N, K) scores never exist whole, and
a tile of them stays in a processor's cache. The code in the middle is taken from both inputs before, so that
a common offset, which does not change a distance, costs no precision. (The mean would do as well, but it
rounds, and two codes at one distance from x would no longer tie.)

The kernel has the same product from tensor cores, tile by tile in registers, with a bound of its error, and
computes those distances in float64 that the error leaves open.
"""

import torch
from torch import Tensor

from ._autocast import no_autocast
from .backend import Refusals, choose, forced_backend, operation, triton_refusal

# Vectors by codes whose scores exist at a time. On a CPU 2 MB: no other size measured faster, and a whole
# codebook of 16384 codes much slower, which the product packs anew for each chunk of vectors.
_TILE = (512, 1024)
_GPU_SCORES = 2**26
_OF_KERNEL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _refusals(x: Tensor, codebook: Tensor) -> Refusals:
    refusals: Refusals = {}
    if (reason := triton_refusal(x, codebook)) is not None:
        refusals["triton"] = reason
    elif not {x.dtype, codebook.dtype} <= {*_OF_KERNEL}:
        refusals["triton"] = f"the kernel has no {x.dtype} with {codebook.dtype}"
    elif torch.float64 in (x.dtype, codebook.dtype) and forced_backend() is None:
        refusals["triton"] = "of float64 the kernel is made for tests, in small tiles"
    return refusals


@operation(_refusals)
def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """The index of the code that is nearest to each vector.

    Time O(N K D) for N vectors. Memory beyond the inputs: O(K D) and a tile of the scores, in the kernel
    O(N + K D); compiled without the kernel, where a loop over the tiles would fix N, all O(N K) scores.
    Computed in float32 at least, also under autocast. Deterministic. It has no gradient: an index is an
    integer.

    The kernel returns the index of float64, the lower one of equal distances, whatever the inputs. That costs
    little while few codes are as near as TF32 can tell (half precision, if both inputs share it, is exact in
    the scan). Each that is costs a distance in float64, one code after the other: a codebook of copies, or of
    halves with an offset that dwarfs what tells them apart, is searched many times as slowly.
    Without the kernel it is the index of float64 except where two codes are as near as rounding can tell: the
    chosen code's squared distance exceeds the least by no more than a few eps (|x| + |c|)², where c is the
    nearest code and the lengths are measured from the middle of the codebook. On a GPU, eps is then that of
    TF32 where `torch.set_float32_matmul_precision` allows it.

    Args:
        x: (..., D), of any float dtype.
        codebook: (K, D), of any float dtype.

    Returns:
        (...) of int64, each in [0, K). Of codes at one distance the lower index, as far as the arithmetic is
        exact: two equal codes may round to distances apart without the kernel, and then either is returned.
        Where a distance is NaN the definition and the kernel return the first such code.

    Raises:
        ValueError: the codebook is not (K, D) with a code in it, x has not D channels, or either is not a
            float.

    Reference:
        van den Oord, Vinyals, Kavukcuoglu. Neural Discrete Representation Learning. NIPS 2017. Equation 1.

    Example:
        >>> codebook = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        >>> nearest_code(torch.tensor([[0.9, 0.8], [0.2, -0.3]]), codebook)
        tensor([1, 0])
    """
    if codebook.ndim != 2 or codebook.shape[0] == 0:
        raise ValueError(f"codebook must be (K, D) with at least one code, got {tuple(codebook.shape)}")
    if x.ndim == 0 or x.shape[-1] != codebook.shape[1]:
        raise ValueError(f"x must be (..., D) with D = {codebook.shape[1]}, got {tuple(x.shape)}")
    if not (x.is_floating_point() and codebook.is_floating_point()):
        raise ValueError(f"x and codebook must be floats, got {x.dtype} and {codebook.dtype}")
    x, codebook = x.detach(), codebook.detach()
    wide = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    path = choose("nearest_code", _refusals(x, codebook))
    if path == "triton":
        from .fused import nearest_code as fused

        if wide is torch.float64:
            x, codebook = x.to(wide), codebook.to(wide)
        found: Tensor = fused.nearest_code(x, codebook)
        return found
    x, codebook = x.to(wide), codebook.to(wide)
    return _torch_path(x, codebook) if path == "torch" else nearest_code_reference(x, codebook)


def nearest_code_reference(x: Tensor, codebook: Tensor) -> Tensor:
    """The definition, in PyTorch: what every other path is tested against. O(N K) memory."""
    distances = torch.cdist(x.reshape(-1, x.shape[-1]), codebook, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.argmin(-1).view(x.shape[:-1])


def _torch_path(x: Tensor, codebook: Tensor) -> Tensor:
    nearness = (codebook - codebook.mean(0)).square().sum(-1)
    middle = codebook.index_select(0, nearness.argmin().view(1))
    codebook = codebook - middle
    rows = x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling():
        with no_autocast(x.device.type):
            scores = torch.addmm(codebook.square().sum(-1), rows - middle, codebook.mT, alpha=-2)
        return scores.argmin(-1).view(x.shape[:-1])
    height, width = _TILE if x.device.type == "cpu" else (max(1, _GPU_SCORES // len(codebook)), len(codebook))
    tiles = [(codes.square().sum(-1), codes.mT) for codes in codebook.split(width)]
    scores = rows.new_empty(min(height, len(rows)) * min(width, len(codebook)))  # one for all tiles
    indices = torch.zeros(len(rows), dtype=torch.int64, device=x.device)
    for chunk, found in zip(rows.split(height), indices.split(height), strict=True):
        chunk = chunk - middle
        least = chunk.new_full((len(chunk),), torch.inf)
        for i, (lengths, codes) in enumerate(tiles):
            out = scores[: len(chunk) * len(lengths)].view(len(chunk), len(lengths))
            torch.addmm(lengths, chunk, codes, alpha=-2, out=out)  # with `out` it has no autocast
            values, places = out.min(-1)
            nearer = values < least  # not where equal: the lower index came first
            found.copy_(torch.where(nearer, places + i * width, found))
            least = torch.where(nearer, values, least)
    return indices.view(x.shape[:-1])

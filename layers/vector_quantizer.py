"""Vector quantisation with a learned codebook (van den Oord et al., 2017)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from ..kernels import code_sums, nearest_code

_RESTART_DECAY = 0.99  # of the usage that restarts go by, where the codebook itself has no moving average


class Quantized(NamedTuple):
    """What `VectorQuantizer` returns.

    Attributes:
        output: the codes in place of the vectors; its gradient goes straight through to x.
        indices: which codes, int64; -1 where a place takes no part.
        loss: to be added to the loss of what is built on the output.
        perplexity: exp of the entropy of the codes in this call: 1 where all are one code, and `num_codes`
            where all codes are equally frequent. 0 where no place takes part.
        usage: the fraction of the codes that occur in this call.

    Shape:
        - output: as x
        - indices: as x without its channels
        - loss, perplexity, usage: scalars

    Reference:
        van den Oord, Vinyals, Kavukcuoglu. Neural Discrete Representation Learning. NIPS 2017. Section 3.2.

    Example:
        >>> quantized = VectorQuantizer(16, 8)(torch.randn(2, 5, 8))
        >>> quantized.indices.shape
        torch.Size([2, 5])
    """

    output: Tensor
    indices: Tensor
    loss: Tensor
    perplexity: Tensor
    usage: Tensor


class VectorQuantizer(nn.Module):
    """Puts the nearest code of a learned codebook in place of each vector.

    .. math:: k = \\operatorname{argmin}_j \\lVert x - e_j \\rVert, \\quad
              y = x + \\operatorname{sg}(e_k - x), \\quad
              L = \\lVert \\operatorname{sg}(x) - e_k \\rVert^2
              + \\beta \\lVert x - \\operatorname{sg}(e_k) \\rVert^2

    sg stops the gradient; the squares are means over channels and places. The codebook learns by the first
    term, x by what comes back through y and by β times the second.

    With `ema_decay` the codebook takes no gradient, and the loss is the second term alone. Each training
    call moves the averages γ N + (1 - γ) n and γ m + (1 - γ) Σ x of how often a code is chosen and of what
    chooses it, and sets e = m / N, with N smoothed so that no code divides by zero. The averages are buffers,
    in float32 at least, and are summed over the processes of `torch.distributed`. They start at N = 1, m = e.

    With `restart_below` a training call gives each code whose average count lies under it a vector of the
    batch: no two codes the same one, drawn from the global random stream (of the first process). Its count
    starts again at `restart_below`. The average is that of `ema_decay`, or γ = 0.99 where there is none; an
    optimiser's momentum of a replaced code stays. Evaluation changes nothing and draws nothing.

    How it differs: taming-transformers puts β on the first term unless it is told `legacy=False`; that is
    β times the loss of `commitment=1 / β` here. vector-quantize-pytorch sends the gradient through a rotation
    by default (with `rotation_trick=False` it is this one), and has a loss in training only, the second term;
    where its codebook learns by gradient, one mean square stands for both terms, with the gradients of
    `commitment=1`. It counts from N = 1 too, and restarts as here.
    Time O(N K D) for N vectors, memory O(N D): see `lamina.kernels.nearest_code`; the sums are
    `lamina.kernels.code_sums`. Deterministic given the seed, with a codebook that learns by gradient on a GPU
    under `torch.use_deterministic_algorithms`.

    Args:
        num_codes: K.
        dim: D, channels of x and of a code.
        commitment: β.
        ema_decay: γ; None for a codebook that learns by gradient.
        eps: of the smoothing of N.
        restart_below: the average count in a call under which a code is replaced; None for never.
        channel_dim: which dimension of x holds the channels: -1 in tokens, 1 in images.
        device: where codebook and averages are.
        dtype: of the codebook.

    Shape:
        - x: (..., dim), or (B, dim, ...) with `channel_dim=1`
        - mask: bool, as x without its channels, True where a vector takes part. The others have no part in
          the loss, the averages and the numbers; their output is zero and their index -1
        - output: a `Quantized`

    Raises:
        ValueError: a size or rate is out of its range, or x, mask or indices do not fit.

    Reference:
        van den Oord, Vinyals, Kavukcuoglu. Neural Discrete Representation Learning. NIPS 2017. Section 3.2
        and appendix A.1.
        Esser, Rombach, Ommer. Taming Transformers for High-Resolution Image Synthesis. CVPR 2021.
        Dhariwal et al. Jukebox: A Generative Model for Music. arXiv:2005.00341, 2020. Section 3.1 (restarts).

    Example:
        >>> quantizer = VectorQuantizer(16, 8, channel_dim=1)
        >>> quantized = quantizer(torch.randn(2, 8, 4, 3))
        >>> quantized.output.shape
        torch.Size([2, 8, 4, 3])
        >>> quantizer.lookup(quantized.indices).equal(quantized.output)
        True
    """

    codebook: Tensor
    ema_count: Tensor | None
    ema_sum: Tensor | None

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        commitment: float = 0.25,
        ema_decay: float | None = None,
        eps: float = 1e-5,
        restart_below: float | None = None,
        channel_dim: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_codes < 1 or dim < 1:
            raise ValueError(f"num_codes and dim must be at least 1, got {num_codes} and {dim}")
        if commitment < 0:
            raise ValueError(f"commitment must not be negative, got {commitment}")
        if ema_decay is not None and not 0.0 <= ema_decay < 1.0:
            raise ValueError(f"ema_decay must be in [0, 1), or None, got {ema_decay}")
        if not eps > 0:
            raise ValueError(f"eps must be greater than 0, got {eps}")
        if restart_below is not None and not restart_below > 0:
            raise ValueError(f"restart_below must be greater than 0, or None, got {restart_below}")
        self.num_codes, self.dim, self.channel_dim = num_codes, dim, channel_dim
        self.commitment, self.ema_decay, self.eps = commitment, ema_decay, eps
        self.restart_below = restart_below
        codebook = torch.empty(num_codes, dim, device=device, dtype=dtype)
        wide = torch.promote_types(codebook.dtype, torch.float32)
        averaged = ema_decay is not None
        if averaged:
            self.register_buffer("codebook", codebook)
        else:
            self.codebook = nn.Parameter(codebook)
        counted = averaged or restart_below is not None
        count = torch.empty(num_codes, device=device, dtype=wide) if counted else None
        self.register_buffer("ema_count", count)
        self.register_buffer("ema_sum", torch.empty_like(codebook, dtype=wide) if averaged else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """e from U(-1/K, 1/K) as in VQ-VAE and VQGAN; N = 1 and m = e."""
        nn.init.uniform_(self.codebook, -1 / self.num_codes, 1 / self.num_codes)
        with torch.no_grad():
            if self.ema_count is not None:
                self.ema_count.fill_(1.0)
            if self.ema_sum is not None:
                self.ema_sum.copy_(self.codebook)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Quantized:
        self._check(x, mask)
        last = x.movedim(self.channel_dim, -1)
        rows = last.reshape(-1, self.dim)
        taking_part = None if mask is None else mask.reshape(-1)
        indices = nearest_code(rows, self.codebook)
        wide = torch.promote_types(rows.dtype, torch.float32)
        rows, codes = rows.to(wide), F.embedding(indices, self.codebook).to(wide)
        loss = self._loss(rows, codes, taking_part)
        counts = self._counts(indices, taking_part).to(wide)
        if self.training:
            self._learn(rows.detach(), indices, counts, taking_part)
        frequencies = counts / counts.sum().clamp_min(1)
        perplexity = torch.special.entr(frequencies).sum().exp() * (counts.sum() > 0)
        usage = (counts > 0).to(counts.dtype).mean()
        if taking_part is not None:
            indices = indices.masked_fill(~taking_part, -1)
            codes = codes.masked_fill(~taking_part.unsqueeze(-1), 0)
        chosen = codes.detach().to(x.dtype).view(last.shape).movedim(-1, self.channel_dim)
        # x - x is zero: the sum is the code to the last bit, which x + (code - x) is not.
        through = x if mask is None else x.masked_fill(~mask.unsqueeze(self.channel_dim), 0)
        output = (through - through.detach()) + chosen
        return Quantized(output, indices.view(last.shape[:-1]), loss, perplexity, usage)

    def lookup(self, indices: Tensor) -> Tensor:
        """The codes of these indices, channels at `channel_dim`; zeros where an index is -1."""
        if indices.is_floating_point() or indices.dtype is torch.bool:
            raise ValueError(f"indices must be integers, got {indices.dtype}")
        codes = F.embedding(indices.clamp_min(0), self.codebook)
        return codes.masked_fill((indices < 0).unsqueeze(-1), 0).movedim(-1, self.channel_dim)

    def _loss(self, rows: Tensor, codes: Tensor, taking_part: Tensor | None) -> Tensor:
        if taking_part is None:
            places: Tensor | int = max(rows.shape[0], 1)
        else:
            rows = rows.masked_fill(~taking_part.unsqueeze(-1), 0)
            codes = codes.masked_fill(~taking_part.unsqueeze(-1), 0)
            places = taking_part.sum().clamp_min(1)
        loss = self.commitment * F.mse_loss(rows, codes.detach(), reduction="sum")
        if self.ema_decay is None:
            loss = loss + F.mse_loss(codes, rows.detach(), reduction="sum")
        return loss / (places * self.dim)

    def _counts(self, indices: Tensor, taking_part: Tensor | None) -> Tensor:
        ones = torch.ones_like(indices) if taking_part is None else taking_part.to(indices.dtype)
        # Integers, added in whatever order, give one sum; as floats they would stop at 2**24.
        return indices.new_zeros(self.num_codes).scatter_add_(0, indices, ones)

    @torch.no_grad()
    def _learn(self, rows: Tensor, indices: Tensor, counts: Tensor, taking_part: Tensor | None) -> None:
        if self.ema_count is None:
            return
        counts = _summed(counts.to(self.ema_count.dtype))
        decay = _RESTART_DECAY if self.ema_decay is None else self.ema_decay
        self.ema_count.lerp_(counts, 1 - decay)
        if self.ema_sum is not None:
            sums = code_sums(rows.to(self.ema_sum.dtype), indices, self.num_codes, mask=taking_part)
            self.ema_sum.lerp_(_summed(sums), 1 - decay)
            total = self.ema_count.sum()
            smoothed = (self.ema_count + self.eps) / (total + self.num_codes * self.eps) * total
            self.codebook.copy_(self.ema_sum / smoothed.unsqueeze(-1))
        if self.restart_below is not None and rows.shape[0]:
            self._restart(rows, taking_part)

    def _restart(self, rows: Tensor, taking_part: Tensor | None) -> None:
        """Gives the dead codes, in their order, the vectors that take part, in a random order."""
        assert self.ema_count is not None
        assert self.restart_below is not None
        draws = torch.rand(rows.shape[0], device=rows.device)
        if taking_part is not None:
            draws = draws.masked_fill(~taking_part, 2.0)  # behind all that take part
        dead = self.ema_count < self.restart_below
        place = dead.cumsum(0) - 1  # of a dead code among the dead ones
        available = rows.shape[0] if taking_part is None else taking_part.sum()
        replaced = dead & (place < available)
        order = draws.argsort()
        fresh = rows[order[place.clamp(0, rows.shape[0] - 1)]].to(self.ema_count.dtype)
        replaced, fresh = _of_first_process(replaced, fresh)
        self.codebook.copy_(torch.where(replaced.unsqueeze(-1), fresh, self.codebook))
        self.ema_count.masked_fill_(replaced, self.restart_below)
        if self.ema_sum is not None:
            self.ema_sum.copy_(torch.where(replaced.unsqueeze(-1), fresh * self.restart_below, self.ema_sum))

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        if not -x.dim() <= self.channel_dim < x.dim() or x.shape[self.channel_dim] != self.dim:
            raise ValueError(
                f"x must have {self.dim} channels in dimension {self.channel_dim}, got {tuple(x.shape)}"
            )
        if mask is not None:
            places = x.select(self.channel_dim, 0).shape
            if mask.dtype is not torch.bool or mask.shape != places:
                raise ValueError(
                    f"mask must be bool of shape {tuple(places)}, as x without its channels, "
                    f"got {mask.dtype} of shape {tuple(mask.shape)}"
                )

    def extra_repr(self) -> str:
        learning = "" if self.ema_decay is None else f", ema_decay={self.ema_decay}"
        restarts = "" if self.restart_below is None else f", restart_below={self.restart_below}"
        return f"{self.num_codes}, {self.dim}, commitment={self.commitment}{learning}{restarts}"


def _in_company() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _summed(statistic: Tensor) -> Tensor:
    """The sum of a statistic over all processes."""
    if _in_company():
        distributed.all_reduce(statistic)
    return statistic


def _of_first_process(replaced: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
    """Every process takes the same codes: the draws differ, and so do the batches."""
    if _in_company():
        both = torch.cat([replaced.unsqueeze(-1).to(fresh.dtype), fresh], -1)
        distributed.broadcast(both, 0)
        return both[:, 0] > 0, both[:, 1:]
    return replaced, fresh

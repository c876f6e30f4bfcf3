"""Class and distillation tokens (Dosovitskiy et al., 2021; Touvron et al., 2021)."""

import torch
from torch import Tensor, nn


class ClassToken(nn.Module):
    """Puts a learned class token before the tokens of each row, and a distillation token behind it.

    .. math:: y = [x_{\\text{class}};\\, x_{\\text{distill}};\\, x_1; \\dots; x_L]

    The class token gathers what a classifier reads; DeiT's distillation token is a second one, which learns
    the label that a teacher gives. `split` takes them apart again behind the encoder. Positions are added
    after this layer and have rows for its tokens: `LearnedPositions2d(…, num_prefix_tokens=num_tokens)`.

    Hugging Face and timm hold the two as parameters of their own, (1, 1, dim) each: `weight` is both, in this
    order, (2, dim). They start as N(0, std²); ViT's authors start at zero (`std=0`), timm truncates. It costs
    one copy of the tokens.

    Args:
        dim: C, channels of the model.
        distillation: whether there is a distillation token too.
        std: deviation of the initial tokens.
        device: where the parameter is.
        dtype: of the parameter.

    Shape:
        - tokens: (B, L, dim)
        - output: (B, 1 + L, dim), or (B, 2 + L, dim) with a distillation token
        - of `split`: (B, dim) for each learned token, and the rest, (B, L, dim)

    Raises:
        ValueError: the tokens are not (B, L, dim); fewer tokens are split than this layer adds.

    Reference:
        Dosovitskiy et al. An Image is Worth 16x16 Words. ICLR 2021. Section 3.1.
        Touvron et al. Training Data-efficient Image Transformers & Distillation through Attention. ICML 2021.

    Example:
        >>> class_token = ClassToken(8, distillation=True)
        >>> tokens = class_token(torch.randn(2, 5, 8))
        >>> tokens.shape
        torch.Size([2, 7, 8])
        >>> for_labels, for_teacher, patches = class_token.split(tokens)
        >>> for_labels.shape, patches.shape
        (torch.Size([2, 8]), torch.Size([2, 5, 8]))
    """

    def __init__(
        self,
        dim: int,
        *,
        distillation: bool = False,
        std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_tokens, self.std = 1 + distillation, std
        self.weight = nn.Parameter(torch.empty(self.num_tokens, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, std²), not truncated. With std = 0 nothing is drawn."""
        if self.std:
            nn.init.normal_(self.weight, std=self.std)
        else:
            nn.init.zeros_(self.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.ndim != 3 or tokens.shape[-1] != self.weight.shape[1]:
            raise ValueError(f"tokens must be (B, L, {self.weight.shape[1]}), got {tuple(tokens.shape)}")
        return torch.cat([self.weight.expand(tokens.shape[0], -1, -1), tokens], dim=1)

    def split(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """The class token, the distillation token where there is one, and the rest of `tokens`."""
        n = self.num_tokens
        if tokens.ndim != 3 or tokens.shape[1] < n:
            raise ValueError(f"tokens must be (B, L, C) with L at least {n}, got {tuple(tokens.shape)}")
        return (*(tokens[:, i] for i in range(n)), tokens[:, n:])

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, distillation={self.num_tokens == 2}, std={self.std}"

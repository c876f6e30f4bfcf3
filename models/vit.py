"""Vision Transformer (Dosovitskiy et al., 2021)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from ..blocks import Encoder, EncoderBlock, ResNet
from ..layers import ClassToken, FeedForward, LearnedPositions2d, PatchEmbedding
from .base import Model
from .parts import ACTIVATIONS, Attention, find_part
from .registry import register_presets


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a Vision Transformer for images (B, C, H, W). The defaults are ViT-B/16 at 224 pixels.

    `backbone_depths` makes it a hybrid: the units of a ResNet's stages, whose output the patches are cut
    from. `attention` names a layer, or is {"name": …, "options": {…}}. `representation_dim` is the size of
    the tanh layer before the classifier that the authors pre-train with, None for none. `activation` is
    "gelu" as in the paper; the authors' code has "gelu_tanh". `position_std` is the deviation that positions
    start with: the authors' 0.02 takes long runs to grow, which a small data set does not afford.

    Source:
        Dosovitskiy et al. ICLR 2021. Table 1.

    Example:
        >>> ViTConfig(patch_size=32).dim
        768
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    in_channels: int = 3
    num_classes: int = 1000
    backbone_depths: tuple[int, ...] | None = None
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    hidden_dim: int = 3072
    pool: Literal["cls", "mean"] = "cls"
    attention: Attention = "MultiHeadAttention"
    activation: str = "gelu"
    representation_dim: int | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    norm_eps: float = 1e-6
    position_std: float = 0.02
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "backbone_depths"):  # JSON has no tuples
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.pool not in ("cls", "mean"):
            raise ValueError(f"pool must be 'cls' or 'mean', got {self.pool!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")


class ViT(Model):
    """A Transformer encoder over the patches of an image, and a linear classifier on its class token.

    .. math:: z_0 = [x_{\\text{class}}; x^1_p E; \\dots; x^N_p E] + E_{\\text{pos}}, \\quad
              z_\\ell = \\operatorname{Block}(z_{\\ell - 1}), \\quad
              y = \\operatorname{LN}(z_L^0) \\, W

    Images of any size are taken: positions are interpolated in two dimensions, and an image that the patches
    do not divide is padded with zeros on the right and below. As in the authors' code the class token, the
    biases and the classifier start at (or next to) zero; the code's approximate GELU is
    `activation="gelu_tanh"`, and its mean of the tokens in place of the class token is `pool="mean"`.

    Args:
        config: the sizes; `create_model("vit_base_patch16_224")` makes one from a preset.
        attention: makes each block's attention, in place of the layer that `config.attention` names.

    Shape:
        - images: (B, in_channels, H, W); the published weights take values in [-1, 1]
        - output: (B, num_classes); (B, dim) where num_classes is 0

    Reference:
        Dosovitskiy et al. An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale. ICLR
        2021. Steiner et al. How to Train Your ViT? TMLR 2022 (the tiny and small sizes).

    Example:
        >>> model = ViT(ViTConfig(image_size=32, patch_size=8, num_classes=5, dim=16, depth=2, num_heads=2))
        >>> model(torch.randn(3, 3, 32, 32)).shape
        torch.Size([3, 5])
        >>> model(torch.randn(3, 3, 40, 24)).shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        config: ViTConfig,
        *,
        attention: Attention | Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        norm = partial(nn.LayerNorm, eps=config.norm_eps)
        self.backbone = (
            None
            if config.backbone_depths is None
            else ResNet(config.backbone_depths, in_channels=config.in_channels, device=device, dtype=dtype)
        )
        channels = config.in_channels if self.backbone is None else self.backbone.out_channels
        self.patches = PatchEmbedding(
            config.dim, config.patch_size, in_channels=channels, device=device, dtype=dtype
        )
        with_class_token = config.pool == "cls"
        self.class_token = (
            ClassToken(config.dim, std=0.0, device=device, dtype=dtype) if with_class_token else None
        )
        self.positions = LearnedPositions2d(
            self.grid(*self._image_size),
            config.dim,
            interpolation=config.interpolation,
            num_prefix_tokens=int(with_class_token),
            device=device,
            dtype=dtype,
        )
        self.dropout = nn.Dropout(config.dropout)
        block = partial(
            EncoderBlock,
            attention=find_part(config.attention if attention is None else attention),
            feed_forward=partial(
                FeedForward, hidden_dim=config.hidden_dim, activation=ACTIVATIONS[config.activation]
            ),
            norm=norm,
            dropout=config.dropout,
        )
        self.encoder = Encoder(
            config.dim,
            config.depth,
            config.num_heads,
            block=block,
            norm=norm,
            drop_path=config.drop_path,
            device=device,
            dtype=dtype,
        )
        width = config.representation_dim or config.dim
        self.representation = (
            nn.Sequential(nn.Linear(config.dim, width, device=device, dtype=dtype), nn.Tanh())
            if config.representation_dim
            else nn.Identity()
        )
        self.head = (
            nn.Linear(width, config.num_classes, device=device, dtype=dtype)
            if config.num_classes
            else nn.Identity()
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors: class token and classifier zero, feed-forward networks Xavier-uniform."""
        if self.class_token is not None:
            self.class_token.reset_parameters()
        for table in self.positions.parameters():
            nn.init.normal_(table, std=self.config.position_std)
        for module in self.encoder.modules():
            if isinstance(module, FeedForward):
                for linear in (module.up, module.down):
                    nn.init.xavier_uniform_(linear.weight)
                    nn.init.normal_(linear.bias, std=1e-6)
        if isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the classes, (B, num_classes)."""
        tokens = self.tokens(images)
        pooled = tokens[:, 0] if self.config.pool == "cls" else tokens.mean(1)
        logits: Tensor = self.head(self.representation(pooled))
        return logits

    def tokens(self, images: Tensor) -> Tensor:
        """The encoder's output, (B, N, dim): the class token, where there is one, then the patches."""
        x = self.patches(images if self.backbone is None else self.backbone(images))
        if self.class_token is not None:
            x = self.class_token(x)
        x = self.positions(x, grid=self.grid(*images.shape[-2:]))
        out: Tensor = self.encoder(self.dropout(x))
        return out

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches that an image of this size is cut into."""
        if self.backbone is not None:
            reduction = self.backbone.reduction
            height, width = -(-height // reduction), -(-width // reduction)
        return self.patches.grid(height, width)

    def example_inputs(
        self, batch_size: int = 1, device: torch.device | str | None = None
    ) -> tuple[Tensor, ...]:
        """Random images of the configured size, (B, in_channels, H, W)."""
        return (torch.randn(batch_size, self.config.in_channels, *self._image_size, device=device),)

    @property
    def _image_size(self) -> tuple[int, int]:
        size = self.config.image_size
        return (size, size) if isinstance(size, int) else size


_TINY = ViTConfig(dim=192, depth=12, num_heads=3, hidden_dim=768)
_SMALL = ViTConfig(dim=384, depth=12, num_heads=6, hidden_dim=1536)
_BASE = ViTConfig(dim=768, depth=12, num_heads=12, hidden_dim=3072)
_LARGE = ViTConfig(dim=1024, depth=24, num_heads=16, hidden_dim=4096)
_HUGE = ViTConfig(dim=1280, depth=32, num_heads=16, hidden_dim=5120)

register_presets(
    ViT,
    {
        f"vit_{size}_patch{patch}_{pixels}": replace(sizes, patch_size=patch, image_size=pixels)
        for size, sizes, patch, resolutions in [
            ("tiny", _TINY, 16, (224, 384)),
            ("small", _SMALL, 16, (224, 384)),
            ("small", _SMALL, 32, (224, 384)),
            ("base", _BASE, 16, (224, 384)),
            ("base", _BASE, 32, (224, 384)),
            ("large", _LARGE, 16, (224, 384)),
            ("large", _LARGE, 32, (224, 384)),
            ("huge", _HUGE, 14, (224,)),
        ]
        for pixels in resolutions
    }
    # The hybrids: /16 puts all units of ResNet-50's last two stages into the third, /32 has all four.
    | {
        f"vit_{size}_r50_patch{patch}_{pixels}": replace(
            sizes, patch_size=1, image_size=pixels, backbone_depths=depths
        )
        for size, sizes in (("base", _BASE), ("large", _LARGE))
        for patch, depths in ((16, (3, 4, 9)), (32, (3, 4, 6, 3)))
        for pixels in (224, 384)
    }
    | {
        # CIFAR's 32 x 32 pixels, and scikit-learn's digits of 8 x 8.
        "vit_cifar": ViTConfig(32, 4, 3, 10, dim=192, depth=9, num_heads=3, hidden_dim=768),
        "vit_digits": ViTConfig(8, 2, 1, 10, dim=64, depth=4, num_heads=4, hidden_dim=128),
    },
)

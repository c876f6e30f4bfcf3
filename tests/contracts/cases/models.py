"""Models, in small."""

import torch
from contracts.case import Case
from lamina.models import RecurrentClassifier, RecurrentClassifierConfig, ViT, ViTConfig

SMALL = {"image_size": 8, "patch_size": (4, 2), "in_channels": 2, "num_classes": 5, "dim": 12, "depth": 2}
SMALL |= {"num_heads": 3, "hidden_dim": 7}


def images(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (torch.randn(3, 2, 8, 8, dtype=dtype),)


def vit(**config):
    return lambda **factory: ViT(ViTConfig(**SMALL, **config), **factory)


def classifier(**config):
    config = {"input_dim": 3, "hidden_dim": 5, "num_classes": 7} | config
    return lambda **factory: RecurrentClassifier(RecurrentClassifierConfig(**config), **factory)


def sequences(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (torch.randn(3, 7, 3, dtype=dtype),)


CASES = [
    Case("ViT", vit(dropout=0.1, drop_path=0.1), images),
    Case("ViT mean", vit(pool="mean", representation_dim=11, activation="gelu_tanh"), images),
    Case("ViT hybrid", vit(backbone_depths=(1, 1)), lambda dtype: (torch.randn(3, 2, 16, 16, dtype=dtype),)),
    Case("ViT headless", lambda **f: ViT(ViTConfig(**SMALL | {"num_classes": 0}), **f), images),
    Case("RecurrentClassifier", classifier(dropout=0.1), sequences),
    Case(
        "RecurrentClassifier gru-both-ways",
        classifier(cell="gru", bidirectional=True, num_layers=2),
        sequences,
    ),
    Case(
        "RecurrentClassifier lengths",
        classifier(cell="rnn"),
        lambda dtype: (*sequences(dtype), torch.tensor([7, 1, 4])),
        dynamic=((0,), (0,)),
    ),
]

"""Models, in small."""

import torch
from contracts.case import Case
from lamina.layers import Packing
from lamina.models import (
    Bert,
    BertClassifier,
    BertClassifierConfig,
    BertConfig,
    BertForPreTraining,
    Linformer,
    LinformerConfig,
    RecurrentClassifier,
    RecurrentClassifierConfig,
    Reformer,
    ReformerConfig,
    Transformer,
    TransformerConfig,
    ViT,
    ViTConfig,
)

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


def transformer(**config):
    sizes = {"vocab_size": 13, "dim": 12, "encoder_depth": 2, "decoder_depth": 2, "num_heads": 3}
    return lambda **factory: Transformer(TransformerConfig(**sizes, hidden_dim=7, **config), **factory)


def texts(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    source, target = torch.randint(3, 13, (3, 7)), torch.randint(3, 13, (3, 5))
    source[1, 4:] = 0
    return source, target


BERT = {"vocab_size": 13, "max_length": 9, "dim": 12, "depth": 2, "num_heads": 3, "hidden_dim": 7}


def bert(family=Bert, config=BertConfig, **options):
    return lambda **factory: family(config(**BERT, **options), **factory)


def text(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (texts(dtype)[0],)


def reformer(**config):
    sizes = {"vocab_size": 13, "dim": 12, "depth": 2, "num_heads": 2, "head_dim": 5, "hidden_dim": 7}
    sizes |= {"axial_shape": (2, 5), "axial_dims": (5, 7), "chunk_size": 4, "num_buckets": 4, "dropout": 0.1}
    layers = {"layers": ("local", "lsh")}
    return lambda **factory: Reformer(ReformerConfig(**sizes | layers | config), **factory)


def linformer(**config):
    sizes = {"vocab_size": 13, "padding_id": 0, "max_length": 9, "dim": 12, "depth": 2, "num_heads": 3}
    return lambda **factory: Linformer(LinformerConfig(**sizes, hidden_dim=7, rank=4, **config), **factory)


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
    Case("Transformer", transformer(attention_dropout=0.1), texts, dynamic=((0, 1), (0, 1))),
    Case("Bert", bert(), text, dynamic=((0, 1),), trains=False),
    Case(
        "Bert no-segments", bert(num_segments=0, activation="gelu_tanh"), text, dynamic=((0,),), trains=False
    ),
    Case("Bert packed", bert(), text, lambda dtype: {"packed": True}, dynamic=((0, 1),), trains=False),
    Case(
        "Bert packing",
        bert(),
        lambda dtype: (text(dtype)[0].flatten(), text(dtype)[0].flatten() % 2),
        lambda dtype: {"packing": Packing(torch.tensor([0, 9, 12, 12, 21]), 9)},
        dynamic=((0,), (0,)),
        trains=False,
    ),
    Case("BertForPreTraining", bert(BertForPreTraining), text, dynamic=((0, 1),), trains=False),
    Case(
        "BertForPreTraining places",
        bert(BertForPreTraining),
        lambda dtype: (*text(dtype), torch.tensor([[0] * 4 + [1] * 3] * 3)),
        lambda dtype: {"places": torch.tensor([[1, 2], [0, 3], [4, 4]])},
        dynamic=((0,), (0,)),
    ),
    Case("Reformer", reformer(), text, dynamic=((0,),)),
    Case(
        "Reformer both-ways",
        reformer(is_causal=False, axial_shape=None, max_length=9, reversible=False, chunk_feed_forward=3),
        text,
        dynamic=((0,),),
    ),
    Case("Linformer", linformer(), text, dynamic=((0,),)),
    Case("Linformer shared", linformer(share="layers"), text, dynamic=((0,),)),
    Case("Linformer swapped", linformer(attention="MultiHeadAttention"), text, dynamic=((0, 1),)),
    Case(
        "BertClassifier",
        bert(BertClassifier, BertClassifierConfig, num_classes=5),
        text,
        dynamic=((0, 1),),
        trains=False,
    ),
    Case(
        "Transformer pre-norm",
        transformer(norm_first=True, bias=True, source_vocab_size=17, tie_output=False, positions="learned"),
        texts,
        dynamic=((0,), (0,)),
    ),
]

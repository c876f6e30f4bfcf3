"""BERT beside transformers' with the same weights, and packed batches beside padded ones.

    lamina               `Bert`; `lamina-packed` computes nothing for padding
    transformers-sdpa    `BertModel` on PyTorch's fused attention, as people get it; `-eager` on its own

In evaluation: what dropout leaves could not be compared.
"""

import pytest
import torch
from lamina.models import Bert, create_model
from lamina.models.checkpoints.bert import load_state
from torch import Tensor, nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Batch and length of a preset.
SIZES = {"mini": (8, 128), "small": (8, 128)} if DEVICE == "cpu" else {"base": (64, 128), "large": (32, 384)}
both_directions = pytest.mark.parametrize("direction", ["forward", "forward+backward"])
every_size = pytest.mark.parametrize("size", SIZES)


def ours_and_theirs(size: str, attention: str) -> tuple[Bert, nn.Module]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = create_model(f"bert_{size}", device=DEVICE).eval()
    config = transformers.BertConfig(
        hidden_size=ours.config.dim,
        num_hidden_layers=ours.config.depth,
        num_attention_heads=ours.config.num_heads,
        intermediate_size=ours.config.hidden_dim,
        attn_implementation=attention,
    )
    theirs = transformers.BertModel(config).to(DEVICE).eval()
    load_state(ours, theirs.state_dict())
    return ours, theirs


def padded_ids(batch: int, length: int, padding: float) -> Tensor:
    """Sequences of lengths from almost nothing to all, or from a half on, with that share of padding."""
    shares = torch.linspace(max(0.0, 1 - 2 * padding), min(1.0, 2 - 2 * padding), batch)
    lengths = (shares * length).round().clamp(1, length)
    ids = torch.randint(1, 30522, (batch, length))
    return ids.masked_fill(torch.arange(length) >= lengths[:, None], 0)


def flops(model: Bert, ids: Tensor, backward: bool) -> float:
    """Of the real tokens: their products in each block, and each sequence's attention."""
    lengths = (ids != 0).sum(1).double()
    blocks = sum(p.numel() for p in model.encoder.parameters())
    attention = 2 * model.config.depth * model.config.dim * lengths.square().sum()
    return float(2 * (blocks * lengths.sum() + attention) * (3 if backward else 1))


@both_directions
@every_size
@pytest.mark.parametrize("how", ["lamina", "transformers-sdpa", "transformers-eager"])
def bench_bert(benchmark, benchmark_op, how, size, direction):
    """A full batch, with the mask that a tokenizer gives."""
    benchmark.group = f"Bert {size} {SIZES[size]} {direction}"
    model, peer = ours_and_theirs(size, "eager" if how == "transformers-eager" else "sdpa")
    ids, backward = padded_ids(*SIZES[size], 0.0), direction != "forward"

    def ours(ids: Tensor) -> Tensor:
        return model(ids)

    def theirs(ids: Tensor) -> Tensor:
        return peer(ids, attention_mask=ids != 0).last_hidden_state

    timed, other = ((ours, model), (theirs, peer)) if how == "lamina" else ((theirs, peer), (ours, model))
    benchmark_op(
        timed[0],
        [ids],
        backward=backward,
        parameters=list(timed[1].parameters()) if backward else (),
        reference=other[0],
        reference_parameters=list(other[1].parameters()) if backward else (),
        flops=flops(model, ids, backward),
    )


@both_directions
@every_size
@pytest.mark.parametrize("padding", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("how", ["lamina-packed", "lamina-padded", "transformers-sdpa"])
def bench_packed_bert(benchmark, benchmark_op, how, padding, size, direction):
    """A batch with a share of padding, in and out. `lamina-padded` is what all are compared with."""
    benchmark.group = f"Bert {size} {SIZES[size]} {padding:.0%} padding {direction}"
    model, peer = ours_and_theirs(size, "sdpa")
    ids, backward = padded_ids(*SIZES[size], padding), direction != "forward"

    def real(tokens: Tensor, ids: Tensor) -> Tensor:
        return tokens * (ids != 0).unsqueeze(-1)

    def packed(ids: Tensor) -> Tensor:
        return model(ids, packed=True)

    def padded(ids: Tensor) -> Tensor:
        return real(model(ids), ids)

    def theirs(ids: Tensor) -> Tensor:
        return real(peer(ids, attention_mask=ids != 0).last_hidden_state, ids)

    operation = {"lamina-packed": packed, "lamina-padded": padded}.get(how, theirs)
    module = peer if operation is theirs else model
    benchmark_op(
        operation,
        [ids],
        backward=backward,
        parameters=list(module.parameters()) if backward else (),
        reference=padded,
        reference_parameters=list(model.parameters()) if backward else (),
        flops=flops(model, ids, backward),
    )

"""The Linformer's time and memory beside full attention's, over the length: table 3 of the paper.

Random tokens pass forward through an encoder of the paper's width, with one projection for all layers. What
is saved is the ratio of the two, and it depends on what full attention is: the paper's writes out all n²
scores, as the definition does here; a fused one does not, and leaves little to save. Both are measured.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .recipe import Claim, Comparison, Metric, Outcome, Recipe, register
from .settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

RANKS = (128, 256, 512, 1024, 2048)
# Table 3: what a Linformer of each rank saves, on a V100 of 16 GB; None above half of the length.
TIME_SAVED = {
    512: (1.5, 1.3, None, None, None),
    1024: (1.7, 1.6, 1.3, None, None),
    2048: (2.6, 2.4, 2.1, 1.3, None),
    4096: (3.4, 3.2, 2.8, 2.2, 1.3),
    8192: (5.5, 5.0, 4.4, 3.5, 2.1),
    16384: (8.6, 7.8, 7.0, 5.6, 3.3),
    32768: (13, 12, 11, 8.8, 5.0),
    65536: (20, 18, 16, 14, 7.9),
}
MEMORY_SAVED = {
    512: (1.7, 1.5, None, None, None),
    1024: (3.0, 2.9, 1.8, None, None),
    2048: (6.1, 5.6, 3.6, 2.0, None),
    4096: (14, 13, 8.3, 4.3, 2.3),
    8192: (28, 26, 17, 8.5, 4.5),
    16384: (56, 48, 32, 16, 8),
    32768: (56, 48, 36, 18, 16),
    65536: (60, 52, 40, 20, 18),
}
# Full attention that writes out its scores, and one that does not; the Linformer runs on the same backend.
BACKENDS = {"written out": "reference", "fused": "torch"}


@dataclass(frozen=True, kw_only=True)
class LengthSettings(Settings):
    """Settings of a recipe that measures over the length; nothing is trained.

    Args:
        lengths: n.
        ranks: k; of each length those up to its half, as in the paper.
        depth: blocks of the encoder.
        dim: its width, in heads of 64; the hidden layers are four times as wide.
        tokens: of a batch, at least one sequence.
        rounds: in which all are timed in turn; the least time counts.
        dtype: of weights and tokens.
    """

    epochs: int = 1
    learning_rate: float = 1.0
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    ranks: tuple[int, ...] = (128, 256)
    depth: int = 2
    dim: int = 768
    tokens: int = 1
    rounds: int = 3
    dtype: str = "float32"


def cells(settings: LengthSettings) -> Iterator[tuple[int, int]]:
    """The lengths and ranks of the table."""
    for length in settings.lengths:
        yield from ((length, rank) for rank in settings.ranks if 2 * rank <= length)


def paper(table: Mapping[int, tuple[float | None, ...]], length: int, rank: int) -> float | None:
    """The paper's number of that cell, if it has one."""
    return dict(zip(RANKS, table.get(length, ()), strict=False)).get(rank)


def measure(settings: LengthSettings, seed: int) -> dict[str, Any]:
    """Each cell's time and memory, and the operations as counted and by their formula."""
    rows = [row for length in settings.lengths for row in _measured(settings, length)]
    flops = [_flops(settings, length, rank) for length, rank in cells(settings)]
    metrics: dict[str, float] = {}
    for row in rows:
        fused = "" if row["full"] == "written out" else "fused_"
        for saved in ("time_saved", "memory_saved"):
            metrics[f"test/{fused}{saved}_{row['length']}_{row['rank']}"] = row[saved]
    metrics["test/flops_off"] = max(
        abs(row[f"{what}_counted"] - row[f"{what}_formula"])
        for row in flops
        for what in ("full", "linformer")
    )
    return {"metrics": metrics | _beside_the_paper(rows), "evidence": {"cells": rows, "flops": flops}}


def _encoder(settings: LengthSettings, length: int, **options: Any) -> "nn.Module":
    """The Linformer's blocks, without embedding and head; by `attention` those of a RoBERTa."""
    from ..models import Linformer, create_model

    model = create_model(
        "linformer_base_shared",
        depth=settings.depth,
        dim=settings.dim,
        num_heads=settings.dim // 64,
        hidden_dim=4 * settings.dim,
        max_length=length,
        vocab_size=2,
        **options,
    )
    assert isinstance(model, Linformer)
    return model.bert.encoder.eval()


def _measured(settings: LengthSettings, length: int) -> list[dict[str, Any]]:
    """The rows of one length, for each kind of full attention that fits into the memory."""
    import torch

    from ..kernels import use_backend
    from .measuring import device, peak_bytes, seconds_by_turns

    factory: dict[str, Any] = {"device": device(), "dtype": getattr(torch, settings.dtype)}
    batch = max(1, settings.tokens // length)
    ranks = [rank for n, rank in cells(settings) if n == length]
    encoders = {0: _encoder(settings, length, attention="MultiHeadAttention", **factory)}
    encoders |= {rank: _encoder(settings, length, rank=rank, **factory) for rank in ranks}
    rows = []
    with torch.inference_mode():
        x = torch.randn(batch, length, settings.dim, **factory)
        for full, backend in BACKENDS.items():
            calls = [partial(encoder, x) for encoder in encoders.values()]
            with use_backend(backend):  # type: ignore[arg-type]
                try:
                    peaks = [peak_bytes(call) for call in calls]
                    times = seconds_by_turns(calls, settings.rounds)
                except torch.OutOfMemoryError:
                    continue
            # The least of the rounds: what interrupts a call only adds to it.
            fastest = [min(of_call) for of_call in times]
            for rank, peak, own in zip(ranks, peaks[1:], fastest[1:], strict=True):
                rows.append(
                    {
                        "length": length,
                        "rank": rank,
                        "batch": batch,
                        "full": full,
                        "time_saved": fastest[0] / own,
                        "memory_saved": peaks[0] / peak,
                        "full_ms": 1e3 * fastest[0],
                        "linformer_ms": 1e3 * own,
                        "full_mb": peaks[0] / 2**20,
                        "linformer_mb": peak / 2**20,
                    }
                )
    return rows


def _flops(settings: LengthSettings, length: int, rank: int) -> dict[str, int]:
    """Of a forward pass of one sequence, as counted in the model and by the formula; 2 a multiply-add.

    Full attention has four products of n tokens with C x C and two of n x n with n x C. The Linformer mixes
    the tokens, and a column of ones for the bias, by E; k columns meet the projections to keys and values,
    and n tokens the two others; the last two products are of n x k with k x C.
    """
    import torch

    from ..viz import count_flops

    n, k, c = length, rank, settings.dim
    feed_forward = 16 * n * c**2
    formula = {
        "full": 8 * n * c**2 + 4 * n**2 * c + feed_forward,
        "linformer": 4 * n * c**2 + 4 * k * c**2 + 2 * n * k * (c + 1) + 4 * n * k * c + feed_forward,
    }
    x = torch.empty(1, n, c, device="meta")
    counted = {
        "full": count_flops(_encoder(settings, n, attention="MultiHeadAttention", device="meta"), [x]),
        "linformer": count_flops(_encoder(settings, n, rank=k, device="meta"), [x]),
    }
    found = {"length": n, "rank": k}
    for name in formula:
        found |= {f"{name}_formula": settings.depth * formula[name], f"{name}_counted": counted[name]}
    return found


def _beside_the_paper(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How the time that is saved where scores are written out follows the paper's, cell by cell."""
    import torch

    pairs = [
        (float(row["time_saved"]), float(number))
        for row in rows
        if row["full"] == "written out"
        and (number := paper(TIME_SAVED, row["length"], row["rank"])) is not None
    ]
    if len(set(pairs)) < 2:  # there are no ranks to compare
        return {}
    numbers = torch.tensor(pairs, dtype=torch.float64).T
    below = (numbers[:, :, None] > numbers[:, None]).double()
    equal = (numbers[:, :, None] == numbers[:, None]).double()
    ranks = below.sum(2) + equal.sum(2) / 2  # of equal numbers the mean
    return {
        "test/largest_factor": max(max(a / b, b / a) for a, b in pairs),
        "test/rank_correlation": float(torch.corrcoef(ranks)[0, 1]),
    }


def saved_over_the_length(outcome: Outcome) -> "Figure":
    """What a Linformer saves against attention that writes its scores out, and the paper's table, dotted."""
    from ..viz import plot_lines

    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    references: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for full in BACKENDS:
        for key, table in ("time_saved", TIME_SAVED), ("memory_saved", MEMORY_SAVED):
            title = f"{key.replace('_', ' ')}, full attention {full}"
            for row in outcome.evidence()[0]["cells"]:
                if row["full"] != full:
                    continue
                n, k = row["length"], row["rank"]
                name = f"{'fused_' if full == 'fused' else ''}{key}_{n}_{k}"
                panels.setdefault(title, {}).setdefault(f"k = {k}", []).append((n, outcome.mean(name)))
                theirs = paper(table, n, k)
                if full == "written out" and theirs is not None:
                    references.setdefault(title, {}).setdefault(f"k = {k}", []).append((n, theirs))
    return plot_lines(
        panels,
        x="length n",
        y="times less",
        log="xy",
        references=references,
        reference="the paper, on a V100",
    )


def _rises(found: Comparison) -> float:
    """By what factor the time saved rises with each doubling of the length, at the least."""
    values = [found.mean(f"time_saved_{length}_128") for length in (1024, 2048, 4096)]
    return min(after / before for before, after in pairwise(values))


def _time_claim(length: int, bar: float) -> Claim:
    return Claim(
        name=f"time saved at n = {length}, k = 128",
        value=lambda found: found.mean(f"time_saved_{length}_128"),
        bar=bar,
        unit="x",
        source="set before the first run: the paper's ratio with room for a CPU",
        paper=paper(TIME_SAVED, length, 128),
        paper_source="table 3, V100",
    )


EXACT = Claim(
    name="operations counted in the models, beside their formula: the largest difference",
    value=lambda found: found.mean("flops_off"),
    bar=0.0,
    higher_is_better=False,
    source="exact",
)

LINFORMER_SPEED = register(
    Recipe(
        name="linformer_speed",
        title="What a Linformer saves in time and memory, over the length",
        paper="Wang et al. Linformer: Self-Attention with Linear Complexity. arXiv:2006.04768, 2020.",
        model="linformer_base_shared",
        model_options={"depth": 2, "max_length": 4096},
        measure=measure,
        settings=LengthSettings(threads=1),
        metric=Metric(
            name="time saved at n = 4096, k = 128",
            key="time_saved_4096_128",
            unit="x",
            bar=2.5,
            source="set before the first run: the paper's ratio with room for a CPU",
            paper=3.4,
            paper_source="table 3, V100",
        ),
        claims=(
            _time_claim(1024, 1.2),
            _time_claim(2048, 1.8),
            Claim(
                name="the time saved rises with the length: the least factor of a doubling from n = 1024",
                value=_rises,
                bar=1.0,
                unit="x",
                source="the paper's claim",
            ),
            Claim(
                name="memory saved at n = 4096, k = 128",
                value=lambda found: found.mean("memory_saved_4096_128"),
                bar=7.0,
                unit="x",
                source="ours, set before the first run: half of the paper's",
                paper=14.0,
                paper_source="table 3, by the largest batch",
            ),
            EXACT,
        ),
        figures={"What is saved over the length": saved_over_the_length},
        notes="The width and the heads are the paper's, the blocks 2 and not 12: all are alike, so that the "
        "ratio is that of one. One sequence a batch on one thread of a CPU, by that thread's own time; the "
        "peak of the memory stands for the largest batch. Full attention is the definition, which writes out "
        "its scores, as the paper's does; against fused attention the figure and the result file have the "
        "numbers too.",
    )
)

LINFORMER_SPEED_GPU = register(
    replace(
        LINFORMER_SPEED,
        name="linformer_speed_gpu",
        title="What a Linformer saves in time and memory, over the length: the paper's table on a GPU",
        model_options={"max_length": 65536},
        settings=LengthSettings(
            lengths=tuple(TIME_SAVED), ranks=RANKS, depth=12, tokens=32768, rounds=5, dtype="float16"
        ),
        metric=Metric(
            name="rank correlation of the time saved with the paper's",
            key="rank_correlation",
            bar=0.95,
            source="set before the first run, over the cells that fit into the memory",
        ),
        claims=(
            Claim(
                name="time saved beside the paper's: the largest factor between the two",
                value=lambda found: found.mean("largest_factor"),
                bar=2.0,
                unit="x",
                higher_is_better=False,
                source="set before the first run, over the cells that fit into the memory",
            ),
            EXACT,
        ),
        notes="32,768 tokens a batch, or one sequence, in half precision; a length whose scores do not fit "
        "into the memory is left out. The peak of the memory stands for the largest batch.",
    )
)

"""What a Reformer's two ideas save: memory of training over the depth, time over the length (figure 5).

A step holds parameters, gradients and activations. The first two grow with the depth whatever one does. So
the activations are measured on a stack whose blocks share their parameters: those of one block, however deep
it is. What a step takes where each block has its own is measured beside it, gradients on their way included.
"""

import statistics
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from .recipe import Claim, Metric, Outcome, Recipe, register
from .settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

# What is measured: hashed attention alone, of four heads of 64.
SIZES: dict[str, Any] = {
    "dim": 256,
    "layers": ("lsh",),
    "num_heads": 4,
    "head_dim": None,
    "hidden_dim": 1024,
    "axial_dims": (64, 192),
    "chunk_size": 64,
    "dropout": 0.0,
}
STACKS = {"reversible": True, "kept": False}


@dataclass(frozen=True, kw_only=True)
class MemorySettings(Settings):
    """Settings of a recipe that measures; nothing is trained.

    Args:
        depths: blocks of the stacks whose memory is measured.
        length: of their sequence, one a step.
        lengths: of the sequences whose time is measured.
        tokens: of a batch there, the longest length at least: shorter sequences are as many more.
        depth: blocks of that model.
        hashes: their numbers, beside full attention.
        rounds: in which all are timed in turn.
        dtype: of weights and activations.
    """

    epochs: int = 1
    learning_rate: float = 1.0
    depths: tuple[int, ...] = (3, 6, 9, 12)
    length: int = 1024
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    tokens: int = 16384
    depth: int = 1
    hashes: tuple[int, ...] = (2, 4)
    rounds: int = 3
    dtype: str = "float32"


def measure(settings: MemorySettings, seed: int) -> dict[str, Any]:
    """The peak memory of each stack, and the time a token of each length."""
    memory = [_memory(settings, depth, stack) for depth, stack in product(settings.depths, STACKS)]
    times = [row for length in settings.lengths for row in _times(settings, length)]
    metrics = {}
    for row in memory:
        for what in "activations", "step":
            metrics[f"test/{what}_{row['stack']}_{row['depth']}"] = row[what] / 2**20
    for row in times:
        metrics[f"test/us_a_token_{_name(row['hashes'])}_{row['length']}"] = row["us_a_token"]
    shallow, deep = min(settings.depths), max(settings.depths)
    for stack in STACKS:
        ends = (metrics[f"test/activations_{stack}_{depth}"] for depth in (deep, shallow))
        metrics[f"test/{stack}_ratio"] = next(ends) / next(ends)
    return {"metrics": metrics, "evidence": {"memory": memory, "times": times}}


def _reformer(settings: MemorySettings, length: int, depth: int, **options: Any) -> "nn.Module":
    """With about twice as many buckets as chunks, as a pair, which is cheap where there are many."""
    import torch

    from ..models import create_model
    from .measuring import device

    buckets = max(2 * length // SIZES["chunk_size"], 4)
    first = 2 ** (buckets.bit_length() // 2)
    pair = first, 2 * max(buckets // (2 * first), 1)
    return create_model(
        "reformer_enwik8",
        **SIZES | {"depth": depth, "axial_shape": (32, -(-length // 32)), "num_buckets": pair} | options,
        device=device(),
        dtype=getattr(torch, settings.dtype),
    )


def _memory(settings: MemorySettings, depth: int, stack: str) -> dict[str, Any]:
    """Bytes at the peak of a forward and a backward pass, beyond the parameters."""
    import torch
    import torch.nn.functional as F

    from ..layers import Reversible
    from ..models import Reformer
    from .measuring import device, peak_bytes

    model = _reformer(settings, settings.length, depth, reversible=STACKS[stack])
    assert isinstance(model, Reformer)
    ids = torch.randint(model.config.vocab_size, (1, settings.length), device=device())

    def step() -> None:
        logits = model(ids)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()

    step()  # from here on the gradients are there, and are not counted either
    own = peak_bytes(step)
    shared = [model.blocks.blocks[0]] * depth
    model.blocks = Reversible(shared, recompute=STACKS[stack])  # type: ignore[arg-type]
    return {"depth": depth, "stack": stack, "step": own, "activations": peak_bytes(step)}


def _times(settings: MemorySettings, length: int) -> list[dict[str, Any]]:
    """Microseconds a token of a forward pass without gradients, all kinds of attention in turn."""
    import torch

    from .measuring import device, seconds_by_turns

    batch = max(1, settings.tokens // length)
    kinds: dict[int, dict[str, Any]] = {n: {"num_hashes": n} for n in settings.hashes}
    kinds[0] = {"attention": "MultiHeadAttention"}
    models = [_reformer(settings, length, settings.depth, **kind).eval() for kind in kinds.values()]
    with torch.inference_mode():
        ids = torch.randint(256, (batch, length), device=device())
        times = seconds_by_turns([partial(model, ids) for model in models], settings.rounds)
    return [
        {
            "length": length,
            "hashes": hashes,
            "batch": batch,
            "us_a_token": 1e6 * statistics.median(of_kind) / (batch * length),
        }
        for hashes, of_kind in zip(kinds, times, strict=True)
    ]


def memory_over_the_depth(outcome: Outcome) -> "Figure":
    """Megabytes at the peak of a step, with activations computed again and with activations kept."""
    from ..viz import plot_lines

    titles = {"activations": "activations alone", "step": "with the parameters' gradients on their way"}
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {title: {} for title in titles.values()}
    for row in outcome.evidence()[0]["memory"]:
        for what, title in titles.items():
            point = row["depth"], outcome.mean(f"{what}_{row['stack']}_{row['depth']}")
            panels[title].setdefault(row["stack"], []).append(point)
    return plot_lines(panels, x="blocks", y="MB at the peak")


def time_over_the_length(outcome: Outcome) -> "Figure":
    """Microseconds a token of a forward pass, at the same number of tokens a batch."""
    from ..viz import plot_lines

    lines: dict[str, list[tuple[float, float]]] = {}
    for row in outcome.evidence()[0]["times"]:
        value = outcome.mean(f"us_a_token_{_name(row['hashes'])}_{row['length']}")
        lines.setdefault(_title(row["hashes"]), []).append((row["length"], value))
    return plot_lines({"time a token": lines}, x="length", y="microseconds", log="xy")


def _name(hashes: int) -> str:
    return f"lsh_{hashes}" if hashes else "full"


def _title(hashes: int) -> str:
    return f"LSH-{hashes}" if hashes else "full attention"


def _growth(hashes: int, bar: float, *, higher_is_better: bool = False) -> Claim:
    """How the time of a token grows from the shortest length to the longest."""

    def of_seed(evidence: dict[str, Any]) -> float:
        times = {row["length"]: row["us_a_token"] for row in evidence["times"] if row["hashes"] == hashes}
        return times[max(times)] / times[min(times)] if times else float("nan")

    return Claim(
        name=f"a token's time at the longest beside the shortest length, {_title(hashes)}",
        value=lambda found: statistics.median(of_seed(evidence) for evidence in found.evidence()),
        bar=bar,
        unit="x",
        higher_is_better=higher_is_better,
        source="set before the first run: figure 5, nearly flat for hashing, blowing up for full attention",
    )


KEPT = Claim(
    name="activations of 12 blocks beside those of 3, kept",
    value=lambda found: found.mean("kept_ratio"),
    bar=2.0,
    unit="x",
    source="set before the first run: without recomputation memory must grow",
)

REFORMER_MEMORY = register(
    Recipe(
        name="reformer_memory",
        title="Memory of training a Reformer over its depth, and time over the length",
        paper="Kitaev, Kaiser, Levskaya. Reformer: The Efficient Transformer. ICLR 2020.",
        model="reformer_enwik8",
        model_options=SIZES | {"axial_shape": (32, 32), "num_buckets": (8, 4), "depth": 3},
        measure=measure,
        settings=MemorySettings(threads=1),
        metric=Metric(
            name="activations of 12 blocks beside those of 3, computed again",
            key="reversible_ratio",
            unit="x",
            bar=1.2,
            higher_is_better=False,
            source="set before the first run: section 3, memory independent of the depth",
        ),
        claims=(
            KEPT,
            _growth(2, 1.5),
            _growth(0, 2.0, higher_is_better=True),
        ),
        figures={
            "Memory over the depth": memory_over_the_depth,
            "Time over the length": time_over_the_length,
        },
        notes="Activations are what a step holds at its peak beyond parameters and their gradients, on a "
        "stack whose blocks share their parameters, so that gradients on their way do not grow with the "
        "depth either; the second panel is of blocks with parameters of their own. There are buckets for "
        "chunks of 64 at each length, as a pair. Full attention is PyTorch's, which writes no scores.",
    )
)

REFORMER_MEMORY_GPU = register(
    replace(
        REFORMER_MEMORY,
        name="reformer_memory_gpu",
        title="Memory of training a Reformer over its depth, and time up to 32k tokens, on a GPU",
        settings=MemorySettings(
            length=8192,
            lengths=(2048, 4096, 8192, 16384, 32768),
            tokens=32768,
            depth=3,
            hashes=(2, 4, 8),
            rounds=20,
            dtype="bfloat16",
        ),
        claims=(
            KEPT,
            _growth(2, 1.5),
            _growth(4, 1.5),
            _growth(8, 1.5),
            _growth(0, 2.0, higher_is_better=True),
        ),
    )
)

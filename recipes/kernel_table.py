"""The table of the page on kernels: what each fuses and refuses, and ratios from committed result files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import RecipeError
from .files import check_in_clone, read_json, write_bytes
from .speed import RESULTS, ROOT

PAGE = ROOT / "docs" / "kernels.md"
BEGIN = "<!-- Written by `lamina report --docs` from benchmarks/results, up to the next mark. -->"
END = "<!-- The end of what is written. -->"


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as a peer ours is, in one group of a result file.

    Args:
        label: what it is, in the table.
        group: of the benchmark.
        ours: how the name of our entry begins.
        peer: the same of the peer's.
        by: where the ratio by turns stands: "ours", measured beside the peer; "peer", measured beside ours;
            or "medians", where the two cannot be equal and so were not timed by turns.
    """

    label: str
    group: str
    ours: str
    peer: str
    by: str = "ours"

    def of(self, rows: list[dict[str, Any]]) -> float | None:
        found = {}
        for who, start in ("ours", self.ours), ("peer", self.peer):
            entries = [r for r in rows if r["group"] == self.group and _entry(r).startswith(start)]
            if not entries:
                return None
            found[who] = entries[0]
        if self.by == "medians":
            return float(found["peer"]["median_ms"] / found["ours"]["median_ms"])
        turns = float(found[self.by]["times_as_fast_as_reference"])
        return turns if self.by == "ours" else 1 / turns


@dataclass(frozen=True)
class Line:
    """A line of the table: the operation, what the kernel fuses, what it refuses, the result file, ratios."""

    operation: str
    fuses: str
    refuses: str
    file: str
    ratios: tuple[Ratio, ...]


_TRANSLATION = "(32, 50, 50, 512)"
_DETR = "deformable_sampling {} float32 {}"
_SAMPLED = "lamina-{}-float32", "grid_sample-{}-float32"


def _sampled(label: str, sizes: str, name: str, direction: str) -> Ratio:
    ours, peer = (entry.format(f"{name}-{direction}") for entry in _SAMPLED)
    return Ratio(label, _DETR.format(sizes, direction), ours, peer)


def _both(label: str, group: str, ours: str, peer: str, by: str = "ours") -> tuple[Ratio, ...]:
    """Forward alone, and with the backward pass."""
    return tuple(
        Ratio(
            f"{label}, {direction}",
            group.format(direction),
            ours.format(direction),
            peer.format(direction),
            by,
        )
        for direction in ("forward", "forward+backward")
    )


LINES = (
    Line(
        "dot_product_attention",
        "scores, bias of any shape with its gradient, tables, distances, windows, lengths, dropout",
        "plain, causal and grouped attention → PyTorch's; heads wider than 256 → PyTorch's",
        "dot_product_attention",
        (
            *_both(
                "a bias, beside the definition",
                "dot_product_attention bias (1, 8, 1024, 64) {}",
                "long-1k-bias-{}-auto",
                "long-1k-bias-{}-reference",
            ),
            *_both(
                "dropout, beside PyTorch's",
                "dot_product_attention dropout (2, 12, 512, 64) {}",
                "bert-512-dropout-{}-auto",
                "bert-512-dropout-{}-sdpa",
                "medians",
            ),
        ),
    ),
    Line(
        "packed_attention",
        "sequences of any lengths in one launch",
        "nothing",
        "dot_product_attention",
        _both(
            "beside padding",
            "packed_attention (2, 12, 512, 64) {}",
            "(2, 12, 512, 64)-torch.float32-{}-auto",
            "(2, 12, 512, 64)-torch.float32-{}-padded",
            "medians",
        ),
    ),
    Line(
        "deformable_sampling",
        "corners, weights and sums of all levels and points; scatter by vector atomics, or sorted samples",
        "nothing of floats of 16 to 64 bits",
        "deformable_sampling",
        (
            _sampled("decoder beside `grid_sample`, forward", "(2, 300)", "decoder-300", "forward"),
            _sampled(
                "decoder beside `grid_sample`, forward+backward",
                "(2, 300)",
                "decoder-300",
                "forward+backward",
            ),
            _sampled("encoder, forward", "(1, 17821)", "encoder-17821", "forward"),
        ),
    ),
    Line(
        "lsh_attention",
        "gathering, scores, softmax and the combination of the rounds, where the tokens lie",
        "heads wider than 256, in float32 wider than 128 → the definition",
        "lsh_attention",
        (
            *_both(
                "4,096 tokens beside reformer-pytorch",
                "lsh_attention L=4096 {}",
                "lamina-4096-float32-{}",
                "reformer-pytorch-4096-float32-{}",
            ),
            *_both(
                "8,192 tokens beside PyTorch's causal attention of all pairs",
                "lsh_attention L=8192 {}",
                "lamina-8192-float32-{}",
                "sdpa-8192-float32-{}",
                "medians",
            ),
        ),
    ),
    Line(
        "lsh_buckets",
        "rotations and the largest of both signs",
        "heads wider than 256 → the definition",
        "lsh_attention",
        (
            Ratio(
                "4,096 tokens beside reformer-pytorch, forward",
                "lsh_buckets L=4096",
                "lamina-4096",
                "reformer-pytorch-4096",
                "medians",
            ),
        ),
    ),
    Line(
        "low_rank_attention",
        "attention to k columns that stay on chip, one pass",
        "heads wider than 128, more columns than fit, dropout, float32 → `dot_product_attention`",
        "low_rank_attention",
        _both(
            "the layer at n = 4,096, k = 256 beside the equation in einsum",
            "LowRankAttention (4, 4096, 512, 8, 256) {}",
            "lamina-n4096-k256-{}",
            "einsum-n4096-k256-{}",
            "peer",
        ),
    ),
    Line(
        "additive_scores",
        "sum, tanh and the weighted sum, by exponentials of the tokens",
        "nothing of floats of 16 to 64 bits",
        "additive_scores",
        _both(
            "a batch of sentences beside the definition",
            f"additive_scores {_TRANSLATION} {{}}",
            "scores-auto-translation-torch.float32-{}",
            "scores-reference-translation-torch.float32-{}",
        ),
    ),
    Line(
        "additive_attention",
        "the scores as above, softmax and values",
        "values wider than fit, of another dtype → `additive_scores`, then two products",
        "additive_scores",
        _both(
            "a batch of sentences beside the definition",
            f"additive_attention {_TRANSLATION} {{}}",
            "attention-auto-translation-torch.float32-{}",
            "attention-reference-translation-torch.float32-{}",
        ),
    ),
    Line(
        "nearest_code",
        "products and the least distance, settled in float64; no (N, K) matrix",
        "float64 → the definition, in parts",
        "nearest_code",
        (
            Ratio(
                "8,192 vectors beside `cdist`",
                "nearest_code (8192, 1024, 64) float32",
                "lamina-tokens",
                "cdist-tokens",
            ),
            Ratio(
                "beside differences of all pairs",
                "nearest_code (8192, 1024, 64) float32",
                "lamina-tokens",
                "broadcast-tokens",
                "peer",
            ),
        ),
    ),
    Line(
        "code_sums",
        "sums of the vectors of each code, segment by segment",
        "float64 → the definition",
        "nearest_code",
        (
            Ratio(
                "8,192 vectors beside `index_add_`, forward",
                "code_sums (8192, 1024, 64) even forward",
                "lamina-tokens-forward-even",
                "index_add-tokens-forward-even",
            ),
        ),
    ),
    Line(
        "extract_glimpses",
        "all scales in one launch, gathers in the backward pass",
        "more than eight scales, float64 → two products",
        "glimpses",
        _both(
            "four scales beside slices image by image",
            "extract_glimpses (128, 1, 100, 100) 12 x 4 {}",
            "lamina-cluttered-{}",
            "slices-cluttered-{}",
        ),
    ),
    Line(
        "lstm_sequence",
        "the gates, their norms and peepholes of a step; steps replayed from a CUDA graph",
        "plain LSTMs → PyTorch's; norms of more units than a program holds → the loop",
        "recurrent",
        _both(
            "layer norm, 32 × 50 × 512, beside the cells one by one",
            "Recurrent layer norm (32, 50, 512) {}",
            "layer norm-torch-B32-T50-H512-{}",
            "layer norm-cell by cell-B32-T50-H512-{}",
        ),
    ),
    Line(
        "attentive_gru",
        "scores, softmax, context and gates of a step; steps replayed from a CUDA graph",
        "more keys than a program holds → the loop",
        "recurrent",
        _both(
            "20 steps over 20 words beside the loop",
            "attentive_gru (20, 32, 128, 256, 128, 20) {}",
            "torch-B32-T20-S20-H128-{}",
            "step by step-B32-T20-S20-H128-{}",
        ),
    ),
)


def write_kernel_table(page: Path = PAGE, folder: Path = RESULTS) -> Path:
    """Puts the table between its marks.

    Raises:
        RecipeError: this is not a clone, or the page has no marks.
    """
    check_in_clone(page)
    text = page.read_text(encoding="utf-8")
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        raise RecipeError(f"{page} must have the two marks that the table stands between")
    table = "\n".join(_table(folder))
    write_bytes(page, f"{before}{BEGIN}\n\n{table}\n\n{END}{after}".encode())
    return page


def _table(folder: Path) -> list[str]:
    lines = [
        "| Operation | In the kernel | Refused, then runs | On a GPU | On two cores, times as fast |",
        "|---|---|---|---|---|",
    ]
    machines: dict[str, list[str]] = {}
    for line in LINES:
        cells = f"| `{line.operation}` | {line.fuses} | {line.refuses} | {_on_a_gpu(line, folder)} |"
        saved = _saved(line.file, folder, "cpu-")
        if saved is None:
            lines.append(f"{cells} not measured yet |")
            continue
        of = saved["machine"]
        day = saved.get("date", "before dates were kept")
        machines.setdefault(f"{of.get('cpu', '')}, torch {of['versions']['torch']}, {day}", []).append(
            line.operation
        )
        shown = [_show(ratio, saved["results"]) for ratio in line.ratios]
        lines.append(f"{cells} {'; '.join(shown)} |")
    where = "; ".join(f"{of} ({', '.join(names)})" for of, names in machines.items())
    if where:
        lines += ["", f"Measured on: {where}."]
    return lines


def _on_a_gpu(line: Line, folder: Path) -> str:
    found = [path for path in folder.glob(f"{line.file}-*.json") if f"{line.file}-cpu-" not in path.name]
    return "see Benchmarks" if found else "not measured yet"


def _saved(file: str, folder: Path, device: str) -> dict[str, Any] | None:
    paths = sorted(folder.glob(f"{file}-{device}*.json"))
    return read_json(paths[-1]) if paths else None


def _show(ratio: Ratio, rows: list[dict[str, Any]]) -> str:
    value = ratio.of(rows)
    return f"{ratio.label}: {'not measured yet' if value is None else f'{value:.3g} ×'}"


def _entry(row: dict[str, Any]) -> str:
    return str(row["name"].partition("[")[2].rstrip("]"))

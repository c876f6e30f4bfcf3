"""The page of speeds, written from the benchmarks' committed result files."""

from pathlib import Path
from typing import Any

from .files import check_in_clone, read_json, write_bytes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"


def write_speed(page: Path = PAGE, folder: Path = RESULTS) -> Path:
    """Writes one table a file: within a group, each entry's time beside that of the fastest.

    Raises:
        RecipeError: this is not a clone: there is no folder for the page.
    """
    check_in_clone(page)
    lines = [
        "# Benchmarks",
        "",
        "<!-- Written by `lamina report --docs` from benchmarks/results: change those, not this page. -->",
        "",
        "Each table is one run on one machine; all entries were asserted equal before they were timed.",
        "By turns: how many times as fast as the benchmark's reference an entry is, the median of pairs",
        "timed one after the other. On a machine with neighbours it holds where two medians waver. Between",
        "machines nothing is worth comparing. What has no row is not measured yet.",
        "`pytest benchmarks --save-results` makes the files.",
    ]
    for path in sorted(folder.glob("*.json")):
        if (saved := read_json(path)) is not None:
            lines += _section(path.stem.split("-")[0], saved)
    write_bytes(page, ("\n".join(lines) + "\n").encode())
    return page


def _section(what: str, saved: dict[str, Any]) -> list[str]:
    machine = saved["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = ["", f"## {what}", "", f"On {machine.get('cpu', '')} {machine['device']}; {versions}.", ""]
    lines += [
        "| Group | Entry | Median, ms | Of the fastest | By turns | Peak, MB |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in saved["results"]:
        groups.setdefault(row["group"] or "", []).append(row)
    for group, rows in groups.items():
        fastest = min(row["median_ms"] for row in rows)
        for row in sorted(rows, key=lambda row: row["median_ms"]):
            ratio = f"{row['median_ms'] / fastest:.2f} ×"
            entry = row["name"].partition("[")[2].rstrip("]") or row["name"]
            lines.append(
                f"| {group} | {entry} | {row['median_ms']:.3g} | {ratio} | "
                f"{row.get('times_as_fast_as_reference', '')} | {row.get('peak_mb', '')} |"
            )
            group = ""
    return lines

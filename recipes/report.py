"""The report: one page, with its pictures inside, made from the result files alone."""

import base64
import math
import statistics
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import RecipeError
from .files import check_in_clone, read_json, write_bytes, write_json
from .recipe import Bar, Metric, get_recipe, list_recipes

SAVED = Path(__file__).parent / "results"  # committed results, one a recipe and machine
PAGE = Path(__file__).parents[1] / "docs" / "replications.md"


def read_runs(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Recipe -> its runs in that folder, the newest first; each result gets its `folder`."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(out.glob("*/*/result.json"), reverse=True):
        if (result := read_json(path)) is not None:
            runs.setdefault(result["recipe"], []).append(result | {"folder": path.parent})
    return dict(sorted(runs.items()))


def write_report(out: Path) -> Path:
    """Writes `index.html`: for each recipe its newest complete run, or the newest, and a line for all others.

    Raises:
        RecipeError: there is no result in the folder.
    """
    import jinja2

    runs = read_runs(out)
    if not runs:
        raise RecipeError(f"no results in {out}: lamina reproduce NAME makes them")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "verdict": verdict,
        "mean": show_mean,
        "show": show_number,
        "others": others,
        "claims": claims,
    }
    html = environment.get_template("report.html").render(
        recipes=[_with_pictures(newest(results)) for results in runs.values()],
        runs=[result for results in runs.values() for result in results],
        metrics={name: _metric(results[0]) for name, results in runs.items()},
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    write_bytes(out / "index.html", html.encode())
    return out / "index.html"


def newest(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The first complete one of results that are sorted from new to old; without any, the first."""
    return next((result for result in results if result["complete"]), results[0])


def verdict(result: dict[str, Any]) -> str:
    """One word: "reached", "missed" or "unfinished"."""
    if not result["complete"]:
        return "unfinished"
    return "reached" if result["met"] else "missed"


def show_mean(result: dict[str, Any]) -> str:
    """Mean and spread over the seeds, with the unit."""
    metric = _metric(result)
    if result["value"] is None:
        return "–"
    spread = "" if result["std"] is None else f" ± {result['std']:.2f}"
    return f"{result['value']:.2f}{spread} {metric.unit}".rstrip()


def others(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What stands beside the recipe's own number: name, number, and whether it was trained."""
    metric = _metric(result)
    rows = []
    for name, seeds in result.get("arms", {}).items():
        values = [seed["value"] for seed in seeds]
        if values:
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            shown = f"{statistics.fmean(values):.2f}{spread} {metric.unit}".rstrip()
            rows.append((name, shown, "trained beside it"))
    return rows + [(n, metric.show(value), "baseline") for n, value in result.get("baselines", {}).items()]


def claims(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each claim as text: name, value, bar, the paper's number, source, and "reached" or "missed"."""
    rows = []
    for claim in result.get("claims", []):
        bar = Bar(**{f.name: claim[f.name] for f in fields(Bar)})
        paper = "–" if bar.paper is None else f"{bar.show(bar.paper)} ({bar.paper_source})"
        shown = {"name": bar.name, "value": bar.show(claim["value"]), "bar": bar.show_bar()}
        verdict = "reached" if claim["met"] else "missed"
        rows.append(shown | {"paper": paper, "source": bar.source, "verdict": verdict})
    return rows


def show_number(value: Any) -> str:
    """A number at a readable length, and anything else as it is."""
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def save_results(out: Path, folder: Path = SAVED) -> list[Path]:
    """Copies the newest complete result of each recipe to where it is committed.

    Only runs by the recipe's own settings and seeds count. Curves and evidence of a training stay behind:
    what is kept is the numbers, and all that tells where they come from.

    Raises:
        RecipeError: there is none.
    """
    paths = []
    for name, results in read_runs(out).items():
        complete = [result for result in results if result["complete"] and result["is_default"]]
        if not complete:
            continue
        result = {key: value for key, value in complete[0].items() if key not in ("folder", "pictures")}
        # Of a recipe that measures, the tables that it measured are the result.
        kept = {"seed", "value", "minutes", "metrics"} | ({"evidence"} if result["measured"] else set())
        result["results"] = [_only(kept, seed) for seed in result["results"]]
        result["arms"] = {arm: [_only(kept, seed) for seed in seeds] for arm, seeds in result["arms"].items()}
        device = str(result["machine"]["accelerator"]).lower().replace(" ", "-")
        path = folder / f"{name}-{device}-torch{result['torch'].split('+')[0]}.json"
        folder.mkdir(exist_ok=True)
        write_json(path, result)
        paths.append(path)
    if not paths:
        raise RecipeError(f"no complete run with its recipe's own settings and seeds in {out}")
    return paths


def write_replications(page: Path = PAGE, folder: Path = SAVED) -> Path:
    """Writes the page of the docs from the committed results; a recipe without one is named as not yet run.

    Raises:
        RecipeError: this is not a clone: there is no folder for the page.
    """
    check_in_clone(page)
    saved = [result for path in sorted(folder.glob("*.json")) if (result := read_json(path)) is not None]
    lines = [
        "# Replications",
        "",
        "<!-- Written by `lamina report --docs` from recipes/results: change those files, not this page. -->",
        "",
        "Each number is the mean over the seeds, with its standard deviation, on data unseen in training.",
        "The bar was fixed before the run. A recipe that missed its bar stands here too.",
        "",
        "| Recipe | Metric | Bar | Ours | | Paper's | Seeds | Device | torch | Minutes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    details = []
    for name in list_recipes():
        recipe = get_recipe(name)
        results = [result for result in saved if result["recipe"] == name]
        lines += [_row(result) for result in results]
        if not results:
            metric = recipe.metric
            lines.append(f"| `{name}` | {metric.name} | {metric.show_bar()} | not yet run | | | | | | |")
        details += ["", f"## {recipe.title}", "", f"{recipe.paper}", "", recipe.notes or "As in the paper."]
        details += [f"The bar: {recipe.metric.source}."]
        for result in results:
            values = ", ".join(f"{seed['seed']}: {seed['value']:.2f}" for seed in result["results"])
            of = result["machine"]
            details += [
                "",
                f"- `{result['command']}` on {of['cpu']}, {of['cores']} cores, {of['accelerator']}; Python "
                f"{result['versions']['python']}, Lightning {result['versions'].get('lightning', '?')}; "
                f"commit {result['commit'] or 'unknown'}, {result['date'][:10]}. By seed: {values}.",
            ]
            details += _tables(result)
    write_bytes(page, ("\n".join(lines + details) + "\n").encode())
    return page


def _tables(result: dict[str, Any]) -> list[str]:
    """What was compared, and what was claimed."""
    lines = []
    if rows := others(result):
        lines += ["", f"| Beside it | {_metric(result).name} | |", "|---|---|---|"]
        lines += [f"| {name} | {value} | {kind} |" for name, value, kind in rows]
    if found := claims(result):
        lines += [
            "",
            "| Claimed | Bar | Ours | | Paper's | Where the bar comes from |",
            "|---|---|---|---|---|---|",
        ]
        for row in found:
            word = row["verdict"] if row["verdict"] == "reached" else f"**{row['verdict']}**"
            cells = row["name"], row["bar"], row["value"], word, row["paper"], row["source"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _only(kept: set[str], values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key in kept}


def _row(result: dict[str, Any]) -> str:
    metric = _metric(result)
    paper = "–" if metric.paper is None else f"{metric.show(metric.paper)} ({metric.paper_source})"
    cells = (
        f"`{result['recipe']}`",
        metric.name,
        metric.show_bar(),
        show_mean(result),
        verdict(result) if result["met"] else f"**{verdict(result)}**",
        paper,
        str(len(result["seeds"])),
        str(result["machine"]["accelerator"]),
        result["torch"].split("+")[0],
        f"{result['minutes']:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def _metric(result: dict[str, Any]) -> Metric:
    return Metric(**result["metric"])


def _with_pictures(result: dict[str, Any]) -> dict[str, Any]:
    """The result with its pictures as data URLs; one that was deleted is left out."""
    urls = {}
    for caption, name in result["pictures"].items():
        path = result["folder"] / name
        if path.exists():
            urls[caption] = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    return result | {"urls": urls}

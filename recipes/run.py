"""A run: all seeds of a recipe, their folder, and the result that the report is made from.

report/<recipe>/<time>/result.json      complete or not; replaced after each seed, never once it is complete
                      /<picture>.png
                      /model/           the first seed's model, for `from_pretrained`
                      /seed-<n>/        last.ckpt, metrics.csv, result.json when the seed is done
                      /arms/<arm>/      the seeds of each training that it is compared with
"""

import errno
import hashlib
import io
import json
import math
import shlex
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from .errors import RecipeError
from .files import only_one_process, read_json, write_bytes, write_json
from .machine import git_commit, machine, versions
from .recipe import Bar, Comparison, Outcome, Recipe, SeedResult
from .settings import Settings, changed
from .training import Hardware, measure_seed, new_model, train_seed


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe with everything decided, and by that the fingerprint by which an unfinished run is found.

    Args:
        recipe: what to run.
        settings: the recipe's, with the user's changes.
        model: the user's changes to what the model is created with.
        seeds: one training each; the recipe's where empty.
        folder: of `--data`.
        hardware: where to train.

    Raises:
        RecipeError: the recipe takes no data, or the folder, the accelerator or the model are wrong.
    """

    recipe: Recipe
    settings: Settings
    model: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    folder: Path | None = None
    hardware: Hardware = field(default_factory=Hardware)

    def __post_init__(self) -> None:
        if not self.seeds:
            object.__setattr__(self, "seeds", self.recipe.seeds)
        if self.folder is not None:
            if not self.recipe.data_format:
                raise RecipeError(
                    f"{self.recipe.name} takes no --data: what it trains on is installed with it"
                )
            if not self.folder.is_dir():
                raise RecipeError(
                    f"no data folder {self.folder}; {self.recipe.name} wants {self.recipe.data_format}"
                )
        _ = self.what  # the models and the device are tried here, before anything is written

    @cached_property
    def device(self) -> str:
        return self.hardware.check()

    @cached_property
    def blank(self) -> nn.Module:
        """The model without weights: what it is, at no cost."""
        with torch.device("meta"):
            return new_model(self.recipe, self.model, seed=0)

    @cached_property
    def arms(self) -> dict[str, "Plan"]:
        """Name -> the plan of that training, whose settings are these with the arm's changes."""
        plans = {}
        for name, arm in self.recipe.arms.items():
            try:
                settings = replace(self.settings, **arm.settings)
                plans[name] = replace(self, recipe=self.recipe.arm(name), settings=settings)
            except (RecipeError, ValueError) as error:
                raise RecipeError(f"arm {name!r}: {error}") from error
        return plans

    @cached_property
    def what(self) -> dict[str, Any]:
        """What decides the numbers, as plain data."""
        model = self.blank
        described = {
            "recipe": self.recipe.name,
            "settings": asdict(self.settings),
            "changed": changed(self.settings, self.recipe.settings)
            | {f"model.{k}": v for k, v in self.model.items()},
            "model": {
                "name": self.recipe.model,
                "config": asdict(model.config),  # type: ignore[call-overload]
                "parameters": sum(p.numel() for p in model.parameters()),
            },
            "seeds": list(self.seeds),
            "data": _fingerprint_of_folder(self.folder),
            "device": self.device,
            "precision": self.hardware.precision,
            "torch": str(torch.__version__),
        }
        if self.arms:
            described["of_arms"] = {
                name: {"settings": changed(plan.settings, self.settings), "model": plan.what["model"]}
                for name, plan in self.arms.items()
            }
        return dict(json.loads(json.dumps(described, default=_name_of)))

    @cached_property
    def description(self) -> dict[str, Any]:
        """The part of the result that is known before the run."""
        recipe, what = self.recipe, self.what
        return what | {
            "title": recipe.title,
            "paper": recipe.paper,
            "notes": recipe.notes,
            "metric": asdict(recipe.metric),
            "measured": recipe.measure is not None,
            "fingerprint": hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest(),
            "command": self.command,
            "is_default": not what["changed"]
            and self.seeds == recipe.seeds
            and (self.folder is not None) == recipe.bar_with_data,
            "versions": versions(),
            "machine": machine(self.device) | {"threads": self.settings.threads or torch.get_num_threads()},
            "commit": git_commit(),
        }

    @property
    def command(self) -> str:
        """The command that makes this run; of the data's folder only the name: reports are shown around."""
        words = ["lamina", "reproduce", self.recipe.name]
        if self.seeds != self.recipe.seeds:
            words += ["--seed", ",".join(map(str, self.seeds))]
        for key, value in changed(self.settings, self.recipe.settings).items():
            words += ["--set", f"{key}={value}"]
        for key, value in self.model.items():
            words += ["--set", f"model.{key}={value}"]
        if self.folder is not None:
            words += ["--data", self.folder.name]
        for option, default in asdict(Hardware()).items():
            if (value := getattr(self.hardware, option)) != default:
                words += [f"--{option}", value]
        return shlex.join(words)


def reproduce_all(
    plans: Sequence[Plan],
    out: Path,
    *,
    restart: bool = False,
    deadline: float = math.inf,
    console: Console,
) -> Iterator[dict[str, Any]]:
    """Runs several plans as one command, and yields each result.

    A command that was stopped skips the plans that it has completed when it is given again; a command that
    was not begins all of them anew.

    Raises:
        RecipeError, OSError: as `reproduce`.
    """
    keys = [plan.description["fingerprint"] for plan in plans]
    note = out / f".unfinished-{hashlib.sha256(' '.join(keys).encode()).hexdigest()[:16]}.json"
    if restart:
        note.unlink(missing_ok=True)
    runs: dict[str, str] = read_json(note) or {}
    for index, (key, plan) in enumerate(zip(keys, plans, strict=True)):
        earlier = read_json(out / plan.recipe.name / runs[key] / "result.json") if key in runs else None
        if earlier is not None and earlier["complete"]:
            console.print(f"{plan.recipe.name}: done in {runs[key]}", soft_wrap=True)
            yield earlier
            continue
        if index and time.monotonic() >= deadline:
            return
        result = reproduce(plan, out, restart=restart, deadline=deadline, console=console)
        if result["complete"] and index + 1 < len(plans):
            write_json(note, runs := runs | {key: result["run"]})
        yield result
    if result["complete"]:
        note.unlink(missing_ok=True)


def reproduce(
    plan: Plan, out: Path, *, restart: bool = False, deadline: float = math.inf, console: Console
) -> dict[str, Any]:
    """Runs the plan, or what is left of it, and returns what `result.json` holds.

    Args:
        plan: what to run.
        out: the report's folder.
        restart: begins a new run, whatever is unfinished.
        deadline: on the monotonic clock; the epoch in which it falls is the last one.
        console: where to show progress.

    Raises:
        RecipeError: a checkpoint is damaged, or another process is at the same run.
        OSError: the disk is full, or the folder cannot be written.
    """
    name, metric = plan.recipe.name, plan.recipe.metric
    console.print(
        f"[bold]{name}[/]: {plan.recipe.title}; bar {metric.name} {metric.show_bar()}", soft_wrap=True
    )
    folder = None if restart else _unfinished(out / name, plan.description["fingerprint"])
    if folder is None:
        folder = _new_folder(out / name)
    else:
        console.print(f"continues the unfinished run {folder}", soft_wrap=True)
    with only_one_process(folder):
        result = _run(plan, folder, deadline, console)
    if result["complete"]:
        verdict = "reached" if result["met"] else "[bold]missed[/]"
        mean = f"{metric.show(result['value'])}, mean of {len(plan.seeds)} seeds"
        console.print(f"{name}: {metric.name} {mean}; bar {metric.show_bar()}: {verdict}", soft_wrap=True)
    return result


def _run(plan: Plan, folder: Path, deadline: float, console: Console) -> dict[str, Any]:
    metric = plan.recipe.metric
    done: dict[str, list[SeedResult]] = {name: [] for name in ("", *plan.arms)}
    in_time = True
    _write_result(folder, plan, done)
    for name, found in done.items():
        of_arm = plan.arms[name] if name else plan
        for seed in plan.seeds:
            seed_folder = (folder / "arms" / name if name else folder) / f"seed-{seed}"
            seed_folder.mkdir(parents=True, exist_ok=True)
            if (earlier := read_json(seed_folder / "result.json")) is not None:
                found.append(SeedResult(**earlier))
                continue
            if not in_time:
                return _write_result(folder, plan, done)
            of_seed = _one_seed(of_arm, seed, folder, seed_folder, deadline, console, name)
            if of_seed is None:
                return _write_result(folder, plan, done)
            write_json(seed_folder / "result.json", asdict(of_seed))
            found.append(of_seed)
            in_time = time.monotonic() < deadline
            _write_result(folder, plan, done)
            which = f"seed {seed}, {name}" if name else f"seed {seed}"
            console.print(f"  {which}: {metric.name} {metric.show(of_seed.value)}", soft_wrap=True)
    return _finish(folder, plan, done, console)


def _one_seed(
    plan: Plan, seed: int, run: Path, folder: Path, deadline: float, console: Console, arm: str
) -> SeedResult | None:
    """Trains or measures; None where the deadline came first."""
    recipe = plan.recipe
    if recipe.data is None:
        return measure_seed(recipe, plan.settings, seed)
    model = new_model(recipe, plan.model, seed)
    data = recipe.data(plan.settings, plan.folder)
    label = f"{arm}, seed {seed}" if arm else f"seed {seed}"
    trained = train_seed(
        recipe,
        model,
        plan.settings,
        data,
        seed,
        folder,
        hardware=plan.hardware,
        deadline=deadline,
        console=console,
        label=label,
    )
    if trained is not None and seed == plan.seeds[0] and not arm:
        _save_model(model, run / "model")
        getattr(data, "save", lambda folder: None)(run / "model")  # a tokenizer
    return trained


def _finish(folder: Path, plan: Plan, done: dict[str, list[SeedResult]], console: Console) -> dict[str, Any]:
    """Baselines, claims and pictures, once all is trained."""
    recipe, data, model = plan.recipe, None, None
    if recipe.data is not None:
        data = recipe.data(plan.settings, plan.folder)
        model = type(plan.blank).from_pretrained(folder / "model").eval()  # type: ignore[attr-defined]
    baselines = {}
    if data is not None and recipe.baselines:
        data.setup("fit")
        data.setup("test")
        baselines = {name: float(of(data)) for name, of in recipe.baselines.items()}
    arms = {name: tuple(found) for name, found in done.items() if name}
    outcome = Outcome(
        model=model,  # type: ignore[arg-type]
        data=data,  # type: ignore[arg-type]
        seeds=tuple(done[""]),
        arms=arms,
        baselines=baselines,
    )
    claims = _claims(recipe, outcome)
    for claim in claims:
        bar = Bar(**{f.name: claim[f.name] for f in fields(Bar)})
        verdict = "reached" if claim["met"] else "[bold]missed[/]"
        console.print(
            f"  {bar.name}: {bar.show(claim['value'])}; bar {bar.show_bar()}: {verdict}", soft_wrap=True
        )
    return _write_result(folder, plan, done, _draw(plan, folder, outcome), baselines, claims)


def _claims(recipe: Recipe, found: Comparison) -> list[dict[str, Any]]:
    claims = []
    for claim in recipe.claims:
        value = float(claim.value(found))
        bar = {f.name: getattr(claim, f.name) for f in fields(Bar)}
        claims.append(bar | {"value": value, "met": claim.met(value)})
    return claims


def _write_result(
    folder: Path,
    plan: Plan,
    done: dict[str, list[SeedResult]],
    pictures: dict[str, str] | None = None,
    baselines: dict[str, float] | None = None,
    claims: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Writes what is known so far; complete is what has its pictures too."""
    values = [result.value for result in done[""]]
    mean = statistics.fmean(values) if values else None
    reached = mean is not None and plan.recipe.metric.met(mean)
    result = plan.description | {
        "run": folder.name,
        "complete": pictures is not None,
        "value": mean,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "met": pictures is not None and reached and all(claim["met"] for claim in claims or []),
        "results": [asdict(result) for result in done[""]],
        "arms": {name: [asdict(result) for result in found] for name, found in done.items() if name},
        "baselines": baselines or {},
        "claims": claims or [],
        "minutes": sum(result.minutes for found in done.values() for result in found),
        "pictures": pictures or {},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(folder / "result.json", result)
    return result


def _draw(plan: Plan, folder: Path, outcome: Outcome) -> dict[str, str]:
    """Draws the recipe's pictures and returns caption -> file name."""
    files = {}
    for caption, draw in plan.recipe.figures.items():
        buffer = io.BytesIO()
        draw(outcome).savefig(buffer, format="png", dpi=150)
        files[caption] = f"{draw.__name__}.png"
        write_bytes(folder / files[caption], buffer.getvalue())
    return files


def _save_model(model: nn.Module, folder: Path) -> None:
    from safetensors import SafetensorError

    try:
        model.cpu().save_pretrained(folder)  # type: ignore[operator]
    except SafetensorError as error:  # it reports a full disk in words of its own
        raise OSError(errno.EIO, str(error), str(folder)) from error


def _unfinished(folder: Path, fingerprint: str) -> Path | None:
    """The newest run of this plan, if it is unfinished."""
    runs = sorted(folder.glob("*/result.json"), reverse=True)
    for path in runs:
        result = read_json(path)
        if result is not None and result.get("fingerprint") == fingerprint:
            return None if result.get("complete") else path.parent
    return None


def _new_folder(parent: Path) -> Path:
    time_stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
    for attempt in range(100):
        folder = parent / (time_stamp if attempt == 0 else f"{time_stamp}-{attempt + 1}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not folder.is_dir():
                raise
    raise RecipeError(f"too many runs begin at once in {parent}")


def _fingerprint_of_folder(folder: Path | None) -> str | None:
    """Names, sizes and times of the files: to read gigabytes for it would cost more than it is worth."""
    if folder is None:
        return None
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = (f"{p.relative_to(folder)} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _name_of(value: Any) -> str:
    """What stands in JSON for a part that a config holds, such as a class: its name, without an address."""
    return str(getattr(value, "__qualname__", type(value).__qualname__))

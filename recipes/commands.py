"""The commands of `lamina`. What a command needs is imported when it runs: help and lists are quick."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .errors import RecipeError
from .recipe import get_recipe, list_recipes
from .settings import override

REACHED, MISSED, UNFINISHED, INTERRUPTED = 0, 1, 3, 130

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Out = Annotated[Path, typer.Option(help="Folder of runs and report.")]


@app.callback()
def lamina() -> None:
    """The milestone attention papers: their models, assembled from layers, trained and measured."""


@app.command("list")
def list_command(
    models: Annotated[
        bool, typer.Option("--models", help="The models too, with their parameter counts.")
    ] = False,
) -> None:
    """Lists the recipes, with the paper, the metric and its bar."""
    console = Console()
    table = Table("recipe", "paper", "metric", "bar", box=None, pad_edge=False)
    for name in list_recipes():
        recipe = get_recipe(name)
        table.add_row(name, recipe.paper, recipe.metric.name, recipe.metric.show_bar())
    console.print(table)
    if models:
        console.print()
        console.print(_table_of_models())


@app.command()
def show(name: Annotated[str, typer.Argument(help="A model, or the recipe of one.")]) -> None:
    """Shows a model: its tree, shapes, parameters and FLOPs."""
    from .inspect import show_model

    show_model(get_recipe(name).model if name in list_recipes() else name, Console())


@app.command("info")
def info_command() -> None:
    """Shows versions, devices, and which kernels can run here, or why not."""
    from .inspect import info

    info(Console())


@app.command()
def reproduce(
    names: Annotated[
        list[str], typer.Argument(help="Recipes, as `lamina list` names them.", metavar="NAME...")
    ],
    seed: Annotated[
        list[str] | None, typer.Option(help="A seed, or several: 1,2,3. May be repeated.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A setting (epochs=5) or the model's (model.depth=4)."
        ),
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after the epoch in which this time is up.")
    ] = None,
    accelerator: Annotated[str, typer.Option(help="cpu, gpu, mps, ... as Lightning names them.")] = "auto",
    precision: Annotated[
        str, typer.Option(help="32-true, bf16-mixed, ... as Lightning names them.")
    ] = "32-true",
    data: Annotated[Path | None, typer.Option(help="The paper's data, where a recipe takes it.")] = None,
    out: Out = Path("report"),
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew beside an unfinished run.")] = False,
) -> int:
    """Trains and tests recipes, and writes the report.

    What was stopped or killed goes on, to the same bits, when the same command is given again.
    Exit status: 0 all bars reached, 1 one missed (or an error), 3 stopped by --max-minutes, 130 by Ctrl-C.
    """
    console = Console(highlight=False)
    recipes = [get_recipe(name) for name in dict.fromkeys(names)]
    seeds = _seeds(seed or [])
    changes = [override(recipe.settings, assignments or []) for recipe in recipes]

    from .report import write_report
    from .run import Plan, reproduce_all
    from .training import Hardware, minutes_from_now

    deadline = minutes_from_now(max_minutes)
    hardware = Hardware(accelerator=accelerator, precision=precision)
    plans = [  # all of them before the first is run: a mistake shows at once, not after an hour
        Plan(recipe=recipe, settings=settings, model=model, seeds=seeds, folder=data, hardware=hardware)
        for recipe, (settings, model) in zip(recipes, changes, strict=True)
    ]
    results: list[dict[str, Any]] = []
    try:
        for result in reproduce_all(plans, out, restart=restart, deadline=deadline, console=console):
            results.append(result)
            page = write_report(out)
    except KeyboardInterrupt:
        typer.echo("lamina: stopped; the same command continues after the last whole epoch", err=True)
        return INTERRUPTED
    console.print(f"report: {page}", soft_wrap=True)
    missed = [result["recipe"] for result in results if result["complete"] and not result["met"]]
    if missed:
        typer.echo(f"lamina: below the bar: {', '.join(missed)}", err=True)
        return MISSED
    if len(results) < len(plans) or not all(result["complete"] for result in results):
        typer.echo("lamina: the time is up; the same command continues after the last whole epoch", err=True)
        return UNFINISHED
    return REACHED


@app.command()
def report(
    out: Out = Path("report"),
    save: Annotated[
        bool,
        typer.Option(
            "--save", help="Also keep the newest complete results in recipes/results, to be committed."
        ),
    ] = False,
    docs: Annotated[
        bool,
        typer.Option("--docs", help="Write the docs' pages of results and speeds from the committed files."),
    ] = False,
) -> None:
    """Writes the report again from the results in the folder."""
    from .kernel_table import write_kernel_table
    from .report import save_results, write_replications, write_report
    from .speed import write_speed

    console = Console(soft_wrap=True, highlight=False)
    if save or not docs:
        console.print(f"report: {write_report(out)}")
    if save:
        for path in save_results(out):
            console.print(f"saved: {path}")
    if docs:
        console.print(f"page: {write_replications()}")
        console.print(f"page: {write_speed()}")
        console.print(f"page: {write_kernel_table()}")


def _seeds(texts: list[str]) -> tuple[int, ...]:
    words = [word.strip() for text in texts for word in text.split(",")]
    try:
        seeds = tuple(dict.fromkeys(int(word) for word in words))
    except ValueError:
        raise RecipeError(f"--seed takes whole numbers such as 1,2,3, got {','.join(texts)!r}") from None
    if any(not 0 <= seed < 2**32 for seed in seeds):
        raise RecipeError(f"--seed takes numbers from 0 to 2^32 - 1, got {','.join(texts)!r}")
    return seeds


def _table_of_models() -> Table:
    from ..models import create_model, list_models

    table = Table("model", "parameters", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name in list_models():
        table.add_row(name, f"{create_model(name, device='meta').num_parameters():,}")
    return table

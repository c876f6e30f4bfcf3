"""The command line: `lamina`, or `python -m lamina`."""

import sys

EXTRAS = {"jinja2", "lightning", "matplotlib", "rich", "sklearn", "torchmetrics", "typer"}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit status. What the user can mend is one line on stderr.

    Args:
        arguments: the words after `lamina`; those of the process where it is None.
    """
    try:
        return _run(arguments)
    except ImportError as error:
        if "lamina[recipes]" in str(error):  # it says so itself
            return _fail(str(error))
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        return _fail(f'this command needs {missing}: pip install "lamina[recipes]"')


def _run(arguments: list[str] | None) -> int:
    from .recipes.commands import app
    from .recipes.errors import RecipeError

    try:
        # Not standalone: typer would draw a box around an error, and print a traceback for the rest.
        return app(args=arguments, prog_name="lamina", standalone_mode=False) or 0
    except _misuse() as error:
        message = error.format_message()  # type: ignore[attr-defined]
        return _fail(message, status=2) if message else 2  # without a message it has shown the help
    except RecipeError as error:
        return _fail(str(error))
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}; earlier results are as they were")


def _misuse() -> type[Exception]:
    """The error of every wrong option, of which typer exports a subclass alone."""
    import typer

    return typer.BadParameter.__mro__[1]


def _fail(message: str, status: int = 1) -> int:
    print(f"lamina: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())

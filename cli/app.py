"""The application: its commands, and how errors reach the user."""

import logging
import sys
import warnings
from typing import Annotated, Any

import typer

from bnpatch import __version__
from bnpatch.core.errors import BnpatchError, BnpatchWarning

from . import bench, demo, evaluate, export, fine_tune, inspect, tune

app = typer.Typer(
    name="bnpatch",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("inspect")(inspect.inspect)
app.command("tune-alpha")(tune.tune_alpha)
app.command("fine-tune")(fine_tune.fine_tune)
app.command("evaluate")(evaluate.evaluate)
app.command("export")(export.export)
app.command("bench")(bench.bench)
app.command("demo")(demo.demo)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def bnpatch(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and the warnings of libraries.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Fix the normalization layers of vision models that are already trained.

    Each example gets a weight alpha in the statistics that normalize it; alpha is tuned on a
    validation set. No retraining.

    [bold]MODEL[/bold] is a checkpoint file (.pt, .pth, .pth.tar, .ckpt, .safetensors), .onnx, or a name:
    timm:resnet50.a1_in1k, torchvision:resnet50, hf-hub:org/name.

    Example: [bold]bnpatch tune-alpha model.pt --data val/[/bold]
    """
    if not debug:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)  # what libraries log, retries of a hub without network for one
    warnings.simplefilter("always", BnpatchWarning)
    warnings.showwarning = _show_warning


def run() -> None:
    """Run a command; exit 0 when done, 1 when a check failed, 2 for bad usage or bad input."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(["--debug", *arguments] if debug else arguments, prog_name="bnpatch")
    except BnpatchError as error:
        _fail(str(error), debug, error.exit_code)
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        _fail(
            f"{type(error).__name__}: {first_line}; this is a defect of bnpatch, please report what "
            "bnpatch --debug shows",
            debug,
        )


def _fail(message: str, debug: bool, code: int = 2) -> None:
    if debug:
        raise
    typer.echo(f"error: {message}", err=True)
    sys.exit(code)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    ours = issubclass(category, BnpatchWarning)
    typer.echo(f"warning: {message}" if ours else f"{category.__name__}: {message}", err=True)

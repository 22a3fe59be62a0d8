"""The application: its commands, and how errors reach the user."""

import _thread
import logging
import os
import platform
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from bnpatch import __version__
from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.core.text import visible

from . import bench, demo, evaluate, export, fine_tune, inspect, robustness, tune
from .console import WARNED

app = typer.Typer(
    name="bnpatch",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("inspect")(inspect.inspect)
app.command("tune-alpha")(tune.tune_alpha)
app.command("fine-tune")(fine_tune.fine_tune)
app.command("evaluate")(evaluate.evaluate)
app.command("robustness")(robustness.robustness)
app.command("export")(export.export)
app.command("bench")(bench.bench)
app.command("demo")(demo.demo)


def _version(asked: bool) -> None:
    """Print what a report of a defect should say: the versions, and the device that computes."""
    if asked:
        import onnxruntime
        import torch

        from bnpatch.core.io import pick_device

        typer.echo(f"bnpatch {__version__}, Python {platform.python_version()}")
        typer.echo(f"torch {torch.__version__} on {pick_device()}")
        typer.echo(f"onnxruntime {onnxruntime.__version__}")
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
    WARNED.clear()
    if debug:
        logging.basicConfig()
    else:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)  # hides what libraries log, such as a hub's retries without network
    warnings.simplefilter("always", BnpatchWarning)
    warnings.showwarning = _show_warning


def run() -> None:
    """Run a command; exit 0 when done, 1 when a check failed, 2 for bad usage or bad input.

    SIGTERM does what Ctrl-C does, and then the exit code is 143.
    """
    # torch asks Linux for large pages then, so that large feature maps cost fewer page faults. It reads this
    # before its first large tensor.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with _terminable() as came:
        try:
            _run()
        except SystemExit:
            if came:
                raise SystemExit(128 + signal.SIGTERM) from None
            raise


@contextmanager
def _terminable() -> Iterator[list[int]]:
    """Take SIGTERM for Ctrl-C while the context lasts, so that a command ends as it does then.

    Neither is lost where it comes in a destructor. Where the program that called this has other plans for
    SIGTERM, they stand.

    Yields:
        The signals that came.
    """
    came: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield came
        return
    before, report = signal.getsignal(signal.SIGINT), sys.unraisablehook

    def again(what: "sys.UnraisableHookArgs") -> None:
        if issubclass(what.exc_type, KeyboardInterrupt):  # in a destructor, which can't pass it on
            threading.Timer(0.1, _interrupt_main).start()
        else:
            report(what)

    def terminate(number: int, frame: object) -> None:
        came.append(number)
        signal.raise_signal(signal.SIGINT)  # whoever puts off interrupts puts this off, too

    def interrupt(number: int, frame: object) -> None:
        if came:
            raise KeyboardInterrupt

    sys.unraisablehook = again
    signal.signal(signal.SIGTERM, terminate)
    if before is signal.SIG_IGN:  # as in the background jobs of a script: Ctrl-C is not for them
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield came
    finally:
        sys.unraisablehook = report
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if before is signal.SIG_IGN:
            signal.signal(signal.SIGINT, before)


def _interrupt_main() -> None:
    """Interrupt the main thread, also where it sleeps or waits for a file."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:  # Windows
        _thread.interrupt_main()


def _run() -> None:
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(["--debug", *arguments] if debug else arguments, prog_name="bnpatch")
    except BnpatchError as error:
        _fail(str(error), debug, error.exit_code)
    except Exception as error:  # any other error is a defect, which is said in one line, too
        first_line = (str(error).splitlines() or [""])[0]
        _fail(
            f"{type(error).__name__}: {first_line}; this is a defect of bnpatch, please report what "
            "bnpatch --debug shows",
            debug,
        )


def _fail(message: str, debug: bool, code: int = 2) -> None:
    if debug:
        raise
    typer.echo(f"error: {visible(message)}", err=True)
    sys.exit(code)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    ours = issubclass(category, BnpatchWarning)
    if ours:
        WARNED.append(str(message))
    line = visible(str(message), keep="" if ours else "\n")
    typer.echo(f"warning: {line}" if ours else f"{category.__name__}: {line}", err=True)

"""Options that several commands share, and what they add up to."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bnpatch.model import TorchModel
    from bnpatch.onnx_model import OnnxModel

_IMAGES = "How images become inputs (default: the model's own)"
_LOADING = "Loading"
_DATA = "Data"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A checkpoint file, or timm:NAME, torchvision:NAME, hf-hub:ORG/NAME.",
        show_default=False,
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        help="Architecture of a checkpoint file, if its tensors don't tell.", rich_help_panel=_LOADING
    ),
]
UseEma = Annotated[
    bool, typer.Option("--use-ema", help="Take the averaged weights.", rich_help_panel=_LOADING)
]
UnsafeLoad = Annotated[
    bool,
    typer.Option(
        "--unsafe-load",
        help="Unpickle whole modules. This can run any code that the file's author wants.",
        rich_help_panel=_LOADING,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, cuda:1, mps. Default: the accelerator if there is one.", rich_help_panel=_LOADING
    ),
]
Amp = Annotated[
    bool,
    typer.Option("--amp", help="Compute in half precision where that is safe.", rich_help_panel=_LOADING),
]

OutputName = Annotated[
    str | None,
    typer.Option("--output-name", help="Which output of an ONNX file to read.", rich_help_panel=_LOADING),
]

ImgSize = Annotated[int | None, typer.Option(min=1, help="Side in pixels.", rich_help_panel=_IMAGES)]
Mean = Annotated[str | None, typer.Option(help="E.g. 0.485,0.456,0.406.", rich_help_panel=_IMAGES)]
Std = Annotated[str | None, typer.Option(help="E.g. 0.229,0.224,0.225.", rich_help_panel=_IMAGES)]
CropPct = Annotated[
    float | None,
    typer.Option(
        min=0.01, max=1, help="Side of the crop over that of the resized image.", rich_help_panel=_IMAGES
    ),
]
Interpolation = Annotated[
    str | None, typer.Option(help="bilinear, bicubic, nearest, lanczos.", rich_help_panel=_IMAGES)
]

Data = Annotated[
    str,
    typer.Option(
        help="A folder with a folder of images per class, an .npz file with x and y, or a name of timm's.",
        show_default=False,
    ),
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", "-b", min=1, help="Images at a time.", rich_help_panel=_DATA)
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", "-j", min=0, help="Decoding processes. Default: what suits.", rich_help_panel=_DATA
    ),
]
ClassMap = Annotated[
    Path | None,
    typer.Option(
        help="File with the class folders, one a line in the order of the outputs.", rich_help_panel=_DATA
    ),
]
CacheGb = Annotated[
    float, typer.Option(min=0, help="Memory for decoded images, in GB.", rich_help_panel=_DATA)
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Stop at the first image that can't be read.", rich_help_panel=_DATA)
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use at most so many images.", rich_help_panel=_DATA)]
DataRoot = Annotated[str | None, typer.Option(help="Folder of a named data set.", rich_help_panel=_DATA)]
Split = Annotated[str, typer.Option(help="Split of a named data set.", rich_help_panel=_DATA)]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and everything else on stderr.")]


def open_model(
    model: str,
    arch: str | None,
    use_ema: bool,
    unsafe_load: bool,
    device: str | None,
    amp: bool = False,
    output: str | None = None,
    **preprocessing: Any,
) -> "TorchModel | OnnxModel":
    """Load the model that the options describe, and say what there is to know about it."""
    from bnpatch import load

    for name in ("mean", "std"):
        if isinstance(preprocessing.get(name), str):
            preprocessing[name] = _numbers(preprocessing[name], f"--{name}")
    loaded = load(
        model,
        arch=arch,
        use_ema=use_ema,
        unsafe_load=unsafe_load,
        output=output,
        device=device,
        amp=amp,
        preprocessing=preprocessing,
    )
    say(f"model          {loaded.name}" + (f" ({loaded.arch})" if loaded.arch else ""))
    for note in loaded.notes:
        say(f"               {note}")
    say(f"preprocessing  {loaded.preprocessing}")
    say(f"               from {loaded.preprocessing.source}")
    return loaded


def say(text: str) -> None:
    """Tell a person something that is not the result."""
    typer.echo(text, err=True)


def skipped(reasons: Mapping[str, str]) -> str:
    """Say which images were left out, the first few by name."""
    if not reasons:
        return ""
    names = ", ".join(list(reasons)[:3]) + (", ..." if len(reasons) > 3 else "")
    return f", {len(reasons)} unreadable and left out ({names})"


def _numbers(text: str, option: str) -> tuple[float, ...]:
    from bnpatch.errors import BnpatchError

    try:
        numbers = tuple(float(part) for part in text.replace(" ", ",").split(",") if part)
        if not numbers:
            raise ValueError
        return numbers
    except ValueError:
        raise BnpatchError(f"{option} {text!r} is not a list of numbers", "write 0.485,0.456,0.406") from None

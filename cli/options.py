"""Options that several commands share, in groups that a command takes as one argument each."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

import bnpatch
from bnpatch.core.errors import BnpatchError

from .console import say, some

if TYPE_CHECKING:
    from bnpatch.core.recipe import Recipe
    from bnpatch.data.dataset import Examples
    from bnpatch.models.onnx_model import OnnxModel
    from bnpatch.models.torch_model import TorchModel


def panel(title: str) -> Callable[..., Any]:
    """Make a function that makes options in a panel of the help, see ``typer.Option``."""
    return functools.partial(typer.Option, rich_help_panel=title)


_loading, _data = panel("Loading"), panel("Data")
_images = panel("How images become inputs (default: the model's own)")

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A checkpoint, .onnx or .pt2 file, or timm:NAME, torchvision:NAME, hf-hub:ORG/NAME.",
        show_default=False,
    ),
]
Data = Annotated[
    str,
    typer.Option(
        help="A folder with a folder of images per class, an .npz file with x and y, or a name of timm's.",
        show_default=False,
    ),
]
GroupBy = Annotated[
    str | None,
    _data(
        metavar="parent|REGEX|CSV",
        help="Which images belong together (frames of a video, views, a patient): parent, the folder below "
        "the class folder; a regular expression, whose first parenthesis in the file name is the group; "
        "or a .csv file of name,group.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and everything else on stderr.")]


@dataclass(frozen=True)
class Loading:
    """How to load a model."""

    arch: Annotated[
        str | None,
        _loading(help="Architecture of a checkpoint file, if its tensors don't tell."),
    ] = None
    use_ema: Annotated[bool, _loading("--use-ema", help="Take the averaged weights.")] = False
    unsafe_load: Annotated[
        bool,
        _loading(
            "--unsafe-load",
            help="Unpickle whole modules. This can run any code that the file's author wants.",
        ),
    ] = False
    output_name: Annotated[
        str | None,
        _loading(help="Name or number of the output with the classes, if there are several."),
    ] = None
    device: Annotated[
        str | None,
        _loading(help="cpu, cuda, cuda:1, mps. Default: the accelerator if there is one."),
    ] = None
    amp: Annotated[bool, _loading("--amp", help="Compute in half precision where that is safe.")] = False
    include_1x1: Annotated[
        bool,
        _loading(
            "--weigh-single-values",
            help="Weigh examples also where one has a single value per channel. Rarely of use.",
        ),
    ] = False
    img_size: Annotated[str | None, _images(help="Side in pixels, or height,width: 48,192.")] = None
    mean: Annotated[str | None, _images(help="E.g. 0.485,0.456,0.406.")] = None
    std: Annotated[str | None, _images(help="E.g. 0.229,0.224,0.225.")] = None
    crop_pct: Annotated[
        float | None,
        _images(min=0.01, max=1, help="Side of the crop over that of the resized image."),
    ] = None
    interpolation: Annotated[str | None, _images(help="bilinear, bicubic, nearest, lanczos.")] = None

    def open(self, model: str, recipe: "Recipe | None" = None) -> "TorchModel | OnnxModel":
        """Load a model, and say what there is to know about it.

        A recipe was found with a certain preprocessing, or size of inputs, and output, which are used unless
        options ask for others.
        """
        from bnpatch.data.preprocessing import Preprocessing
        from bnpatch.models.foreign import reading

        provenance = recipe.provenance if recipe is not None else {}
        loaded = bnpatch.load(
            model,
            arch=self.arch,
            use_ema=self.use_ema,
            unsafe_load=self.unsafe_load,
            output=self.output_name or provenance.get("output") or None,
            device=self.device,
            amp=self.amp,
            include_1x1=self.include_1x1,
            preprocessing={
                "img_size": _size(self.img_size),
                "mean": _numbers(self.mean, "--mean"),
                "std": _numbers(self.std, "--std"),
                "crop_pct": self.crop_pct,
                "interpolation": self.interpolation,
            },
        )
        asked = (self.img_size, self.mean, self.std, self.crop_pct, self.interpolation)
        if all(value is None for value in asked):
            with reading(Path("the recipe"), "one of bnpatch", "make it again with bnpatch tune-alpha"):
                if stored := provenance.get("preprocessing"):
                    loaded.preprocessing = Preprocessing.from_json(stored, "the recipe")
                elif shape := (provenance.get("data") or {}).get("input_shape"):
                    taken = loaded.preprocessing.for_inputs(shape, "the recipe's data")
                    loaded.preprocessing = taken.checked()
        say(f"model          {loaded.name}" + (f" ({loaded.arch})" if loaded.arch else ""))
        for note in loaded.notes:
            say(f"               {note}")
        say(f"preprocessing  {loaded.preprocessing}")
        say(f"               from {loaded.preprocessing.source}")
        return loaded


@dataclass(frozen=True)
class Reading:
    """How to read a data set."""

    batch_size: Annotated[int, _data("--batch-size", "-b", min=1, help="Images at a time.")] = 64
    workers: Annotated[
        int | None,
        _data(
            "--workers", "-j", min=0, help="Decoding threads; in training, processes. Default: what suits."
        ),
    ] = None
    class_map: Annotated[
        Path | None,
        _data(help="File with the class folders, one a line in the order of the outputs."),
    ] = None
    cache_gb: Annotated[float, _data(min=0, help="Memory for decoded images, in GB.")] = 4.0
    strict: Annotated[bool, _data("--strict", help="Stop at the first image that can't be read.")] = False
    limit: Annotated[int | None, _data(min=1, help="Use at most so many images.")] = None
    data_root: Annotated[str | None, _data(help="Folder of a named data set.")] = None
    split: Annotated[str, _data(help="Split of a named data set, or of MedMNIST's .npz.")] = "validation"
    bit_depth: Annotated[
        int | None,
        _data(min=8, max=32, help="Bits of 16- and 32-bit images. Default: what a sample needs."),
    ] = None

    def settings(self, model: "TorchModel | OnnxModel") -> dict[str, Any]:
        """Keyword arguments for :func:`bnpatch.open_examples`."""
        return {
            "class_map": self.class_map,
            "data_root": self.data_root,
            "split_name": self.split,
            "bit_depth": self.bit_depth,
            "limit": self.limit,
            "num_workers": self.workers,
            "cache_gb": self.cache_gb,
            "strict": self.strict,
            "pin_memory": model.device.type == "cuda",
        }

    def open(self, data: str, model: "TorchModel | OnnxModel", seed: int, **options: Any) -> "Examples":
        """Open a data set for a model; see :func:`bnpatch.open_examples` for further options."""
        return bnpatch.open_examples(data, model, seed=seed, **self.settings(model), **options)


def say_assumed_order(model: "TorchModel | OnnxModel", reading: Reading, was_named: bool) -> None:
    """Say in which order class folders were taken, where nothing names the classes."""
    if was_named or reading.class_map is not None or not model.class_names:
        return
    order = some([f"{index} = {name}" for index, name in enumerate(model.class_names)])
    say(f"classes        the model names none, so folders are taken in order: {order} (else --class-map)")


def groups_of(rule: str | None) -> "Callable[[str], str | None] | None":
    """Return what ``--group-by`` says, as a function from the name of a file to its group."""
    from bnpatch.data.groups import group_by

    return None if rule is None else group_by(rule)


def in_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take a group of options as one argument: Typer gets to see every field."""
    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in signature.parameters.values():
        group = parameter.annotation
        if not is_dataclass(group):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = group
        hints = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=hints[field.name],
            )
            for field in fields(group)
        ]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _size(text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    sides = [int(part) for part in text.split(",") if part.strip().isascii() and part.strip().isdecimal()]
    if len(sides) != text.count(",") + 1 or len(sides) > 2 or not all(sides):
        raise BnpatchError(
            f"--img-size {text!r} is not a size in pixels", "write one side, 224, or height,width: 48,192"
        )
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.replace(" ", ",").split(",") if part)
        if not numbers:
            raise ValueError
        return numbers
    except ValueError:
        raise BnpatchError(f"{option} {text!r} is not a list of numbers", "write 0.485,0.456,0.406") from None

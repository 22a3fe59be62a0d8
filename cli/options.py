"""Options that several commands share, in groups that a command takes as one argument each."""

import functools
import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from bnpatch.core.recipe import Recipe
    from bnpatch.data.dataset import Examples
    from bnpatch.models.onnx_model import OnnxModel
    from bnpatch.models.torch_model import TorchModel

#: The verdict in a recipe that a search has written on the way.
UNFINISHED = "none: the search has not ended"

_LOADING = "Loading"
_DATA = "Data"
_IMAGES = "How images become inputs (default: the model's own)"

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
    typer.Option(
        metavar="parent|REGEX|CSV",
        help="Which images belong together (frames of a video, views, a patient): parent, the folder below "
        "the class folder; a regular expression, whose first parenthesis in the file name is the group; "
        "or a .csv file of name,group.",
        show_default=False,
        rich_help_panel=_DATA,
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and everything else on stderr.")]


def _option(*names: str, panel: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, **settings)


@dataclass(frozen=True)
class Loading:
    """How to load a model."""

    arch: Annotated[
        str | None,
        _option(help="Architecture of a checkpoint file, if its tensors don't tell.", panel=_LOADING),
    ] = None
    use_ema: Annotated[bool, _option("--use-ema", help="Take the averaged weights.", panel=_LOADING)] = False
    unsafe_load: Annotated[
        bool,
        _option(
            "--unsafe-load",
            help="Unpickle whole modules. This can run any code that the file's author wants.",
            panel=_LOADING,
        ),
    ] = False
    output_name: Annotated[
        str | None,
        _option(help="Name or number of the output with the classes, if there are several.", panel=_LOADING),
    ] = None
    device: Annotated[
        str | None,
        _option(help="cpu, cuda, cuda:1, mps. Default: the accelerator if there is one.", panel=_LOADING),
    ] = None
    amp: Annotated[
        bool, _option("--amp", help="Compute in half precision where that is safe.", panel=_LOADING)
    ] = False
    include_1x1: Annotated[
        bool,
        _option(
            "--weigh-single-values",
            help="Weigh examples also where one has a single value per channel. Rarely of use.",
            panel=_LOADING,
        ),
    ] = False
    img_size: Annotated[
        str | None, _option(help="Side in pixels, or height,width: 48,192.", panel=_IMAGES)
    ] = None
    mean: Annotated[str | None, _option(help="E.g. 0.485,0.456,0.406.", panel=_IMAGES)] = None
    std: Annotated[str | None, _option(help="E.g. 0.229,0.224,0.225.", panel=_IMAGES)] = None
    crop_pct: Annotated[
        float | None,
        _option(min=0.01, max=1, help="Side of the crop over that of the resized image.", panel=_IMAGES),
    ] = None
    interpolation: Annotated[
        str | None, _option(help="bilinear, bicubic, nearest, lanczos.", panel=_IMAGES)
    ] = None

    def open(self, model: str, recipe: "Recipe | None" = None) -> "TorchModel | OnnxModel":
        """Load a model, and say what there is to know about it.

        A recipe was found with a certain preprocessing and output, which are used unless options ask for
        others.
        """
        from bnpatch import load
        from bnpatch.data.preprocessing import Preprocessing

        provenance = recipe.provenance if recipe is not None else {}
        loaded = load(
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
        stored = provenance.get("preprocessing")
        if stored and all(value is None for value in asked):
            loaded.preprocessing = Preprocessing.from_json(stored, "the recipe")
        say(f"model          {loaded.name}" + (f" ({loaded.arch})" if loaded.arch else ""))
        for note in loaded.notes:
            say(f"               {note}")
        say(f"preprocessing  {loaded.preprocessing}")
        say(f"               from {loaded.preprocessing.source}")
        return loaded


@dataclass(frozen=True)
class Reading:
    """How to read a data set."""

    batch_size: Annotated[
        int, _option("--batch-size", "-b", min=1, help="Images at a time.", panel=_DATA)
    ] = 64
    workers: Annotated[
        int | None,
        _option(
            "--workers",
            "-j",
            min=0,
            help="Decoding threads; in training, processes. Default: what suits.",
            panel=_DATA,
        ),
    ] = None
    class_map: Annotated[
        Path | None,
        _option(help="File with the class folders, one a line in the order of the outputs.", panel=_DATA),
    ] = None
    cache_gb: Annotated[float, _option(min=0, help="Memory for decoded images, in GB.", panel=_DATA)] = 4.0
    strict: Annotated[
        bool, _option("--strict", help="Stop at the first image that can't be read.", panel=_DATA)
    ] = False
    limit: Annotated[int | None, _option(min=1, help="Use at most so many images.", panel=_DATA)] = None
    data_root: Annotated[str | None, _option(help="Folder of a named data set.", panel=_DATA)] = None
    split: Annotated[str, _option(help="Split of a named data set, or of MedMNIST's .npz.", panel=_DATA)] = (
        "validation"
    )
    bit_depth: Annotated[
        int | None,
        _option(
            min=8, max=32, help="Bits of 16- and 32-bit images. Default: what a sample needs.", panel=_DATA
        ),
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
        from bnpatch import open_examples

        return open_examples(data, model, seed=seed, **self.settings(model), **options)


def say_assumed_order(model: "TorchModel | OnnxModel", reading: Reading, was_named: bool) -> None:
    """Say in which order class folders were taken, where nothing names the classes."""
    if was_named or reading.class_map is not None or not model.class_names:
        return
    some = ", ".join(f"{index} = {name}" for index, name in enumerate(model.class_names[:3]))
    more = ", ..." if len(model.class_names) > 3 else ""
    say(
        f"classes        the model names none, so folders are taken in order: {some}{more} (else --class-map)"
    )


def groups_of(rule: str | None) -> "Callable[[str], str | None] | None":
    """What ``--group-by`` says, as a function from the name of a file to its group."""
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


def say(text: str) -> None:
    """Tell a person something that is not the result, in one line; once, however many processes run."""
    if os.environ.get("RANK", "0") == "0":
        put(text, err=True)


def put(text: str = "", *, err: bool = False) -> None:
    """Print one line; what would act on the terminal in names of files, classes and models is escaped."""
    from bnpatch.core.text import visible

    line = text.strip("\n")  # blank lines before and after it are meant
    typer.echo(text.replace(line, visible(line)) if line else text, err=err)


def recipe_of(path: Path | None) -> "Recipe | None":
    """Read the recipe that an option names, and say what its search concluded."""
    from bnpatch.core.errors import BnpatchWarning
    from bnpatch.core.recipe import Recipe

    if path is None:
        return None
    recipe = Recipe.load(path)
    if verdict := recipe.provenance.get("verdict"):
        metric = recipe.provenance.get("metric")
        say(f"recipe         verdict of its search: {verdict}" + (f" ({metric})" if metric else ""))
    if verdict == UNFINISHED:
        warnings.warn(
            f"the search that wrote {path} has not ended: the weights are its best so far, and no verdict "
            "says what they are worth",
            BnpatchWarning,
            stacklevel=2,
        )
    return recipe


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few names."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def skipped(reasons: Mapping[str, str]) -> str:
    """Say which images were left out, the first few by name."""
    if not reasons:
        return ""
    return f"; left out, because they can't be read: {len(reasons)} ({some(list(reasons))})"


def _size(text: str | None) -> int | tuple[int, int] | None:
    from bnpatch.core.errors import BnpatchError

    if text is None:
        return None
    sides = [int(part) for part in text.split(",") if part.strip().isascii() and part.strip().isdecimal()]
    if len(sides) != text.count(",") + 1 or len(sides) > 2 or not all(sides):
        raise BnpatchError(
            f"--img-size {text!r} is not a size in pixels", "write one side, 224, or height,width: 48,192"
        )
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    from bnpatch.core.errors import BnpatchError

    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.replace(" ", ",").split(",") if part)
        if not numbers:
            raise ValueError
        return numbers
    except ValueError:
        raise BnpatchError(f"{option} {text!r} is not a list of numbers", "write 0.485,0.456,0.406") from None

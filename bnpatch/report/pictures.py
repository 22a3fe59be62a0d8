"""Pictures of examples in the page: what the model is given, what the patch changes, what is strange."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from bnpatch.report.text import class_name
from bnpatch.search.result import TuneResult
from bnpatch.search.thumbnails import Pixels, Sample

# Up to this many pixels a side, a picture is enlarged by pixels and stored without loss.
_TINY = 48


@dataclass(frozen=True)
class Picture:
    """A picture of an example.

    Attributes:
        source: the picture itself, as a data URI.
        name: name of the example.
        lines: what stands below it.
        is_tiny: whether it has so few pixels that they are shown as squares.
    """

    source: str
    name: str
    lines: Sequence[str]
    is_tiny: bool


@dataclass(frozen=True)
class Gallery:
    """Pictures under a heading.

    Attributes:
        heading: the heading.
        pictures: the pictures.
        text: what stands above them.
    """

    heading: str
    pictures: Sequence[Picture]
    text: str = ""


def galleries(result: TuneResult, names: Sequence[str] | None) -> list[Gallery]:
    """Make pictures of the inputs, of the examples that became right and wrong, and of the farthest.

    Args:
        result: the result of a search.
        names: names of the classes.
    """
    samples = result.samples
    far = (
        f"Of {samples.num_measured:,} held-out examples, these lie farthest from the running statistics of "
        "the first norm layer (distance 0: like the images of training). Broken files and images of "
        "something else are found here."
    )
    every = [
        ("What the model is given", samples.inputs, ""),
        ("Wrong before, right now", samples.gained, ""),
        ("Right before, wrong now", samples.lost, ""),
        ("Farthest from the images of training", samples.farthest, far),
    ]
    return [
        Gallery(heading, [_picture(sample, names, some is not samples.inputs) for sample in some], about)
        for heading, some, about in every
        if some
    ]


def class_galleries(result: TuneResult, names: Sequence[str] | None) -> list[Gallery]:
    """Make pictures of the examples whose answers changed, of the classes that change most.

    Args:
        result: the result of a search.
        names: names of the classes.
    """
    return [
        Gallery(class_name(names, target), [_picture(sample, names, True) for sample in some])
        for target, some in result.samples.by_class.items()
        if some
    ]


def _picture(sample: Sample, names: Sequence[str] | None, is_detailed: bool) -> Picture:
    lines = [] if sample.target is None else [class_name(names, sample.target)]
    if is_detailed and sample.answers is not None and sample.confidences is not None:
        for when, answer, confidence in zip(
            ("as it is", "patched"), sample.answers, sample.confidences, strict=True
        ):
            lines.append(f"{when}: {class_name(names, answer)} ({100 * confidence:.0f}%)")
    if is_detailed and sample.distance is not None:
        lines.append(f"distance {sample.distance:.2g}")
    return Picture(_data_uri(sample.pixels), sample.name, lines, max(sample.pixels.shape) <= _TINY)


def _data_uri(pixels: Pixels) -> str:
    content = io.BytesIO()
    kind = "png" if max(pixels.shape) <= _TINY else "jpeg"
    Image.fromarray(pixels).save(content, kind, **({} if kind == "png" else {"quality": 85}))
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode('ascii')}"

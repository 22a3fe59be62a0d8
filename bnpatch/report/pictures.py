"""Pictures of examples in the page: what the model is given, and which answers the patch changes."""

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


def galleries(result: TuneResult, names: Sequence[str] | None) -> list[tuple[str, list[Picture]]]:
    """Make headings and pictures of the inputs, and of the examples that became right and wrong.

    Args:
        result: the result of a search.
        names: names of the classes.
    """
    samples = result.samples
    every = [
        ("What the model is given", samples.inputs, False),
        ("Wrong before, right now", samples.gained, True),
        ("Right before, wrong now", samples.lost, True),
    ]
    return [
        (heading, [_picture(sample, names, has_answers) for sample in some])
        for heading, some, has_answers in every
        if some
    ]


def _picture(sample: Sample, names: Sequence[str] | None, has_answers: bool) -> Picture:
    lines = [] if sample.target is None else [class_name(names, sample.target)]
    if has_answers and sample.answers is not None and sample.confidences is not None:
        for when, answer, confidence in zip(
            ("as it is", "patched"), sample.answers, sample.confidences, strict=True
        ):
            lines.append(f"{when}: {class_name(names, answer)} ({100 * confidence:.0f}%)")
    return Picture(_data_uri(sample.pixels), sample.name, lines, max(sample.pixels.shape) <= _TINY)


def _data_uri(pixels: Pixels) -> str:
    content = io.BytesIO()
    kind = "png" if max(pixels.shape) <= _TINY else "jpeg"
    Image.fromarray(pixels).save(content, kind, **({} if kind == "png" else {"quality": 85}))
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode('ascii')}"

"""What ``bnpatch inspect`` says about training, and about the range of normalized values."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from bnpatch.core.errors import BnpatchError
from bnpatch.core.text import counted

from . import options as opt
from .console import put, say, skipped, some

if TYPE_CHECKING:
    from bnpatch.evaluation.output_range import OutputRange
    from bnpatch.finetune.guidance import Technique
    from bnpatch.models.torch_model import TorchModel
    from bnpatch.nn.tracing import NormPaths

_DEFAULT_TRAIN_BATCH = 32


@dataclass(frozen=True)
class Advice:
    """What a torch model's structure, its training batch, and data say."""

    norm_layers: tuple[str, ...]
    unnormalized: frozenset[str] | None
    num_function_calls: int | None
    train_batch_size: int
    train_batch_source: str
    ranges: "Sequence[OutputRange] | None"

    @property
    def techniques(self) -> "tuple[Technique, ...]":
        """The paper's four things, judged."""
        from bnpatch.finetune.guidance import techniques

        reached = None if self.unnormalized is None else len(self.unnormalized)
        return techniques(self.train_batch_size, len(self.norm_layers), reached)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "unnormalized": None if self.unnormalized is None else sorted(self.unnormalized),
            "norms_by_function_calls": self.num_function_calls,
            "train_batch_size": self.train_batch_size,
            "train_batch_size_source": self.train_batch_source,
            "techniques": [asdict(technique) for technique in self.techniques],
            "output_ranges": None if self.ranges is None else [_range_as_json(r) for r in self.ranges],
        }


def advise(loaded: "TorchModel", data: str | None, asked: int | None, reading: opt.Reading) -> Advice:
    """Ask the model, and where there is data, run it."""
    batch = asked or loaded.train_batch_size or _DEFAULT_TRAIN_BATCH
    source = "as asked" if asked else "from the checkpoint" if loaded.train_batch_size else "assumed"
    norm_layers = tuple(norm_layer.name for norm_layer in loaded.inventory().norm_layers)
    ranges = _observe(loaded, data, batch, reading) if data is not None and norm_layers else None
    paths = _paths(loaded)
    unnormalized = None if paths is None else paths.unnormalized.intersection(norm_layers)
    calls = None if paths is None else paths.num_function_calls
    return Advice(norm_layers, unnormalized, calls, batch, source, ranges)


def _observe(
    loaded: "TorchModel", data: str, train_batch_size: int, reading: opt.Reading
) -> "Sequence[OutputRange]":
    from bnpatch.evaluation.output_range import output_ranges

    from .render import counter, progress_bar

    # The data is read once, so caching it would waste memory.
    examples = replace(reading, cache_gb=0.0).open(data, loaded, seed=0, labels="optional")
    with progress_bar() as progress:
        ranges = output_ranges(
            loaded,
            examples,
            train_batch_size=train_batch_size,
            batch_size=reading.batch_size,
            on_batch=counter(progress, "observing", len(examples)),
        )
    left_out = {examples.source.name(index): why for index, why in examples.skipped.items()}
    say(f"data           {counted(len(examples) - len(left_out), 'image')}{skipped(left_out)}")
    return ranges


def _paths(loaded: "TorchModel") -> "NormPaths | None":
    import torch

    from bnpatch.nn.tracing import norm_paths

    dtype = next((p.dtype for p in loaded.module.parameters() if p.is_floating_point()), torch.float32)
    example = torch.zeros(1, *loaded.preprocessing.input_size, device=loaded.device, dtype=dtype)
    try:
        return norm_paths(loaded.module, example)
    except BnpatchError as error:  # the model takes no blank image; what else was found is printed
        say(f"note           {error.problem}")
        return None


def print_advice(advice: Advice, list_sites: bool) -> None:
    """Print for people; with ``list_sites`` every name and every range."""
    from .render import table

    num_norms = len(advice.norm_layers)
    if calls := advice.num_function_calls:
        put(f"\nfunction calls of the model's own code, which stay as they are: {counted(calls, 'norm')}")
    if not num_norms:
        return
    if (reached := advice.unnormalized) is not None:
        names = [name for name in advice.norm_layers if name in reached]
        put(
            f"\nscales and shifts of {len(reached)} of {num_norms} norm layers reach the output past no "
            "other norm" + (f": {some(names, len(names) if list_sites else 3)}" if names else "")
        )
    put(f"\nfor batches of {advice.train_batch_size} in training ({advice.train_batch_source}):")
    rows = [[t.name, t.fits, t.reason] for t in advice.techniques]
    table(["technique", "fits", "why"], rows)
    if advice.ranges is not None:
        _print_ranges(advice.ranges, list_sites)


def _print_ranges(ranges: "Sequence[OutputRange]", list_sites: bool) -> None:
    from .render import table

    beyond = [r for r in ranges if r.is_beyond_training]
    put(
        f"\nnormalized values, in standard deviations: {len(beyond)} of {len(ranges)} norm layers go beyond "
        "what was possible in training"
    )
    shown = ranges if list_sites else beyond
    if shown:
        rows = [
            [
                r.name,
                f"{r.observed:.1f}",
                f"{r.training_bound:.1f}",
                "none" if math.isinf(r.inference_bound) else f"{r.inference_bound:.1f}",
                "beyond" if r.is_beyond_training else "",
            ]
            for r in shown
        ]
        table(["norm layer", "observed", "bound in training", "bound at inference", ""], rows)


def _range_as_json(found: "OutputRange") -> dict[str, Any]:
    bound = found.inference_bound
    # None replaces infinity, which JSON does not have
    values = {
        **asdict(found),
        "inference_bound": None if math.isinf(bound) else bound,
    }
    return {**values, "is_beyond_training": found.is_beyond_training}

"""What ``bnpatch inspect`` says of running statistics, preprocessing and shift."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from . import options as opt
from .console import put

if TYPE_CHECKING:
    from bnpatch.models.doctor import Checkup
    from bnpatch.models.onnx_model import OnnxModel
    from bnpatch.models.torch_model import TorchModel


@dataclass(frozen=True)
class Report:
    """What is wrong, or may be.

    Attributes:
        findings: what is unusual in the checkpoint, one line each.
        checkup: what images say; None without images.
        eps: the distances with the eps in use and with that of TensorFlow, if they were compared.
    """

    findings: list[str]
    checkup: "Checkup | None" = None
    eps: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        checkup = None if self.checkup is None else self.checkup.to_json()
        return {"findings": self.findings, "checkup": checkup, "eps_distances": self.eps}


def examine(loaded: "TorchModel | OnnxModel", data: str | None, reading: opt.Reading) -> Report:
    """Look at the running statistics, and where there is data, at a few images."""
    from bnpatch.models.doctor import check_up, eps_distances, eps_finding, findings

    found = findings(loaded)
    if data is None:
        return Report(found)
    # The images are read a few times, and are few.
    examples = replace(reading, cache_gb=1.0).open(data, loaded, seed=0, labels="optional", classes=False)
    eps = eps_distances(loaded, examples)
    if eps is not None and (says := eps_finding(*eps)):
        found.append(says)
    return Report(found, check_up(loaded, examples), eps)


def print_report(report: Report, train_batch_size: int | None) -> None:
    """Print for people; ``train_batch_size`` is None if it is not known."""
    from .render import table

    for line in report.findings:
        put(f"\nnote: {line}")
    if (checkup := report.checkup) is None:
        return
    first, largest = checkup.first.norm_layer, checkup.largest
    put(f"\nhow the images fit {first}, the first norm layer, by preprocessing (0 is perfect)")
    rows = [
        [fit.name, _three(fit.mean), _three(fit.std), f"{fit.distance:.3g}"]
        for fit in sorted(checkup.fits, key=lambda fit: fit.distance)
    ]
    table(["preprocessing", "mean", "std", "distance"], rows)
    put("(what hardly shows: the order of the channels, the crop, and the size within a factor of two)")
    if says := checkup.warning():
        put(f"\n{says}")
    put(
        f"\nthe images differ most from those of training at {largest.norm_layer}: distance "
        f"{largest.distance:.2g} (0.2 or less: little to gain)"
    )
    put(f"{checkup.common_share:.0%} of the deviation is common to all images (median of the norm layers)")
    put(f"outlook: {checkup.outlook()}")
    if train_batch_size:
        put(
            f"a rule of thumb for one alpha at all layers, from the training batch of {train_batch_size}: "
            f"{1 / train_batch_size:.2g}"
        )


def _three(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.3g}" for value in (values if len(set(values)) > 1 else values[:1]))

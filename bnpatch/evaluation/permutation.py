"""Find out whether the classes of a data set have other numbers than the outputs of the model.

A model that is right about most examples once its outputs are renamed has learned the classes, and someone
numbered them otherwise: folders in another order, or a class map that is wrong.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bnpatch.core.errors import BnpatchWarning

Classes = npt.NDArray[np.int64]

# The share of right answers that the renamed outputs must reach, and by how much it must exceed the present
# share. A shift of the images makes a model take some images of one class for another; that is not enough.
_RIGHT, _BETTER = 0.6, 0.1
_SHOWN = 3


def permutation(answers: Classes, targets: Classes) -> dict[int, int]:
    """Return, by class, the output that stands for it, for all classes whose numbers look exchanged.

    Each half of the examples gives its best assignment of outputs to classes, and the other half tests it.
    Tested on the examples that it comes from, some assignment would always be better than the present one.

    Args:
        answers: the predicted class of each example, (N,).
        targets: the class of each example, (N,).

    Returns:
        The outputs by class; empty if the present numbers are as good as others.
    """
    half = np.arange(len(targets)) % 2 == 1
    order = np.argsort(targets, kind="stable")  # so that both halves have every class
    answers, targets = answers[order], targets[order]
    now = answers == targets
    renamed = np.zeros(len(targets), np.bool_)
    count = 1 + int(max(answers.max(initial=0), targets.max(initial=0)))
    for part in (half, ~half):
        outputs = _assigned(answers[~part], targets[~part], count)
        renamed[part] = answers[part] == outputs[targets[part]]
    if len(targets) < 2 or renamed.mean() < _RIGHT:
        return {}
    change = renamed.astype(float) - now
    if change.mean() - 2 * change.std() / np.sqrt(len(change)) < _BETTER:
        return {}
    outputs = _assigned(answers, targets, count)
    return {int(t): int(outputs[t]) for t in np.unique(targets) if outputs[t] != t}


def _assigned(answers: Classes, targets: Classes, count: int) -> Classes:
    """Return, for each of ``count`` classes, the output of the assignment with the most right answers."""
    from scipy.optimize import linear_sum_assignment  # imported here because it is slow to import

    confusion = np.zeros((count, count))
    np.add.at(confusion, (targets, answers), 1)
    confusion += 1e-3 * np.eye(count)  # in doubt a class keeps its output
    outputs: Classes = linear_sum_assignment(confusion, maximize=True)[1]
    return outputs


def warn_if_permuted(answers: Classes, targets: Classes, class_names: Sequence[str] | None) -> None:
    """Warn, with the permutation, if the classes of the data look exchanged."""
    found = permutation(answers, targets)
    if not found:
        return

    def name(index: int) -> str:
        return repr(class_names[index]) if class_names and index < len(class_names) else str(index)

    right, renamed = (float(np.mean(a)) for a in (answers == targets, _renamed(answers, targets, found)))
    pairs = ", ".join(f"{name(t)} is answered as {name(o)}" for t, o in list(found.items())[:_SHOWN])
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    warnings.warn(
        f"the classes look permuted: {right:.1%} of the answers are right, and {renamed:.1%} would be if the "
        f"outputs were named otherwise ({pairs}{more}); --class-map FILE says which folder is which output",
        BnpatchWarning,
        stacklevel=2,
    )


def _renamed(answers: Classes, targets: Classes, outputs: dict[int, int]) -> npt.NDArray[np.bool_]:
    wanted = [outputs.get(int(target), int(target)) for target in targets]
    return np.equal(answers, wanted)

"""What settings scored on the tuning examples, block by block, so that no block is scored twice."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bnpatch.core.errors import BnpatchError
from bnpatch.core.patch import PatchWeights
from bnpatch.data.dataset import Examples, Indices
from bnpatch.evaluation.metrics import Values
from bnpatch.models.base import Patchable
from bnpatch.search.global_search import block_sizes
from bnpatch.search.objective import Judge, in_sets


def blocks_of(order: Indices, set_size: int) -> list[Indices]:
    """Split examples into blocks: of sets that are scored together, or as suits a global search.

    There are two at least where there are two examples: some to learn from, and others to choose by.
    """
    if set_size == 1:
        ends = np.cumsum(block_sizes(len(order)))[:-1]
        blocks = np.split(order, ends)
    else:
        blocks = in_sets(order, set_size)
    return blocks if len(blocks) > 1 or len(order) < 2 else np.array_split(order, 2)


class ScoreCache:
    """Scores of settings on blocks of examples, remembered as long as the model's targets are the same."""

    def __init__(
        self,
        model: Patchable,
        examples: Examples,
        judge: Judge,
        blocks: Sequence[Indices],
        count: Callable[[str, int], None],
    ) -> None:
        """Begin with nothing scored.

        Args:
            model: gets the weights of each setting that is scored.
            examples: where the examples are.
            judge: what scores them.
            blocks: which of them; all can be read.
            count: called with what it was for and the number of examples that were scored.
        """
        self._model, self._examples, self._judge, self._count = model, examples, judge, count
        self.blocks = blocks
        self._known: dict[tuple[Any, int], dict[str, Values]] = {}

    def forget(self) -> None:
        """The model has other targets: lambdas mean something else now."""
        self._known = {key: scores for key, scores in self._known.items() if not any(key[0][1])}

    def on(self, blocks: range, setting: PatchWeights, label: str, metric: str) -> Values:
        """Scores of the examples of some blocks, or of these blocks as sets, by a metric.

        Raises:
            OutputsNotFiniteError: the model returns infinities or NaN for one.
        """
        return np.concatenate([scores[metric] for scores in self.by_block(setting, blocks, label)])

    def by_block(self, setting: PatchWeights, blocks: range, label: str) -> list[dict[str, Values]]:
        """Scores by name of metric, of each block.

        Raises:
            OutputsNotFiniteError: the model returns infinities or NaN for an example.
        """
        key = tuple(setting.alphas.values()), tuple(setting.lambdas.values())
        missing = [block for block in blocks if (key, block) not in self._known]
        if missing and self._judge.set_size == 1:  # together, as small batches take long
            scores = self.of(np.concatenate([self.blocks[block] for block in missing]), setting, label)
            ends = np.cumsum([len(self.blocks[block]) for block in missing])[:-1]
            parts = {name: np.split(values, ends) for name, values in scores.items()}
            for index, block in enumerate(missing):
                self._known[key, block] = {name: split[index] for name, split in parts.items()}
        else:
            for block in missing:
                self._known[key, block] = self.of(self.blocks[block], setting, label)
        return [self._known[key, block] for block in blocks]

    def of(self, indices: Indices, setting: PatchWeights, label: str) -> dict[str, Values]:
        """Scores of examples by name of metric, not remembered.

        Raises:
            OutputsNotFiniteError: the model returns infinities or NaN for one.
            BnpatchError: one of them can't be read any more: nothing else could be compared with the rest.
        """
        self._model.set(setting)
        scores = self._judge.scores(self._model, self._examples, indices)
        lost = next((int(index) for index in indices if int(index) in self._examples.skipped), None)
        if lost is not None:
            raise BnpatchError(
                f"{self._examples.source.name(lost)} can't be read any more: {self._examples.skipped[lost]}",
                "look at the file, and start again",
            )
        self._count(label, len(indices))
        return scores

"""A cache of scores on the tuning examples, block by block, so that no block is scored twice."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bnpatch.core.errors import BnpatchError
from bnpatch.core.patch import PatchState, PatchWeights
from bnpatch.data.dataset import Examples, Indices
from bnpatch.data.groups import cut
from bnpatch.evaluation.metrics import Values
from bnpatch.models.base import Model
from bnpatch.search.objective import Objective, groups_of_scores, in_sets
from bnpatch.search.temperature import values_of

# With fewer blocks than this, successive halving is pointless.
_LEAST_BLOCKS = 4


def block_sizes(examples: int, most: int = 32, smallest: int = 8) -> list[int]:
    """Return sizes of nearly equal blocks that suit a global search over ``examples`` examples."""
    count = max(1, min(most, examples // smallest))
    return [len(part) for part in np.array_split(np.arange(examples), count)]


def blocks_of(order: Indices, set_size: int, groups: Indices | None = None) -> list[Indices]:
    """Split examples into blocks: sets that are scored together, or blocks that suit a global search.

    Two examples or more make at least two blocks: one to learn from, and one to select by. A group of
    examples (``groups``, of shape (N,)), whose members ``order`` has side by side, stays in one block.
    """
    if set_size == 1:
        blocks = cut(order, np.cumsum(block_sizes(len(order)))[:-1], groups)
    else:
        blocks = in_sets(order, set_size, groups)
    return blocks if len(blocks) > 1 or len(order) < 2 else cut(order, [-(-len(order) // 2)], groups)


class ScoreCache:
    """Keeps the scores of weights on blocks of examples while the re-estimated statistics stay the same.

    Attributes:
        model: the model, which has the weights that were scored last.
        examples: the examples.
        objective: scores the examples.
        base: the state of the model that weights apply to.
        blocks: indices of the examples in each block.
    """

    def __init__(
        self,
        model: Model[Any],
        examples: Examples,
        objective: Objective,
        blocks: Sequence[Indices],
        count: Callable[[str, int], None],
    ) -> None:
        """Start with an empty cache.

        Args:
            model: the model that is set to the weights and scored; they apply to the state that it has now.
            examples: the examples.
            objective: scores the examples.
            blocks: indices of the examples in each block; all of these can be read.
            count: called with a label and the number of examples that were scored.
        """
        self.model, self.examples, self.objective, self.blocks = model, examples, objective, blocks
        self._count = count
        self._known: dict[tuple[Any, int], dict[str, Values]] = {}
        self.base = model.state

    @property
    def has_few_blocks(self) -> bool:
        """Whether there are too few blocks for successive halving, so that each trial is scored on all."""
        return len(self.blocks) < _LEAST_BLOCKS

    def groups(self, blocks: range) -> Indices | None:
        """Return the group of each score of some blocks; None where scores are independent."""
        indices = np.concatenate([self.blocks[block] for block in blocks])
        return groups_of_scores(self.objective, self.examples, indices)

    def groups_by_block(self) -> list[Indices] | None:
        """Return the groups of the scores of each block; None where scores are independent."""
        found = [self.groups(range(block, block + 1)) for block in range(len(self.blocks))]
        return [groups for groups in found if groups is not None] or None

    def use(self, base: PatchState) -> None:
        """Apply weights to another state from now on, and forget the scores that depend on its statistics."""
        self.base = base
        self._known = {key: scores for key, scores in self._known.items() if not any(key[0][1])}

    def on(self, blocks: range, weights: PatchWeights, label: str, metric: str) -> Values:
        """Return scores of some blocks by one metric: one per example, or per block where blocks are sets.

        Raises:
            OutputsNotFiniteError: the model returns infinities or NaN for an example.
        """
        parts = self.by_block(weights, blocks, label)
        return values_of(metric, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})

    def by_block(self, weights: PatchWeights, blocks: range, label: str) -> list[dict[str, Values]]:
        """Return scores of each block by name of metric.

        Raises:
            OutputsNotFiniteError: the model returns infinities or NaN for an example.
        """
        key = tuple(tuple(part.values()) for _, part in weights.kinds())
        missing = [block for block in blocks if (key, block) not in self._known]
        if missing and self.objective.set_size == 1:  # in one go, because small batches are slow
            scores = self.of(np.concatenate([self.blocks[block] for block in missing]), weights, label)
            ends = np.cumsum([len(self.blocks[block]) for block in missing])[:-1]
            parts = {name: np.split(values, ends) for name, values in scores.items()}
            for index, block in enumerate(missing):
                self._known[key, block] = {name: split[index] for name, split in parts.items()}
        else:
            for block in missing:
                self._known[key, block] = self.of(self.blocks[block], weights, label)
        return [self._known[key, block] for block in blocks]

    def of(self, indices: Indices, weights: PatchWeights, label: str) -> dict[str, Values]:
        """Score examples without the cache; return scores by name of metric.

        Raises:
            OutputsNotFiniteError: the model returns infinities or NaN for an example.
            BnpatchError: an example can't be read any more, so that its scores can't be compared.
        """
        self.model.set_state(self.base.with_weights(weights))
        scores = self.objective.scores(self.model, self.examples, indices)
        lost = next((int(index) for index in indices if int(index) in self.examples.skipped), None)
        if lost is not None:
            raise BnpatchError(
                f"{self.examples.source.name(lost)} can't be read any more: {self.examples.skipped[lost]}",
                "look at the file, and start again",
            )
        self._count(label, len(indices))
        return scores

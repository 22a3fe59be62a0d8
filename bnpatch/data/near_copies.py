"""Find data sets whose images are near-copies of each other, by small sketches of what is decoded anyway."""

import warnings
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor

from bnpatch.core.errors import BnpatchWarning

# Side of a sketch, and of the subsampled image that it is made of.
_SIDE, _SAMPLED = 8, 64

# Two images are near-copies if their sketches are nearer than this fraction of the distance of two random
# images. Of scikit-learn's 1,797 digits, 5 have a neighbour that near; a frame of a video has its neighbours.
_NEAR = 0.15

# There is no warning for fewer images than this, nor if there are more groups than this share of the images.
_FEWEST, _LARGEST_SHARE = 30, 0.8

# The number of images whose near-copies are counted, of random pairs that give the typical distance, and of
# distances in memory at a time.
_COUNTED, _PAIRS, _AT_A_TIME = 2000, 2000, 20_000_000

Sketch = npt.NDArray[np.float32]


@dataclass
class Sketches:
    """Sketches of images by index: vectors of length 1, see :func:`sketch`."""

    of: dict[int, Sketch] = field(default_factory=dict)

    def add(self, index: int, x: Tensor) -> None:
        """Sketch an image (C, H, W), bytes or floats, if it is new; other inputs have no sketch."""
        if index not in self.of and x.ndim == 3:
            self.of[index] = sketch(x)

    def num_groups(self) -> int | None:
        """Estimate how many groups of near-copies the images make; None if nearly all images are distinct.

        An image that is one of k near-copies counts as 1 / k of a group. If there are many images, 2000 of
        them are compared with all, so that the time grows linearly with the number of images.
        """
        count = len(self.of)
        if count < _FEWEST:
            return None
        sketches, rng = np.stack(list(self.of.values())), np.random.default_rng(0)
        first, second = rng.integers(0, count, (2, _PAIRS))
        typical = float(np.median(np.linalg.norm(sketches[first] - sketches[second], axis=1)))
        norms = (sketches**2).sum(1)
        limit = (_NEAR * typical) ** 2 + 1e-5  # of squared distances; 1e-5 is more than their rounding error
        some = rng.permutation(count)[:_COUNTED]
        parts = np.array_split(some, -(-len(some) * count // _AT_A_TIME))
        copies = [
            (norms[part, None] + norms - 2 * sketches[part] @ sketches.T <= limit).sum(1) for part in parts
        ]
        share = float(np.mean(1 / np.concatenate(copies)))
        return max(1, round(share * count)) if share <= _LARGEST_SHARE else None


def sketch(x: Tensor) -> Sketch:
    """Reduce the first three channels of an image (C, H, W) to 64 values each, together of length 1.

    The mean is subtracted. Images that differ in contrast or by a little noise have nearly the same sketch.
    The sketch of an image that has the same value everywhere is 0.
    """
    step = max(1, min(x.shape[1:]) // _SAMPLED)
    sampled = x[:3, ::step, ::step].float()
    values: Sketch = F.adaptive_avg_pool2d(sampled, _SIDE).flatten().cpu().numpy()
    values = values - values.mean()
    length = float(np.linalg.norm(values))
    return values / length if length > 1e-3 else 0 * values


def warn_of_near_copies(sketches: Sketches) -> str:
    """Warn if many of the images are near-copies of each other; return what the warning says, or ""."""
    groups = sketches.num_groups()
    if groups is None:
        return ""
    text = (
        f"of {len(sketches.of):,} images many are near-copies of each other: they make about {groups:,} "
        "groups, and intervals that take them for independent are too narrow; name the groups with "
        "--group-by (groups= in Python)"
    )
    warnings.warn(text, BnpatchWarning, stacklevel=3)
    return text

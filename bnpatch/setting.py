"""What is tuned: two weights per site."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Setting:
    """Weights by name of site; a site that is not named keeps what it has.

    Attributes:
        alphas: the weight of the example against the running moments.
        lambdas: the weight of the moments of the data at hand (the target) against those of the checkpoint
            (the source), in the running moments that are used.
    """

    alphas: Mapping[str, float] = field(default_factory=dict)
    lambdas: Mapping[str, float] = field(default_factory=dict)

"""What is tuned: two weights per norm layer."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from bnpatch.core.errors import BnpatchError, check_alpha


@dataclass(frozen=True)
class PatchWeights:
    """Weights by name of norm layer; a norm layer that is not named keeps what it has.

    Attributes:
        alphas: the weight of the example against the running moments.
        lambdas: the weight of the moments of the data at hand (the target) against those of the checkpoint
            (the source), in the running moments that are used.
    """

    alphas: Mapping[str, float] = field(default_factory=dict)
    lambdas: Mapping[str, float] = field(default_factory=dict)

    def is_identity(self, identities: Mapping[str, float]) -> bool:
        """Whether a model with these weights computes what it did; ``identities`` are alphas by name."""
        return not any(self.lambdas.values()) and all(a == identities[n] for n, a in self.alphas.items())

    def check_lambdas(self, norm_layers: Container[str], targets: Container[str]) -> None:
        """Refuse what could not be set, before anything is.

        Args:
            norm_layers: names of the norm layers of the model.
            targets: names of those whose moments on the data at hand are known.

        Raises:
            BnpatchError: there is no norm layer of a name, or lambda is to weigh what isn't known.
            InvalidAlphaError: a weight is not in [0, 1].
        """
        for name, weight in self.lambdas.items():
            check_alpha(float(weight), name, "lambda")
            if name not in norm_layers:
                raise BnpatchError(f"the model has no norm layer {name!r}", "see bnpatch inspect --sites")
            if weight and name not in targets:
                raise BnpatchError(
                    f"there are no target moments for norm layer {name!r}", "re-estimate them on data"
                )

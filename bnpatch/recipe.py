"""The recipe: what bnpatch found out about a model, in a file of a few KB that people keep."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bnpatch.errors import BnpatchError
from bnpatch.files import write_text

FORMAT = 1


@dataclass(frozen=True)
class SiteRecipe:
    """One site of the model.

    Attributes:
        name: dotted name of the module.
        kind: what it is.
        alpha: the weight of the example.
        fingerprint: a hash of its parameters.
        calibrated: mean and variance, where running moments were taken from data.
        channels_per_group: consecutive channels whose moments are pooled.
    """

    name: str
    kind: str
    alpha: float
    fingerprint: str
    calibrated: Mapping[str, Sequence[float]] | None = None
    channels_per_group: int = 1


@dataclass(frozen=True)
class Recipe:
    """Weights for the sites of one model, and where they come from.

    Attributes:
        sites: the sites, in the order of the model.
        provenance: how the weights were found: metric, data, results with confidence intervals, seed,
            versions, command line. Plain JSON values; nothing in it changes what the recipe does.
    """

    sites: tuple[SiteRecipe, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def alphas(self) -> dict[str, float]:
        """The weight of the example by name of site."""
        return {site.name: site.alpha for site in self.sites}

    def check_fits(self, fingerprints: Mapping[str, str]) -> None:
        """Compare with the sites of a model, by name.

        Raises:
            BnpatchError: the model isn't the one that the recipe was made for; names the first
                site that differs.
        """
        remedy = "apply it to the model that it was tuned on, or tune this one"
        for site in self.sites:
            if site.name not in fingerprints:
                raise BnpatchError(f"the recipe is for another model: site {site.name!r} is missing", remedy)
            if fingerprints[site.name] != site.fingerprint:
                raise BnpatchError(
                    f"the recipe is for another model: the parameters of site {site.name!r} differ", remedy
                )
        if extra := fingerprints.keys() - {site.name for site in self.sites}:
            raise BnpatchError(f"the recipe is for another model: it has no site {min(extra)!r}", remedy)

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain JSON values."""
        return {
            "format": FORMAT,
            "sites": [asdict(s) for s in self.sites],
            "provenance": dict(self.provenance),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as JSON, atomically."""
        write_text(path, json.dumps(self.to_json(), indent=2) + "\n")

    @classmethod
    def from_json(cls, content: Any, source: str = "recipe") -> "Recipe":
        """Read what :meth:`to_json` made.

        Raises:
            BnpatchError: it is not a recipe, or one of a newer format.
        """
        remedy = "make one with bnpatch tune-alpha"
        if not isinstance(content, dict) or "format" not in content:
            raise BnpatchError(f"{source} is not a recipe", remedy)
        if content["format"] != FORMAT:
            raise BnpatchError(
                f"{source} has recipe format {content['format']}, this bnpatch reads {FORMAT}",
                "update bnpatch",
            )
        try:
            sites = tuple(SiteRecipe(**site) for site in content["sites"])
            provenance = dict(content["provenance"])
        except (KeyError, TypeError, ValueError) as error:
            raise BnpatchError(f"{source} is a damaged recipe ({error})", remedy) from error
        for site in sites:
            if not isinstance(site.alpha, (int, float)) or not 0 <= site.alpha <= 1:
                raise BnpatchError(
                    f"{source}: site {site.name!r} has alpha = {site.alpha}", "an alpha must lie in [0, 1]"
                )
            if not isinstance(site.channels_per_group, int) or site.channels_per_group < 1:
                raise BnpatchError(
                    f"{source}: site {site.name!r} pools {site.channels_per_group} channels",
                    "it must be 1 or more",
                )
        return cls(sites, provenance)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Recipe":
        """Read a recipe file.

        Raises:
            BnpatchError: the file can't be read or is not a recipe.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise BnpatchError(f"cannot read {path}: {error.strerror}", "name a recipe.json file") from error
        except ValueError as error:
            raise BnpatchError(f"{path} is not a recipe", "name a recipe.json file") from error
        return cls.from_json(content, str(path))


def fingerprint(parameters: Iterable[npt.ArrayLike]) -> str:
    """Hash the parameters of a site: gamma, beta, running mean and running variance.

    Taken in float32, so that it survives an export or a change of precision that keeps the values.
    """
    digest = hashlib.sha256()
    for values in parameters:
        digest.update(np.ascontiguousarray(values, dtype="<f4").tobytes())
    return digest.hexdigest()[:16]

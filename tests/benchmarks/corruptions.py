"""The standard corruptions before and after: one patch for all of them, and one for each kind.

Tuned on images of which each has one of the 15 kinds in one of the 5 severities, or none; or on images that
all have one kind in severity 3. Judged on others, in every kind and severity.
"""

import numpy as np

import bnpatch
from bnpatch.data.standard_corruptions import SEVERITIES, STANDARD, corrupt
from bnpatch.evaluation.robustness_scores import CLEAN
from tests.benchmarks.fashion_mnist import NETWORKS, load

MIDDLE, MOST_JUDGED = 3, 100


def parts():
    for kind in STANDARD:
        yield {"network": NETWORKS[1], "kind": kind}


def corrupted(images, conditions):
    """Images (N, H, W), each with its kind and severity, or as it is."""
    pairs = enumerate(zip(images, conditions, strict=True))
    return np.stack([corrupt(x[None], *how, key=(0, index))[0] if how else x for index, (x, how) in pairs])


def recipe_for_all(setup, network):
    """The file of the recipe of a search on all corruptions, which is made if it is missing."""
    path = setup.networks / f"{network}-all.json"
    if not path.exists():
        (images, labels), _ = setup.parts(*setup.images())
        conditions = [None, *((kind, severity) for kind in STANDARD for severity in SEVERITIES)]
        drawn = np.random.default_rng(0).integers(0, len(conditions), len(images))
        seen = corrupted(images, [conditions[number] for number in drawn])
        bnpatch.tune_alpha(load(setup.network(network)), (seen, labels)).recipe.save(path)
    return path


def measure(setup, network, kind):
    """Errors by severity, 0 being images as they are; as it is, with either patch."""
    model, ((images, labels), held_out) = load(setup.network(network)), setup.parts(*setup.images())
    judged = tuple(part[:MOST_JUDGED] for part in held_out)
    seen = corrupted(images, [(kind, MIDDLE)] * len(images))
    own = bnpatch.tune_alpha(model, (seen, labels)).recipe
    for_all, for_kind = (
        bnpatch.robustness(model, judged, recipe, kinds=kind)
        for recipe in (recipe_for_all(setup, network), own)
    )
    rows = []
    for severity in (0, *SEVERITIES):
        condition = (kind, severity) if severity else CLEAN
        of_all, of_kind = (found.comparison(condition) for found in (for_all, for_kind))
        errors = {"as_it_is": of_all.before, "for_all": of_all.after, "for_kind": of_kind.after}
        row = {"severity": severity, "images": for_all.num_examples}
        rows.append({**row, **{name: float(error.value) for name, error in errors.items()}})
    return rows

"""bnpatch improves the normalization layers of trained vision models without retraining.

In training, Batch Norm normalizes an example by the moments of a batch that contains it. At inference it uses
running averages, in which the example has no weight. bnpatch gives the example a weight again: its own
moments get the weight alpha and the running ones 1 - alpha, and alpha is tuned on a validation set (Summers &
Dinneen, "Four Things Everyone Should Know to Improve Batch Normalization", ICLR 2020).

    import bnpatch
    model = bnpatch.patch(model, alpha=0.02)
    result = bnpatch.tune_alpha("model.pt", "val/", metric="accuracy")
    result.recipe.save("recipe.json")
    model = bnpatch.apply(model, "recipe.json")
"""

import warnings
from typing import Any

import lazy_loader

__version__ = "0.1.0"

# lazy_loader imports each public name when it is first used, because importing torch takes seconds.
_lazy_getattr, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

# Earlier names, which can be imported for one more release.
_RENAMED = {
    "ExampleWeighedNorm": "ExampleWeightedNorm",
    "weighed_norm": "weighted_norm",
    "survey": "inventory",
    "recover_folded": "recover_fused",
}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warnings.warn(
            f"bnpatch.{name} is called bnpatch.{_RENAMED[name]} now", DeprecationWarning, stacklevel=2
        )
        name = _RENAMED[name]
    return _lazy_getattr(name)

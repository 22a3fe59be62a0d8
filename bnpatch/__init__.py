"""bnpatch fixes the normalization layers of vision models that are already trained.

At inference Batch Norm normalizes by running averages; in training the example had a say. bnpatch gives
it one again: the example's own moments weigh alpha, the running ones 1 - alpha, and alpha is tuned on
a validation set (Summers & Dinneen, "Four Things Everyone Should Know to Improve Batch Normalization",
ICLR 2020). No retraining.

    import bnpatch
    model = bnpatch.patch(model, alpha=0.02)
    result = bnpatch.tune_alpha("model.pt", "val/", metric="accuracy")
    result.recipe.save("recipe.json")
    model = bnpatch.apply(model, "recipe.json")
"""

import lazy_loader

__version__ = "0.1.0"

# Imported when they are first asked for: torch alone takes seconds.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

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

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported when they are first asked for: torch alone takes seconds.
_WHERE = {
    "BnpatchError": "errors",
    "BnpatchWarning": "errors",
    "ExampleWeighedNorm": "nn.norm",
    "Metric": "metrics",
    "Moments": "moments",
    "NormDecay": "decay",
    "NormSpec": "spec",
    "Recipe": "recipe",
    "FineTuneSettings": "finetune.settings",
    "OnnxModel": "onnx_model",
    "TorchModel": "model",
    "TuneResult": "search.result",
    "apply": "loading.load",
    "calibrate": "calibration",
    "convert_norms": "nn.conversion",
    "evaluate": "evaluation",
    "export_onnx": "export",
    "fine_tune": "finetune.run",
    "load": "loading.load",
    "mix": "moments",
    "open_examples": "data.sources",
    "patch": "nn.surgery",
    "pool": "moments",
    "recover_folded": "calibration",
    "survey": "nn.surgery",
    "tune_alpha": "search.tune",
    "unpatch": "nn.surgery",
    "weighed_norm": "nn.norm",
}

__all__ = sorted(_WHERE)

if TYPE_CHECKING:
    from bnpatch.calibration import calibrate as calibrate
    from bnpatch.calibration import recover_folded as recover_folded
    from bnpatch.data.sources import open_examples as open_examples
    from bnpatch.decay import NormDecay as NormDecay
    from bnpatch.errors import BnpatchError as BnpatchError
    from bnpatch.errors import BnpatchWarning as BnpatchWarning
    from bnpatch.evaluation import evaluate as evaluate
    from bnpatch.export import export_onnx as export_onnx
    from bnpatch.finetune.run import fine_tune as fine_tune
    from bnpatch.finetune.settings import FineTuneSettings as FineTuneSettings
    from bnpatch.loading.load import apply as apply
    from bnpatch.loading.load import load as load
    from bnpatch.metrics import Metric as Metric
    from bnpatch.model import TorchModel as TorchModel
    from bnpatch.moments import Moments as Moments
    from bnpatch.moments import mix as mix
    from bnpatch.moments import pool as pool
    from bnpatch.nn.conversion import convert_norms as convert_norms
    from bnpatch.nn.norm import ExampleWeighedNorm as ExampleWeighedNorm
    from bnpatch.nn.norm import weighed_norm as weighed_norm
    from bnpatch.nn.surgery import patch as patch
    from bnpatch.nn.surgery import survey as survey
    from bnpatch.nn.surgery import unpatch as unpatch
    from bnpatch.onnx_model import OnnxModel as OnnxModel
    from bnpatch.recipe import Recipe as Recipe
    from bnpatch.search.result import TuneResult as TuneResult
    from bnpatch.search.tune import tune_alpha as tune_alpha
    from bnpatch.spec import NormSpec as NormSpec


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

"""The public names, for type checkers; :mod:`lazy_loader` imports each when it is first asked for."""

from .core.errors import BnpatchError as BnpatchError
from .core.errors import BnpatchWarning as BnpatchWarning
from .core.moments import ExampleWeight as ExampleWeight
from .core.moments import Moments as Moments
from .core.moments import mix as mix
from .core.moments import pool as pool
from .core.norm_spec import NormSpec as NormSpec
from .core.recipe import Recipe as Recipe
from .data.sources import open_examples as open_examples
from .evaluation.evaluate import evaluate as evaluate
from .evaluation.metrics import Metric as Metric
from .evaluation.robustness import Robustness as Robustness
from .evaluation.robustness import robustness as robustness
from .finetune.config import FineTuneSettings as FineTuneSettings
from .finetune.norm_decay import NormDecay as NormDecay
from .finetune.run import fine_tune as fine_tune
from .models.export import export_onnx as export_onnx
from .models.load import apply as apply
from .models.load import load as load
from .models.onnx_model import OnnxModel as OnnxModel
from .models.running_stats import calibrate as calibrate
from .models.running_stats import recover_fused as recover_fused
from .models.torch_model import TorchModel as TorchModel
from .nn.functional import weighted_norm as weighted_norm
from .nn.norm import ExampleWeightedNorm as ExampleWeightedNorm
from .nn.surgery import inventory as inventory
from .nn.surgery import patch as patch
from .nn.surgery import unpatch as unpatch
from .nn.training_norm import convert_norms as convert_norms
from .search.config import SearchConfig as SearchConfig
from .search.result import TuneResult as TuneResult
from .search.tune import tune_alpha as tune_alpha

__version__: str

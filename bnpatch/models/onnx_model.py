"""An ONNX file that can be patched and asked for predictions, on onnxruntime.

One session has all alphas as inputs and serves the whole search; another runs the file as it is, which
answers where all alphas are 0, so that "as it is" means just that.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from bnpatch.core.errors import BnpatchError, check_alpha, first_line
from bnpatch.core.inventory import (
    CALIBRATE,
    FUSED,
    NEEDS_CALIBRATION,
    AnyNormLayer,
    Inventory,
    NormFacts,
    SkippedNorm,
)
from bnpatch.core.moments import Moments, mix, pool
from bnpatch.core.patch import PatchWeights
from bnpatch.core.recipe import NormRecipe, Recipe, fingerprint
from bnpatch.data.preprocessing import Preprocessing
from bnpatch.models.metadata import write_metadata
from bnpatch.onnx import match
from bnpatch.onnx.expressions import Tape
from bnpatch.onnx.formulas import append_by_batch
from bnpatch.onnx.fused_conv import find_fused_convs, insert_norms, observe_values
from bnpatch.onnx.rewrite import AlphaInputs, rewrite
from bnpatch.onnx.runtime import Signature, open_session


@dataclass
class OnnxModel:
    """An ONNX graph with what is needed to feed it.

    Attributes:
        graph: the model as it was read; never changed.
        name: what it is called in tables and files.
        signature: what it takes and returns.
        preprocessing: how images become inputs.
        class_names: names of the outputs in their order, where known.
        class_order: how class folders are sorted where names don't tell.
        device: cpu or cuda.
        include_1x1: weigh also where an example has one value per channel.
        notes: what a person should know about it.
        calibrated: running moments from data, by name of norm layer: of norms that have none, and of the
            outputs of convolutions that a Batch Norm was fused into, whose norm layers have a name that ends
            in :data:`~bnpatch.core.inventory.FUSED`.
    """

    graph: ir.Model
    name: str
    signature: Signature
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    class_order: str = "natural"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    include_1x1: bool = False
    notes: list[str] = field(default_factory=list)
    calibrated: dict[str, Moments[Any]] = field(default_factory=dict)
    arch: None = None

    def __post_init__(self) -> None:
        self._alphas: dict[str, float] = {}
        self._lambdas: dict[str, float] = {}
        self._targets: dict[str, Moments[Any]] = {}
        self._num_outputs: int | None = None
        self._take_norms()

    def _take_norms(self) -> None:
        """Look at the graph again: new norm layers are at their identity, and no session is open."""
        self._norm_layers = match.inventory(self._with_norms(self.calibrated))
        identities = self.identities()
        self._alphas = {name: self._alphas.get(name, alpha) for name, alpha in identities.items()}
        self._lambdas = {name: self._lambdas.get(name, 0.0) for name in identities}
        self._plain: Any = None
        self._weighted: _Weighted | None = None
        self._observed: _Weighted | None = None
        self._by_batch: tuple[Any, _Outputs] | None = None

    def inventory(self) -> Inventory[AnyNormLayer]:
        """The norm layers, one per module, and the norms that are skipped."""
        norm_layers: dict[str, AnyNormLayer] = {}
        for norm_layer in self._patchable():
            norm_layers.setdefault(
                norm_layer.module, _ModuleNorm(norm_layer.module, norm_layer.kind, norm_layer.num_channels)
            )
        missing = self.uncalibrated()
        left = {
            s.module: SkippedNorm(s.module, s.kind, NEEDS_CALIBRATION, True)
            for s in self._norm_layers.norm_layers
            if s.module in missing
        }
        return Inventory(tuple(norm_layers.values()), (*left.values(), *self._norm_layers.skipped_norms))

    def uncalibrated(self) -> tuple[str, ...]:
        """Norms that would be norm layers if they had running moments: Group Norm."""
        names = (
            s.module
            for s in self._norm_layers.norm_layers
            if s.needs_calibration and s.module not in self.calibrated
        )
        return tuple(dict.fromkeys(names))

    def identities(self) -> dict[str, float]:
        """The alpha by name of norm layer at which the model computes what the file does."""
        return {norm_layer.module: norm_layer.identity for norm_layer in self._patchable()}

    def fused_convs(self) -> tuple[str, ...]:
        """Convolutions that a Batch Norm may have been fused into, and that are no norm layers so far."""
        candidates = find_fused_convs(self.graph)
        return tuple(c.name for c in candidates if c.name + FUSED not in self.calibrated)

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return self.graph.opset_imports.get("", 0)

    def alphas(self) -> dict[str, float]:
        """The weight of the example by name of norm layer."""
        return dict(self._alphas)

    def set_alphas(self, alpha: float | Mapping[str, float]) -> None:
        """Set the weight of the example, for all norm layers or by name.

        Raises:
            BnpatchError: there is no norm layer, or none of a name; InvalidAlphaError for a wrong weight.
        """
        if not self._alphas:
            remedy = "it was fused into the convolutions, most likely: add --recover-folded"
            if left := self.inventory().skipped_norms:
                waits = any(norm.is_uncalibrated for norm in left)
                remedy = CALIBRATE if waits else f"its norms are skipped: {left[0].reason}"
            raise BnpatchError(f"{self.name} has no norm that could be patched", remedy)
        if not isinstance(alpha, Mapping):
            alpha = dict.fromkeys(self._alphas, float(alpha))
        if unknown := [name for name in alpha if name not in self._alphas]:
            raise BnpatchError(f"{self.name} has no norm layer {unknown[0]!r}", "see bnpatch inspect --sites")
        self._alphas.update({name: check_alpha(float(value), name) for name, value in alpha.items()})

    def setting(self) -> PatchWeights:
        """Both weights of every norm layer."""
        return PatchWeights(dict(self._alphas), dict(self._lambdas))

    def set(self, setting: PatchWeights) -> None:
        """Set weights by name of norm layer.

        Raises:
            BnpatchError: there is no norm layer of a name, or lambda is to weigh what wasn't given.
            InvalidAlphaError: a weight is not in [0, 1].
        """
        setting.check_lambdas(self._lambdas, self._targets)
        self.set_alphas(setting.alphas)
        self._lambdas.update((name, float(weight)) for name, weight in setting.lambdas.items())

    def retarget(self, targets: Mapping[str, Moments[Any]]) -> None:
        """Give the moments of the data at hand, (C,) by name of norm layer, that lambda is the weight of.

        Norm layers that are not named keep theirs.
        """
        self._targets.update((name, _as_in_recipes(moments)) for name, moments in targets.items())

    def targets(self) -> Mapping[str, Moments[Any]]:
        """What :meth:`retarget` was given last."""
        return self._targets

    def facts(self) -> dict[str, NormFacts]:
        """What each norm layer brings along, by name."""
        own = {s.module: s for s in self._patchable()}
        return {
            name: NormFacts(_as_tensors(self.calibrated.get(name) or _moments_of(norm_layer)), norm_layer.eps)
            for name, norm_layer in own.items()
        }

    def running(self) -> dict[str, Moments[Any]]:
        """Running mean and variance (C,) that a norm layer normalizes by now, where not those of the file."""
        sources = {name: m for name, m in self.calibrated.items() if not name.endswith(FUSED)}
        mixed = {}
        for norm_layer in self._patchable():  # several norm layers where a module is used several times
            if weight := self._lambdas[norm_layer.module]:
                source = sources.get(norm_layer.module) or _moments_of(norm_layer)
                mixed[norm_layer.module] = mix(weight, self._targets[norm_layer.module], source)
        return sources | mixed

    def calibrate(self, moments: Mapping[str, Moments[Any]]) -> None:
        """Give running moments (C,) to norms that have none, and to convolutions (as ``NAME`` + FOLDED).

        From now on they are norm layers, at their identity; one that was calibrated before gets other moments
        and keeps its weights.

        Raises:
            BnpatchError: the model has no such norm or convolution.
        """
        known = {candidate.name + FUSED for candidate in find_fused_convs(self.graph)} | {
            norm_layer.module for norm_layer in self._norm_layers.norm_layers if norm_layer.needs_calibration
        }
        if unknown := [name for name in moments if name not in known]:
            raise BnpatchError(f"{self.name} has no norm {unknown[0]!r} to calibrate", "calibrate it again")
        self.calibrated |= {name: _as_in_recipes(part) for name, part in moments.items()}
        self._take_norms()

    @property
    def _is_as_read(self) -> bool:
        return self.setting().is_identity(self.identities())

    def predict(self, x: Tensor) -> Tensor:
        """Run a batch.

        Args:
            x: images as bytes (N, C, H, W), resized and cropped; or floating-point inputs as they are.

        Returns:
            Logits (N, K), or whatever else the graph returns, on the host.

        Raises:
            BnpatchError: the graph does not take this input.
        """
        if self._is_as_read:
            session = self._plain = self._plain or open_session(self.graph, self.device)
            return self._logits(self.run(session, [self.signature.output], x)[0])
        self._weighted = self._weighted or self._open_weighted()
        return self._logits(
            self.run(self._weighted.session, [self.signature.output], x, self._feeds(self._weighted))[0]
        )

    def observe(self, x: Tensor, gradients: bool = False) -> tuple[Tensor, dict[str, Moments[Tensor]]]:
        """Run a batch as :meth:`predict` does; there are no gradients here.

        Returns:
            The outputs, and by name of norm layer, or of norm that is to be calibrated, the moments (N, C) of
            each example at its input; where a module is used k times, of each use, (k * N, C).
        """
        opened = self._observed = self._observed or self._open_weighted(observe=True)
        names = [name for pairs in opened.moments.values() for pair in pairs for name in pair]
        outputs, *parts = self.run(opened.session, [self.signature.output, *names], x, self._feeds(opened))
        by_name = {name: torch.from_numpy(part).flatten(1) for name, part in zip(names, parts, strict=True)}
        return self._logits(outputs), {
            module: Moments(*(torch.cat([by_name[n] for n in part]) for part in zip(*pairs, strict=True)))
            for module, pairs in opened.moments.items()
        }

    def moments_by_batch(self, x: Tensor) -> dict[str, Moments[Tensor]]:
        """Run a batch as in training: Batch Norm normalizes by the moments of the batch.

        Group Norm does what it always does. A file with a fixed batch size does so for each such batch.

        Returns:
            Moments (C,) of the whole batch at the input of each norm layer, by name; those of all uses
            together where a module is used several times. Norm layers in a branch (If, Loop) are missing.
        """
        self._by_batch = self._by_batch or self._open_by_batch()
        session, names = self._by_batch
        if not names:
            return {}  # onnxruntime takes an empty list of outputs for all of them
        outputs = [name for pairs in names.values() for pair in pairs for name in pair]
        values = zip(outputs, self.run(session, outputs, x), strict=True)
        rows = {name: torch.from_numpy(value).flatten(1) for name, value in values}
        moments = {}
        for module, pairs in names.items():
            pooled = pool(
                Moments(*(torch.cat([rows[n] for n in part]) for part in zip(*pairs, strict=True))), axes=0
            )
            moments[module] = Moments(pooled.mean[0], pooled.var[0])
        return moments

    def _logits(self, output: npt.NDArray[Any]) -> Tensor:
        y = torch.from_numpy(output)
        y = y.flatten(1) if y.ndim == 4 and y.shape[2:] == (1, 1) else y
        # The softmax of log(p) is p: the logarithm gives back logits, up to a constant that changes nothing.
        return (
            y.float().clamp_min(torch.finfo(torch.float32).tiny).log() if self.signature.is_probability else y
        )

    def run(
        self, session: Any, outputs: list[str], x: Tensor, feeds: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> list[npt.NDArray[Any]]:
        """Run a session of this model on a batch, in portions where the graph's batch size is fixed.

        Args:
            session: of the graph, or of one that was made from it.
            outputs: names of what to return, each of shape (N, ...); of shape (1, ...) what is per batch.
            x: as for :meth:`predict`.
            feeds: values of further inputs.

        Raises:
            BnpatchError: the graph does not take this input.
        """
        inputs = self._prepare(x)
        step = self.signature.batch or max(1, len(inputs))
        portions = []
        for start in range(0, max(1, len(inputs)), step):
            portion = inputs[start : start + step]
            padded = portion
            if self.signature.batch and len(
                inputs
            ):  # fill it up with other examples: moments of a batch need real ones
                padded = inputs.take(range(start, start + step), axis=0, mode="wrap")
            try:
                results = session.run(outputs, {self.signature.input: padded, **(feeds or {})})
            except Exception as error:  # onnxruntime's exceptions have no common class that is public
                raise BnpatchError(
                    f"{self.name} does not take an input of shape {inputs.shape}: {first_line(error)}",
                    "set --img-size, or look at the data",
                ) from error
            portions.append([result[: len(portion)] for result in results])
        return [np.concatenate(parts) for parts in zip(*portions, strict=True)]

    def num_outputs(self, example: Tensor | None = None) -> int:
        """K, the number of classes, found by running one input.

        Args:
            example: an input (1, ...); by default a blank image.

        Raises:
            BnpatchError: the output for one image isn't one number per class.
        """
        if self._num_outputs is None:
            y = self.predict(torch.zeros(1, *self.preprocessing.input_size) if example is None else example)
            if y.ndim != 2:
                raise BnpatchError(
                    f"{self.name} returns {tuple(y.shape)} as {self.signature.output!r} for one image",
                    "choose another with --output-name",
                )
            self._num_outputs = y.shape[1]
        return self._num_outputs

    def norm_shapes(self, example: Tensor | None = None) -> dict[str, tuple[int, ...]]:
        """Spatial shape of each site's input by name, as far as the graph tells it in numbers."""
        shapes = {}
        for norm_layer in self._patchable():
            spatial = norm_layer.dims[2:]
            if all(isinstance(size, int) for size in spatial):
                shapes[norm_layer.module] = tuple(int(size) for size in spatial if isinstance(size, int))
        return shapes

    def fingerprints(self) -> dict[str, str]:
        """A hash of the parameters of each norm layer, by name: that of the torch model which was
        exported.
        """
        hashes = {s.module: _fingerprint(s) for s in self._patchable()}
        for candidate in find_fused_convs(self.graph):
            if candidate.name + FUSED in self.calibrated:  # of what the file has, not of what the data gave
                hashes[candidate.name + FUSED] = fingerprint(candidate.parameters)
        return hashes

    def recipe(self, provenance: Mapping[str, Any] | None = None) -> Recipe:
        """The weights that the model has now, as a recipe."""
        hashes, norm_layers = self.fingerprints(), []
        for norm_layer in self.inventory().norm_layers:
            weight = self._lambdas[norm_layer.name]
            target = self._targets[norm_layer.name] if weight else None
            weights = (self._alphas[norm_layer.name], hashes[norm_layer.name], weight)
            norm_layers.append(
                NormRecipe(
                    norm_layer.name, norm_layer.kind, *weights, target, self.calibrated.get(norm_layer.name)
                )
            )
        return Recipe(tuple(norm_layers), dict(provenance or {}), self.include_1x1)

    def apply(self, recipe: Recipe) -> None:
        """Patch the model with a recipe.

        Raises:
            BnpatchError: the recipe was made for another model; names the first norm layer that differs. Or
                it pools channels, which the file doesn't.
        """
        weighed = (norm_layer for norm_layer in recipe.norm_layers if norm_layer.alpha or norm_layer.lambda_)
        if pooled := [norm_layer.name for norm_layer in weighed if norm_layer.channels_per_group > 1]:
            raise BnpatchError(
                f"the recipe pools channels at {pooled[0]!r}, of which an ONNX file knows nothing",
                "export the torch checkpoint with the recipe",
            )
        found = {
            norm_layer.name: norm_layer.calibrated
            for norm_layer in recipe.norm_layers
            if norm_layer.calibrated is not None
        }
        if found:
            self.calibrate(found)
        recipe.check_fits(self.fingerprints())
        self.include_1x1 = recipe.include_1x1
        self.retarget(
            {
                norm_layer.name: norm_layer.target
                for norm_layer in recipe.norm_layers
                if norm_layer.target is not None
            }
        )
        self.set(recipe.setting)

    def evaluating(self) -> AbstractContextManager[None]:
        """A graph has no other mode."""
        return nullcontext()

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Every weight is as before when the context ends."""
        before, targets = self.setting(), dict(self._targets)
        try:
            yield
        finally:
            self._targets = targets
            known = self.setting()  # calibration may have added norm layers, which are at their identity
            self._alphas = {name: before.alphas.get(name, a) for name, a in known.alphas.items()}
            self._lambdas = {name: before.lambdas.get(name, 0.0) for name in known.lambdas}

    def rewritten(self, alpha_inputs: AlphaInputs | None = None) -> tuple[ir.Model, tuple[str, ...]]:
        """A copy of the graph with the weights that the model has now, and the norm layers that have them.

        Args:
            alpha_inputs: see :func:`bnpatch.onnx.rewrite.rewrite`.
        """
        # A recovered norm layer at its identity is the convolution that it was.
        used = {
            name: moments
            for name, moments in self.calibrated.items()
            if alpha_inputs or self._alphas[name] or self._lambdas[name] or not name.endswith(FUSED)
        }
        graph = self._with_norms(used)
        there = {n: a for n, a in self._alphas.items() if n in used or not n.endswith(FUSED)}
        patched: tuple[str, ...] = ()
        if alpha_inputs is not None or not self._is_as_read:
            running = {name: m for name, m in self.running().items() if name in there}
            patched = rewrite(
                graph,
                there,
                running=running,
                alpha_inputs=alpha_inputs,
                include_1x1=self.include_1x1,
            ).patched
        write_metadata(graph, self.preprocessing, self.class_names)
        return graph, patched

    def _with_norms(self, moments: Mapping[str, Moments[Any]]) -> ir.Model:
        graph = self.graph.clone()
        insert_norms(
            graph, {name.removesuffix(FUSED): m for name, m in moments.items() if name.endswith(FUSED)}
        )
        return graph

    def _patchable(self) -> list[match.NormLayer]:
        return [
            s for s in self._norm_layers.norm_layers if not s.needs_calibration or s.module in self.calibrated
        ]

    def _prepare(self, x: Tensor) -> npt.NDArray[Any]:
        takes_bytes = self.signature.dtype == np.uint8
        if not x.is_floating_point() and not takes_bytes:
            shape = (1, -1, 1, 1)
            mean, std = (
                255 * torch.tensor(v).view(shape) for v in (self.preprocessing.mean, self.preprocessing.std)
            )
            x = (x.float() - mean) / std
        if self.signature.channels_last and x.ndim == 4:
            x = x.movedim(1, -1)
        return np.ascontiguousarray(x.cpu().numpy().astype(self.signature.dtype))

    def _open_weighted(self, observe: bool = False) -> "_Weighted":
        """A session with all weights as inputs."""
        graph = self._with_norms(self.calibrated)
        moments: _Outputs = {}
        if observe:
            norm_layers = [
                s for s in match.inventory(graph).norm_layers if s.node.graph is graph.graph
            ]  # not of a branch
            for norm_layer, pair in zip(
                norm_layers, observe_values(graph, [(s.input, len(s.dims)) for s in norm_layers]), strict=True
            ):
                moments.setdefault(norm_layer.module, []).append(pair)
        running = {name: m for name, m in self.calibrated.items() if not name.endswith(FUSED)}
        done = rewrite(
            graph,
            self._alphas,
            running=running,
            alpha_inputs="per-site",
            running_inputs=True,
            include_1x1=self.include_1x1,
        )
        session = open_session(graph, self.device)
        taken = {value.name for value in session.get_overridable_initializers()}
        modules = {norm_layer.name: norm_layer.module for norm_layer in self._patchable()}
        alphas = {
            name: modules[norm_layer] for norm_layer, name in done.alpha_inputs.items() if name in taken
        }
        pairs: dict[str, list[tuple[str, str]]] = {}
        for site_name, pair in done.running_inputs.items():
            if pair[0] in taken:
                pairs.setdefault(modules[site_name], []).append(pair)
        return _Weighted(session, alphas, pairs, moments)

    def _open_by_batch(self) -> "tuple[Any, _Outputs]":
        """A session whose norms normalize by the batch, and the outputs that have its moments."""
        graph, names = self._with_norms(self.calibrated), dict[str, list[tuple[str, str]]]()
        outside = {s.module for s in match.inventory(graph).norm_layers if s.node.graph is not graph.graph}
        norm_layers = [s.module for s in self._patchable() if s.module not in outside]

        def append(tape: Tape, norm_layer: match.NormLayer, *_: Any) -> ir.Value:
            result, moments = append_by_batch(tape, norm_layer)
            graph.graph.outputs.extend([moments.mean, moments.var])
            names.setdefault(norm_layer.module, []).append((moments.mean.name or "", moments.var.name or ""))
            return result

        # Any weight that is no site's identity has it rewritten.
        running = {name: m for name, m in self.calibrated.items() if not name.endswith(FUSED)}
        rewrite(graph, dict.fromkeys(norm_layers, 0.5), running=running, include_1x1=True, append=append)
        return open_session(graph, self.device), names

    def _feeds(self, opened: "_Weighted") -> dict[str, npt.NDArray[Any]]:
        feeds = {
            name: np.asarray(self._alphas[norm_layer], np.float32)
            for name, norm_layer in opened.alphas.items()
        }
        for norm_layer, moments in self.running().items():
            for mean, var in opened.running.get(norm_layer, ()):
                feeds |= {
                    mean: np.asarray(moments.mean, np.float32),
                    var: np.asarray(moments.var, np.float32),
                }
        return feeds


@dataclass(frozen=True)
class _Weighted:
    """A session with weights as inputs.

    Attributes:
        session: onnxruntime's.
        alphas: the norm layer whose alpha an input takes, by name of the input.
        running: the inputs that take running mean and variance.
        moments: the outputs that have mean and variance of each example.
    """

    session: Any
    alphas: dict[str, str]
    running: "_Outputs"
    moments: "_Outputs"


#: Pairs of names, for mean and variance, by name of norm layer.
_Outputs = dict[str, list[tuple[str, str]]]


def _moments_of(norm_layer: match.NormLayer) -> Moments[Any]:
    assert norm_layer.running_mean is not None  # or it was calibrated
    assert norm_layer.running_var is not None
    return Moments(norm_layer.running_mean, norm_layer.running_var)


def _fingerprint(norm_layer: match.NormLayer) -> str:
    like = np.zeros(norm_layer.num_channels)
    mean = like if norm_layer.running_mean is None else norm_layer.running_mean
    var = like + 1 if norm_layer.running_var is None else norm_layer.running_var
    return fingerprint(
        [
            np.broadcast_to(norm_layer.weight, like.shape),
            np.broadcast_to(norm_layer.bias, like.shape),
            mean,
            var,
        ]
    )


def _as_tensors(moments: Moments[Any]) -> Moments[Tensor]:
    return Moments(*(torch.as_tensor(np.asarray(p, np.float32)) for p in (moments.mean, moments.var)))


def _as_in_recipes(moments: Moments[Any]) -> Moments[Any]:
    """Rounded to float32, so that a recipe is exact, and held in float64, so that arithmetic is."""
    parts = (np.asarray(part, np.float32) for part in (moments.mean, moments.var))
    return Moments(*(part.astype(np.float64) for part in parts))


@dataclass(frozen=True)
class _ModuleNorm:
    name: str
    kind: str
    num_channels: int

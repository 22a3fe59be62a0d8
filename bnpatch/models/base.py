"""The base class of models that can be patched and run, for torch and for onnxruntime.

:class:`Model` holds a :class:`~bnpatch.core.patch.PatchState` and has everything that does not depend on the
backend. The backends (:class:`~bnpatch.models.torch_model.TorchModel` and
:class:`~bnpatch.models.onnx_model.OnnxModel`) find norm layers, compute with a state, and run batches.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import onnx_ir as ir
import torch
from torch import Tensor

from bnpatch.core.errors import BnpatchError
from bnpatch.core.inventory import Inventory, NormFacts, NormLayer
from bnpatch.core.moments import Moments, mix
from bnpatch.core.patch import PatchState, PatchWeights, Statistics, as_arrays
from bnpatch.core.recipe import NormRecipe, Recipe
from bnpatch.data.preprocessing import Preprocessing
from bnpatch.models.architecture import Architecture
from bnpatch.models.outputs import PROBES, Output, choose, describe
from bnpatch.onnx.rewrite import AlphaInputs

#: Maps a batch to the moments (N, C) of each example, by name of module.
Watch = Callable[[Tensor], Mapping[str, Moments[Any]]]

NormLayerT = TypeVar("NormLayerT", bound=NormLayer)


class Model(ABC, Generic[NormLayerT]):
    """A model with its preprocessing and the patch that it computes with.

    Attributes:
        name: the name of the model in tables and files.
        preprocessing: how images become inputs.
        class_names: names of the outputs in their order, or None if they are not known.
        class_order: how its training script sorted class folders, "plain" (1, 10, 2) or "natural".
        arch: the architecture, from which the module can be built again, or None.
        device: the device that computes.
        notes: what a person should know about how it was loaded.
        output: what is read of that which the model returns; None until the first batch.
        wanted_output: name or number of the output that the user wants, or None.
    """

    if TYPE_CHECKING:  # fields of the backends, which are dataclasses
        name: str
        preprocessing: Preprocessing
        class_names: tuple[str, ...] | None
        class_order: str
        arch: Architecture | None
        device: torch.device
        notes: list[str]
        output: Output | None
        wanted_output: str | None
    has_gradients: ClassVar[bool]  # whether forward computes gradients
    runs_onnx: ClassVar[bool] = False
    suffix: ClassVar[str]  # suffix of a file that holds the patched model
    norm_cost: ClassVar[int]  # fixed cost of a patched norm layer per batch, as a number of elements read
    _state: PatchState

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The type of the numbers that the model computes with."""

    # The patch.

    @property
    def state(self) -> PatchState:
        """The patch that the model computes with; its weights name every norm layer."""
        return self._state

    def set_state(self, state: PatchState) -> None:
        """Make the model compute with another patch. Norm layers that it does not name compute as they did.

        Raises:
            BnpatchError: the model has no norm layer of a name, or a norm layer with a lambda has no
                re-estimated statistics.
            InvalidAlphaError: a weight is not in [0, 1].
            InvalidSlopeError: a slope is not in [-4, 4].
        """
        self._make_norm_layers(state)
        baseline_alphas = self.baseline_alphas()
        state.check(baseline_alphas, self.name)
        zeros = dict.fromkeys(baseline_alphas, 0.0)
        everywhere = PatchWeights(baseline_alphas, zeros, zeros)
        state = replace(state, weights=everywhere.updated(state.weights))
        self._use(state)
        self._state = state

    @property
    def weights(self) -> PatchWeights:
        """Alpha, lambda and slope of every norm layer."""
        return self._state.weights

    def set_weights(self, weights: PatchWeights) -> None:
        """Set the weights of the norm layers that ``weights`` names, see :meth:`set_state`."""
        self.set_state(self._state.with_weights(weights))

    def alphas(self) -> dict[str, float]:
        """Return the weight of the example by name of norm layer."""
        return dict(self._state.weights.alphas)

    def set_alphas(self, alpha: float | Mapping[str, float]) -> None:
        """Set the weight of the example, for all norm layers or by name.

        Raises:
            BnpatchError: the model has no norm layer, or none of a name.
            InvalidAlphaError: a weight is not in [0, 1].
        """
        if not self._state.weights.alphas:
            self._refuse_without_norm_layers()
        if not isinstance(alpha, Mapping):
            alpha = dict.fromkeys(self._state.weights.alphas, float(alpha))
        self.set_weights(PatchWeights(alpha))

    def set_target(self, target: Statistics) -> None:
        """Set the re-estimated statistics (C,) that lambda weights, for the norm layers named."""
        self.set_state(self._state.with_target(target))

    def set_running(self, running: Statistics) -> None:
        """Give running statistics (C,) to norms that have none of their own, which makes them norm layers.

        A new norm layer still computes what the norm did. A norm that got running statistics before keeps
        its weights. The name of the Batch Norm that was fused into a convolution is the name of the
        convolution + :data:`~bnpatch.core.inventory.FUSED`.

        Raises:
            BnpatchError: the model has no such norm or convolution.
        """
        self.set_state(self._state.with_running(running))

    def baseline(self) -> PatchState:
        """Return the state in which the model computes what it did before any patch."""
        return replace(self._state, weights=PatchWeights())

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Put the model in evaluation mode; when the context ends, restore every mode and the state."""
        before = self._state
        try:
            with self.evaluating():
                yield
        finally:
            self.set_state(before)

    @contextmanager
    def in_state(self, state: PatchState | None) -> Iterator[None]:
        """Make the model compute with a state (None: its own) in evaluation mode, until the context ends."""
        with self.borrowed():
            if state is not None:
                self.set_state(state)
            yield

    # Recipes.

    def recipe(self, state: PatchState | None = None, provenance: Mapping[str, Any] | None = None) -> Recipe:
        """Make a recipe of a state of this model.

        Args:
            state: the state; None for the one that the model computes with.
            provenance: how the state was found, as plain JSON values.
        """
        with self.in_state(state):
            state, hashes = self._state, self.fingerprints()
            norms = []
            for norm_layer in self.inventory().norm_layers:
                name = norm_layer.name
                weight = state.weights.lambdas[name]
                target = state.target[name] if weight else None
                running = state.running.get(name)
                norms.append(
                    NormRecipe(
                        name,
                        norm_layer.kind,
                        state.weights.alphas[name],
                        hashes[name],
                        weight,
                        None if target is None else as_arrays(target),
                        None if running is None else as_arrays(running),
                        state.channels_per_group.get(name, 1),
                        state.weights.slopes[name],
                    )
                )
        return Recipe(tuple(norms), dict(provenance or {}), state.include_1x1)

    def apply(self, recipe: Recipe) -> None:
        """Patch the model with a recipe.

        Raises:
            BnpatchError: the recipe was made for another model, or has statistics of another size; the
                message names the first norm layer that differs.
        """
        state, before = recipe.state, self._state
        recipe.check_fits(self.fingerprints(state.running))
        self.set_state(state)
        channels = {norm_layer.name: norm_layer.num_channels for norm_layer in self.inventory().norm_layers}
        for name, statistics in (*state.target.items(), *state.running.items()):
            if statistics.mean.shape != (channels[name],):
                self.set_state(before)
                raise BnpatchError(
                    f"the recipe is damaged: norm layer {name!r} has {channels[name]} channels, its "
                    f"statistics have the shape {tuple(statistics.mean.shape)}",
                    "make another with bnpatch tune-alpha",
                )

    @abstractmethod
    def save(self, path: str | os.PathLike[str], recipe: Recipe) -> bool:
        """Write a patched file; return False if :func:`bnpatch.load` needs ``unsafe_load`` to read it."""

    @abstractmethod
    def rewritten(
        self, alpha_inputs: AlphaInputs | None = None, example_input: Tensor | None = None
    ) -> tuple[ir.Model, tuple[str, ...]]:
        """Return the patched model as an ONNX graph, and the names of the norm layers that were rewritten.

        Args:
            alpha_inputs: see :func:`bnpatch.onnx.rewrite.rewrite`.
            example_input: inputs (N, ...) with which a torch model is exported; by default blank images.
        """

    # Methods of the backends.

    @abstractmethod
    def inventory(self) -> Inventory[NormLayerT]:
        """List the norm layers, and the norms that are skipped."""

    @abstractmethod
    def uncalibrated(self) -> tuple[str, ...]:
        """Name the norms that become norm layers once they have running statistics, such as Group Norm."""

    @abstractmethod
    def baseline_alphas(self) -> dict[str, float]:
        """Return, by name of norm layer, the alpha at which it computes what it did before any patch."""

    def alphas_in_use(self) -> Mapping[str, float | Tensor]:
        """Return the weight of the example by name of norm layer; a learned one is the tensor itself."""
        return self.alphas()

    def slopes_in_use(self) -> Mapping[str, float | Tensor]:
        """Return the slope by name of norm layer; a learned one is the tensor itself."""
        return self.weights.slopes

    @abstractmethod
    def watch_fused(self, example: Tensor) -> Watch | None:
        """Return a function from a batch to the moments of each example at the output of convolutions.

        These are the convolutions that a Batch Norm may have been fused into; the result is None if there are
        none.

        Args:
            example: an input (1, ...), with which they are found.
        """

    @abstractmethod
    def facts(self) -> dict[str, NormFacts]:
        """Return, by name of norm layer, what the layer has from the checkpoint."""

    @abstractmethod
    def fingerprints(self, running: Collection[str] = ()) -> dict[str, str]:
        """Return a hash of the parameters of each norm layer, by name; a patch does not change it.

        Args:
            running: names of further norms to include, which have no running statistics yet.
        """

    @abstractmethod
    def norm_shapes(self, example: Tensor | None = None) -> dict[str, tuple[int, ...]]:
        """Return the spatial shape of each norm layer's input by name, as far as it is known.

        Args:
            example: an input (1, ...); by default a blank image.
        """

    @abstractmethod
    def evaluating(self) -> AbstractContextManager[None]:
        """Return a context in which the model is in evaluation mode. Don't change the state within it."""

    @abstractmethod
    def _make_norm_layers(self, state: PatchState) -> None:
        """Make norm layers of exactly the norms that have running statistics, own ones or in the state."""

    @abstractmethod
    def _use(self, state: PatchState) -> None:
        """Start to compute with a state, which was checked and names every norm layer."""

    @abstractmethod
    def _refuse_without_norm_layers(self) -> None:
        """Raise a BnpatchError that says why there is nothing to patch."""

    @abstractmethod
    def statistics_in_use(self) -> Mapping[str, Moments[Any]]:
        """Return, by name, the mean and variance (C,) in use where they are not the norm layer's own."""

    # Predictions.

    def forward(self, x: Tensor) -> Tensor:
        """Run a batch as :meth:`predict` does, with gradients if the model has them."""
        return self.predict(x)

    def efficient_batch(self, batch_size: int, x: Tensor) -> int:
        """Return how many examples like those of a batch ``x`` to run at a time, at most ``batch_size``."""
        return batch_size

    @abstractmethod
    def predict(self, x: Tensor) -> Tensor:
        """Return the outputs for a batch of images as bytes, or of inputs as floats.

        Returns:
            Logits (N, K), probabilities of a sigmoid, or outputs of another shape if the model has them; of
            several outputs, those of :meth:`output_for`. Probabilities of a softmax become their logarithms.
        """

    @abstractmethod
    def observe(self, x: Tensor, gradients: bool = False) -> tuple[Tensor, dict[str, Moments[Tensor]]]:
        """Return the outputs for a batch, and each example's moments (N, C) at each norm layer's input."""

    @abstractmethod
    def moments_by_batch(self, x: Tensor) -> dict[str, Moments[Tensor]]:
        """Return the batch's moments (C,) at each norm layer's input, while Batch Norm normalizes by them."""

    @abstractmethod
    def _returned(self, x: Tensor) -> dict[str, Tensor]:
        """Run a batch, and return all tensors that the model returns, by name."""

    @abstractmethod
    def _probed(self, x: Tensor) -> tuple[dict[str, Tensor], Collection[str]]:
        """Run a batch; return all tensors that the model returns, and the names of those from a sigmoid."""

    def output_for(self, example: Tensor, classes: int | None = None) -> Output:
        """Return what is read of that which the model returns, which is decided once.

        Random inputs decide, which depend on nothing but the shape of the example; see
        :func:`bnpatch.models.outputs.choose`.

        Args:
            example: inputs (N, ...), of which only the shape counts.
            classes: number of classes that the data has, if it is known.

        Raises:
            BnpatchError: the model doesn't take the example, or it is not clear which output is meant.
        """
        if self.output is None:
            with self.evaluating(), torch.inference_mode():
                self._returned(example[:1])  # raises for an input that the model doesn't take
                noise = torch.Generator().manual_seed(0)
                tensors, sigmoids = self._probed(torch.randn(PROBES, *example.shape[1:], generator=noise))
            found = describe(tensors, sigmoids)
            if not found:
                shapes = ", ".join(str(tuple(y.shape)) for y in tensors.values()) or "no tensor"
                raise BnpatchError(
                    f"{self.name} returns {shapes} for {PROBES} images", "give a model that returns a tensor"
                )
            known = len(self.class_names) if self.class_names else classes
            self.output = choose(found, self.wanted_output, known, self.name)
        return self.output

    @property
    def chosen_output(self) -> str | None:
        """The name of the output that was chosen among several, to be remembered; None without a choice."""
        if self.output is None:
            return self.wanted_output
        return None if self.output.is_only else self.output.name

    def as_classes(self, outputs: Tensor) -> Tensor:
        """Return the logits (N, K) of the classes for outputs of :meth:`predict` or :meth:`forward`.

        Raises:
            BnpatchError: the output for one image isn't one number per class.
        """
        assert self.output is not None  # it was decided when these outputs were computed
        self._check_classes(self.output)
        return self.output.as_classes(outputs)

    def num_outputs(self, example: Tensor | None = None, classes: int | None = None) -> int:
        """Return K, the number of classes, found by running random inputs; 2 if the model has one output.

        Args:
            example: an input (1, ...); by default a blank image.
            classes: number of classes that the data has, if it is known; it helps to choose an output.

        Raises:
            BnpatchError: the output for one input isn't one number per class, or it is not clear which of
                several outputs is meant.
        """
        output = self.output_for(self._blank() if example is None else example, classes)
        return self._check_classes(output)

    def _check_classes(self, output: Output) -> int:
        if output.num_classes is None:
            raise BnpatchError(
                f"{self.name} returns {output}, not one number per class",
                "choose another output with --output-name, or give tune_alpha a metric of your own in Python",
            )
        return output.num_classes

    def _blank(self) -> Tensor:
        return torch.zeros(1, *self.preprocessing.input_size)

    def _run_one(self, example: Tensor | None = None) -> None:
        with self.evaluating(), torch.inference_mode():
            self._returned(self._blank() if example is None else example)


def in_use(state: PatchState, source: Mapping[str, Moments[Any]]) -> dict[str, Moments[Any]]:
    """Return the statistics of the norm layers that don't normalize by those of the checkpoint.

    Args:
        state: state of the model.
        source: by name of norm layer, running statistics of the checkpoint or from data.
    """
    weighted = ((name, weight) for name, weight in state.weights.lambdas.items() if weight)
    mixed = {name: mix(weight, as_arrays(state.target[name]), source[name]) for name, weight in weighted}
    return {name: as_arrays(part) for name, part in state.running.items()} | mixed

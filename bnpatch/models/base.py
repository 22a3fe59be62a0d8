"""The base class of models that can be patched and run, for torch and for onnxruntime.

:class:`Model` holds a :class:`~bnpatch.core.patch.PatchState` and has everything that does not depend on the
backend. :class:`~bnpatch.models.torch_model.TorchModel` and :class:`~bnpatch.models.onnx_model.OnnxModel` add
what :class:`~bnpatch.models.backend.Backend` lists.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bnpatch.core.errors import BnpatchError
from bnpatch.core.module_names import as_named_in
from bnpatch.core.moments import ExampleWeight, Moments
from bnpatch.core.patch import PatchState, PatchWeights, Statistics
from bnpatch.core.recipe import Recipe
from bnpatch.data.preprocessing import Preprocessing
from bnpatch.models.architecture import Architecture
from bnpatch.models.backend import Backend, NormLayerT
from bnpatch.models.outputs import PROBES, Output, choose


@dataclass(kw_only=True)
class Model(Backend[NormLayerT]):
    """A model with its preprocessing and the patch that it computes with.

    Attributes:
        name: the name of the model in tables and files.
        preprocessing: how images become inputs.
        class_names: names of the outputs in their order, or None if they are not known.
        class_order: how its training script sorted class folders, "plain" (1, 10, 2) or "natural" (1, 2, 10).
        arch: the architecture, from which the module can be built again, or None.
        device: the device that computes.
        notes: what a person should know about how it was loaded.
        output: which of the tensors that the model returns is read; None until the first batch.
        wanted_output: name or number of the output that the user wants, or None.
        state: the patch that the model computes with. At first, it has the weights that a torch module has
            itself, if it is patched already; all else comes from ``_state``.
    """

    name: str
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    class_order: str = "natural"
    arch: Architecture | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    notes: list[str] = field(default_factory=list)
    output: Output | None = None
    wanted_output: str | None = None
    _state: PatchState = field(default_factory=PatchState, repr=False)  # a field for dataclasses.replace

    # The patch.

    @property
    def state(self) -> PatchState:
        """The patch that the model computes with; its weights name every norm layer."""
        return self._state

    def set_state(self, state: PatchState) -> None:
        """Make the model compute with another patch. Norm layers that it does not name get the baseline.

        Raises:
            BnpatchError: the model has no norm layer of a name, or a norm layer with a lambda has no
                re-estimated statistics.
            InvalidWeightError: a weight is out of its range.
        """
        self._make_norm_layers(state)
        baseline_alphas = self.baseline_alphas()
        state.check(baseline_alphas, self.name)
        state = replace(state, weights=PatchWeights.baseline(baseline_alphas).updated(state.weights))
        self._use(state)
        self._state = state

    @property
    def weights(self) -> PatchWeights:
        """Alpha, lambda, slope and offset of every norm layer."""
        return self._state.weights

    def set_weights(self, weights: PatchWeights) -> None:
        """Set the weights of the norm layers that ``weights`` names, see :meth:`set_state`."""
        self.set_state(self._state.with_weights(weights))

    def weights_in_use(self) -> dict[str, ExampleWeight]:
        """Return how much the example counts, by name of norm layer; what is learned is the tensor itself."""
        return {name: self.weights.example_weight(name) for name in self.weights.alphas}

    def alphas(self) -> dict[str, float]:
        """Return the weight of the example by name of norm layer."""
        return dict(self._state.weights.alphas)

    def set_alphas(self, alpha: float | Mapping[str, float]) -> None:
        """Set the weight of the example, for all norm layers or by name.

        Raises:
            BnpatchError: the model has no norm layer, or none of a name.
            InvalidWeightError: a weight is not in [0, 1].
        """
        if not self._state.weights.alphas:
            self._refuse_without_norm_layers()
        if not isinstance(alpha, Mapping):
            alpha = dict.fromkeys(self._state.weights.alphas, float(alpha))
        self.set_weights(PatchWeights(alpha))

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
        """Return the state in which the model computes the same as before any patch."""
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
            kinds = {norm_layer.name: norm_layer.kind for norm_layer in self.inventory().norm_layers}
            return Recipe.of_state(self._state, kinds, self.fingerprints(), provenance or {})

    def apply(self, recipe: Recipe) -> None:
        """Patch the model with a recipe.

        Raises:
            BnpatchError: the recipe was made for another model, or has statistics of another size; the
                message names the first norm layer that differs.
        """
        recipe = as_named_in([*self.baseline_alphas(), *self.uncalibrated()], recipe)
        state, before = recipe.state, self._state
        recipe.check_fits(self.fingerprints(state.running))
        self.set_state(state)
        try:
            recipe.check_sizes({norm.name: norm.num_channels for norm in self.inventory().norm_layers})
        except BnpatchError:
            self.set_state(before)
            raise

    # Predictions.

    def forward(self, x: Tensor) -> Tensor:
        """Run a batch as :meth:`predict` does, with gradients if the model has them."""
        return self.predict(x)

    def first_moments(self, x: Tensor, names: Collection[str]) -> tuple[str, Moments[Any]] | None:
        """Return the first of some norm layers that a batch reaches, and the moments (N, C) of its input.

        Args:
            x: as for :meth:`predict`.
            names: the norm layers. None is returned if the batch reaches none of them.
        """
        _, seen = self.observe(x)
        return next(((name, moments) for name, moments in seen.items() if name in names), None)

    def efficient_batch(self, batch_size: int, x: Tensor) -> int:
        """Return how many examples like those of a batch ``x`` to run at a time, at most ``batch_size``."""
        return batch_size

    def output_for(self, example: Tensor, classes: int | None = None) -> Output:
        """Return which output is read of those that the model returns; random inputs decide that once.

        See :func:`bnpatch.models.outputs.choose`.

        Args:
            example: inputs (N, ...), of which only the shape counts.
            classes: number of classes that the data has, if it is known.

        Raises:
            BnpatchError: the model doesn't take the example, or it is not clear which output is meant.
        """
        if self.output is None:
            with self.evaluating(), torch.inference_mode():
                self._probed(example[:1])  # raises for an input that the model doesn't take
                noise = torch.Generator().manual_seed(0)
                tensors, sigmoids = self._probed(torch.randn(PROBES, *example.shape[1:], generator=noise))
            known = len(self.class_names) if self.class_names else classes
            self.output = choose(tensors, sigmoids, self.wanted_output, known, self.name)
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
        self.output.check_classes(self.name)
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
        return output.check_classes(self.name)

    def _blank(self) -> Tensor:
        return torch.zeros(1, *self.preprocessing.input_size)

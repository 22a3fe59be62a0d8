"""What a backend has to do: find norm layers, compute with a patch, run batches, write files.

:class:`~bnpatch.models.base.Model` has everything else, written once for all backends by these methods.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import onnx_ir as ir
import torch
from torch import Tensor

from bnpatch.core.inventory import Inventory, NormFacts, NormLayer
from bnpatch.core.moments import Moments
from bnpatch.core.patch import PatchState
from bnpatch.core.recipe import Recipe

if TYPE_CHECKING:
    from bnpatch.models.torch_model import TorchModel

#: Maps a batch to the moments (N, C) of each example, by name of module.
Watch = Callable[[Tensor], Mapping[str, Moments[Any]]]

NormLayerT = TypeVar("NormLayerT", bound=NormLayer)


class Backend(ABC, Generic[NormLayerT]):
    """The methods that :class:`TorchModel` and :class:`OnnxModel` implement, each in its own way."""

    runs_onnx: ClassVar[bool] = False
    suffix: ClassVar[str]  # suffix of a file that holds the patched model
    norm_cost: ClassVar[int]  # fixed cost of a patched norm layer per batch, as a number of elements read

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The type of the numbers that the model computes with."""

    @abstractmethod
    def inventory(self) -> Inventory[NormLayerT]:
        """List the norm layers, and the norms that are skipped."""

    @abstractmethod
    def uncalibrated(self) -> tuple[str, ...]:
        """Name the norms that become norm layers once they have running statistics, such as Group Norm."""

    @abstractmethod
    def baseline_alphas(self) -> dict[str, float]:
        """Return, by name of norm layer, the alpha at which it computes the same as before any patch."""

    @abstractmethod
    def facts(self) -> dict[str, NormFacts]:
        """Return, by name of norm layer, its running statistics without lambda, and its eps."""

    @abstractmethod
    def statistics_in_use(self) -> Mapping[str, Moments[Any]]:
        """Return, by name, the mean and variance (C,) in use where they are not the norm layer's own."""

    @abstractmethod
    def fingerprints(self, running: Collection[str] = ()) -> dict[str, str]:
        """Return a hash of the parameters of each norm layer, by name; a patch does not change it.

        ``running`` names further norms to include, which have no running statistics yet.
        """

    @abstractmethod
    def norm_shapes(self, example: Tensor | None = None) -> dict[str, tuple[int, ...]]:
        """Return the spatial shape of each norm layer's input by name, as far as it is known.

        A torch module runs ``example``, an input (1, ...), by default a blank image; norm layers that don't
        run are missing. In a graph, shapes are inferred.
        """

    @abstractmethod
    def evaluating(self) -> AbstractContextManager[None]:
        """Return a context in which the model is in evaluation mode. Don't change the state within it."""

    @abstractmethod
    def predict(self, x: Tensor) -> Tensor:
        """Run a batch.

        Args:
            x: images as bytes (N, C, H, W), resized and cropped; or floating-point inputs (N, ...).

        Returns:
            Logits (N, K), probabilities of a sigmoid, or outputs of another shape if the model has them; of
            several outputs, those of :meth:`output_for`. Probabilities of a softmax become their logarithms.

        Raises:
            BnpatchError: the model does not take this input, returns no tensor, or none of several is chosen.
        """

    @abstractmethod
    def observe(self, x: Tensor, gradients: bool = False) -> tuple[Tensor, dict[str, Moments[Tensor]]]:
        """Run a batch, and compute the moments of each example at the input of the norms.

        Args:
            x: as for :meth:`predict`.
            gradients: let gradients flow through the results, if the model has them.

        Returns:
            The outputs; and by name of norm layer or uncalibrated norm, the moments (N, C) of each example at
            its input. If a module is called k times, they are of shape (k * N, C).
        """

    @abstractmethod
    def moments_by_batch(self, x: Tensor) -> dict[str, Moments[Tensor]]:
        """Run a batch as in training: Batch Norm normalizes by the moments of the batch.

        Group Norm computes what it always does. The model is left as it was.

        Returns:
            By name of norm layer, the moments (C,) of the whole batch at its input, pooled over all calls if
            a module is called several times. Norm layers that the batch does not reach are missing, and those
            in a branch (If, Loop) of a graph.
        """

    @abstractmethod
    def watch_fused(self, example: Tensor) -> Watch | None:
        """Return a function from a batch to the moments of each example at the output of convolutions.

        These are the convolutions that a Batch Norm may have been fused into, found by running ``example``,
        an input (1, ...). The result is None if there are none.
        """

    @abstractmethod
    def with_gradients(self, x: Tensor) -> "TorchModel | None":
        """Return a model of the same norm layers that computes gradients: this one, or a copy of it in torch.

        Args:
            x: a batch, on which a copy must agree with this model.

        Returns:
            The model; None where there is no such copy. A copy has the running statistics in the state of
            this model (``PatchState.running``) as its own, so states for the copy leave them out.
        """

    @abstractmethod
    def ready_to_run(self, x: Tensor, threads: int | None = None) -> Callable[[], object]:
        """Return a function that runs inputs (N, ...) as a user of the patched model would, to time it.

        The model must have the same state now and whenever the function runs.

        Args:
            x: normally distributed inputs; a graph that takes bytes gets bytes.
            threads: number of CPU threads of onnxruntime, or None for its default; torch has one number for
                the whole process.

        Raises:
            BnpatchError: the model does not take these inputs.
        """

    @abstractmethod
    def unpatched_graph(self, example_input: Tensor | None = None) -> tuple[ir.Model, frozenset[str]]:
        """Return the model without its patch as a new ONNX graph, and the names of its norm layers in it.

        A torch model is exported with ``example_input``, inputs (N, ...), by default blank images.
        """

    @abstractmethod
    def save(self, path: str | os.PathLike[str], recipe: Recipe, images: Tensor | None = None) -> bool:
        """Write a file of the model, patched with a recipe, for :func:`bnpatch.load`.

        Args:
            path: the file.
            recipe: the patch.
            images: a real batch (N, ...) on which an ONNX file is compared, besides random ones.

        Returns:
            Whether the file loads without ``unsafe_load``. The file of a torch model needs it if building the
            architecture by its name does not give this model again: then the file has the pickled module.
        """

    @abstractmethod
    def _make_norm_layers(self, state: PatchState) -> None:
        """Make norm layers of the norms with running statistics, their own or the state's, no others."""

    @abstractmethod
    def _use(self, state: PatchState) -> None:
        """Start to compute with a state, which was checked and names every norm layer."""

    @abstractmethod
    def _refuse_without_norm_layers(self) -> None:
        """Raise a BnpatchError that says why there is nothing to patch."""

    @abstractmethod
    def _probed(self, x: Tensor) -> tuple[dict[str, Tensor], Collection[str]]:
        """Run a batch; return all tensors that the model returns, and the names of those from a sigmoid."""

"""An ONNX file that can be patched and asked for predictions, on onnxruntime.

One session has all alphas as inputs and serves the whole search; another runs the file as it is, which
answers where all alphas are 0, so that "as it is" means just that.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from bnpatch.errors import BnpatchError, check_alpha, first_line
from bnpatch.graph import match, read
from bnpatch.graph.folded import FOLDED, folded_candidates, insert_norms
from bnpatch.graph.rewrite import AlphaInputs, rewrite
from bnpatch.graph.session import Signature, open_session, read_signature
from bnpatch.moments import Moments
from bnpatch.preprocessing import Preprocessing
from bnpatch.recipe import Recipe, SiteRecipe, fingerprint
from bnpatch.sites import AnySite, LeftAlone, Survey
from bnpatch.to_graph import program_to_graph

#: Keys of the file's metadata under which bnpatch stores what it knows, as JSON.
PREPROCESSING, CLASS_NAMES = "bnpatch.preprocessing", "bnpatch.class_names"


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
        notes: what a person should know about it.
        calibrated: moments of the outputs of convolutions that a Batch Norm was folded into, by name:
            each of them is a site.
    """

    graph: ir.Model
    name: str
    signature: Signature
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    class_order: str = "natural"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    notes: list[str] = field(default_factory=list)
    calibrated: dict[str, Moments[Any]] = field(default_factory=dict)
    arch: None = None

    def __post_init__(self) -> None:
        self._sites = match.survey(self._with_norms(self.calibrated))
        self._alphas = dict.fromkeys((site.module for site in self._patchable()), 0.0)
        self._plain: Any = None
        self._weighed: Any = None
        self._inputs: dict[str, str] = {}  # of the weighed session: the site whose alpha an input takes
        self._num_outputs: int | None = None

    def survey(self) -> Survey[AnySite]:
        """The sites, one per module, and the norms that are left alone."""
        sites: dict[str, AnySite] = {}
        for site in self._patchable():
            sites.setdefault(site.module, _ModuleSite(site.module, site.kind, site.num_channels))
        reason = "has no running moments; it would need them calibrated on data"
        uncalibrated = (LeftAlone(s.name, s.kind, reason) for s in self._sites.sites if s.needs_calibration)
        return Survey(tuple(sites.values()), (*uncalibrated, *self._sites.left_alone))

    def folded(self) -> tuple[str, ...]:
        """Convolutions that a Batch Norm may have been folded into, and that are no sites so far."""
        candidates = folded_candidates(self.graph)
        return tuple(c.name for c in candidates if c.name not in self.calibrated)

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return self.graph.opset_imports.get("", 0)

    def alphas(self) -> dict[str, float]:
        """The weight of the example by name of site."""
        return dict(self._alphas)

    def set_alphas(self, alpha: float | Mapping[str, float]) -> None:
        """Set the weight of the example, for all sites or by name.

        Raises:
            BnpatchError: there is no site, or none of a name; InvalidAlphaError for a wrong weight.
        """
        if not self._alphas:
            remedy = "it was folded into the convolutions, most likely: add --recover-folded"
            if reasons := [left.reason for left in self.survey().left_alone]:
                remedy = f"its norms are left alone: {reasons[0]}"
            raise BnpatchError(f"{self.name} has no Batch Norm that could be patched", remedy)
        if not isinstance(alpha, Mapping):
            alpha = dict.fromkeys(self._alphas, float(alpha))
        if unknown := [name for name in alpha if name not in self._alphas]:
            raise BnpatchError(f"{self.name} has no site {unknown[0]!r}", "see bnpatch inspect --sites")
        self._alphas.update({name: check_alpha(float(value), name) for name, value in alpha.items()})

    def calibrate(self, moments: Mapping[str, Moments[Any]]) -> None:
        """Take these convolutions as sites, see :func:`bnpatch.calibrate.recover_folded`.

        Raises:
            BnpatchError: the model has no such convolution.
        """
        known = {candidate.name for candidate in folded_candidates(self.graph)}
        if unknown := [name for name in moments if name not in known]:
            raise BnpatchError(f"{self.name} has no folded convolution {unknown[0]!r}", "calibrate it again")
        self.calibrated = {**self.calibrated, **moments}
        self.__post_init__()

    def predict(self, x: Tensor) -> Tensor:
        """Run a batch.

        Args:
            x: images as bytes (N, C, H, W), resized and cropped; or floating-point inputs as they are.

        Returns:
            Logits (N, K), or whatever else the graph returns, on the host.

        Raises:
            BnpatchError: the graph does not take this input.
        """
        if any(self._alphas.values()):
            session = self._weighed_session()
        else:
            session = self._plain = self._plain or open_session(self.graph, self.device)
        y = torch.from_numpy(self.run(session, [self.signature.output], x)[0])
        y = y.flatten(1) if y.ndim == 4 and y.shape[2:] == (1, 1) else y
        # The softmax of log(p) is p: the logarithm gives back logits, up to a constant that changes nothing.
        return (
            y.float().clamp_min(torch.finfo(torch.float32).tiny).log() if self.signature.is_probability else y
        )

    def run(self, session: Any, outputs: list[str], x: Tensor) -> list[npt.NDArray[Any]]:
        """Run a session of this model on a batch, in portions where the graph's batch size is fixed.

        Args:
            session: of the graph, or of one that was made from it.
            outputs: names of what to return, each of shape (N, ...).
            x: as for :meth:`predict`.

        Raises:
            BnpatchError: the graph does not take this input.
        """
        inputs = self._prepare(x)
        step = self.signature.batch or max(1, len(inputs))
        taken = {value.name for value in session.get_overridable_initializers()}
        feeds = {n: np.asarray(self._alphas[s], np.float32) for n, s in self._inputs.items() if n in taken}
        portions = []
        for start in range(0, max(1, len(inputs)), step):
            portion = inputs[start : start + step]
            missing = step - len(portion) if self.signature.batch else 0
            padded = (
                np.concatenate([portion, np.repeat(portion[-1:], missing, axis=0)]) if missing else portion
            )
            try:
                results = session.run(outputs, {self.signature.input: padded, **feeds})
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

    def site_shapes(self) -> dict[str, tuple[int, ...]]:
        """Spatial shape of each site's input by name, as far as the graph tells it in numbers."""
        shapes = {}
        for site in self._patchable():
            spatial = site.dims[2:]
            if all(isinstance(size, int) for size in spatial):
                shapes[site.module] = tuple(int(size) for size in spatial if isinstance(size, int))
        return shapes

    def fingerprints(self) -> dict[str, str]:
        """A hash of the parameters of each site, by name: that of the torch model which was exported."""
        hashes = {s.module: _fingerprint(s) for s in self._patchable()}
        for candidate in folded_candidates(self.graph):
            if candidate.name in self.calibrated:  # of what the file has, not of what the data gave
                hashes[candidate.name + FOLDED] = fingerprint(candidate.parameters)
        return hashes

    def recipe(self, provenance: Mapping[str, Any] | None = None) -> Recipe:
        """The weights that the model has now, as a recipe."""
        hashes = self.fingerprints()
        sites = []
        for site in self.survey().sites:
            moments = self.calibrated.get(site.name.removesuffix(FOLDED))
            alpha, print_ = self._alphas[site.name], hashes[site.name]
            sites.append(SiteRecipe(site.name, site.kind, alpha, print_, _plain(moments)))
        return Recipe(tuple(sites), dict(provenance or {}))

    def apply(self, recipe: Recipe) -> None:
        """Patch the model with a recipe.

        Raises:
            BnpatchError: the recipe was made for another model; names the first site that differs. Or it
                pools channels, which the file doesn't.
        """
        if pooled := [site.name for site in recipe.sites if site.channels_per_group > 1 and site.alpha]:
            raise BnpatchError(
                f"the recipe pools channels at {pooled[0]!r}, of which an ONNX file knows nothing",
                "export the torch checkpoint with the recipe",
            )
        found = {
            site.name.removesuffix(FOLDED): Moments(*(np.array(site.calibrated[k]) for k in ("mean", "var")))
            for site in recipe.sites
            if site.calibrated is not None
        }
        if found:
            self.calibrate(found)
        recipe.check_fits(self.fingerprints())
        self.set_alphas(recipe.alphas)

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Every alpha is as before when the context ends."""
        alphas = dict(self._alphas)
        try:
            yield
        finally:
            self._alphas = alphas

    def rewritten(self, alpha_inputs: AlphaInputs | None = None) -> tuple[ir.Model, tuple[str, ...]]:
        """A copy of the graph with the weights that the model has now, and the sites that have them.

        Args:
            alpha_inputs: see :func:`bnpatch.graph.rewrite.rewrite`.
        """
        # A recovered site at alpha = 0 is the convolution that it was.
        used = {n: m for n, m in self.calibrated.items() if alpha_inputs or self._alphas[n + FOLDED]}
        graph = self._with_norms(used)
        there = {
            name: a for name, a in self._alphas.items() if name.removesuffix(FOLDED) not in self.calibrated
        }
        there |= {name + FOLDED: self._alphas[name + FOLDED] for name in used}
        patched: tuple[str, ...] = ()
        if alpha_inputs is not None or any(there.values()):
            patched = rewrite(graph, there, alpha_inputs=alpha_inputs).patched
        graph.metadata_props[PREPROCESSING] = json.dumps(self.preprocessing.to_json())
        if self.class_names:
            graph.metadata_props[CLASS_NAMES] = json.dumps(self.class_names)
        return graph, patched

    def _with_norms(self, moments: Mapping[str, Moments[Any]]) -> ir.Model:
        graph = self.graph.clone()
        insert_norms(graph, moments)
        return graph

    def _patchable(self) -> list[match.Site]:
        return [site for site in self._sites.sites if not site.needs_calibration]

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

    def _weighed_session(self) -> Any:
        if self._weighed is None:
            graph = self._with_norms(self.calibrated)
            done = rewrite(graph, self._alphas, alpha_inputs="per-site")
            modules = {site.name: site.module for site in self._patchable()}
            self._inputs = {name: modules[site] for site, name in done.alpha_inputs.items()}
            self._weighed = open_session(graph, self.device)
        return self._weighed


def _fingerprint(site: match.Site) -> str:
    assert site.running_mean is not None  # a patchable site has them
    assert site.running_var is not None
    return fingerprint([site.weight, site.bias, site.running_mean, site.running_var])


def _plain(moments: Moments[Any] | None) -> dict[str, list[float]] | None:
    if moments is None:
        return None
    parts = {"mean": moments.mean, "var": moments.var}
    return {name: [float(f"{value:.8g}") for value in part] for name, part in parts.items()}


@dataclass(frozen=True)
class _ModuleSite:
    name: str
    kind: str
    num_channels: int


def load_onnx(
    path: str | os.PathLike[str],
    *,
    output: str | None = None,
    device: torch.device | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> OnnxModel:
    """Read an ONNX file, ready to predict.

    Args:
        path: an ONNX file, whose external data lie beside it; or a ``.pt2`` file of torch.export, which is
            exported to ONNX.
        output: which output to read; the first by default.
        device: cpu or cuda.
        preprocessing: what to use instead of what the file says, see :func:`bnpatch.load`.

    Raises:
        BnpatchError: the file can't be read, or takes something else than one batch of images.
    """
    is_program = Path(path).suffix == ".pt2"
    graph = read.inline_norms(program_to_graph(path)) if is_program else read.load(path)
    signature = read_signature(graph, output)
    known = graph.metadata_props.get(PREPROCESSING)
    wanted = dict(preprocessing or {})
    notes = []
    channels, height, width = signature.size
    if known:
        base = Preprocessing.from_json(json.loads(known), "the file's metadata")
    else:
        source = "ImageNet's values, for want of better (--mean, --std, --crop-pct)"
        if height is None and wanted.get("img_size") is None:
            notes.append("the file leaves the image size open; 224 is taken, --img-size says otherwise")
        size = (channels or 3, height or 224, width or 224)
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        base = Preprocessing(size, mean, std, "bilinear", source=source)
    names = graph.metadata_props.get(CLASS_NAMES)
    model = OnnxModel(
        graph,
        Path(path).stem,
        signature,
        base.override(channels=channels, **wanted),
        class_names=tuple(json.loads(names)) if names else None,
        device=device or torch.device("cpu"),
        notes=notes,
    )
    if len(model.folded()) > len(model.survey().sites):
        notes.append(
            f"{len(model.folded())} convolutions look as if a Batch Norm was folded into them: "
            "tune-alpha --recover-folded makes them sites"
        )
    return model

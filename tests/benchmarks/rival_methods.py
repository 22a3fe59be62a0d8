"""Other methods that change how a trained network normalizes a single image, to compare bnpatch with.

Each is written from its paper on bnpatch's own layer, for one image at a time and without a stream: no answer
depends on other images. The images of a batch are computed side by side, which changes nothing.

- alpha-BN: You et al., "Test-time Batch Statistics Calibration for Covariate Shift", 2021; public code calls
  it AlphaBatchNorm, with a weight of 0.1.
- Soft shrinkage: the instance-aware Batch Norm of Gong et al., "NOTE: Robust Continual Test-time Adaptation
  Against Temporal Correlation", NeurIPS 2022, which is trained with it; here it comes after training.
- InTEnt: Dong et al., "Medical Image Segmentation with InTEnt: Integrated Entropy Weighting for Single Image
  Test-Time Adaptation", 2024.
- AugBN: Khurana et al., "SITA: Single Image Test-time Adaptation", 2021.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bnpatch.core.moments import Moments, pool
from bnpatch.core.patch import PatchWeights
from bnpatch.models.torch_model import TorchModel
from bnpatch.nn.functional import affine, example_moments
from bnpatch.nn.surgery import patched_layers

#: What to normalize by, (N, C) or (C,), given the moments of the examples (N, C), the running ones (C,), eps,
#: and the number of values that the moments of an example are of.
Rule = Callable[[Moments[Tensor], Moments[Tensor], float, int], Moments[Tensor]]

#: Returns probabilities (N, K) for images (N, C, H, W) as bytes.
Predict = Callable[[TorchModel, Tensor], Tensor]

NUM_VIEWS = 8
#: The statistics of the image count so much in the six answers that InTEnt averages.
INTENT_WEIGHTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def alpha_bn(weight: float) -> Rule:
    """Average means and variances; the variance between the two means, which a mixture has, is left out."""

    def rule(example: Moments[Tensor], running: Moments[Tensor], eps: float, count: int) -> Moments[Tensor]:
        var = example.var * count / max(1, count - 1)  # that of torch's running variance
        return Moments(
            (1 - weight) * running.mean + weight * example.mean, (1 - weight) * running.var + weight * var
        )

    return rule


def soft_shrinkage(k: float) -> Rule:
    """Normalize by running statistics, moved by what an image deviates beyond k standard errors."""

    def rule(example: Moments[Tensor], running: Moments[Tensor], eps: float, count: int) -> Moments[Tensor]:
        var, several = running.var + eps, max(1, count - 1)
        mean_away = _shrunk(example.mean - running.mean, k * (var / count).sqrt())
        var_away = _shrunk(example.var * count / several - running.var, k * var * math.sqrt(2 / several))
        return Moments(running.mean + mean_away, (running.var + var_away).clamp_min(0))

    return rule


def aug_bn(weight: float, views: int = NUM_VIEWS) -> Rule:
    """Average running statistics and those of all views of an image, which are consecutive rows."""

    def rule(example: Moments[Tensor], running: Moments[Tensor], eps: float, count: int) -> Moments[Tensor]:
        rows = Moments(*(part.unflatten(0, (-1, views)) for part in (example.mean, example.var)))
        of_image = pool(rows, axes=1)
        together = Moments(*(p.expand_as(rows.mean).flatten(0, 1) for p in (of_image.mean, of_image.var)))
        return alpha_bn(weight)(together, running, eps, count * views)

    return rule


def _shrunk(x: Tensor, by: Tensor) -> Tensor:
    return x.sign() * (x.abs() - by).clamp_min(0)


@contextmanager
def normalizing(model: TorchModel, rule: Rule) -> Iterator[None]:
    """Let every norm layer of a model normalize by what a rule gives, until the context ends."""

    def normalized(layer, x):  # type: ignore[no-untyped-def]
        if not layer.weighs(x):  # one value per channel: bnpatch leaves it alone, and so do the others here
            origin = layer.as_origin()  # has this function as its forward, too
            return type(origin).forward(origin, x)
        weight, bias, mean, var = layer.parameters_of_norm()
        moments = rule(example_moments(x), Moments(mean, var), layer.eps, math.prod(x.shape[2:]))
        scale = weight * torch.rsqrt(moments.var + layer.eps)
        return layer.finish(affine(x, *torch.broadcast_tensors(scale, bias - moments.mean * scale)))

    weighted = PatchWeights(dict.fromkeys(model.baseline_alphas(), 0.5))  # any but the baseline
    with model.in_state(model.baseline().with_weights(weighted)), ExitStack() as replaced:
        for layer in patched_layers(model.module).values():
            layer.forward = partial(normalized, layer)
            replaced.callback(layer.__dict__.pop, "forward")
        yield


def probabilities(model: TorchModel, x: Tensor) -> Tensor:
    """Return the probabilities of a model in its present state."""
    return model.as_classes(model.predict(x)).softmax(1)


def by_rule(rule: Rule) -> Predict:
    """Predict by one pass in which all norm layers follow a rule."""

    def predict(model: TorchModel, x: Tensor) -> Tensor:
        with normalizing(model, rule):
            return probabilities(model, x)

    return predict


def intent(top: float = 1.0) -> Predict:
    """Average the answers of several weights, from 0 to ``top``; an answer of low entropy counts more."""

    def predict(model: TorchModel, x: Tensor) -> Tensor:
        answers = torch.stack([by_rule(alpha_bn(top * w))(model, x) for w in INTENT_WEIGHTS])
        entropy = -(answers * answers.clamp_min(1e-12).log()).sum(2) / math.log(answers.shape[2])
        return (torch.softmax(1 - entropy, dim=0)[..., None] * answers).sum(0)

    return predict


def augmented(weight: float) -> Predict:
    """Predict for an image by statistics of its views."""

    def predict(model: TorchModel, x: Tensor) -> Tensor:
        model.output_for(x)  # runs inputs of its own the first time, which have no views
        with normalizing(model, aug_bn(weight)):
            return probabilities(model, views_of(x))[::NUM_VIEWS]

    return predict


def views_of(x: Tensor) -> Tensor:
    """Return the image itself, its mirror image, and crops of both, each image's views side by side.

    Args:
        x: images (N, C, H, W) as bytes.

    Returns:
        Bytes (8 N, C, H, W). A crop is a corner of 85% of each side, resized to the whole.
    """
    size = x.shape[2:]
    height, width = (math.ceil(0.85 * side) for side in size)
    crops = [
        F.interpolate(corner.float(), size, mode="bilinear", align_corners=False).round().to(torch.uint8)
        for corner in (x[..., :height, :width], x[..., -height:, -width:], x[..., :height, -width:])
    ]
    views = torch.stack([view for each in (x, *crops) for view in (each, each.flip(-1))], dim=1)
    return views.flatten(0, 1)

"""A classifier of digits at 8 x 8 with three norms, for searches in which the network does not matter.

It is made as :mod:`tests.closed_form` makes its own, and the same is true of it: contrast multiplies what the
first convolution returns, so that lambda = 1 at the first norm undoes all of it.
"""

import numpy as np
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import nn

from tests import closed_form

WIDTHS = (8, 16, 32)  # of the norms, at 8 x 8, 4 x 4 and 2 x 2


def small(images, contrast=1.0):
    """Digits (N, 32, 32) at 8 x 8, as bytes."""
    values = images.reshape(-1, 8, 4, 8, 4).mean((2, 4)) - 127.5
    return (127.5 + contrast * values).round().astype(np.uint8)


def classifier(images, labels, seed=0):
    """Random convolutions, norms with the running statistics of these images, and a linear discriminant."""
    rng = np.random.default_rng(seed)
    x = closed_form.as_inputs(images)
    layers, channels = [], 1
    for index, width in enumerate(WIDTHS):
        conv = nn.Conv2d(channels, width, 3, stride=1 + (index > 0), padding=1, bias=False)
        norm = nn.BatchNorm2d(width, momentum=1.0)
        _fill(conv.weight, rng.normal(0, (2 / (9 * channels)) ** 0.5, conv.weight.shape))
        _fill(norm.weight, rng.uniform(0.8, 1.2, width))
        _fill(norm.bias, rng.normal(0, 0.1, width))
        layers += [conv, norm, nn.ReLU()]
        channels = width
    return _with_head(layers, x, labels)


def of_one_norm(images, labels):
    """A norm of the image itself, and a linear discriminant of what is brighter than its mean."""
    return _with_head([nn.BatchNorm2d(1, momentum=1.0), nn.ReLU()], closed_form.as_inputs(images), labels)


def _with_head(layers, x, labels):
    features = nn.Sequential(*layers, nn.Flatten())
    with torch.inference_mode():
        features.train()(x)
        values = features.eval()(x).double().numpy()
    discriminant = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1).fit(values, labels)
    head = nn.Linear(values.shape[1], 10)
    _fill(head.weight, discriminant.coef_)
    _fill(head.bias, discriminant.intercept_)
    model = nn.Sequential(*features, head).eval()
    model.pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
    return model


def _fill(parameter, values):
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(values))

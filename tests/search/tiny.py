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


def small(images):
    """Digits (N, 32, 32) at 8 x 8, as bytes."""
    return images.reshape(-1, 8, 4, 8, 4).mean((2, 4)).round().astype(np.uint8)


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


class Opposites(nn.Module):
    """Two norms, of which one must have alpha = 0 and the other alpha = 1; takes inputs (N, 2, 4, 4).

    The first bit of the class is the brightness of the first channel, which alpha = 1 takes away. The second
    bit is the sign of a pattern in the second channel, which ReLU hides unless alpha = 1 takes the brightness
    away.
    """

    def __init__(self):
        super().__init__()
        self.keep, self.remove = nn.BatchNorm2d(1), nn.BatchNorm2d(1)
        self.register_buffer("pattern", torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 2))
        self.pretrained_cfg = {"input_size": (2, 4, 4), "mean": (0.0, 0.0), "std": (1.0, 1.0)}

    def forward(self, x):
        first = self.keep(x[:, :1]).mean((1, 2, 3))
        second = (torch.relu(self.remove(x[:, 1:])) * self.pattern).mean((1, 2, 3))
        return 4 * torch.stack([-first - second, -first + second, first - second, first + second], 1)

    def examples(self, count):
        """Inputs, and classes 0 to 3."""
        rng = np.random.default_rng(0)
        labels = np.arange(count) % 4
        first, second = 2 * (labels // 2) - 1, 2 * (labels % 2) - 1
        pattern = self.pattern.numpy()
        bright = np.stack([first, rng.choice([-1, 1], count)], 1)[:, :, None, None]
        shape = np.stack([np.broadcast_to(pattern, (count, 4, 4)), second[:, None, None] * pattern], 1)
        return (bright + shape + rng.normal(0, 0.2, shape.shape)).astype(np.float32), labels


class MeanOfUnknownScale(nn.Module):
    """One norm, whose output should keep the mean of an input and lose its scale; takes inputs (N, 1, 4, 4).

    The class is the sign of the mean. Every input is multiplied by a number of its own, so the answers are
    equally sure only if the variance is the example's own. If the mean was that, too, there would be nothing
    to see.
    """

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.pretrained_cfg = {"input_size": (1, 4, 4), "mean": (0.0,), "std": (1.0,)}

    def forward(self, x):
        evidence = 4 * self.norm(x).mean((1, 2, 3))
        return torch.stack([-evidence, evidence], 1)

    def examples(self, count):
        """Inputs, and classes 0 and 1."""
        labels = np.arange(count) % 2
        scales = np.geomspace(0.1, 4, count)[np.random.default_rng(0).permutation(count)]
        pattern = np.tile([[1.0, -1.0], [-1.0, 1.0]], (2, 2))
        x = scales[:, None, None, None] * ((labels - 0.5)[:, None, None, None] + pattern)
        return x.astype(np.float32), labels


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

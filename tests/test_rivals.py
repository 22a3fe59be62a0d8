"""The methods that bnpatch is compared with, against their formulas in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bnpatch
from tests.benchmarks import rival_data, rival_tables
from tests.benchmarks import rival_methods as rivals

EPS = 0.1


@pytest.fixture
def model():
    """One norm, a pooling, and a linear layer, in float64."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3, eps=EPS)
    module = nn.Sequential(norm, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 5)).double().eval()
    with torch.no_grad():
        for values in (norm.weight, norm.bias, norm.running_mean):
            values.copy_(torch.randn(3))
        norm.running_var.copy_(torch.rand(3) + 0.5)
    module.pretrained_cfg = {"input_size": (3, 6, 6), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return bnpatch.load(module)


@pytest.fixture
def images():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 6, 6)).astype(np.uint8))


def answers(model, images, mean_and_var):
    """Probabilities, where ``mean_and_var`` gives what a channel of an image is normalized by."""
    values = {name: value.numpy() for name, value in model.module.state_dict().items()}
    x = inputs(images)
    found = []
    for n, image in enumerate(x):
        y = np.empty_like(image)
        for c in range(3):
            mean, var = mean_and_var(x, n, c, values["0.running_mean"][c], values["0.running_var"][c])
            y[c] = (image[c] - mean) / np.sqrt(var + EPS) * values["0.weight"][c] + values["0.bias"][c]
        pooled = y.reshape(3, 2, 3, 2, 3).mean((2, 4)).reshape(-1)
        logits = values["3.weight"] @ pooled + values["3.bias"]
        found.append(np.exp(logits) / np.exp(logits).sum())
    return np.stack(found)


def inputs(images):
    """What the model makes of bytes, in float32."""
    return ((images.float() - 127.5) / 63.75).double().numpy()


def check(model, images, predict, mean_and_var):
    before = model.state
    expected = answers(model, images, mean_and_var)
    np.testing.assert_allclose(predict(model, images).numpy(), expected, rtol=1e-6)  # inputs are float32
    assert model.state.computes_like(before)


def linear(weight):
    """Means and variances averaged with a weight; the variance is unbiased."""
    return lambda x, n, c, mean, var: (
        (1 - weight) * mean + weight * x[n, c].mean(),
        (1 - weight) * var + weight * x[n, c].var(ddof=1),
    )


def test_alpha_bn(model, images):
    check(model, images, rivals.by_rule(rivals.alpha_bn(0.1)), linear(0.1))


@pytest.mark.parametrize("k", [0.0, 1.0, 1e6])
def test_soft_shrinkage(model, images, k):
    def shrunk(x, by):
        return x - by if x > by else x + by if x < -by else 0.0

    def mean_and_var(x, n, c, mean, var):
        count = x[n, c].size
        error, error_of_var = np.sqrt((var + EPS) / count), (var + EPS) * np.sqrt(2 / (count - 1))
        moved = var + shrunk(x[n, c].var(ddof=1) - var, k * error_of_var)
        return mean + shrunk(x[n, c].mean() - mean, k * error), max(0.0, moved)

    check(model, images, rivals.by_rule(rivals.soft_shrinkage(k)), mean_and_var)


def test_intent(model, images):
    parts = np.stack([answers(model, images, linear(weight)) for weight in (0, 0.1, 0.2, 0.3, 0.4, 0.5)])
    confidence = 1 + (parts * np.log(parts)).sum(2) / np.log(5)
    weights = np.exp(confidence) / np.exp(confidence).sum(0)
    found = rivals.intent(0.5)(model, images).numpy()
    np.testing.assert_allclose(found, (weights[..., None] * parts).sum(0), rtol=1e-6)


def test_aug_bn(model, images):
    views = rivals.views_of(images)
    assert len(views) == 8 * len(images)
    assert torch.equal(views[8], images[1])
    assert torch.equal(views[9], images[1].flip(-1))
    seen = inputs(views)

    def mean_and_var(x, n, c, mean, var):
        of_views = seen[8 * n : 8 * n + 8, c]
        return 0.7 * mean + 0.3 * of_views.mean(), 0.7 * var + 0.3 * of_views.var(ddof=1)

    check(model, images, rivals.augmented(0.3), mean_and_var)


def test_maps_of_a_single_value_are_left_alone(images):
    torch.manual_seed(0)
    module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 5)).eval()
    module.pretrained_cfg = {"input_size": (3, 6, 6), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    model = bnpatch.load(module)
    found = rivals.by_rule(rivals.alpha_bn(0.5))(model, images)
    assert torch.equal(found, rivals.probabilities(model, images))


@pytest.mark.parametrize(
    "predict",
    [rivals.by_rule(rivals.soft_shrinkage(4.0)), rivals.intent(), rivals.augmented(0.3)],
    ids=["soft shrinkage", "InTEnt", "AugBN"],
)
def test_no_answer_depends_on_other_images(model, images, predict):
    alone = torch.cat([predict(model, image[None]) for image in images])
    np.testing.assert_allclose(predict(model, images).numpy(), alone.numpy(), rtol=1e-9)


def test_the_page_has_the_tables_of_the_stored_results():
    docs = Path(__file__).parents[1] / "docs"
    page = (docs / "rivals.md").read_text()
    sections = rival_tables.tables(docs / "results" / "rivals.jsonl").split("### ")[1:]
    names = [section.partition("\n")[0] for section in sections]
    assert names == [*(network.name for network in rival_data.NETWORKS), "What predicts a gain"]
    for section in sections:
        assert section.split("\n\n", 1)[1].strip() in page


def test_the_page_has_the_table_of_the_lines_of_text():
    docs = Path(__file__).parents[1] / "docs"
    assert rival_tables.of_lines(docs / "results" / "rivals_text.jsonl") in (docs / "rivals.md").read_text()

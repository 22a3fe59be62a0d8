"""The example of docs/own-metric.md runs, and does what it says."""

import re
from pathlib import Path

import pytest
import torch

DOCUMENT = Path(__file__).parents[1] / "docs" / "own-metric.md"


@pytest.fixture(scope="module")
def names():
    """What the example defines."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    defined = {}
    exec(compile(code, str(DOCUMENT), "exec"), defined)
    return defined


@pytest.mark.slow
def test_the_example_finds_a_gain(names):
    result = names["result"]
    assert result.verdict == "gain"
    assert result.metric.name == "mean_iou"
    assert [c.metric.name for c in result.comparisons] == ["mean_iou"]
    assert result.num_tuning == result.num_held_out == 200


@pytest.mark.slow
def test_its_metric_is_the_mean_iou(names):
    random = torch.Generator().manual_seed(0)
    outputs = torch.randn(5, 3, 4, 4, generator=random)
    targets = torch.randint(0, 3, (5, 4, 4), generator=random)
    targets[0] = 0
    outputs[0, 2] = -9.0  # class 2 is neither guessed nor there
    for got, output, target in zip(names["mean_iou"](outputs, targets), outputs, targets, strict=True):
        ious = []
        for k in range(3):
            guess, truth = output.argmax(0) == k, target == k
            if either := int((guess | truth).sum()):
                ious.append(int((guess & truth).sum()) / either)
        assert float(got) == pytest.approx(sum(ious) / len(ious))

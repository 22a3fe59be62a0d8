"""Training keeps each group of images on one side of a split."""

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.finetune import ablation, run
from bnpatch.finetune.ablation import ablate
from bnpatch.finetune.config import Callbacks, FineTuneSettings
from bnpatch.finetune.run import fine_tune
from bnpatch.finetune.technique_search import _Search

GROUPS = np.arange(60) // 3


@pytest.fixture
def model():
    return bnpatch.load(timm.create_model("test_resnet", num_classes=4), preprocessing={"img_size": 32})


@pytest.fixture
def opened(model):
    """60 images in 20 groups of three, each of which has one class."""
    images = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (60, 3, 32, 32)).astype(np.float32))
    return bnpatch.open_examples((images, GROUPS % 4), model, groups=GROUPS)


@pytest.mark.filterwarnings("ignore:the model is right on")  # it is random
def test_no_group_both_selects_and_judges(model, opened, monkeypatch):
    selected = []
    monkeypatch.setattr(run, "train", lambda model, examples, *args, **options: selected.append(examples))
    result = fine_tune(model, opened, opened, trials=1)
    selection, held_out = selected[0].selection, result.tuning.held_out.indices
    assert len(selection) + len(held_out) == 60
    assert not set(GROUPS[selection]) & set(GROUPS[held_out])
    assert result.tuning.held_out.num_groups == len(np.unique(GROUPS[held_out]))
    assert result.comparisons[0].change == result.tuning.comparisons[0].change  # both by group


def test_groups_that_are_too_few_are_refused_before_training(model, opened, monkeypatch):
    opened.groups = np.arange(60) // 30
    monkeypatch.setattr(run, "train", lambda *args, **options: pytest.fail("trained"))
    with pytest.raises(BnpatchError, match="are of one group"):
        fine_tune(model, opened, opened)


def test_no_group_is_on_both_sides_of_the_comparison_of_techniques(model, opened, monkeypatch):
    parts = []
    means = {metric.name: 0.0 for metric in ablation._METRICS}

    def scores(model, examples, metrics, indices):
        parts.append(indices)
        return SimpleNamespace(mean=lambda metric: 0.0)

    monkeypatch.setattr(
        ablation, "train", lambda model, examples, *args, **options: parts.append(examples.selection)
    )
    monkeypatch.setattr(ablation, "evaluate", scores)
    monkeypatch.setattr(ablation, "_tuned", lambda *args: means)
    ablate(model, opened, opened, FineTuneSettings(batch_size=8))
    assert len(parts[0]) + len(parts[1]) == 60
    assert not set(GROUPS[parts[0]]) & set(GROUPS[parts[1]])


def test_no_group_is_on_both_sides_of_the_search_for_techniques(model, opened):
    search = _Search(model, opened, FineTuneSettings(batch_size=8), 1, Callbacks())
    subset, selection = search._examples.subset, search._examples.selection
    assert len(subset) + len(selection) == 60
    assert not set(GROUPS[subset]) & set(GROUPS[selection])

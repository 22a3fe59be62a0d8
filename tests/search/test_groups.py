"""Groups of examples: their names, splits that keep them together, and near-copies that nobody named."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from optuna.trial import TrialState
from PIL import Image

import bnpatch
from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.data.dataset import folds, others, split
from bnpatch.data.groups import cut, group_by, number_groups, shuffled
from bnpatch.data.near_copies import Sketches
from bnpatch.evaluation.metrics import ACCURACY, CROSS_ENTROPY, paired_difference
from bnpatch.report.text import origin, verdict_sentence
from bnpatch.search.candidates import CandidateSearch
from bnpatch.search.config import Plan
from bnpatch.search.latency_limit import trade_off
from bnpatch.search.objective import ObjectiveSpec
from bnpatch.search.score_cache import blocks_of
from bnpatch.search.task import Task, parts_of
from bnpatch.search.trials import GlobalSearchConfig, StoredTrial, Trials
from tests.search.tiny import small


class Names:
    """A source that has names alone."""

    def __init__(self, names):
        self.names = names

    def __len__(self):
        return len(self.names)

    def name(self, index):
        return self.names[index]


FILES = Names(["cat/a/1.png", "cat/a/2.png", "cat/b/1.png", "dog/a/3.png", "dog/4.png", "dog/5.png"])


def test_groups_are_numbered_in_the_order_of_their_appearance():
    assert number_groups(["x", "y", "x", 3, None, None], FILES).tolist() == [0, 1, 0, 2, 3, 4]
    assert number_groups(np.array([5, 5, 2, 2, 7, 7]), FILES).tolist() == [0, 0, 1, 1, 2, 2]
    assert number_groups(lambda name: name[-5], FILES).tolist() == [0, 1, 0, 2, 3, 4]


def test_labels_that_make_no_groups_are_refused():
    with pytest.raises(BnpatchError, match="2 group labels for 6 examples"):
        number_groups(["x", "y"], FILES)
    with pytest.raises(BnpatchError, match="one example each"):
        number_groups(range(6), FILES)


def test_group_by_the_folder_below_the_class_folder():
    # Folders of one name are one group, and a file in no such folder is a group of its own.
    assert number_groups(group_by("parent"), FILES).tolist() == [0, 0, 1, 0, 2, 3]


def test_group_by_a_regular_expression():
    assert number_groups(group_by(r"(\w+)/"), FILES).tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(BnpatchError, match=r"finds nothing in dog/4\.png"):
        number_groups(group_by(r"/(\w+)/"), FILES)
    with pytest.raises(BnpatchError, match="no parentheses"):
        group_by("cat")
    with pytest.raises(BnpatchError, match="no regular expression"):
        group_by("(")


def test_group_by_a_table(tmp_path):
    path = tmp_path / "groups.csv"
    path.write_text("name,group\n" + "\n".join(f"{name},p{name[-5]}" for name in FILES.names))
    assert number_groups(group_by(str(path)), FILES).tolist() == [0, 1, 0, 2, 3, 4]
    path.write_text("cat/a/1.png,p1\n")
    with pytest.raises(BnpatchError, match=r"has no group for cat/a/2.png"):
        number_groups(group_by(str(path)), FILES)
    path.write_text("cat/a/1.png;p1\n")
    with pytest.raises(BnpatchError, match="name,group"):
        group_by(str(path))
    with pytest.raises(BnpatchError, match="cannot read"):
        group_by(str(tmp_path / "none.csv"))


def grouped(count=300, seed=0):
    """Strata and groups: groups of 1 to 9 examples, each of one of three classes."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(count), rng.integers(1, 10, count))[:count]
    return (groups % 3).astype(np.int64), groups


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_a_split_keeps_groups_together_and_classes_balanced(fraction):
    strata, groups = grouped()
    tuning, held_out = split(strata, fraction, 0, groups)
    assert sorted([*tuning, *held_out]) == list(range(len(strata)))
    assert not set(groups[tuning]) & set(groups[held_out])
    for kind in range(3):
        # No class is off by more than one group, which is the last that was dealt, or the largest.
        assert abs(np.sum(strata[held_out] == kind) - fraction * np.sum(strata == kind)) <= 9
    assert split(strata, fraction, 0, groups)[1].tolist() == held_out.tolist()
    assert split(strata, fraction, 1, groups)[1].tolist() != held_out.tolist()


def test_rounding_favors_neither_part():
    """Of three groups in each of 100 classes, one part gets two; it is not always the same part."""
    strata, groups = np.repeat(np.arange(100), 3), np.arange(300)
    assert [len(part) for part in split(strata, 0.5, 0, groups)] == [150, 150]


def test_folds_keep_groups_together():
    strata, groups = grouped()
    parts = folds(strata, 5, 0, groups)
    assert sorted(np.concatenate(parts)) == list(range(len(strata)))
    assert sum(len(set(groups[part])) for part in parts) == len(set(groups))
    assert max(map(len, parts)) - min(map(len, parts)) <= 3 * 9
    with pytest.raises(BnpatchError, match="2 groups can't be held out in 5 folds"):
        folds(strata[:10], 5, 0, np.repeat([0, 1], 5))


def test_an_unlabelled_example_of_a_held_out_group_is_on_neither_side():
    strata, groups = np.array([0, 0, -1, 1, 1, -1, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 1, 2, 2, 3, 3])
    tuning, held_out = split(strata, 0.5, 0, groups)
    assert not set(groups[tuning]) & set(groups[held_out])
    assert (strata[held_out] >= 0).all()
    assert others(np.array([0, 1]), 10, groups).tolist() == list(range(3, 10))


def test_without_groups_splits_are_as_ever():
    assert others(np.array([2, 5]), 8).tolist() == [0, 1, 3, 4, 6, 7]
    rng, same = np.random.default_rng(3), np.random.default_rng(3)
    order = shuffled(np.arange(100), None, rng)
    assert order.tolist() == same.permutation(100).tolist()
    assert [len(block) for block in blocks_of(order, 1)] == [9] * 4 + [8] * 8
    assert [len(block) for block in blocks_of(order, 30)] == [34, 33, 33]


@pytest.mark.parametrize("set_size", [1, 30])
def test_blocks_are_of_whole_groups(set_size):
    _, groups = grouped()
    order = shuffled(np.arange(0, 300, 2), groups, np.random.default_rng(0))
    blocks = blocks_of(order, set_size, groups)
    assert len(blocks) > 3
    assert sorted(np.concatenate(blocks)) == list(range(0, 300, 2))
    assert sum(len(set(groups[block])) for block in blocks) == len(set(groups[order]))


def test_two_groups_make_two_blocks():
    groups = np.repeat([0, 1], [2, 9])
    assert [len(block) for block in blocks_of(np.arange(11), 1, groups)] == [2, 9]
    assert [len(part) for part in cut(np.arange(11), [1, 2, 3], groups)] == [2, 9]


def opened(tiny, plain, groups):
    return bnpatch.open_examples(plain, tiny, groups=groups)


def test_few_groups_take_turns_and_two_sides_need_two_groups_each(tiny, plain):
    examples = opened(tiny, plain, np.arange(600) % 100)
    parts = parts_of(examples, None, None, 0, True)
    assert len(parts) == 5  # 600 examples would be split in halves, but they are 100 groups
    judged = [set(examples.groups[held_out]) for _, held_out in parts]
    assert sum(map(len, judged)) == len(set.union(*judged)) == 100
    for tuning, held_out in parts:
        assert not set(examples.groups[tuning]) & set(examples.groups[held_out])
    with pytest.raises(BnpatchError, match="of one group; give images of more groups"):
        parts_of(opened(tiny, plain, np.arange(600) % 3), None, None, 0, True)
    with pytest.raises(BnpatchError, match="to tune on are of one group"):
        parts_of(opened(tiny, plain, [0] * 600), examples, None, 0, True)


def test_a_limit_keeps_the_groups_of_what_it_keeps(tiny, plain):
    labels = np.arange(600) // 5
    examples = bnpatch.open_examples(plain, tiny, groups=labels.tolist(), limit=100)
    names = [int(examples.source.name(index).split()[-1]) for index in range(100)]
    assert examples.groups.tolist() == labels[names].tolist()


def sketched(images):
    sketches = Sketches()
    for index, image in enumerate(images):
        sketches.add(index, torch.as_tensor(image))
    return sketches.num_groups()


def test_digits_are_no_near_copies_of_each_other():
    from sklearn.datasets import load_digits

    digits = (load_digits().images * 15.9).astype(np.uint8)[:, None]
    assert sketched(digits) is None
    assert sketched(127 + digits // 10) is None  # nor with little contrast


def test_frames_are_found_in_spite_of_noise_and_light(plain):
    rng = np.random.default_rng(0)
    frames = np.repeat(plain[0][:100, None].astype(float), 5, axis=0)
    light = np.tile([1.0, 0.9, 0.8, 0.95, 0.85], 100)[:, None, None, None]
    frames = (frames * light + rng.normal(0, 4, frames.shape)).clip(0, 255).astype(np.uint8)
    assert sketched(frames) == pytest.approx(100, rel=0.1)
    assert sketched(frames[::5]) is None  # one of each
    assert sketched(np.full((50, 3, 16, 16), 7, np.uint8)) == 1


def test_of_many_images_some_are_compared(monkeypatch, plain):
    monkeypatch.setattr("bnpatch.data.near_copies._COUNTED", 50)
    assert sketched(np.repeat(plain[0][:100, None], 5, axis=0)) == 100
    assert sketched(plain[0][:500, None]) is None


@pytest.mark.parametrize("floats", [False, True])
def test_near_copies_give_a_warning_unless_groups_are_named(tiny, plain, floats):
    images, labels = (np.repeat(part[:40], 5, axis=0) for part in plain)
    images = images[:, None] / np.float32(255) if floats else images
    examples = bnpatch.open_examples((images, labels), tiny)
    bnpatch.evaluate(tiny, examples)
    with pytest.warns(BnpatchWarning, match=r"of 200 images many .* about 40 groups.*--group-by"):
        examples.warn_of_near_copies()
    named = bnpatch.open_examples((images, labels), tiny, groups=np.arange(200) // 5)
    bnpatch.evaluate(tiny, named)
    assert named.warn_of_near_copies() == ""


def test_looking_for_near_copies_reads_nothing_again(tiny, plain, tmp_path, monkeypatch):
    for index in range(40):
        (tmp_path / str(index % 10)).mkdir(exist_ok=True)
        Image.fromarray(small(np.kron(plain[0][index][None], np.ones((4, 4), np.uint8)))[0]).save(
            tmp_path / str(index % 10) / f"{index}.png"
        )
    examples = bnpatch.open_examples(tmp_path, tiny, cache_gb=0)
    bnpatch.evaluate(tiny, examples)
    monkeypatch.setattr(examples.source, "read", None)
    assert examples.warn_of_near_copies() == ""
    assert len(examples.sketches.of) == 40


@pytest.fixture(scope="module")
def dim_copies(dim):
    """Three near-copies of each of 200 dim digits, and their groups: (images, labels), groups."""
    rng = np.random.default_rng(0)
    images = np.repeat(dim[0][:200].astype(float), 3, axis=0)
    images = (images + rng.normal(0, 1, images.shape)).round().clip(0, 255).astype(np.uint8)
    return (images, np.repeat(dim[1][:200], 3)), np.repeat(np.arange(200), 3)


@pytest.fixture(scope="module")
def known(tiny_module, dim_copies):
    data, groups = dim_copies
    return bnpatch.tune_alpha(
        tiny_module, data, metric="cross-entropy", granularity="global", groups=groups, trials=5
    )


def test_a_search_judges_by_groups_that_it_has_not_seen(known):
    assert known.num_tuning_groups == known.held_out.num_groups == 100
    held_out = set((known.held_out.indices // 3).tolist())
    assert len(known.held_out.indices) == 3 * len(held_out) == 300  # with all copies of each
    assert known.comparisons[0].is_rough  # 300 images, but 100 groups
    assert "below 300 groups the interval of the cross-entropy is rough" in known.notes
    about = known.recipe.provenance["data"]
    assert (about["tuning_groups"], about["held_out_groups"]) == (100, 100)
    assert "on 300 examples in 100 groups" in verdict_sentence(known)
    assert ("groups", "100 to tune on, 100 to judge by") in origin(known.recipe)


def test_the_interval_of_groups_is_the_one_that_is_printed(known, tiny, dim_copies):
    held_out = known.held_out
    change = known.comparisons[0].change
    examples = bnpatch.open_examples(dim_copies[0], tiny)
    before = bnpatch.evaluate(tiny, examples, indices=held_out.indices).values["cross-entropy"]
    tiny.apply(known.candidate_recipe or known.recipe)
    after = bnpatch.evaluate(tiny, examples, indices=held_out.indices).values["cross-entropy"]
    expected = paired_difference(before, after, held_out.indices // 3)
    assert (change.low, change.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    ignored = paired_difference(before, after)
    assert (ignored.high - ignored.low) * 1.5 < change.high - change.low


def test_without_groups_near_copies_give_a_warning_and_a_note(tiny_module, dim_copies):
    with pytest.warns(BnpatchWarning, match="near-copies"):
        result = bnpatch.tune_alpha(tiny_module, dim_copies[0], granularity="global", trials=2)
    assert any("--group-by" in note for note in result.notes)
    assert result.num_tuning_groups is None
    assert "tuning_groups" not in result.recipe.provenance["data"]


@pytest.mark.parametrize("metric", ["unlabeled", "accuracy"])
def test_what_learns_and_what_selects_share_no_group(tiny, dim_copies, metric):
    data, groups = dim_copies
    examples = bnpatch.open_examples(data, tiny, groups=groups)
    indices = np.arange(0, 600)
    spec = ObjectiveSpec.of(metric, None, 64)
    task = Task(tiny, spec, examples, examples, examples, examples, None, [(indices, indices)], Plan())
    search = CandidateSearch(task, indices, spec.objective(tiny, examples, indices))
    blocks = search._cache.blocks
    first = search.selection._blocks.start
    assert 0 < first < len(blocks)
    learned, selecting = np.concatenate(blocks[:first]), np.concatenate(blocks[first:])
    assert len(learned) + len(selecting) == 600
    assert not set(groups[learned]) & set(groups[selecting])
    assert (search.selection.groups is None) == (metric == "unlabeled")


def test_trials_are_compared_by_groups():
    sizes, groups = [6, 6], [np.repeat([0, 1], 3), np.repeat([2, 3], 3)]
    config = GlobalSearchConfig(sizes, CROSS_ENTROPY, {"alpha": (0, 1)}, {"alpha": 0.0}, groups=groups)
    losses = np.repeat([1.0, 2.0, 4.0, 9.0], 3)
    blocks = {0: {"cross-entropy": losses[:6]}, 1: {"cross-entropy": losses[6:]}}
    zero = {block: {"cross-entropy": 0 * scores["cross-entropy"]} for block, scores in blocks.items()}
    trials = [
        StoredTrial(n, {"alpha": float(n)}, 0, b, TrialState.COMPLETE) for n, b in enumerate([zero, blocks])
    ]
    difference = Trials(config, trials).difference(trials[1], trials[0])
    assert (difference.value, difference.pairs) == (4.0, 4)
    assert difference.stderr == pytest.approx(np.std([1, 2, 4, 9], ddof=1) / 2)


def test_few_groups_are_said_to_be_few(tiny_module, dim_copies):
    data, _ = dim_copies
    nine = np.arange(600) % 9
    result = bnpatch.tune_alpha(tiny_module, data, granularity="global", groups=nine, trials=2)
    assert any("groups judged: with fewer than 10 all intervals are rough" in note for note in result.notes)
    assert all(comparison.is_rough for comparison in result.comparisons)


def test_groups_of_other_data(tiny, tiny_module, plain):
    """Labels are of the data to tune on; a function of names is of both; open examples have their own."""
    few, others = (plain[0][:100], plain[1][:100]), (plain[0][100:200], plain[1][100:200])
    run = {"granularity": "global", "trials": 2, "test_data": others}
    labelled = bnpatch.tune_alpha(tiny_module, few, groups=np.arange(100) // 2, **run)
    assert (labelled.num_tuning_groups, labelled.held_out.num_groups) == (50, None)
    with pytest.warns(BnpatchWarning, match="10 groups, such as '0', both in the data to learn from"):
        named = bnpatch.tune_alpha(tiny_module, few, groups=lambda name: name[-1], **run)
    assert (named.num_tuning_groups, named.held_out.num_groups) == (10, 10)
    with pytest.raises(BnpatchError, match="open already; give groups to open_examples"):
        bnpatch.tune_alpha(tiny, bnpatch.open_examples(few, tiny), groups=np.arange(100) // 2)


def test_an_evaluation_is_by_groups(tiny, dim_copies):
    data, groups = dim_copies
    known, ignored = (
        bnpatch.evaluate(tiny, bnpatch.open_examples(data, tiny, groups=g)).estimate(ACCURACY)
        for g in (groups, None)
    )
    assert known.value == ignored.value
    assert (ignored.high - ignored.low) * 1.5 < known.high - known.low


def test_the_gain_of_a_trade_off_has_the_standard_error_of_groups(tiny):
    gains, groups = np.random.default_rng(0).normal(1, 1, 40).repeat(5), np.arange(200) // 5
    baseline = tiny.weights
    weights = replace(baseline, alphas=dict.fromkeys(baseline.alphas, 0.5))

    def scores(weights):
        return gains * sum(weights.alphas.values())

    def error(groups):
        points = trade_off(tiny, weights, scores, ACCURACY, seconds=0.01, groups=groups)
        return points[-1].standard_error / points[-1].gain

    assert error(groups) > 2 * error(None)

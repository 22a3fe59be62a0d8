"""Examples without labels, loaders, and targets that are no classes."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import bnpatch
from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.data.preprocessing import Preprocessing
from bnpatch.evaluation.evaluate import evaluate, warn_at_chance
from bnpatch.evaluation.metrics import Metric

WITHOUT_LABELS = "or search without labels: --metric unlabeled"


@pytest.fixture
def segmenter():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 1)
    ).eval()
    loaded = bnpatch.load(net)
    loaded.preprocessing = Preprocessing((1, 8, 8), (0.5,), (0.5,), crop_pct=1.0)
    return loaded


def floats(count=6, side=8):
    return torch.randn(count, 1, side, side, generator=torch.Generator().manual_seed(0))


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(folder / name)
    return folder


def by_name(data):
    return {data.source.name(i): int(data.targets[i]) for i in range(len(data))}


def test_images_of_a_plain_folder_have_no_label(model, tmp_path):
    write(tmp_path, "a.png", "b.png")
    data = bnpatch.open_examples(tmp_path, model, labels="optional")
    assert by_name(data) == {"a.png": -1, "b.png": -1}
    assert not data.labelled.any()
    assert next(data.batches(2)).targets.tolist() == [-1, -1]
    with pytest.raises(
        BnpatchError, match=f"in no class folders; make one folder per class, {WITHOUT_LABELS}"
    ):
        bnpatch.open_examples(tmp_path, model)


def test_images_beside_class_folders_have_no_label(model, tmp_path):
    write(tmp_path, "stray.png", "3/a.png", "7/deep/b.png")
    data = bnpatch.open_examples(tmp_path, model, labels="optional")
    assert by_name(data) == {"stray.png": -1, "3/a.png": 3, "7/deep/b.png": 7}
    assert data.labelled.tolist() == [False, True, True]


def test_folders_that_are_not_named_after_a_class_have_no_label(model, tmp_path):
    write(tmp_path, "3/a.png", "unsorted/b.png")
    with pytest.warns(BnpatchWarning, match="'unsorted' of .* not among the model's classes; .* unlabelled"):
        data = bnpatch.open_examples(tmp_path, model, labels="optional")
    assert by_name(data) == {"3/a.png": 3, "unsorted/b.png": -1}


def test_as_many_folders_as_outputs_are_no_classes_where_the_names_are_known(model, tmp_path):
    write(tmp_path, *(f"camera{n}/a.png" for n in range(10)))
    with pytest.warns(BnpatchWarning, match="count as unlabelled"):
        assert not bnpatch.open_examples(tmp_path, model, labels="optional").labelled.any()
    model.class_names = None  # then they can only be taken as classes
    assert bnpatch.open_examples(tmp_path, model, labels="optional").labelled.all()


def test_folders_that_do_not_fit_have_no_labels(model, tmp_path):
    model.class_names = None
    write(tmp_path, "cam1/a.png", "cam2/b.png", "c.png")
    with pytest.warns(BnpatchWarning, match="2 class folders, the model has 10 outputs; .* unlabelled"):
        data = bnpatch.open_examples(tmp_path, model, labels="optional")
    assert set(by_name(data).values()) == {-1}
    assert model.class_names is None


def test_a_class_map_that_does_not_fit_is_an_error_all_the_same(model, tmp_path):
    write(tmp_path / "val", "cam1/a.png", "b.png")
    (tmp_path / "map.txt").write_text("\n".join("abcdefghij"))
    with pytest.raises(BnpatchError, match="class map has no 'cam1'"):
        bnpatch.open_examples(tmp_path / "val", model, labels="optional", class_map=tmp_path / "map.txt")


def test_an_empty_folder_is_refused(model, tmp_path):
    with pytest.raises(BnpatchError, match="has no images"):
        bnpatch.open_examples(tmp_path, model, labels="optional")


def test_arrays_without_labels(model, foggy, tmp_path):
    images = foggy[0][:20]
    np.savez(tmp_path / "val.npz", x=images)
    for source in (images, torch.from_numpy(images), (images, None), tmp_path / "val.npz"):
        data = bnpatch.open_examples(source, model, labels="optional")
        assert data.targets.tolist() == [-1] * 20
        with pytest.raises(BnpatchError, match=WITHOUT_LABELS):
            bnpatch.open_examples(source, model)
    some = bnpatch.open_examples((images, [-1, 3] * 10), model, labels="optional")
    assert some.labelled.tolist() == [False, True] * 10
    with pytest.raises(BnpatchError, match="has class -1"):
        bnpatch.open_examples((images, [-1, 3] * 10), model)
    with pytest.raises(BnpatchError, match="has class -2"):
        bnpatch.open_examples((images, [-2, 3] * 10), model, labels="optional")


def test_a_data_set_of_images_alone(model, foggy):
    class Alone(Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return Image.fromarray(foggy[0][index])

    for source in (Alone(), [Image.fromarray(image) for image in foggy[0][:5]]):
        data = bnpatch.open_examples(source, model, labels="optional")
        assert not data.labelled.any()
        assert np.array_equal(next(data.batches(5)).x[:, 0].numpy(), foggy[0][:5])
        with pytest.raises(BnpatchError, match=WITHOUT_LABELS):
            bnpatch.open_examples(source, model)


def test_fingerprints_of_unlabelled_arrays_differ_by_their_content(model, foggy):
    a, b = (bnpatch.open_examples(foggy[0][i : i + 20], model, labels="optional") for i in (0, 20))
    assert a.fingerprint() != b.fingerprint()
    again = bnpatch.open_examples(foggy[0][:20].copy(), model, labels="optional")
    assert a.fingerprint() == again.fingerprint()


def test_a_limit_keeps_the_share_of_the_unlabelled(model, foggy):
    targets = np.where(np.arange(600) < 300, -1, foggy[1])
    data = bnpatch.open_examples((foggy[0], targets), model, labels="optional", limit=100)
    assert len(data) == len(data.labelled) == 100
    assert 48 <= (~data.labelled).sum() <= 52


def test_labels_are_asked_for_where_they_are_needed(model, foggy):
    data = bnpatch.open_examples(
        (foggy[0], np.where(np.arange(600) < 9, -1, foggy[1])), model, labels="optional"
    )
    with pytest.raises(BnpatchError, match="accuracy needs labels, and some examples have none"):
        evaluate(model, data)
    assert len(evaluate(model, data, indices=np.flatnonzero(data.labelled))) == 591
    spread = Metric("spread", lambda outputs, targets: outputs.std(1))
    assert len(evaluate(model, data, [spread])) == 600


def test_chance_is_that_of_the_labelled(model, foggy):
    data = bnpatch.open_examples((foggy[0], np.arange(600) // 60), model)  # the last class is not labelled
    data.labelled = np.arange(600) < 540
    with pytest.warns(BnpatchWarning, match=r"right on 16\.0% .* chance is 11\.1%"):
        warn_at_chance(0.16, data)
    warn_at_chance(0.17, data)  # no warning, which would be an error here
    data.labelled = np.zeros(600, bool)
    warn_at_chance(0.0, data)


def test_a_model_that_is_right_on_three_of_four_of_two_classes_does_not_guess(model, foggy):
    data = bnpatch.open_examples((foggy[0], foggy[1] % 2), model)
    warn_at_chance(0.75, data)
    with pytest.warns(BnpatchWarning, match=r"chance is 50\.0%"):
        warn_at_chance(0.55, data)


def test_a_loader_is_drained_once_in_its_order(model):
    class Once(IterableDataset):
        passes = 0

        def __iter__(self):
            Once.passes += 1
            yield from zip(floats(7, 32), range(7), strict=True)

    data = bnpatch.open_examples(DataLoader(Once(), batch_size=3), model)
    for order in (None, np.array([5, 2])):
        (batch,) = data.batches(8, order)
        chosen = np.arange(7) if order is None else order
        assert torch.equal(batch.x, floats(7, 32)[chosen])
        assert np.array_equal(batch.targets, chosen)
    assert Once.passes == 1
    assert data.as_they_are
    assert not data._cache.inputs  # what is in memory is not kept twice


def test_loaders_of_many_kinds(model, segmenter, foggy):
    x, y = floats(6, 32), torch.arange(6)
    with_processes = DataLoader(TensorDataset(x, y), batch_size=4, num_workers=1)
    batches = [(x[i : i + 2], y[i : i + 2]) for i in (0, 2, 4)]
    halves = [(x[:3], y[:3], "and more"), (x[3:], y[3:], "and more")]
    for source in (with_processes, iter(batches), batches, halves, tuple(halves)):
        data = bnpatch.open_examples(source, model)
        assert data.targets.tolist() == list(range(6))
        assert torch.equal(next(data.batches(6)).x, x)
    as_bytes = DataLoader(TensorDataset(torch.from_numpy(foggy[0][:6]), y), batch_size=4)
    assert np.array_equal(next(bnpatch.open_examples(as_bytes, model).batches(6)).x[:, 0], foggy[0][:6])
    alone = DataLoader(TensorDataset(x), batch_size=4)
    assert not bnpatch.open_examples(alone, model, labels="optional").labelled.any()
    assert not bnpatch.open_examples(alone, segmenter, labels="optional", classes=False).labelled.any()


@pytest.mark.parametrize("turn", [lambda a: a[..., ::-1], lambda a: a.astype(a.dtype.newbyteorder(">"))])
def test_arrays_that_torch_refuses_are_copied(model, foggy, turn):
    """Reversed ones, as where OpenCV's order of colors is turned round, and those of another byte order."""
    images, inputs, y = foggy[0][:6, None], floats(6, 32).numpy(), np.arange(6)

    class Turned(Dataset):
        def __init__(self, x):
            self.x = x

        def __len__(self):
            return len(y)

        def __getitem__(self, index):
            return turn(self.x[index]), index

    for x in (images, inputs):
        expected = next(bnpatch.open_examples((np.ascontiguousarray(turn(x)), y), model).batches(6)).x
        for source in ((turn(x), y), Turned(x), [(turn(x[i : i + 2]), y[i : i + 2]) for i in (0, 2, 4)]):
            data = bnpatch.open_examples(source, model)
            assert torch.equal(next(data.batches(6)).x, expected)
            assert data.targets.tolist() == y.tolist()
            assert data.fingerprint()


def test_loaders_that_do_not_do(model):
    x, y = floats(6, 32), torch.arange(6)
    loader = DataLoader(TensorDataset(x, y), batch_size=2)
    with pytest.raises(BnpatchError, match=r"more memory than the 1e-05 GB .*; raise cache_gb"):
        bnpatch.open_examples(loader, model, cache_gb=1e-5)
    spent = iter(list(loader))
    list(spent)
    for batches, message in (
        (spent, "gives no batches; .* a generator gives them only once"),
        (iter([{"scan": x, "finding": y}]), r"gives dictionaries \(scan, finding\); call the parts image"),
        (iter([(x, y), (x,)]), "some batches have targets"),
        (iter([(x, y), (x[:, :, :9], y)]), r"inputs differ in shape or type \(\(1, 32, 32\) of .*float32"),
        (iter([("names", y)]), "gives a str where numbers are needed"),
    ):
        with pytest.raises(BnpatchError, match=message):
            bnpatch.open_examples(batches, model)
    with pytest.raises(BnpatchError, match="data is a dict"):
        bnpatch.open_examples({"x": x, "y": y}, model)


@pytest.mark.parametrize(
    "targets",
    [
        torch.linspace(0, 1, 6),
        torch.arange(6, dtype=torch.float64),
        torch.arange(6 * 64, dtype=torch.uint8).view(6, 8, 8),
        torch.randn(6, 3),
        torch.arange(-3, 3),
        torch.ones(6, 8, 8, dtype=torch.bool),
    ],
)
def test_targets_of_any_kind_are_passed_on_untouched(segmenter, targets):
    sources = [
        (floats(), targets),
        (floats().numpy(), targets.numpy()),
        [list(floats().numpy()), list(targets.numpy())],
        DataLoader(TensorDataset(floats(), targets), batch_size=4),
        TensorDataset(floats(), targets),
    ]
    for source in sources:
        data = bnpatch.open_examples(source, segmenter, classes=False)
        assert not data.classes
        assert data.labelled.all()
        assert data.strata.tolist() == [0] * 6
        batch = next(data.batches(4, np.array([5, 1])))
        assert batch.targets.dtype == targets.dtype
        assert torch.equal(batch.targets, targets[[5, 1]])
        assert torch.equal(batch.x, floats()[[5, 1]])


def test_classes_are_seen_where_anything_goes(model):
    x = floats(6, 32)
    data = bnpatch.open_examples((x, np.arange(6, dtype=np.int32)), model, classes=False)
    assert data.classes
    assert data.targets.dtype == np.int64
    for targets in (np.arange(6) + 5, np.arange(6) - 1, np.arange(6.0)):
        assert not bnpatch.open_examples((x, targets), model, classes=False).classes


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            torch.zeros(6, 8, 8, dtype=torch.long),
            r"targets of shape \(6, 8, 8\) are no classes; .*of your own",
        ),
        (torch.linspace(0, 1, 6), "not whole numbers; .*of your own"),
        (torch.zeros(5), r"6 images and targets of shape \(5,\)"),
        (np.array(list("abcdef")), "targets are of type <U1"),
    ],
)
def test_targets_that_are_no_classes_are_refused_by_default(model, targets, message):
    with pytest.raises(BnpatchError, match=message):
        bnpatch.open_examples((floats(6, 32), targets), model)


def test_metrics_of_classes_need_classes(segmenter):
    data = bnpatch.open_examples((floats(), torch.zeros(6, 8, 8)), segmenter, classes=False)
    with pytest.raises(BnpatchError, match="accuracy needs class indices"):
        evaluate(segmenter, data)
    with pytest.raises(BnpatchError, match="not one number per class"):
        bnpatch.open_examples((floats(), torch.arange(6)), segmenter)


@pytest.mark.parametrize("truth", [0.0, 1.0])
def test_a_regression_of_one_number_per_example(segmenter, truth):
    """The targets are what the model gives at a known alpha: the nearer to it, the smaller the error."""
    segmenter.module.append(torch.nn.Flatten()).append(torch.nn.Linear(128, 1)).append(torch.nn.Flatten(0))
    segmenter.set_alphas(truth)
    targets = segmenter.predict(floats(40)).clone()
    segmenter.set_alphas(0.0)
    loader = DataLoader(TensorDataset(floats(40), targets), batch_size=8)
    error = Metric("error", lambda outputs, targets: (outputs - targets) ** 2, higher_is_better=False)
    result = bnpatch.tune_alpha(segmenter, loader, metric=error, granularity="global", trials=3)
    assert [c.metric.name for c in result.comparisons] == ["error"]
    weights = [trial.weight for trial in result.trials]
    assert len(set(weights)) == 3
    assert result.alpha == (max(weights) if truth else 0.0)
    assert result.alpha == min(result.trials, key=lambda t: t.scores["error"]).weight


def test_a_list_of_targets_that_is_none_is_not_taken_for_one(segmenter):
    class Masks(TensorDataset):
        pass

    data = Masks(floats(), torch.zeros(6, 8, 8))
    for listed in ([f"mask{i}.png" for i in range(6)], [[0], [0, 1], [], [], [], []], [1, 2]):
        data.targets = listed  # files of masks, boxes, or of something else
        assert bnpatch.open_examples(data, segmenter, classes=False).targets.shape == (6, 8, 8)


def test_images_that_would_move_under_their_masks_are_refused(segmenter):
    class Pairs(Dataset):
        side = 8

        def __len__(self):
            return 3

        def __getitem__(self, index):
            ramp = np.arange(self.side**2, dtype=np.uint8).reshape(self.side, self.side)
            return Image.fromarray(ramp), np.full((8, 8), index)

    data = bnpatch.open_examples(Pairs(), segmenter, classes=False)
    assert next(data.batches(3)).targets.shape == (3, 8, 8)
    Pairs.side = 9
    with pytest.raises(BnpatchError, match="images would be resized or cropped"):
        bnpatch.open_examples(Pairs(), segmenter, classes=False)
    with pytest.raises(BnpatchError, match="more memory than"):
        bnpatch.open_examples(Pairs(), segmenter, classes=False, cache_gb=1e-6)

import numpy as np
import pytest
import torch
from PIL import Image

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.finetune.config import Augmentation
from bnpatch.finetune.data import TrainingData, TrainingImages, check_same_folders, load_batches, shuffled


def test_an_epoch_has_every_example_once_up_to_the_last_batch():
    batches = shuffled(np.arange(70), 16, np.random.default_rng(0))
    assert [len(batch) for batch in batches] == [16] * 4
    assert len(set(np.concatenate(batches).tolist())) == 64
    assert not np.array_equal(np.concatenate(batches), np.arange(64))


def test_unreadable_images_are_left_out_and_named(checkpoint, tmp_path):
    for name in range(10):
        (tmp_path / str(name)).mkdir()
        for copy in range(2):
            Image.new("L", (40, 50), 20 * name).save(tmp_path / str(name) / f"{copy}.png")
    (tmp_path / "3" / "1.png").write_bytes(b"broken")
    model = bnpatch.load(checkpoint, device="cpu")
    examples = bnpatch.open_examples(tmp_path, model)
    images = TrainingImages(examples, model.preprocessing, Augmentation())
    broken = [i for i in range(len(examples)) if examples.source.name(i).startswith("3/1")]
    x, targets, problems = next(iter(load_batches(images, examples.targets, [np.arange(20)], 0)))
    assert x.shape == (19, 1, 32, 32)
    assert targets.tolist() == [t for i, t in enumerate(examples.targets) if i not in broken]
    assert list(problems) == broken
    with pytest.raises(BnpatchError, match="no image of a batch can be read"):
        next(iter(load_batches(images, examples.targets, [np.array(broken)], 0)))


def test_without_augmentation_an_image_is_what_evaluation_sees(checkpoint, digits):
    (images, labels), _ = digits
    model = bnpatch.load(checkpoint, device="cpu")
    examples = bnpatch.open_examples((images[:8], labels[:8]), model)
    plain = TrainingImages(examples, model.preprocessing, Augmentation(min_scale=1.0, hflip=0.0))
    seen = next(examples.batches(8)).x.float() / 255
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1) for v in (model.preprocessing.mean, model.preprocessing.std)
    )
    torch.testing.assert_close(torch.stack([plain[i][1] for i in range(8)]), (seen - mean) / std)


def test_inputs_as_they_are_stay_that_way(checkpoint):
    model = bnpatch.load(checkpoint, device="cpu")
    x, y = np.random.default_rng(0).normal(size=(10, 1, 32, 32)).astype(np.float32), np.arange(10)
    examples = bnpatch.open_examples((x, y), model)
    images = TrainingImages(examples, model.preprocessing, Augmentation(auto_augment="rand-m9"))
    assert torch.equal(images[3][1], torch.from_numpy(x[3]))


def test_processes_share_the_batches_of_whole_steps():
    class Held:
        targets = np.zeros(100, np.int64)

    subset = np.arange(0, 100, 2)
    parts = [
        TrainingData(Held, subset, None, 3, 0, rank, 2).batches(epoch=1, batch_size=4, accumulate=3)
        for rank in range(2)
    ]
    assert [len(part) for part in parts] == [6, 6]  # 12 batches of 4 in 50 are 2 steps of 6
    together = np.concatenate([*parts[0], *parts[1]])
    assert len(np.unique(together)) == 48
    assert np.isin(together, subset).all()
    alone = TrainingData(Held, subset, None, 3, 0).batches(1, 8, 3)
    for step, batch in enumerate(alone):  # a step is of the same examples, however many processes make it
        assert set(batch) == set(np.concatenate([part[step] for part in parts]))


def test_two_folders_must_have_the_same_classes(tmp_path):
    for folder, names in (("train", "abc"), ("val", "abd"), ("few", "ab")):
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
    check_same_folders(tmp_path / "train", tmp_path / "train")
    check_same_folders(tmp_path / "train", tmp_path / "val.npz")  # its classes are numbers
    with pytest.raises(BnpatchError, match=r"train has the class folder 'c', .*val has not"):
        check_same_folders(tmp_path / "train", tmp_path / "val")
    with pytest.raises(BnpatchError, match=r"train has the class folder 'c', .*few has not"):
        check_same_folders(tmp_path / "few", tmp_path / "train")

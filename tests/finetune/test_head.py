import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.data.class_targets import ClassOrder
from bnpatch.finetune.data import check_same_folders
from bnpatch.finetune.head import classes_of, new_head


@pytest.mark.parametrize(
    "arch", ["timm:test_resnet", pytest.param("torchvision:mobilenet_v2", marks=pytest.mark.slow)]
)
def test_another_number_of_classes(arch, tmp_path):
    library, name = arch.split(":")
    module = (
        timm.create_model(name, num_classes=10)
        if library == "timm"
        else torchvision.models.get_model(name, num_classes=10)
    )
    torch.save(module.state_dict(), tmp_path / "model.pt")
    model = bnpatch.load(tmp_path / "model.pt", arch=arch, device="cpu", preprocessing={"img_size": 32})
    assert model.num_outputs() == 10
    before = next(model.module.parameters()).clone()
    state = torch.get_rng_state()
    changed = new_head(model, ("cat", "dog", "fish"))
    assert torch.equal(torch.get_rng_state(), state)
    assert changed.num_outputs() == 3
    assert torch.equal(next(changed.module.parameters()), before)
    changed.save(tmp_path / "changed.pt", changed.recipe())
    again = bnpatch.load(tmp_path / "changed.pt", device="cpu")
    assert again.class_names == ("cat", "dog", "fish")
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(again.predict(x), changed.predict(x))


def test_a_model_without_a_linear_classifier_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(BnpatchError, match="no linear classifier"):
        new_head(bnpatch.load(net, preprocessing={"img_size": 16}), ("a", "b"))


def test_classes_of_a_folder(tmp_path):
    for name in ("10", "2", "1"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert classes_of(tmp_path, ClassOrder.NATURAL) == ("1", "2", "10")
    assert classes_of(tmp_path, ClassOrder.PLAIN) == ("1", "10", "2")
    with pytest.raises(BnpatchError, match="cannot count the classes"):
        classes_of("torch/cifar10", ClassOrder.NATURAL)


@pytest.mark.parametrize("names", [("1", "2", "10"), ("cat", "dog", "fox")])
def test_classes_in_a_table(names, tmp_path):
    rows = []
    for index in range(6):
        Image.new("L", (8, 8)).save(tmp_path / f"i{index}.png")
        rows.append(f"i{index}.png,{names[index % 3]}\n")
    (tmp_path / "labels.csv").write_text("".join(rows))
    assert classes_of(tmp_path, ClassOrder.PLAIN) == names  # numbers in their order, not in that of folders
    for name in names:
        (tmp_path / "folders" / name).mkdir(parents=True)
    check_same_folders(tmp_path, tmp_path / "folders")
    (tmp_path / "folders" / "new").mkdir()
    with pytest.raises(BnpatchError, match="has the class folder 'new'"):
        check_same_folders(tmp_path, tmp_path / "folders")

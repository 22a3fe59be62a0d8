from argparse import Namespace

import numpy as np
import pytest
import timm
import torch
import torchvision

import bnpatch
import bnpatch.models.architecture
from bnpatch.core.errors import BnpatchError
from tests.models.small import bare


@pytest.mark.slow
def test_a_published_file_name_gives_the_published_preprocessing(tmp_path):
    _, path = bare(tmp_path, "torchvision", "resnet50", file="resnet50-11ad3fa6.pth")
    loaded = bnpatch.load(path)
    assert loaded.preprocessing.source == "torchvision's ResNet50_Weights.IMAGENET1K_V2"
    size = np.asarray(
        loaded.preprocessing.transform()(torchvision.transforms.ToPILImage()(torch.rand(3, 464, 464)))
    ).shape
    assert size == (3, 224, 224)
    assert "out of 232 (bilinear" in str(loaded.preprocessing)


@pytest.mark.slow
def test_torchvision_preprocessing_is_torchvisions(tmp_path):
    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V2
    image = torchvision.transforms.ToPILImage()(
        torch.rand(3, 300, 400, generator=torch.Generator().manual_seed(0))
    )
    _, path = bare(tmp_path, "torchvision", "resnet50", file="resnet50-11ad3fa6.pth")
    loaded = bnpatch.load(path)
    x = torch.from_numpy(np.array(loaded.preprocessing.transform()(image)))[None]
    mean, std = (
        255 * torch.tensor(v).view(1, 3, 1, 1) for v in (loaded.preprocessing.mean, loaded.preprocessing.std)
    )
    normalized = (x.float() - mean) / std
    # float32 rounding
    torch.testing.assert_close(normalized[0], weights.transforms()(image), rtol=0, atol=1e-5)


def test_a_published_timm_file_name(tmp_path):
    cfg = timm.get_pretrained_cfg("resnet18.a1_in1k")
    _, path = bare(tmp_path, "timm", "resnet18", file=cfg.url.rsplit("/", 1)[-1])
    loaded = bnpatch.load(path)
    assert loaded.preprocessing.source == "timm's published resnet18.a1_in1k"
    assert (loaded.preprocessing.crop_pct, str(loaded.arch)) == (cfg.crop_pct, "timm:resnet18")


def test_training_arguments_give_the_preprocessing(checkpoint):
    loaded = bnpatch.load(checkpoint)
    assert loaded.preprocessing.source == "the checkpoint's training arguments"
    assert (loaded.preprocessing.input_size, loaded.preprocessing.mean) == ((1, 32, 32), (0.5,))
    assert loaded.class_names == tuple("0123456789")
    other = bnpatch.load(checkpoint, preprocessing={"img_size": 48, "mean": (0.1,), "std": None})
    assert (other.preprocessing.input_size, other.preprocessing.mean) == ((1, 48, 48), (0.1,))
    assert "but img_size, mean as asked" in other.preprocessing.source


TIMM_ARGS = {"model": "resnet18", "mean": [0.1, 0.2, 0.3], "img_size": 128}


TORCHVISION_ARGS = {
    "model": "resnet18",
    "val_crop_size": 160,
    "val_resize_size": 176,
    "interpolation": "bicubic",
}


def test_whose_training_script_wrote_a_checkpoint_decides_between_the_libraries(tmp_path):
    """resnet18 is in both, with the same tensors: what differs is preprocessing and the order of classes."""
    state = torchvision.models.resnet18(num_classes=5).state_dict()
    path = tmp_path / "last.pth.tar"
    torch.save({"arch": "resnet18", "state_dict": state, "version": 2, "args": Namespace(**TIMM_ARGS)}, path)
    loaded = bnpatch.load(path)
    assert (str(loaded.arch), loaded.class_order) == ("timm:resnet18", "natural")
    assert (loaded.preprocessing.mean, loaded.preprocessing.input_size) == ((0.1, 0.2, 0.3), (3, 128, 128))
    torch.save({"model": state, "epoch": 1, "args": Namespace(**TORCHVISION_ARGS)}, path)
    loaded = bnpatch.load(path)
    assert (str(loaded.arch), loaded.class_order) == ("torchvision:resnet18", "plain")
    assert "160 x 160 out of 176 (bicubic" in str(loaded.preprocessing)
    assert loaded.preprocessing.source == "the checkpoint's training arguments"


def test_a_tag_gives_its_preprocessing(tmp_path):
    _, path = bare(tmp_path, "timm", "resnet18")
    assert bnpatch.load(path, arch="timm:resnet18.tv_in1k").preprocessing.interpolation == "bilinear"
    assert bnpatch.load(path, arch="timm:resnet18.a1_in1k").preprocessing.interpolation == "bicubic"
    with pytest.raises(BnpatchError, match="no weights 'V9' of resnet18; choose IMAGENET1K_V1"):
        bnpatch.load("torchvision:resnet18.V9")

import json

import pytest
import timm
import torch
import torchvision

from bnpatch.core.errors import BnpatchError
from bnpatch.models import architecture
from bnpatch.models.architecture import Architecture, fit, identify, names_hash, parse_name, recognized
from bnpatch.models.published import tagged_weights


def state(library, name, **kwargs):
    with torch.device("meta"):
        if library == "timm":
            return timm.create_model(name, **kwargs).state_dict()
        if name == "inception_v3":
            kwargs["init_weights"] = False
        return torchvision.models.get_model(name, **kwargs).state_dict()


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("torchvision", "resnet18"),
        ("torchvision", "densenet121"),
        ("torchvision", "mobilenet_v3_small"),
        ("torchvision", "inception_v3"),
        ("torchvision", "vgg11_bn"),
        ("timm", "test_resnet"),
        ("timm", "test_efficientnet"),
        ("timm", "resnet26d"),
        ("timm", "mobilenetv3_small_050"),
        ("timm", "regnetx_002"),
        ("timm", "repvgg_a0"),
        ("timm", "levit_128s"),
    ],
)
@pytest.mark.parametrize("num_classes", [pytest.param(1000, marks=pytest.mark.slow), 7])
def test_a_bare_state_dict_is_identified(library, name, num_classes):
    found = identify(state(library, name, num_classes=num_classes))
    assert (str(found), found.num_classes, found.in_chans) == (f"{library}:{name}", num_classes, 3)


def test_input_channels_are_read_off_the_tensors():
    found = identify(state("timm", "test_resnet", num_classes=5, in_chans=1))
    assert (found.num_classes, found.in_chans) == (5, 1)
    assert found.build().eval()(torch.zeros(1, 1, 32, 32)).shape == (1, 5)
    tensors = dict(state("torchvision", "resnet18"))
    tensors["conv1.weight"] = torch.empty(64, 2, 7, 7, device="meta")
    found = identify(tensors)
    assert (str(found), found.in_chans) == ("torchvision:resnet18", 2)
    assert found.build().eval()(torch.zeros(1, 2, 32, 32)).shape == (1, 1000)


def test_old_checkpoints_without_counters_are_identified():
    tensors = {k: v for k, v in state("torchvision", "resnet18").items() if "num_batches" not in k}
    assert str(identify(tensors)) == "torchvision:resnet18"


@pytest.mark.slow
def test_variants_that_fit_too_are_reported():
    found = identify(state("torchvision", "resnet50"))
    assert str(found) == "torchvision:resnet50"
    assert "timm:resnetblur50" in found.also


@pytest.mark.parametrize(
    "hint",
    [
        "resnetblur50",
        pytest.param("timm:resnetblur50", marks=pytest.mark.slow),
        pytest.param("resnetblur50.bt_in1k", marks=pytest.mark.slow),
    ],
)
def test_a_hint_decides_between_variants(hint):
    assert str(identify(state("torchvision", "resnet50"), hint)) == "timm:resnetblur50"


@pytest.mark.slow
def test_a_file_name_decides_between_variants():
    assert (
        str(identify(state("torchvision", "resnet50"), None, "resnetblur50-84f4748f.pth"))
        == "timm:resnetblur50"
    )


def test_a_wrong_hint_is_overruled_by_the_tensors():
    assert str(identify(state("torchvision", "resnet18"), "resnet50", "vit.pt")) == "torchvision:resnet18"
    assert str(identify(state("torchvision", "resnet18"), "my_own_net")) == "torchvision:resnet18"


def test_what_fits_nothing_is_refused():
    with pytest.raises(BnpatchError, match=r"model\.pt fit no architecture .* bnpatch\.tune_alpha"):
        identify({"w": torch.zeros(1)}, None, "model.pt")
    with pytest.raises(BnpatchError, match="has no weights"):
        identify({})


def test_a_wrong_arch_is_refused_with_the_first_difference():
    with pytest.raises(
        BnpatchError, match=r"do not fit torchvision:resnet50: .*layer1\.0\.conv1\.weight has shape"
    ):
        fit("resnet50", state("torchvision", "resnet18"))
    with pytest.raises(BnpatchError, match=r"do not fit timm:test_vit: they have no cls_token"):
        fit("timm:test_vit", state("torchvision", "resnet18"))


def test_names():
    assert parse_name("timm:resnet50.a1_in1k") == ("timm", "resnet50")
    assert parse_name("resnet50") == (None, "resnet50")
    with pytest.raises(
        BnpatchError, match="no architecture 'resnt50' in torchvision or timm; did you mean resnet50"
    ):
        parse_name("resnt50")
    with pytest.raises(BnpatchError, match="names no library"):
        parse_name("keras:resnet50")
    with pytest.raises(BnpatchError, match="names no library"):
        parse_name("hf-hub:org/resnet50")


@pytest.mark.parametrize("prefix", ["", "timm:", "timm/", "hf-hub:timm/", "hf_hub:timm/"])
@pytest.mark.parametrize("name", ["tf_efficientnet_b0_ap", "tf_efficientnet_b0.ap_in1k"])
def test_names_of_the_hub_and_of_an_earlier_timm(prefix, name):
    """timm gave names such as tf_efficientnet_b0_ap up, and makes tags of their ends."""
    is_plain = prefix + name == "tf_efficientnet_b0.ap_in1k"
    library = None if is_plain else "timm"
    assert parse_name(prefix + name) == (library, "tf_efficientnet_b0")
    assert recognized(prefix + name) == ("" if is_plain else "timm:") + "tf_efficientnet_b0"
    assert tagged_weights(prefix + name)["name"] == "tf_efficientnet_b0.ap_in1k"


@pytest.mark.parametrize("text", ["", "adam", "keras:resnet18", "torchvision:tf_efficientnet_b0", "a\nb"])
def test_other_texts_name_no_architecture(text):
    assert recognized(text) is None


def test_the_index_is_of_the_installed_libraries():
    index = json.loads((architecture.resources.files("bnpatch.models") / "architectures.json").read_text())
    indexed = {name for names in index.values() for name in names}
    known = {f"{lib}:{name}" for lib in architecture.LIBRARIES for name in architecture.known_names(lib)}
    missing = known - indexed
    assert len(missing) < 0.02 * len(known), (
        f"run tests.models.make_architecture_index: {sorted(missing)[:5]} ..."
    )
    for entry in ("timm:test_resnet", "torchvision:regnet_y_400mf", "timm:tf_efficientnet_lite0"):
        library, _, name = entry.partition(":")
        assert entry in index[names_hash(Architecture(library, name).sketch().state_dict())]


@pytest.mark.parametrize("library", architecture.LIBRARIES)
def test_a_name_is_known_if_and_only_if_it_is_listed(library):
    """So tags, deprecated names, and those of the other library are not."""
    others = [
        *timm.models.get_deprecated_models(),
        *timm.list_pretrained(),
        *torchvision.models.list_models(),
    ]
    names = {*others, *timm.list_models(), *architecture.known_names("timm"), "resnt50", ""}
    known = {name for name in names if architecture.is_known(library, name)}
    assert known == set(architecture.known_names(library))


def test_only_a_tag_names_published_weights():
    assert tagged_weights("timm:resnet18.a1_in1k")["name"] == "resnet18.a1_in1k"
    for arch in ("timm:resnet18", "timm:resnet18.nobody", "torchvision:resnet18", "", None):
        assert tagged_weights(arch) is None

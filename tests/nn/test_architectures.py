"""Identity at alpha = 0 is exact on real architectures, and alpha = 0.1 does something."""

import pytest
import timm
import torch
import torchvision

from bnpatch.core.errors import BnpatchError
from bnpatch.nn.surgery import inventory, patch
from tests.benchmarks import zoo
from tests.nn.norms import images, settle

TIMM_TEST_MODELS = timm.list_models("test_*")

# Of each sweep, what is always run: small, and of unlike families. The rest is slow.
QUICK = {
    "timm": "mobilenetv3_small_050 resnet10t lcnet_035".split(),
    "torchvision": ["mobilenet_v3_small", "shufflenet_v2_x0_5"],
    "zoo": ["timm/lcnetv2_small"],
}

# One small member of each family.
TIMM_FAMILIES = """
    cspresnet50 densenet121 dla46_c dpn48b efficientformer_l1 efficientvit_b0 efficientvit_m0
    ese_vovnet19b_slim fastvit_t8 fbnetc_100 gcresnet33ts ghostnet_050 hardcorenas_a hgnetv2_b0
    hrnet_w18_small inception_resnet_v2 inception_v3 inception_v4 lcnet_035 levit_128s mixnet_s
    mnasnet_small mobilenetv2_035 mobilenetv3_small_050 mobilenetv4_conv_small mobileone_s0
    mobilevit_xxs regnetx_002 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_26w_4s resnest14d resnet10t
    resnetv2_18 rexnet_100 selecsls42 semnasnet_075 shvit_s1 skresnet18 spnasnet_100 starnet_s1
    tf_efficientnet_lite0 tiny_vit_5m_224 tinynet_e vgg11_bn visformer_tiny xception41
""".split()

TORCHVISION_FAMILIES = """
    densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 mobilenet_v2
    mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x0_5 vgg11_bn
    wide_resnet50_2
""".split()

# A sample of the sweep of tests/benchmarks/zoo.py: what is not above, tasks besides classification among it.
ZOO = """
    timm/cpubone_nano timm/efficientvim_m1 timm/iformer_t timm/lcnetv2_small timm/lowformer_b0
    timm/mobilevitv2_050 timm/swiftformer_xs timm/xcit_nano_12_p8_224 torchvision/lraspp_mobilenet_v3_large
    torchvision/mc3_18 torchvision/quantized_shufflenet_v2_x0_5 torchvision/raft_large
    torchvision/ssdlite320_mobilenet_v3_large
""".split()

TORCHVISION_WITHOUT_BN = ["alexnet", "convnext_tiny", "squeezenet1_0", "swin_t", "vgg11", "vit_b_32"]


def sweep(names, quick):
    assert set(quick) <= set(names)
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def check(model, x):
    batch_norms = {n for n in zoo.expected_sites(model) if zoo.is_batch_norm(model.get_submodule(n))}
    assert {
        norm_layer.name for norm_layer in inventory(model).norm_layers
    } == batch_norms  # Group Norm has no moments yet
    if not inventory(model).norm_layers:
        with pytest.raises(BnpatchError, match="norm"):
            patch(model)
        return 0
    with torch.inference_mode():
        before = model(x)
        assert torch.equal(patch(model)(x), before)
        after = patch(model, 0.1)(x)
    assert torch.isfinite(after).all()
    assert not torch.equal(after, before)
    return len(inventory(model).norm_layers)


@pytest.mark.parametrize("name", TIMM_TEST_MODELS + sweep(TIMM_FAMILIES, QUICK["timm"]))
def test_timm(name):
    model = settle(timm.create_model(name))
    cfg = model.pretrained_cfg
    size = cfg["input_size"][-1] if cfg.get("fixed_input_size") or name.startswith("test_") else 96
    num_norms = check(model, images(2, 3, size, size))
    assert num_norms or name in TIMM_TEST_MODELS


@pytest.mark.parametrize("name", sweep(TORCHVISION_FAMILIES, QUICK["torchvision"]))
def test_torchvision(name):
    kwargs = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = settle(torchvision.models.get_model(name, **kwargs))
    size = {"maxvit_t": 224, "inception_v3": 96}.get(name, 64)
    assert check(model, images(2, 3, size, size))


@pytest.mark.parametrize("name", sweep(ZOO, QUICK["zoo"]))
def test_sample_of_the_zoo(name):
    library, name = name.split("/")
    model = settle(zoo.create(library, name))
    family = zoo.Family(library, zoo.module_of(model), name, zoo.norm_classes(model))
    result = zoo.Result(family, name, size=0, expected=zoo.expected_sites(model))
    zoo.check_conversion(family, model, result)
    assert result.problem == ""
    assert result.norm_layers


@pytest.mark.parametrize("name", TORCHVISION_WITHOUT_BN)
def test_torchvision_without_batch_norm(name):
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    assert check(model, None) == 0

import contextlib
import copy
import importlib

import pytest
import timm.layers
import torch
import torchvision
from timm.layers import norm_act
from timm.layers.split_batchnorm import SplitBatchNorm2d
from timm.models import levit
from torch import nn

from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.core.norm_spec import NormSpec
from bnpatch.models.torch_model import TorchModel
from bnpatch.nn import surgery
from bnpatch.nn.norm import ExampleWeightedNorm
from bnpatch.nn.surgery import calibrated, inventory, patch, unpatch
from bnpatch.nn.training_norm import convert_norms
from tests.nn.norms import images, moments, settle

CONVERTIBLE = {
    "BatchNorm1d": lambda: (nn.BatchNorm1d(8), (2, 8, 5)),
    "BatchNorm2d": lambda: (nn.BatchNorm2d(8), (2, 8, 4, 4)),
    "BatchNorm2d without affine": lambda: (nn.BatchNorm2d(8, affine=False), (2, 8, 4, 4)),
    "BatchNorm3d": lambda: (nn.BatchNorm3d(8), (2, 8, 2, 3, 3)),
    "SyncBatchNorm": lambda: (nn.SyncBatchNorm(8), (2, 8, 4, 4)),
    "BatchNormAct2d": lambda: (norm_act.BatchNormAct2d(8, drop_layer=nn.Hardtanh), (2, 8, 4, 4)),
    "SyncBatchNormAct": lambda: (
        norm_act.convert_sync_batchnorm(norm_act.BatchNormAct2d(8, act_layer=nn.SiLU)),
        (2, 8, 4, 4),
    ),
    "FrozenBatchNorm2d": lambda: (torchvision.ops.FrozenBatchNorm2d(8, eps=0.0), (2, 8, 4, 4)),
    "FrozenBatchNormAct2d": lambda: (norm_act.FrozenBatchNormAct2d(8), (2, 8, 4, 4)),
    "SplitBatchNorm2d": lambda: (SplitBatchNorm2d(8), (2, 8, 4, 4)),
    "an initialised LazyBatchNorm2d": lambda: (lazy(), (2, 8, 4, 4)),
}


def lazy(run=True):
    bn = nn.LazyBatchNorm2d()
    if run:
        bn(torch.randn(2, 8, 4, 4))
    return bn


@pytest.mark.parametrize("case", CONVERTIBLE)
def test_converts(case):
    norm, shape = CONVERTIBLE[case]()
    model, x = settle(nn.Sequential(nn.Identity(), norm)), images(*shape)
    before, keys = model(x), list(model.state_dict())
    tail = nn.Sequential(*(getattr(norm, name, nn.Identity()) for name in ("drop", "act")))

    patch(model)
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == keys

    patch(model, 0.3)
    assert isinstance(model[1], ExampleWeightedNorm)
    assert inventory(model).norm_layers[0].alpha == 0.3
    after = model(x)
    assert not torch.equal(after, before)
    bare = copy.deepcopy(model[1])
    for name in ("drop", "act"):
        bare._modules.pop(name, None)
    assert torch.equal(tail(bare(x)), after)  # what followed the normalization still follows it

    unpatch(model)
    assert type(model[1]) is type(norm)
    assert torch.equal(model(x), before)
    assert vars(model[1]).keys() == vars(CONVERTIBLE[case]()[0]).keys()


@pytest.mark.parametrize("case", CONVERTIBLE)
def test_state_dicts_load_both_ways(case):
    plain = nn.Sequential(settle(CONVERTIBLE[case]()[0]))
    patched = patch(nn.Sequential(CONVERTIBLE[case]()[0]), 0.1)
    patched.load_state_dict(plain.state_dict())
    back = nn.Sequential(CONVERTIBLE[case]()[0])
    back.load_state_dict(patched.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    without_counts = {k: v for k, v in plain.state_dict().items() if "num_batches" not in k}
    assert not patched.load_state_dict(without_counts, strict=False).unexpected_keys
    if "Frozen" in case:  # such layers ignore the counter of the Batch Norm that they were
        patched.load_state_dict({**without_counts, "0.num_batches_tracked": torch.tensor(1)})


class UnknownBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    bn = nn.BatchNorm2d(8)
    bn.forward = bn.forward
    return bn


LEFT_ALONE = {
    "running statistics": [
        lambda: nn.BatchNorm2d(8, track_running_stats=False),
        lambda: nn.GroupNorm(2, 8),
        lambda: timm.layers.GroupNorm(8, 2),
        lambda: timm.layers.GroupNorm1(8),
        lambda: timm.layers.GroupNormAct(8, 2),
    ],
    "not this kind": [
        lambda: nn.LayerNorm(8),
        lambda: nn.LocalResponseNorm(2),
        lambda: nn.RMSNorm(8),
        lambda: timm.layers.LayerNorm2d(8),
        lambda: timm.layers.LayerNormAct2d(8),
        lambda: timm.layers.RmsNorm(8),
        lambda: timm.layers.SimpleNorm(8),
        lambda: timm.layers.EvoNorm2dS0(8),
        lambda: timm.layers.FilterResponseNormAct2d(8),
        lambda: timm.layers.grn.GlobalResponseNorm(8),
        lambda: timm.layers.LayerScale(8),
        lambda: importlib.import_module("timm.models.mlp_mixer").Affine(8),
    ],
    "Instance Norm": [lambda: nn.InstanceNorm2d(8, track_running_stats=True), lambda: nn.InstanceNorm1d(8)],
    "not initialised": [lambda: lazy(run=False)],
    "does not know": [lambda: UnknownBatchNorm(8)],
    "replaced on the instance": [hooked],
    "TorchScript": [lambda: torch.jit.script(nn.BatchNorm2d(8))],
    "weights, not its input": [
        lambda: timm.layers.StdConv2d(3, 8, 1),
        lambda: timm.layers.ScaledStdConv2d(3, 8, 1),
    ],
}


@pytest.mark.parametrize(("reason", "make"), [(r, make) for r, makes in LEFT_ALONE.items() for make in makes])
def test_leaves_alone_and_says_why(reason, make):
    norm = make()
    model = nn.Sequential(norm, nn.BatchNorm2d(8))
    (left,) = inventory(model).skipped_norms
    assert left.name == "0"
    assert reason in left.reason
    patch(model, 0.1)
    assert model[0] is norm


def test_auxiliary_norms_of_a_split_norm_are_reported():
    found = inventory(nn.Sequential(SplitBatchNorm2d(8, num_splits=3)))
    assert [norm_layer.name for norm_layer in found.norm_layers] == ["0"]
    assert [left.name for left in found.skipped_norms] == ["0.aux_bn.0", "0.aux_bn.1"]
    assert "belongs to another norm" in found.skipped_norms[0].reason
    patched = patch(nn.Sequential(SplitBatchNorm2d(8)), 0.1)
    assert [left.name for left in inventory(patched).skipped_norms] == ["0.aux_bn.0"]
    patched.train()(images(4, 8, 3, 3))  # the auxiliary norms still train
    assert patched[0].aux_bn[0].num_batches_tracked == 1


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_a_model_of_split_norms_is_converted_like_the_model_that_it_was(name):
    model, x = settle(timm.create_model(name)), images(2, 3, 64, 64)
    names = [norm_layer.name for norm_layer in inventory(model).norm_layers]
    expected = patch(copy.deepcopy(model), 0.2)(x)
    split = timm.layers.convert_splitbn_model(model).eval()
    found = inventory(split)
    assert [(norm_layer.name, norm_layer.kind) for norm_layer in found.norm_layers] == [
        (n, "SplitBatchNorm2d") for n in names
    ]
    assert [left.name for left in found.skipped_norms] == [f"{n}.aux_bn.0" for n in names]
    assert torch.equal(patch(split, 0.2)(x), expected)  # activations included


def test_linear_norm_sees_single_values_and_stays_plain():
    norm = settle(levit.LinearNorm(8, 8))
    x = images(2, 5, 8)
    before = norm(x)
    assert torch.equal(patch(norm, 0.5)(x), before)


def test_every_name_in_the_tables_is_a_class():
    for name in [*surgery.CONVERTIBLE, *surgery.GROUP_NORMS, *surgery.SKIPPED]:
        module, _, cls = name.rpartition(".")
        if "InplaceAbnSync" in cls:
            continue  # of the optional package
        found = getattr(importlib.import_module(module), cls)
        assert f"{found.__module__}.{found.__qualname__}" == name


def test_a_shared_module_is_one_site_in_both_places():
    shared = nn.BatchNorm2d(8)
    model = settle(nn.ModuleDict({"a": nn.Sequential(shared), "b": shared}))
    (norm_layer,) = inventory(model).norm_layers
    assert (norm_layer.name, norm_layer.aliases) == ("a.0", ("b",))
    patch(model, {"b": 0.2})
    assert model["a"][0] is model["b"]
    assert model["b"].alpha == 0.2


class FromLists(nn.Module):
    """Runs its norms from where no module looks for its children."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.listed = [self.first]
        self.named = {"norms": (self.second, None, self.listed)}
        self.__dict__["hidden"] = self.third
        self.listed.append(self.named)

    def forward(self, x):
        return self.hidden(self.named["norms"][0](self.listed[0](x)))


def test_norms_that_a_model_runs_from_a_list_are_patched():
    model, x = settle(FromLists()), images(2, 8, 4, 4)
    before = model(x)
    for name in ("first", "second", "third"):
        patch(model, {"first": 0.0, "second": 0.0, "third": 0.0, name: 0.3})
        assert not torch.equal(model(x), before)
    expected = model.third(model.second(model.first(x)))
    assert torch.equal(model(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    unpatch(model)
    assert torch.equal(model(x), before)
    assert [type(norm) for norm in (model.hidden, model.listed[0], model.named["norms"][0])] == [
        nn.BatchNorm2d
    ] * 3


def test_a_root_that_is_a_norm_is_returned():
    root = patch(settle(nn.BatchNorm2d(8)), 0.2)
    assert isinstance(root, ExampleWeightedNorm)
    assert inventory(root).norm_layers[0].name == ""
    assert type(unpatch(root)) is nn.BatchNorm2d


def test_keeps_everything_about_the_layer():
    calls = []
    bn = nn.BatchNorm2d(8, eps=1e-3, momentum=0.3).double().eval()
    bn.weight.requires_grad_(False)
    bn.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    weight = bn.weight
    model = patch(nn.Sequential(bn), 0.2)
    layer = model[0]
    assert (layer.eps, layer.momentum, layer.training) == (1e-3, 0.3, False)
    assert layer.weight is weight
    assert not layer.weight.requires_grad
    assert layer.parameters_of_norm()[3].dtype == torch.float64
    model(images(1, 8, 2, 2).double())
    assert calls == [ExampleWeightedNorm]
    for mode in (True, False):
        assert model.train(mode)[0].training is mode
    assert model.to("meta")[0].running_mean.device.type == "meta"


def test_by_name_leaves_the_others_as_they_are():
    model = patch(nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8)), 0.5)
    patch(model, {"1": 0.1})
    assert [norm_layer.alpha for norm_layer in inventory(model).norm_layers] == [0.5, 0.1]


def test_where_chooses_sites():
    model = patch(
        nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(4)), 0.5, where=lambda s: s.num_channels == 4
    )
    assert [type(m) for m in model] == [nn.BatchNorm2d, ExampleWeightedNorm]


def test_refuses_plainly():
    with pytest.raises(BnpatchError, match="no normalization layer"):
        patch(nn.Linear(2, 2))
    untrained = nn.Conv2d(2, 2, 1)
    nn.init.zeros_(untrained.bias)
    with pytest.raises(BnpatchError, match="nor convolutions with a bias other than 0: take another"):
        patch(nn.Sequential(untrained))
    with pytest.raises(
        BnpatchError,
        match=r"the model has 1 norm, and none can be patched; skipped: LayerNorm \(not this kind",
    ):
        patch(nn.Sequential(nn.LayerNorm(2)))
    with pytest.raises(
        BnpatchError, match=r"no running statistics: 0; .*bnpatch\.calibrate\(model, images\)"
    ):
        patch(nn.Sequential(nn.GroupNorm(1, 2)))
    with pytest.raises(BnpatchError, match=r"no norm layer '1'; .*bnpatch\.calibrate"):
        patch(nn.Sequential(nn.BatchNorm2d(2), nn.GroupNorm(1, 2)), {"1": 0.5})
    with pytest.raises(BnpatchError, match="no norm layer 'nope'; its norm layers are 0"):
        patch(nn.Sequential(nn.BatchNorm2d(2)), {"nope": 0.1})
    with pytest.raises(ValueError, match="must lie in"):
        patch(nn.Sequential(nn.BatchNorm2d(2)), 2.0)


@pytest.mark.parametrize("alpha", [2.0, {"1": -1.0}])
def test_a_refused_alpha_changes_nothing(alpha):
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    with pytest.raises(ValueError, match="must lie in"):
        patch(model, alpha)
    assert [type(m) for m in model] == [nn.BatchNorm2d, nn.BatchNorm2d]


def test_patching_again_keeps_whether_single_values_are_weighed():
    model = patch(nn.Sequential(nn.BatchNorm2d(2)), 0.5, include_1x1=True)
    patch(model, 0.2)
    assert model[0].include_1x1
    patch(model, 0.2, include_1x1=False)
    assert not model[0].include_1x1


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("repvit_m0_9", marks=pytest.mark.slow),
        "levit_128s",
        pytest.param("repvgg_a0", marks=pytest.mark.slow),
    ],
)
def test_reparameterizing_a_patched_model_warns_and_before_it_there_is_nothing_left(name):
    import timm.utils

    model = settle(timm.create_model(name))
    with pytest.warns(BnpatchWarning, match="fuse before patching"), contextlib.suppress(AssertionError):
        timm.utils.reparameterize_model(patch(copy.deepcopy(model), 0.1))
    fused = timm.utils.reparameterize_model(model)
    assert len(inventory(fused).norm_layers) < len(inventory(model).norm_layers)


def test_layers_are_lent_out_as_what_they_were():
    net = settle(nn.Sequential(nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.BatchNorm2d(8)))
    calibrated(net, {"1": moments()})
    convert_norms(net, NormSpec.batch_group(4, 2), where=lambda norm_layer: norm_layer.name == "2")
    patch(net, {"0": 0.2, "1": 0.7, "2": 0.3}, include_1x1=True)
    net[0].running = moments(seed=4)
    x = images(2, 8, 4, 4)
    before, layers = net(x), list(net)
    with TorchModel(net, name="net", preprocessing=None).unpatched() as plain:
        assert [type(m) for m in plain] == [nn.BatchNorm2d, nn.GroupNorm, nn.BatchNorm2d]
        assert not torch.equal(plain(x), before)
    assert [id(layer) for layer in net] == [id(layer) for layer in layers]
    assert torch.equal(net(x), before)

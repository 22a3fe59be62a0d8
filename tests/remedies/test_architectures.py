import re

import timm
import torch

import bnpatch
from bnpatch.models.load import load
from tests.remedies.world import MANY, SIDE, case, net


@case("there is no architecture 'test_resnett'", "did you mean test_resnet")
def test_a_misspelled_architecture(w):
    def follow(remedy):
        load(w.checkpoint, arch=re.search(r"did you mean (\w+)", remedy)[1])

    return lambda: load(w.checkpoint, arch="test_resnett"), follow


@case("there is no architecture 'qqqq'", r"see timm\.list_models\(\)")
def test_an_architecture_that_is_like_no_other(w):
    (name,) = timm.list_models("test_resnet")
    return lambda: load(w.checkpoint, arch="qqqq"), lambda _: load(w.checkpoint, arch=name)


@case("'mine:resnet' names no library", "write one of .*timm:NAME")
def test_another_library(w):
    return lambda: load(w.checkpoint, arch="mine:resnet"), lambda _: load(
        w.checkpoint, arch="timm:test_resnet"
    )


@case("the weights do not fit .*resnet18", "they fit timm:test_resnet: name that, or leave out --arch")
def test_the_wrong_architecture(w):
    def follow(remedy):
        load(w.checkpoint, arch=re.search(r"they fit (\S+):", remedy)[1])
        load(w.checkpoint)

    return lambda: load(w.checkpoint, arch="resnet18"), follow


@case("the weights do not fit .*resnet18", "they fit no other architecture either: .* bnpatch.tune_alpha")
def test_an_architecture_for_a_model_of_ones_own(w):
    path = w.saved(net().state_dict())
    return lambda: load(path, arch="resnet18"), lambda _: tuned_in_python(path)


@case("cannot load local-dir:", "give the file of the weights in it")
def test_a_folder_of_an_architecture_that_timm_has_not(w):
    path = w.saved(w.state_dict, "mine/model.pt")
    w.file("mine/config.json", '{"architecture": "of my own"}')
    return lambda: load(path.parent), lambda _: load(path)


@case("but beside them are decoder.weight", "--arch timm:test_resnet leaves these out")
def test_weights_beside_the_model(w):
    path = w.saved({**{f"encoder.{k}": t for k, t in w.state_dict.items()}, "decoder.weight": torch.ones(2)})
    return lambda: load(path), lambda remedy: load(path, arch=re.search(r"--arch (\S+)", remedy)[1])


@case("fit no architecture of timm or torchvision", r"call bnpatch.tune_alpha\(module, data\) from Python")
def test_a_model_of_ones_own(w):
    path = w.saved(net().state_dict())
    return lambda: load(path), lambda _: tuned_in_python(path)


def tuned_in_python(path):
    module = net()
    module.load_state_dict(torch.load(path, weights_only=True))
    model = load(module, preprocessing={"img_size": SIDE})
    bnpatch.tune_alpha(model, MANY, granularity="global", trials=1)

import re

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.core.norm_spec import NormSpec
from bnpatch.core.recipe import Recipe
from bnpatch.finetune.head import new_head
from bnpatch.finetune.norm_decay import NormDecay, parameter_groups
from bnpatch.models.load import load
from bnpatch.models.running_stats import calibrate, recover_fused
from bnpatch.nn.training_norm import convert_norms
from tests.remedies.world import MANY, SIDE, X, Y, case, loaded, net

SMALL = {"granularity": "global", "trials": 1}


@case("returns several outputs: map .*, age .*, kind", "say with --output-name .* by its name or number")
def test_several_outputs(w):
    module = net(result=lambda y: {"map": y[:, :, None, None].repeat(1, 1, 2, 2), "age": y[:, :2], "kind": y})

    def follow(_):
        for output in ("kind", "2"):
            assert load(module, output=output, preprocessing={"img_size": SIDE}).num_outputs() == 3

    return lambda: load(module, preprocessing={"img_size": SIDE}).num_outputs(), follow


@case("has no output 'classes'", r"choose --output-name among .*kind \(N, 3\)")
def test_another_output(w):
    module = net(result=lambda y: {"map": y[:, :, None], "kind": y})
    options = {"preprocessing": {"img_size": SIDE}}
    return (
        lambda: load(module, output="classes", **options).num_outputs(),
        lambda _: load(module, output="kind", **options).num_outputs(),
    )


@case("not one number per class", "choose another output with --output-name")
def test_a_map(w):
    module = net(result=lambda y: {"map": y[:, :, None, None].repeat(1, 1, 2, 2), "kind": y})
    options = {"preprocessing": {"img_size": SIDE}}
    return (
        lambda: load(module, output="map", **options).num_outputs(),
        lambda _: load(module, output="kind", **options).num_outputs(),
    )


@case("the model returns a str", "wrap it so that it returns a tensor")
def test_no_tensor(w):
    module = net(result=lambda y: "cat")
    wrapped = net(result=lambda y: y)
    predict = {"preprocessing": {"img_size": SIDE}}
    return lambda: load(module, **predict).predict(X), lambda _: load(wrapped, **predict).predict(X)


@case(r"does not take an input of shape \(\d+, 3, 224, 224\)", "set --img-size, or give inputs")
def test_another_size(w):
    def follow(_):
        load(net(), preprocessing={"img_size": SIDE}).num_outputs()
        load(net()).predict(X)

    return lambda: load(net()).num_outputs(), follow


@case("the model takes 2 channels, image files give 1 or 3", r"float arrays in an \.npz file")
def test_two_channels(w):
    found = load(net(channels=2), preprocessing={"img_size": SIDE})
    data = w.images("a/1.png", "b/1.png", "c/1.png")
    np.savez(w.folder / "data.npz", x=X[:, :2].numpy(), y=Y)
    return lambda: bnpatch.open_examples(data, found), lambda _: bnpatch.open_examples(
        w.folder / "data.npz", found
    )


@case(
    "no normalization layer that bnpatch could patch",
    r"patch the model from before, or add --recover-fused \(bnpatch\.recover_fused in Python\)",
)
def test_fused(w):
    def follow(_):
        bnpatch.patch(net(), 0.1)
        found = loaded(norm=nn.Identity())
        assert recover_fused(found, X) == 1
        bnpatch.patch(found.module, 0.1)

    return lambda: bnpatch.patch(net(norm=nn.Identity()), 0.1), follow


@case("no normalization layer that bnpatch could patch", "take another model")
def test_neither_norms_nor_what_they_were_fused_into(w):
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(4 * (SIDE - 2) ** 2, 3)
    ).eval()
    with pytest.raises(BnpatchError, match="no norms either: take another model"):
        recover_fused(module, X)  # so that the other remedy would not help
    return lambda: bnpatch.patch(module, 0.1), lambda _: bnpatch.patch(net(), 0.1)


@case("have no running statistics", r"bnpatch tune-alpha, or bnpatch\.calibrate\(model, images\)")
def test_group_norm(w):
    found = loaded(norm=nn.GroupNorm(2, 4))

    def follow(_):
        bnpatch.tune_alpha(loaded(norm=nn.GroupNorm(2, 4)), MANY, **SMALL)
        calibrate(found, X)
        bnpatch.patch(found.module, 0.1)

    return lambda: bnpatch.patch(found.module, 0.1), follow


@case("the model has 1 norm, and none can be patched", "run one batch through the model first")
def test_lazy(w):
    module = net(norm=nn.LazyBatchNorm2d())

    def follow(_):
        module.train()(X)
        bnpatch.patch(module.eval(), 0.1)

    return lambda: bnpatch.patch(module, 0.1), follow


@case("alpha = 2.0 is out of range", r"must lie in \[0, 1\]")
def test_too_much_weight(w):
    return lambda: bnpatch.patch(net(), 2), lambda _: [bnpatch.patch(net(), alpha) for alpha in (0, 1)]


@case("var_offset = 9.0 at 'norm' is out of range", r"must lie in \[-8, 8\]")
def test_too_far_apart(w):
    return (
        lambda: bnpatch.patch(net(), 0.1, var_offset={"norm": 9}),
        lambda _: [bnpatch.patch(net(), 0.1, var_offset=offset) for offset in (-8, 8)],
    )


@case("slope = 9.0 .*is out of range", r"must lie in \[-4, 4\]")
def test_too_steep(w):
    return (
        lambda: bnpatch.patch(net(), 0.1, slope=9),
        lambda _: [bnpatch.patch(net(), 0.1, slope=slope) for slope in (-4, 4)],
    )


@case("has no norm layer 'nrm'", "norm")
def test_a_misspelled_norm_layer(w):
    return lambda: bnpatch.patch(net(), {"nrm": 0.1}), lambda remedy: bnpatch.patch(
        net(), {re.search(r"\bnorm\b", remedy)[0]: 0.1}
    )


@case("the model has no norm layer '0.norm'", r"bnpatch\.calibrate\(model, images\) in Python")
def test_a_weight_for_group_norm(w):
    module = nn.Sequential(net(norm=nn.GroupNorm(2, 4)), nn.BatchNorm1d(3)).eval()

    def follow(_):
        calibrate(module, X)
        bnpatch.patch(module, {"0.norm": 0.1})

    return lambda: bnpatch.patch(module, {"0.norm": 0.1}), follow


@case("no norm layer of the model was chosen", "let where accept one of norm")
def test_a_choice_of_no_norm_layer(w):
    def patched(*names):
        bnpatch.patch(net(), 0.1, where=lambda layer: layer.name in names)

    return patched, lambda remedy: patched(remedy.split()[-1])


@case(
    "the recipe is for another model: the parameters of .* differ",
    "the model that it was tuned on, or tune this one",
)
def test_a_recipe_of_another_model(w):
    recipe = loaded().recipe()
    other = net()
    nn.init.constant_(other.norm.bias, 3)

    def follow(_):
        bnpatch.apply(net(), recipe)
        model = load(other, preprocessing={"img_size": SIDE})
        bnpatch.apply(other, bnpatch.tune_alpha(model, MANY, **SMALL).recipe)

    return lambda: bnpatch.apply(other, recipe), follow


@case("is not a recipe", "make one with bnpatch tune-alpha")
def test_no_recipe(w):
    path = w.file("recipe.json", "[]")

    def follow(_):
        bnpatch.tune_alpha(loaded(), MANY, **SMALL).recipe.save(path)
        Recipe.load(path)

    return lambda: Recipe.load(path), follow


@case("torch.fx can't trace a patched layer", "trace the model .* before patching, and patch the result")
def test_tracing_a_patched_model(w):
    patched = bnpatch.patch(net(), 0.1)

    def follow(_):
        traced = bnpatch.patch(torch.fx.symbolic_trace(net()), 0.1)
        torch.testing.assert_close(traced(X), patched(X))

    return lambda: torch.fx.symbolic_trace(patched), follow


@case("torch.jit.script can't compile a patched layer", "use torch.jit.trace, or torch.export")
def test_scripting_a_patched_model(w):
    patched = bnpatch.patch(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), 0.1)

    def follow(_):
        torch.testing.assert_close(torch.jit.trace(patched, X)(X), patched(X))

    return lambda: torch.jit.script(patched), follow


@case("the model is itself a norm", r"put it into a torch\.nn\.Sequential")
def test_a_norm_alone(w):
    return lambda: calibrate(nn.GroupNorm(3, 3), X), lambda _: calibrate(nn.Sequential(nn.GroupNorm(3, 3)), X)


@case("norms are all frozen", "take a checkpoint with ordinary Batch Norm")
def test_training_frozen_norms(w):
    frozen = torchvision.ops.FrozenBatchNorm2d(4)
    return lambda: convert_norms(net(norm=frozen), NormSpec.ghost(2)), lambda _: convert_norms(
        net(), NormSpec.ghost(2)
    )


@case("has no convolution that a Batch Norm may have been fused into", "leave out --recover-fused")
def test_nothing_that_was_fused(w):
    return lambda: recover_fused(net(), X), lambda _: bnpatch.patch(net(), 0.1)


@case("has no linear classifier", "give it a new one in Python")
def test_a_new_head_without_a_linear_one(w):
    module = nn.Sequential(
        nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    found = load(module, preprocessing={"img_size": SIDE})

    def follow(_):
        with_head = load(nn.Sequential(*module, nn.Linear(3, 3)), preprocessing={"img_size": SIDE})
        assert new_head(with_head, ("a", "b")).num_outputs() == 2

    return lambda: new_head(found, ("a", "b")), follow


@case("has no norm layer 'nrm' to decay", "see bnpatch inspect --sites")
def test_decay_of_a_misspelled_norm_layer(w):
    def follow(_):
        (layer,) = bnpatch.inventory(net()).norm_layers
        parameter_groups(net(), norm_decay=NormDecay(1e-4, norm_layers=[layer.name]))

    return lambda: parameter_groups(net(), norm_decay=NormDecay(1e-4, norm_layers=["nrm"])), follow


@case("returned no first this time", "wrap it so that it does")
def test_an_output_that_is_not_there_every_time(w):
    results = []

    def first_only(y):
        return {"first": y, "map": y[:, :, None]} if not results else {"map": y[:, :, None]}

    found = load(net(result=first_only), output="first", preprocessing={"img_size": SIDE})
    found.num_outputs()
    results.append("later")

    def follow(_):
        load(net(result=lambda y: {"first": y}), preprocessing={"img_size": SIDE}).predict(X)

    return lambda: found.predict(X), follow

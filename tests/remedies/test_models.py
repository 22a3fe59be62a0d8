import re

import numpy as np
from torch import nn

import bnpatch
from bnpatch.core.recipe import Recipe
from bnpatch.models.load import load
from bnpatch.models.running_stats import calibrate, recover_fused
from tests.remedies.world import SIDE, X, Y, case, loaded, net


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
    r"patch the model from before, or see bnpatch\.recover_fused",
)
def test_fused(w):
    def follow(_):
        bnpatch.patch(net(), 0.1)
        found = loaded(norm=nn.Identity())
        assert recover_fused(found, X) == 1
        bnpatch.patch(found.module, 0.1)

    return lambda: bnpatch.patch(net(norm=nn.Identity()), 0.1), follow


@case("have no running statistics", r"bnpatch\.calibrate\(model, images\)")
def test_group_norm(w):
    found = loaded(norm=nn.GroupNorm(2, 4))

    def follow(_):
        calibrate(found, X)
        bnpatch.patch(found.module, 0.1)

    return lambda: bnpatch.patch(found.module, 0.1), follow


@case("norms can be patched", "run one batch through the model first")
def test_lazy(w):
    module = net(norm=nn.LazyBatchNorm2d())

    def follow(_):
        module.train()(X)
        bnpatch.patch(module.eval(), 0.1)

    return lambda: bnpatch.patch(module, 0.1), follow


@case("alpha = 2.0 is not a weight", r"must lie in \[0, 1\]")
def test_too_much_weight(w):
    return lambda: bnpatch.patch(net(), 2), lambda _: [bnpatch.patch(net(), alpha) for alpha in (0, 1)]


@case("slope = 9.0 .*is too steep", r"must lie in \[-4, 4\]")
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


@case("the recipe is for another model", "")
def test_a_recipe_of_another_model(w):
    recipe = loaded().recipe()
    other = net()
    nn.init.constant_(other.norm.bias, 3)
    return lambda: bnpatch.apply(other, recipe), lambda _: bnpatch.apply(net(), recipe)


@case("is not a recipe", "")
def test_no_recipe(w):
    path = w.file("recipe.json", "[]")

    def follow(_):
        loaded().recipe().save(path)
        Recipe.load(path)

    return lambda: Recipe.load(path), follow

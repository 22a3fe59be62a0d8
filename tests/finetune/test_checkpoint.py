"""What became of a fine-tuned model when it is stored, loaded, exported."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.core.moments import Moments
from bnpatch.core.norm_spec import NormSpec
from bnpatch.core.patch import PatchWeights
from bnpatch.core.recipe import Recipe
from bnpatch.nn.training_norm import GeneralNorm, convert_norms


@pytest.fixture
def trained(tmp_path):
    """A Batch/Group model whose running statistics have seen something, with alpha > 0."""
    torch.manual_seed(0)
    module = convert_norms(timm.create_model("test_resnet", num_classes=4), NormSpec.batch_group(8))
    for _ in range(3):
        module.train()(torch.randn(4, 3, 32, 32) * 2 + 1)
    torch.save(timm.create_model("test_resnet", num_classes=4).state_dict(), tmp_path / "plain.pt")
    model = bnpatch.load(tmp_path / "plain.pt", device="cpu", preprocessing={"img_size": 32})
    model = replace(model, module=module.eval())
    model.set_alphas(0.2)
    return model


def test_a_checkpoint_remembers_the_groups(trained, tmp_path):
    x = torch.rand(3, 3, 32, 32)
    expected = trained.predict(x)
    trained.save(tmp_path / "model.pt", trained.recipe())
    again = bnpatch.load(tmp_path / "model.pt", device="cpu")
    torch.testing.assert_close(again.predict(x), expected)
    assert {norm_layer.channels_per_group for norm_layer in again.inventory().norm_layers} == {8}
    trained.set_alphas(0.0)
    plain = timm.create_model("test_resnet", num_classes=4).eval()
    plain.load_state_dict(trained.module.state_dict())
    torch.testing.assert_close(plain(x), trained.predict(x))  # at alpha = 0 it is Batch Norm for everybody


@pytest.mark.slow
def test_an_export_computes_the_same_and_leaves_the_model_alone(trained, tmp_path):
    result = bnpatch.export_onnx(trained, tmp_path / "model.onnx")
    assert len(result.patched) > 10
    assert result.max_deviation < 1e-3
    layers = [norm_layer.module for norm_layer in trained.inventory().norm_layers]
    assert {type(layer) for layer in layers} == {GeneralNorm}
    assert {layer.channels_per_group for layer in layers} == {8}
    assert set(trained.alphas().values()) == {0.2}


def test_a_checkpoint_remembers_re_estimated_moments(trained, tmp_path):
    x = torch.rand(3, 3, 32, 32)
    before = trained.predict(x)
    trained.set_state(
        trained.state.with_re_estimated(trained.moments_by_batch(3 * torch.randn(8, 3, 32, 32) + 1))
    )
    trained.set_weights(PatchWeights(lambdas=dict.fromkeys(trained.alphas(), 0.5)))
    expected = trained.predict(x)
    assert not torch.allclose(expected, before, rtol=0.01)
    trained.save(tmp_path / "model.pt", trained.recipe())
    torch.testing.assert_close(bnpatch.load(tmp_path / "model.pt", device="cpu").predict(x), expected)


@pytest.fixture
def small():
    """Two norm layers that pool channels: of maps, and of single values, of which a group still has
    several.
    """
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 4), nn.BatchNorm2d(8), nn.Flatten()),
    )
    convert_norms(net, NormSpec.batch_group(4)).train()(torch.randn(16, 3, 6, 6) + 1)
    model = bnpatch.load(net.eval(), preprocessing={"img_size": 6})
    model.set_state(model.state.with_re_estimated(model.moments_by_batch(3 * torch.randn(16, 3, 6, 6))))
    return model


def both(alpha, weight):
    return PatchWeights({"1": alpha, "4": alpha}, {"1": weight, "4": weight})


@pytest.mark.slow
@pytest.mark.parametrize(("alpha", "weight"), [(0.3, 0.0), (0.0, 0.5), (0.3, 0.5)])
def test_a_file_pools_what_the_model_pools(small, tmp_path, alpha, weight):
    small.set_weights(both(alpha, weight))
    result = bnpatch.export_onnx(small, tmp_path / "model.onnx")  # compares
    assert result.patched == ("1", "4")


@pytest.mark.slow
def test_an_onnx_file_refuses_a_recipe_that_pools_channels(small, tmp_path):
    bnpatch.export_onnx(small, tmp_path / "model.onnx")
    file = bnpatch.load(tmp_path / "model.onnx")
    for weights in (both(0.3, 0.0), both(0.0, 0.5)):
        small.set_weights(weights)
        with pytest.raises(BnpatchError, match="pools channels at '1'"):
            file.apply(small.recipe())
    small.set_weights(both(0.0, 0.0))
    file.apply(small.recipe())  # Batch Norm for everybody


def test_group_norm_keeps_its_groups_without_a_word_in_the_recipe():
    def fresh():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten())
        return bnpatch.load(net, preprocessing={"img_size": 3})

    model, x = fresh(), torch.randn(4, 3, 3, 3)
    model.set_running({"1": Moments(torch.zeros(8), torch.ones(8))})
    model.set_alphas(0.4)
    content = model.recipe().to_json()
    assert "channels_per_group" not in content["sites"][0]
    again = fresh()
    again.apply(Recipe.from_json(content))
    assert torch.equal(again.predict(x), model.predict(x))
    assert again.module[1].channels_per_group == 4


def test_recipes_keep_the_groups_and_refuse_nonsense(trained):
    content = trained.recipe().to_json()
    assert Recipe.from_json(content).norm_layers[0].channels_per_group == 8
    content["sites"][0]["channels_per_group"] = 0
    with pytest.raises(BnpatchError, match="pools 0 channels"):
        Recipe.from_json(content)
    del content["sites"][0]["channels_per_group"]  # a recipe from before there were any
    assert Recipe.from_json(content).norm_layers[0].channels_per_group == 1

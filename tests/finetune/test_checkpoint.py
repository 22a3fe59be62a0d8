"""What became of a fine-tuned model when it is stored, loaded, exported."""

from dataclasses import replace

import pytest
import timm
import torch

import bnpatch
from bnpatch.errors import BnpatchError
from bnpatch.nn.conversion import convert_norms
from bnpatch.nn.training_norm import GeneralNorm
from bnpatch.recipe import Recipe
from bnpatch.spec import NormSpec


@pytest.fixture
def trained(tmp_path):
    """A Batch/Group model whose running moments have seen something, with alpha > 0."""
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
    assert {site.channels_per_group for site in again.survey().sites} == {8}
    trained.set_alphas(0.0)
    plain = timm.create_model("test_resnet", num_classes=4).eval()
    plain.load_state_dict(trained.module.state_dict())
    torch.testing.assert_close(plain(x), trained.predict(x))  # at alpha = 0 it is Batch Norm for everybody


def test_an_export_computes_the_same_and_leaves_the_model_alone(trained, tmp_path):
    result = bnpatch.export_onnx(trained, tmp_path / "model.onnx")
    assert len(result.patched) > 10
    assert result.max_deviation < 1e-3
    layers = [site.module for site in trained.survey().sites]
    assert {type(layer) for layer in layers} == {GeneralNorm}
    assert {layer.channels_per_group for layer in layers} == {8}
    assert set(trained.alphas().values()) == {0.2}


def test_an_onnx_file_refuses_a_recipe_that_pools_channels(trained, tmp_path):
    recipe = trained.recipe()
    trained.set_alphas(0.0)
    bnpatch.export_onnx(trained, tmp_path / "model.onnx")
    with pytest.raises(BnpatchError, match="pools channels at"):
        bnpatch.load(tmp_path / "model.onnx").apply(recipe)


def test_recipes_keep_the_groups_and_refuse_nonsense(trained):
    content = trained.recipe().to_json()
    assert Recipe.from_json(content).sites[0].channels_per_group == 8
    content["sites"][0]["channels_per_group"] = 0
    with pytest.raises(BnpatchError, match="pools 0 channels"):
        Recipe.from_json(content)
    del content["sites"][0]["channels_per_group"]  # a recipe from before there were any
    assert Recipe.from_json(content).sites[0].channels_per_group == 1

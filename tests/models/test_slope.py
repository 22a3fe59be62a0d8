"""The slope through the product: models, files, recipes and searches, in torch and in onnxruntime."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.core.moments import Moments, mix, weight_by_distance
from bnpatch.core.patch import PatchState, PatchWeights
from bnpatch.models.export import export_onnx
from bnpatch.models.running_stats import re_estimate_statistics
from bnpatch.nn.norm import ExampleWeightedNorm
from tests.models.small import assert_close
from tests.nn.norms import images, settle

X = images(6, 1, 32, 32) * torch.tensor([0.2, 0.5, 1, 2, 3, 4]).view(-1, 1, 1, 1)  # at many distances


def weights_of(model, alpha=0.2):
    """Alphas, lambdas and slopes that differ from layer to layer; some are 0."""
    names = list(model.alphas())
    ramp = np.linspace(-1, 1.5, len(names)).round(2).tolist()
    return PatchWeights(
        dict.fromkeys(names, alpha) | {names[1]: 0.0},
        dict(zip(names, [0.0, 0.5] * len(names), strict=False)),
        dict(zip(names, ramp, strict=True)) | {names[2]: 0.0},
    )


@pytest.fixture(scope="module")
def target(checkpoint):
    model = bnpatch.load(checkpoint)
    return re_estimate_statistics(model, bnpatch.open_examples((X.numpy(), np.zeros(len(X), int)), model))


@pytest.fixture(params=["torch", "onnx"])
def model(request, checkpoint, exported):
    return bnpatch.load(checkpoint if request.param == "torch" else exported)


def test_torch_and_onnxruntime_agree(checkpoint, exported, target):
    models = [bnpatch.load(path) for path in (checkpoint, exported)]
    outputs = []
    for model in models:
        model.set_state(model.state.with_re_estimated(target))
        model.set_weights(PatchWeights(dict.fromkeys(model.alphas(), 0.2)))
        model.predict(X)  # a session without slopes is open when they come
        model.set_weights(weights_of(model))
        outputs.append(model.predict(X))
        observed, seen = model.observe(X)
        assert_close(observed, outputs[-1])
        assert len(seen) == len(model.alphas())
    assert_close(outputs[1], outputs[0])
    recipe = models[0].recipe()
    models[1].apply(recipe)
    assert torch.equal(models[1].predict(X), outputs[1])
    models[0].set_weights(PatchWeights(slopes=dict.fromkeys(models[0].alphas(), 0.0)))
    assert (models[0].predict(X) - outputs[0]).abs().max() > 0.1 * outputs[0].abs().max()


def test_no_slope_changes_the_baseline_and_zero_is_the_constant_weight(model):
    before = model.predict(X)
    names = list(model.alphas())
    model.set_alphas(0.2)
    constant = model.predict(X)
    model.set_weights(PatchWeights(dict.fromkeys(names, 0.0), slopes=dict.fromkeys(names, 0.7)))
    assert model.weights.is_baseline(model.baseline_alphas())
    assert torch.equal(model.predict(X), before)
    model.set_alphas(0.2)
    assert not torch.equal(model.predict(X), constant)
    model.set_weights(PatchWeights(slopes=dict.fromkeys(names, 0.0)))
    assert torch.equal(model.predict(X), constant)
    model.set_state(PatchState(PatchWeights({names[0]: 0.2})))
    assert not any(model.weights.slopes.values())


def test_no_prediction_depends_on_its_batch(model, target):
    model.set_state(model.state.with_re_estimated(target))
    model.set_weights(weights_of(model))
    x = images(64, 1, 32, 32) * torch.linspace(0.2, 4, 64).view(-1, 1, 1, 1)
    together = model.predict(x)
    assert_close(torch.cat([model.predict(x[i : i + 1]) for i in range(64)]), together, 1e-5)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert_close(model.predict(x[order]), together[order], 1e-5)


def test_wrong_slopes_are_refused_and_change_nothing(model):
    names = list(model.alphas())
    model.set_weights(PatchWeights({names[0]: 0.2}, slopes={names[0]: 0.5}))
    before = model.predict(X)
    for slopes, message in (
        ({names[0]: 4.5}, rf"slope = 4.5 at '{names[0]}' is too steep; it must lie in \[-4, 4\]"),
        ({names[0]: float("nan")}, "too steep"),
        ({"nope": 0.5}, "has no norm layer 'nope'"),
    ):
        with pytest.raises(BnpatchError, match=message):
            model.set_weights(PatchWeights(slopes=slopes))
    assert torch.equal(model.predict(X), before)


@pytest.mark.slow
def test_files_keep_the_slopes(checkpoint, exported, exporter, target, tmp_path):
    model = bnpatch.load(checkpoint)
    model.set_state(model.state.with_re_estimated(target))
    model.set_weights(weights_of(model))
    y, recipe = model.predict(X), model.recipe()
    assert model.save(tmp_path / "patched.pt", recipe)
    again = bnpatch.load(tmp_path / "patched.pt")
    assert torch.equal(again.predict(X), y)
    assert again.recipe().to_json() == recipe.to_json()
    recipe.save(tmp_path / "recipe.json")
    assert json.loads((tmp_path / "recipe.json").read_text())["format"] == 2
    for path, source in ((tmp_path / "a.onnx", model), (tmp_path / "b.onnx", bnpatch.load(exported))):
        source.apply(bnpatch.Recipe.load(tmp_path / "recipe.json"))
        assert export_onnx(source, path).max_deviation < 1e-4
        assert_close(bnpatch.load(path).predict(X), y)


@pytest.mark.parametrize("kind", ["global", "per-site"])
def test_slopes_can_stay_adjustable(checkpoint, exported, exporter, tmp_path, kind):
    import onnxruntime

    for source in (bnpatch.load(checkpoint), bnpatch.load(exported)):
        names = list(source.alphas())
        source.set_weights(PatchWeights(dict.fromkeys(names, 0.1), slopes=dict.fromkeys(names, 0.5)))
        export_onnx(source, tmp_path / "model.onnx", alpha_inputs=kind)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        inputs = [value.name for value in session.get_overridable_initializers()]
        assert len(inputs) == (2 if kind == "global" else 24)
        for alpha, slope in ((None, None), (0.3, -1.0)):
            feeds = {}
            if alpha is not None:
                values = {"alpha": np.array(alpha, np.float32), "slope": np.array(slope, np.float32)}
                feeds = {name: values[name[:5]] for name in inputs}
                source.set_weights(
                    PatchWeights(dict.fromkeys(names, alpha), slopes=dict.fromkeys(names, slope))
                )
            (y,) = session.run(None, {"input": X.numpy(), **feeds})
            assert_close(torch.from_numpy(y), source.predict(X))


@pytest.mark.slow
def test_a_model_of_several_kinds_of_norm_is_exported_with_slopes(tmp_path):
    """Batch/Group Norm, Group Norm away from and at its identity, single values, a fused convolution."""

    class Kinds(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fused = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
            self.grouped, self.plain, self.single = (nn.BatchNorm2d(6) for _ in range(3))
            self.gn, self.gn2 = nn.GroupNorm(2, 6), nn.GroupNorm(3, 6)

        def forward(self, x):
            x = self.grouped(self.conv(x)).relu()
            x = self.gn2(self.gn(self.fused(x).relu()) + x.mean()).relu()
            return self.single(self.plain(x).mean((2, 3), keepdim=True)).flatten(1)

    torch.manual_seed(0)
    x = images(40, 3, 9, 9)
    model = bnpatch.load(settle(Kinds()), preprocessing={"img_size": 9}, include_1x1=True)
    bnpatch.calibrate(model, x)
    bnpatch.recover_fused(model, bnpatch.open_examples((x.numpy(), np.zeros(40, int)), model))
    before = model.predict(x)
    names = list(model.alphas())
    assert len(names) == 6
    assert "fused.folded" in names
    slopes = dict.fromkeys(names, 0.7)
    model.set_weights(PatchWeights(slopes=slopes))
    assert torch.equal(model.predict(x), before)  # all at their identities
    groups = PatchState(channels_per_group={"grouped": 3}, running=model.state.running, include_1x1=True)
    alphas = dict.fromkeys(names, 0.3) | {"gn": 0.9, "gn2": 1.0}
    model.set_state(groups.with_weights(PatchWeights(alphas, slopes=slopes)))
    assert model.recipe().state.weights.slopes == slopes
    assert export_onnx(model, tmp_path / "model.onnx").max_deviation < 1e-4
    y = model.predict(x)
    assert_close(bnpatch.load(tmp_path / "model.onnx").predict(x), y)
    for name in ("grouped", "plain", "single", "gn", "fused.folded"):  # each slope has its effect
        model.set_weights(PatchWeights(slopes=slopes | {name: 0.0}))
        assert (model.predict(x) - y).abs().max() > 1e-3 * y.abs().max(), name
    model.set_weights(PatchWeights(slopes=slopes | {"gn2": 0.0}))
    assert torch.equal(model.predict(x), y)


def test_patch_takes_a_slope():
    module = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    bnpatch.patch(module, 0.1, slope=0.5)
    assert [norm.slope for norm in bnpatch.inventory(module).norm_layers] == [0.5, 0.5]
    bnpatch.patch(module, {"1": 0.2}, slope={"2": -1})
    assert [norm.slope for norm in bnpatch.inventory(module).norm_layers] == [0.5, -1]
    bnpatch.patch(module, 0.3)
    assert [norm.slope for norm in bnpatch.inventory(module).norm_layers] == [0.5, -1]
    for slope, message in (
        (9, "must lie in"),
        ({"1": -5}, "at '1' is too steep"),
        ({"x": 1}, "no norm layer"),
    ):
        with pytest.raises(BnpatchError, match=message):
            bnpatch.patch(module, 0.1, slope=slope)
    model = bnpatch.load(module)  # a model takes over what its module has
    assert model.weights.slopes == {"1": 0.5, "2": -1}
    bnpatch.unpatch(module)
    assert [norm.slope for norm in bnpatch.inventory(module).norm_layers] == [0, 0]


def test_compiled_models_take_new_slopes_without_being_traced_again():
    module = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    bnpatch.patch(module, 0.1, slope=0.5)
    traced = []

    def count(graph, inputs):
        traced.append(graph)
        return graph.forward

    compiled, x = torch.compile(module, backend=count, dynamic=False), images(2, 3, 9, 9)
    for alpha, slope in ((0.1, 0.5), (0.3, 0.5), (0.3, -2.0)):
        bnpatch.patch(module, alpha, slope=slope)
        torch.testing.assert_close(compiled(x), module(x))
    assert len(traced) == 1
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.slow
def test_a_program_on_disk_keeps_the_slopes(tmp_path):
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    module = settle(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    bnpatch.patch(module, 0.2, slope={"1": 1.5, "4": -1.0})
    x = images(6, 3, 9, 9) * torch.tensor([0.2, 0.5, 1, 2, 3, 4]).view(-1, 1, 1, 1)  # at many distances
    batch = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(module, (x[:2],), dynamic_shapes=batch), tmp_path / "model.pt2")
    with torch.no_grad():
        y = module(x)
        assert_close(torch.export.load(tmp_path / "model.pt2").module()(x), y)
        assert_close(bnpatch.load(tmp_path / "model.pt2").predict(x), y)  # as an ONNX graph
        bnpatch.patch(module, slope=0.0)
        assert (module(x) - y).abs().max() > 0.01  # the slopes are no rounding error


def test_a_search_tries_weights_without_the_slopes_that_the_model_had(checkpoint, foggy):
    some = foggy[0][:160], foggy[1][:160]
    scores = []
    for slope in (0.0, 3.0):
        model = bnpatch.load(checkpoint)
        names = list(model.alphas())
        model.set_weights(PatchWeights(dict.fromkeys(names, 0.3), slopes=dict.fromkeys(names, slope)))
        trials = bnpatch.tune_alpha(model, some, granularity="global", trials=3).trials
        assert set(model.weights.slopes.values()) == {slope}  # the model is left as it was
        scores.append([(trial.params, trial.scores) for trial in trials])
    assert scores[0] == scores[1]


def test_inspect_shows_slopes(cli, checkpoint, tmp_path):
    model = bnpatch.load(checkpoint)
    name = next(iter(model.alphas()))
    for slope in (0.0, 0.75):
        model.set_weights(PatchWeights({name: 0.2}, slopes={name: slope}))
        model.save(tmp_path / "patched.pt", model.recipe())
        code, out, _ = cli("inspect", tmp_path / "patched.pt", "--sites")
        assert code == 0
        assert ("slope" in out and "0.75" in out) is (slope > 0)
        code, out, _ = cli("inspect", tmp_path / "patched.pt", "--json")
        assert json.loads(out)["sites"][0]["slope"] == slope


def test_the_label_free_objective_sees_the_weight_of_each_example():
    from bnpatch.core.inventory import NormFacts
    from bnpatch.search.label_free import Seen, evalnorm

    g = torch.Generator().manual_seed(0)
    example = Moments(torch.randn(5, 3, generator=g), torch.rand(5, 3, generator=g) + 0.1)
    source, slope = Moments(torch.zeros(3), torch.ones(3)), torch.tensor(0.5, requires_grad=True)
    layers, logits = {"a": NormFacts(source, 1e-5)}, torch.zeros(5, 2)
    found = evalnorm(Seen(logits, {"a": example}, {"a": 0.2}, {}, {"a": slope}), layers)
    weight = weight_by_distance(0.2, slope, example, source, 1e-5)
    assert weight.shape == (5, 1)
    expected = evalnorm(Seen(logits, {"a": example}, {"a": weight}, {}), layers)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert slope.grad != 0


def test_a_layer_learns_alpha_lambda_and_slope_together():
    bn = settle(nn.Sequential(nn.BatchNorm2d(4)))[0]
    layer = ExampleWeightedNorm.take_over(bn)
    own, target = Moments(bn.running_mean, bn.running_var), Moments(torch.ones(4), torch.ones(4))
    logits = [torch.tensor(value, requires_grad=True) for value in (-2.0, 0.0, 0.0)]
    layer.alpha = torch.sigmoid(logits[0])
    layer.running = mix(torch.sigmoid(logits[1]), target, own)
    layer.slope = 4 * torch.tanh(logits[2])
    layer(images(5, 4, 6, 6) * 2).square().mean().backward()
    assert all(logit.grad != 0 for logit in logits)
    assert "slope=learned" in repr(layer)

"""Slope and offset through the product: models, files, recipes and searches, in torch and in onnxruntime."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.core.moments import ExampleWeight, Moments, mix, mix_example
from bnpatch.core.patch import BESIDE_ALPHA, PatchState, PatchWeights
from bnpatch.models.export import export_onnx
from bnpatch.models.running_stats import re_estimate_statistics
from bnpatch.nn.norm import ExampleWeightedNorm
from tests.models.small import assert_close
from tests.nn.norms import images, settle

X = images(6, 1, 32, 32) * torch.tensor([0.2, 0.5, 1, 2, 3, 4]).view(-1, 1, 1, 1)  # at many distances


def weights_of(model, alpha=0.2):
    """Alphas, lambdas, slopes and offsets that differ from layer to layer; some are 0."""
    names = list(model.alphas())
    ramp = np.linspace(-1, 1.5, len(names)).round(2).tolist()
    return PatchWeights(
        dict.fromkeys(names, alpha) | {names[1]: 0.0},
        dict(zip(names, [0.0, 0.5] * len(names), strict=False)),
        dict(zip(names, ramp, strict=True)) | {names[2]: 0.0},
        dict(zip(names, [0.0, 1.0, -2.0] * len(names), strict=False)),
    )


def everywhere(names, alpha, slope, offset):
    alphas, slopes, offsets = (dict.fromkeys(names, value) for value in (alpha, slope, offset))
    return PatchWeights(alphas, slopes=slopes, var_offsets=offsets)


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
    for kind in BESIDE_ALPHA:
        models[0].set_weights(PatchWeights(**{f"{kind}s": dict.fromkeys(models[0].alphas(), 0.0)}))
        changed = models[0].predict(X)
        assert (changed - outputs[0]).abs().max() > 0.1 * outputs[0].abs().max()
        outputs[0] = changed


@pytest.mark.parametrize("kind", BESIDE_ALPHA)
def test_no_slope_changes_the_baseline_and_zero_is_the_constant_weight(model, kind):
    before = model.predict(X)
    names = list(model.alphas())
    model.set_alphas(0.2)
    constant = model.predict(X)
    model.set_weights(PatchWeights(dict.fromkeys(names, 0.0), **{f"{kind}s": dict.fromkeys(names, 0.7)}))
    assert model.weights.is_baseline(model.baseline_alphas())
    assert torch.equal(model.predict(X), before)
    model.set_alphas(0.2)
    assert not torch.equal(model.predict(X), constant)
    model.set_weights(PatchWeights(**{f"{kind}s": dict.fromkeys(names, 0.0)}))
    assert torch.equal(model.predict(X), constant)
    model.set_weights(PatchWeights(**{f"{kind}s": dict.fromkeys(names, 0.7)}))
    model.set_state(PatchState(PatchWeights({names[0]: 0.2})))
    assert not any(model.weights.of(kind).values())


def test_no_prediction_depends_on_its_batch(model, target):
    model.set_state(model.state.with_re_estimated(target))
    model.set_weights(weights_of(model))
    x = images(64, 1, 32, 32) * torch.linspace(0.2, 4, 64).view(-1, 1, 1, 1)
    together = model.predict(x)
    assert_close(torch.cat([model.predict(x[i : i + 1]) for i in range(64)]), together, 1e-5)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert_close(model.predict(x[order]), together[order], 1e-5)


def test_wrong_slopes_and_offsets_are_refused_and_change_nothing(model):
    names = list(model.alphas())
    model.set_weights(PatchWeights({names[0]: 0.2}, slopes={names[0]: 0.5}))
    before = model.predict(X)
    for wrong, message in (
        ({"slopes": {names[0]: 4.5}}, rf"slope = 4.5 at '{names[0]}' is out .*; it must lie in \[-4, 4\]"),
        ({"slopes": {names[0]: float("nan")}}, "out of range"),
        ({"slopes": {"nope": 0.5}}, "has no norm layer 'nope'"),
        ({"var_offsets": {names[0]: -9.0}}, rf"var_offset = -9.0 at '{names[0]}' .* in \[-8, 8\]"),
        ({"var_offsets": {"nope": 0.5}}, "has no norm layer 'nope'"),
    ):
        with pytest.raises(BnpatchError, match=message):
            model.set_weights(PatchWeights(**wrong))
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
    assert json.loads((tmp_path / "recipe.json").read_text())["format"] == 3
    for path, source in ((tmp_path / "a.onnx", model), (tmp_path / "b.onnx", bnpatch.load(exported))):
        source.apply(bnpatch.Recipe.load(tmp_path / "recipe.json"))
        assert export_onnx(source, path).max_deviation < 1e-4
        assert_close(bnpatch.load(path).predict(X), y)


@pytest.mark.parametrize("kind", ["global", "per-site"])
@pytest.mark.slow
def test_slopes_and_offsets_can_stay_adjustable(checkpoint, exported, exporter, tmp_path, kind):
    import onnxruntime

    for source in (bnpatch.load(checkpoint), bnpatch.load(exported)):
        names = list(source.alphas())
        source.set_weights(everywhere(names, 0.1, 0.5, 1.0))
        export_onnx(source, tmp_path / "model.onnx", alpha_inputs=kind)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        inputs = [value.name for value in session.get_overridable_initializers()]
        assert len(inputs) == (3 if kind == "global" else 36)
        for values in (None, {"alpha": 0.3, "slope": -1.0, "var_offset": -2.0}):
            feeds = {}
            if values is not None:
                feeds = {name: np.array(values[name.split(".")[0]], np.float32) for name in inputs}
                source.set_weights(everywhere(names, *values.values()))
            (y,) = session.run(None, {"input": X.numpy(), **feeds})
            assert_close(torch.from_numpy(y), source.predict(X))


@pytest.mark.slow
def test_a_model_of_several_kinds_of_norm_is_exported_with_slopes_and_offsets(tmp_path):
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
    beside = {"slopes": dict.fromkeys(names, 0.7), "var_offsets": dict.fromkeys(names, 1.5)}
    model.set_weights(PatchWeights(**beside))
    assert torch.equal(model.predict(x), before)  # all at their identities
    groups = PatchState(channels_per_group={"grouped": 3}, running=model.state.running, include_1x1=True)
    alphas = dict.fromkeys(names, 0.3) | {"gn": 0.9, "gn2": 1.0}
    model.set_state(groups.with_weights(PatchWeights(alphas, **beside)))
    assert model.recipe().state.weights.updated(PatchWeights(**beside)) == model.weights
    assert export_onnx(model, tmp_path / "model.onnx").max_deviation < 1e-4
    y = model.predict(x)
    assert_close(bnpatch.load(tmp_path / "model.onnx").predict(x), y)
    for kind, values in beside.items():
        for name in ("grouped", "plain", "single", "gn", "fused.folded"):  # each has its effect
            model.set_weights(PatchWeights(**beside | {kind: values | {name: 0.0}}))
            assert (model.predict(x) - y).abs().max() > 1e-3 * y.abs().max(), (kind, name)
        model.set_weights(PatchWeights(**beside | {kind: values | {"gn2": 0.0}}))
        assert torch.equal(model.predict(x), y)


@pytest.mark.parametrize(("kind", "most"), [("slope", 4), ("var_offset", 8)])
def test_patch_takes_a_slope_and_an_offset(kind, most):
    module = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))

    def values():
        return [getattr(norm.example_weight, kind) for norm in bnpatch.inventory(module).norm_layers]

    bnpatch.patch(module, 0.1, **{kind: 0.5})
    assert values() == [0.5, 0.5]
    bnpatch.patch(module, {"1": 0.2}, **{kind: {"2": -1}})
    assert values() == [0.5, -1]
    bnpatch.patch(module, 0.3)
    assert values() == [0.5, -1]
    for value, message in (
        (most + 5, "must lie in"),
        ({"1": -most - 1}, "at '1' is out of range"),
        ({"x": 1}, "no norm layer"),
    ):
        with pytest.raises(BnpatchError, match=message):
            bnpatch.patch(module, 0.1, **{kind: value})
    model = bnpatch.load(module)  # a model takes over what its module has
    assert model.weights.of(kind) == {"1": 0.5, "2": -1}
    bnpatch.unpatch(module)
    assert values() == [0, 0]


@pytest.mark.slow
def test_compiled_models_take_new_slopes_and_offsets_without_being_traced_again():
    module = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    bnpatch.patch(module, 0.1, slope=0.5, var_offset=1.0)
    traced = []

    def count(graph, inputs):
        traced.append(graph)
        return graph.forward

    compiled, x = torch.compile(module, backend=count, dynamic=False), images(2, 3, 9, 9)
    for alpha, slope, offset in ((0.1, 0.5, 1.0), (0.3, 0.5, 1.0), (0.3, -2.0, 1.0), (0.3, -2.0, -1.0)):
        bnpatch.patch(module, alpha, slope=slope, var_offset=offset)
        torch.testing.assert_close(compiled(x), module(x))
    assert len(traced) == 1
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.slow
def test_a_program_on_disk_keeps_slopes_and_offsets(tmp_path):
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    module = settle(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    bnpatch.patch(module, 0.2, slope={"1": 1.5, "4": -1.0}, var_offset={"1": 1.0})
    x = images(6, 3, 9, 9) * torch.tensor([0.2, 0.5, 1, 2, 3, 4]).view(-1, 1, 1, 1)  # at many distances
    batch = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(module, (x[:2],), dynamic_shapes=batch), tmp_path / "model.pt2")
    with torch.no_grad():
        y = module(x)
        assert_close(torch.export.load(tmp_path / "model.pt2").module()(x), y)
        assert_close(bnpatch.load(tmp_path / "model.pt2").predict(x), y)  # as an ONNX graph
        for kind in BESIDE_ALPHA:
            bnpatch.patch(module, 0.2, **{kind: 0.0})
            changed = module(x)
            assert (changed - y).abs().max() > 0.01  # it was no rounding error
            y = changed


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


@pytest.mark.parametrize("kind", [pytest.param("slope", marks=pytest.mark.slow), "var_offset"])
def test_inspect_shows_slopes_and_offsets(cli, checkpoint, tmp_path, kind):
    model = bnpatch.load(checkpoint)
    name = next(iter(model.alphas()))
    for value in (0.0, 0.75):
        model.set_weights(PatchWeights({name: 0.2}, **{f"{kind}s": {name: value}}))
        model.save(tmp_path / "patched.pt", model.recipe())
        code, out, _ = cli("inspect", tmp_path / "patched.pt", "--sites")
        assert code == 0
        assert (kind in out and "0.75" in out) is (value > 0)
        code, out, _ = cli("inspect", tmp_path / "patched.pt", "--json")
        assert json.loads(out)["sites"][0][kind] == value


def test_the_label_free_objective_sees_the_weight_of_each_example():
    from bnpatch.core.inventory import NormFacts
    from bnpatch.search.label_free import Seen, evalnorm

    g = torch.Generator().manual_seed(0)
    example = Moments(torch.randn(5, 3, generator=g), torch.rand(5, 3, generator=g) + 0.1)
    source, slope = Moments(torch.zeros(3), torch.ones(3)), torch.tensor(0.5, requires_grad=True)
    layers, logits = {"a": NormFacts(source, 1e-5)}, torch.zeros(5, 2)
    weight = ExampleWeight(0.2, slope, 1.0)
    found = evalnorm(Seen(logits, {"a": example}, {"a": weight}, {}), layers)
    used = mix_example(weight, example, source, 1e-5)
    assert used.weight.shape == (5, 1)
    constant = ExampleWeight(used.weight, 0.0, 1.0)
    torch.testing.assert_close(found, evalnorm(Seen(logits, {"a": example}, {"a": constant}, {}), layers))
    shared = evalnorm(Seen(logits, {"a": example}, {"a": ExampleWeight(used.weight)}, {}), layers)
    assert (found - shared).abs() > 1e-4  # the offset has its effect
    found.backward()
    assert slope.grad != 0


def test_a_layer_learns_all_weights_together():
    bn = settle(nn.Sequential(nn.BatchNorm2d(4)))[0]
    layer = ExampleWeightedNorm.take_over(bn)
    own, target = Moments(bn.running_mean, bn.running_var), Moments(torch.ones(4), torch.ones(4))
    logits = [torch.tensor(value, requires_grad=True) for value in (-2.0, 0.0, 0.0, 0.0)]
    layer.alpha = torch.sigmoid(logits[0])
    layer.running = mix(torch.sigmoid(logits[1]), target, own)
    layer.slope, layer.var_offset = 4 * torch.tanh(logits[2]), 8 * torch.tanh(logits[3])
    layer(images(5, 4, 6, 6) * 2).square().mean().backward()
    assert all(logit.grad != 0 for logit in logits)
    assert "slope=learned, var_offset=learned" in repr(layer)

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.core.moments import Moments
from bnpatch.core.patch import PatchWeights
from bnpatch.core.recipe import Recipe
from bnpatch.models.export import export_onnx
from bnpatch.models.outputs import Kind
from bnpatch.models.running_stats import calibrate, target_moments
from tests.nn.test_surgery import images, settle
from tests.test_calibration import DATA, INPUTS, group_norm, small

LIKE_TRAINING = {"mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}


def test_an_export_has_the_sites_of_the_checkpoint(checkpoint, exported):
    torch_model, onnx_model = bnpatch.load(checkpoint), bnpatch.load(exported)
    assert onnx_model.fingerprints() == torch_model.fingerprints()
    assert onnx_model.preprocessing.source == "the file's metadata, as of the checkpoint's training arguments"
    assert onnx_model.class_names == torch_model.class_names
    assert onnx_model.num_outputs() == 10
    assert onnx_model.norm_shapes() == torch_model.norm_shapes()


def test_what_a_file_knows_of_its_model_has_names_that_stay(exported):
    """Files that are out there have them."""
    metadata = {prop.key: json.loads(prop.value) for prop in onnx.load(exported).metadata_props}
    assert metadata["bnpatch.preprocessing"]["mean"] == list(bnpatch.load(exported).preprocessing.mean)
    assert metadata["bnpatch.class_names"] == [str(number) for number in range(10)]


def assert_close(found, expected, relative=1e-4):
    """Up to so much of the largest output: float32 through fifteen layers, in another order, gives 1e-5."""
    torch.testing.assert_close(found, expected, rtol=0, atol=relative * expected.abs().max().item())


@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.6, 1.0])
def test_torch_and_onnxruntime_agree(checkpoint, exported, alpha, clean):
    torch_model, onnx_model = bnpatch.load(checkpoint), bnpatch.load(exported)
    x = torch.from_numpy(clean[0][:9, None])
    for model in (torch_model, onnx_model):
        model.set_alphas(alpha)
    # More rounding where alpha near 1 divides by small variances.
    assert_close(onnx_model.predict(x), torch_model.predict(x))


def test_a_recipe_of_one_applies_to_the_other(checkpoint, exported):
    torch_model, onnx_model = bnpatch.load(checkpoint), bnpatch.load(exported)
    names = list(torch_model.alphas())
    torch_model.set_alphas({name: 0.01 * index for index, name in enumerate(names)})
    onnx_model.apply(torch_model.recipe())
    assert onnx_model.alphas() == torch_model.alphas()
    x = images(4, 1, 32, 32)
    assert_close(onnx_model.predict(x), torch_model.predict(x))
    back = bnpatch.load(checkpoint)
    back.apply(onnx_model.recipe())
    assert back.alphas() == torch_model.alphas()


def test_tuning_the_export_finds_what_tuning_the_checkpoint_finds(checkpoint, exported, foggy):
    """Scores differ by 1e-5 of them at most, those of two weights by 1e-3 at least, over ten seeds."""
    from_torch, from_onnx = (
        bnpatch.tune_alpha(bnpatch.load(p), foggy, granularity="global", metric="cross-entropy")
        for p in (checkpoint, exported)
    )
    assert from_onnx.alpha == from_torch.alpha > 0
    assert [trial.weight for trial in from_onnx.trials] == [trial.weight for trial in from_torch.trials]
    for a, b in zip(from_onnx.trials, from_torch.trials, strict=True):
        assert a.scores["cross-entropy"] == pytest.approx(b.scores["cross-entropy"], rel=1e-4)
    for a, b in zip(from_onnx.comparisons, from_torch.comparisons, strict=True):
        assert a.after.value == pytest.approx(b.after.value, abs=0.01)  # three examples of 300 on the edge


@pytest.mark.slow
def test_one_session_serves_the_whole_search(exported, foggy, monkeypatch):
    from bnpatch.models import onnx_model, onnx_sessions

    opened = []
    original = onnx_model.open_session
    for module in (onnx_model, onnx_sessions):
        monkeypatch.setattr(module, "open_session", lambda *args: opened.append(args) or original(*args))
    some = foggy[0][:320], foggy[1][:320]
    run = {"granularity": "stage", "recalibrate": True, "trials": 2, "holdout": 0.5}
    bnpatch.tune_alpha(bnpatch.load(exported), some, **run)
    # The file as it is, with alphas as inputs, with slopes too, and normalizing by the batch.
    assert len(opened) == 4


def test_the_model_is_left_as_it_was(exported, foggy):
    model = bnpatch.load(exported)
    bnpatch.tune_alpha(model, foggy, granularity="global", trials=2)
    assert not any(model.alphas().values())
    with pytest.raises(BnpatchError, match="no norm layer 'nope'"):
        model.set_alphas({"nope": 0.1})
    with pytest.raises(ValueError, match="must lie in"):
        model.set_alphas(2.0)


def test_folded_batch_norm_is_recovered(checkpoint, folded, digits, foggy):
    """Recovered on the images that the checkpoint was fitted to, it weighs examples as that does."""
    model = bnpatch.load(folded, preprocessing=LIKE_TRAINING)
    assert not model.inventory().norm_layers
    with pytest.raises(BnpatchError, match=r"fused into the convolutions.*--recover-folded"):
        bnpatch.tune_alpha(model, foggy)
    result = bnpatch.tune_alpha(model, foggy, granularity="global", recover_folded=True, calib_data=digits[0])
    assert not model.inventory().norm_layers  # left as it was
    model.apply(result.recipe)
    names = {norm_layer.name for norm_layer in model.inventory().norm_layers}
    assert result.recipe.alphas.keys() == names
    reference, x = bnpatch.load(checkpoint), torch.from_numpy(foggy[0][:100, None])
    assert len(names) == sum(shape != (1, 1) for shape in reference.norm_shapes().values()) == 12
    for alpha in (0.0, 0.2, 0.6):
        model.set_alphas(alpha)
        reference.set_alphas(alpha)
        # Running variances are unbiased and eps is in other places: at most 0.0007 of the largest output for
        # the first two seeds, where alpha = 0.2 moves outputs by 0.4 of it and more.
        assert_close(model.predict(x), reference.predict(x), 0.01 if alpha else 1e-4)


def test_a_recovered_site_at_zero_is_the_convolution_that_it_was(folded, digits, tmp_path):
    from bnpatch.models.running_stats import recover_folded

    model = bnpatch.load(folded, preprocessing=LIKE_TRAINING)
    x = images(4, 1, 32, 32)
    before = model.predict(x)
    assert (
        recover_folded(model, bnpatch.open_examples(digits[0], model))
        == len(model.inventory().norm_layers)
        > 5
    )
    assert torch.equal(model.predict(x), before)
    first = model.inventory().norm_layers[0].name
    model.set_alphas({first: 1e-12})
    assert_close(model.predict(x), before)
    model.set_alphas({first: 0.2})
    done = export_onnx(model, tmp_path / "patched.onnx")
    assert done.patched == (first,)
    again = bnpatch.load(folded, preprocessing=LIKE_TRAINING)
    model.recipe().save(tmp_path / "recipe.json")
    again.apply(Recipe.load(tmp_path / "recipe.json"))
    assert_close(again.predict(x), model.predict(x), 1e-5)  # moments in 8 digits


@pytest.mark.slow
def test_calibration_does_not_depend_on_the_batch_size(folded, digits):
    from bnpatch.models.running_stats import recover_folded

    found = []
    for size in (7, 600):
        model = bnpatch.load(folded, preprocessing=LIKE_TRAINING)
        recover_folded(model, bnpatch.open_examples(digits[0], model), batch_size=size)
        found.append(model.state.running)
    for name, moments in found[0].items():
        np.testing.assert_allclose(moments.mean, found[1][name].mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(moments.var, found[1][name].var, rtol=1e-4, atol=1e-5)


def graph(dims, *, channels_last=False, dtype=TensorProto.FLOAT, last="none", outputs=1):
    """A convolution, a Batch Norm and a mean over positions, with variations of what surrounds them."""
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.normal(size=(4, 3, 1, 1)),
        "bn.weight": rng.uniform(0.5, 1, 4),
        "bn.bias": rng.normal(size=4),
        "bn.running_mean": rng.normal(size=4),
        "bn.running_var": rng.uniform(0.5, 1, 4),
    }
    nodes = []
    image = "x"
    if dtype != TensorProto.FLOAT:
        nodes.append(helper.make_node("Cast", [image], ["as_float"], to=TensorProto.FLOAT))
        image = "as_float"
    if channels_last:
        nodes.append(helper.make_node("Transpose", [image], ["nchw"], perm=[0, 3, 1, 2]))
        image = "nchw"
    nodes += [
        helper.make_node("Conv", [image, "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", *list(arrays)[1:]], ["n"]),
        helper.make_node("GlobalAveragePool", ["n"], ["p"]),
    ]
    tail = {
        "none": [],
        "flat": ["Flatten"],
        "softmax": ["Flatten", "Softmax", "Identity"],
        "log": ["Flatten", "LogSoftmax"],
    }
    value = "p"
    for index, op in enumerate(tail[last]):
        nodes.append(helper.make_node(op, [value], [f"y{index}"]))
        value = f"y{index}"
    shapes = {value: ["n", 4], "p": ["n", 4, 1, 1]}
    infos = [helper.make_tensor_value_info(v, TensorProto.FLOAT, shapes[v]) for v in [value, "p"][:outputs]]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, dims)],
        infos,
        [numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def opened(tmp_path, model, **kwargs):
    onnx.save(model, tmp_path / "model.onnx")
    return bnpatch.load(tmp_path / "model.onnx", **kwargs)


BYTES = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "dims",
    [["n", 3, 8, 8], [1, 3, 8, 8], [2, 3, 8, 8], ["n", 3, "h", "w"], [None, 3, None, None], [0, 3, 8, 8]],
)
def test_batches_fixed_or_not_and_sizes_known_or_not(tmp_path, dims):
    model = opened(tmp_path, graph(dims, last="flat"), preprocessing={"img_size": 8})
    expected = opened(tmp_path, graph(["n", 3, 8, 8], last="flat")).predict(BYTES)
    torch.testing.assert_close(model.predict(BYTES), expected)
    model.set_alphas(0.3)
    assert model.predict(BYTES).shape == (5, 4)
    assert model.num_outputs() == 4


def test_an_open_image_size_is_said(tmp_path):
    model = opened(tmp_path, graph(["n", 3, "h", "w"]))
    assert "--img-size" in model.notes[0]
    assert model.preprocessing.input_size == (3, 224, 224)


def test_layouts_and_types_of_input(tmp_path):
    expected = opened(tmp_path, graph(["n", 3, 8, 8])).predict(BYTES)
    assert expected.shape == (5, 4)  # (N, K, 1, 1)
    last = opened(tmp_path, graph(["n", 8, 8, 3], channels_last=True))
    assert last.preprocessing.input_size == (3, 8, 8)
    torch.testing.assert_close(last.predict(BYTES), expected)
    takes_bytes = opened(tmp_path, graph(["n", 3, 8, 8], dtype=TensorProto.UINT8))
    as_floats = opened(tmp_path, graph(["n", 3, 8, 8])).predict(BYTES.float())
    torch.testing.assert_close(takes_bytes.predict(BYTES), as_floats)
    half = opened(tmp_path, graph(["n", 3, 8, 8], dtype=TensorProto.FLOAT16))
    torch.testing.assert_close(half.predict(BYTES), expected, rtol=1e-2, atol=1e-2)  # inputs of 11 bits


@pytest.mark.parametrize("last", ["softmax", "log"])
def test_probabilities_are_told_from_logits(tmp_path, last):
    logits = opened(tmp_path, graph(["n", 3, 8, 8], last="flat")).predict(BYTES)
    given = opened(tmp_path, graph(["n", 3, 8, 8], last=last)).predict(BYTES)
    targets = torch.tensor([0, 1, 2, 3, 0])
    torch.testing.assert_close(
        torch.nn.functional.cross_entropy(given, targets), torch.nn.functional.cross_entropy(logits, targets)
    )


def test_an_output_is_chosen(tmp_path):
    model = graph(["n", 3, 8, 8], last="softmax", outputs=2)
    softmax, logits = opened(tmp_path, model), opened(tmp_path, model, output="p")
    assert [m.output_for(BYTES).kind for m in (softmax, logits)] == [Kind.SOFTMAX, Kind.LOGITS]
    torch.testing.assert_close(softmax.predict(BYTES).softmax(1), logits.predict(BYTES).softmax(1))
    with pytest.raises(BnpatchError, match="no output 'nope'; choose --output-name among"):
        opened(tmp_path, model, output="nope")


def test_a_rank_that_shapes_do_not_tell_is_found_by_running(tmp_path):
    """How many sizes Compress keeps depends on its values."""
    proto = graph(["n", 3, 8, 8], last="flat")
    conv, norm, *rest = proto.graph.node
    norm.input[0] = "reshaped"
    between = [
        helper.make_node("Shape", ["c"], ["shape"]),
        helper.make_node("Compress", ["shape", "all"], ["sizes"]),
        helper.make_node("Reshape", ["c", "sizes"], ["reshaped"]),
    ]
    nodes = [conv, *between, norm, *rest]
    initializers = [*proto.graph.initializer, numpy_helper.from_array(np.ones(4, np.bool_), "all")]
    made = helper.make_graph(nodes, "g", proto.graph.input, proto.graph.output, initializers)
    proto = helper.make_model(made, opset_imports=proto.opset_import, ir_version=9)
    model = opened(tmp_path, proto, preprocessing={"img_size": 8})
    assert [norm.name for norm in model.inventory().norm_layers] == ["bn"]
    model.set_alphas(0.3)
    expected = opened(tmp_path, graph(["n", 3, 8, 8], last="flat"))
    expected.set_alphas(0.3)
    torch.testing.assert_close(model.predict(BYTES), expected.predict(BYTES))


@pytest.mark.parametrize("dims", [["n", 3], ["n", 3, 8, 8, 8, 8]])
def test_what_takes_no_images_is_refused(tmp_path, dims):
    model = graph(["n", 3, 8, 8])
    del model.graph.input[0].type.tensor_type.shape.dim[:]
    for dim in dims:
        model.graph.input[0].type.tensor_type.shape.dim.add(
            **{"dim_param" if dim == "n" else "dim_value": dim}
        )
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(BnpatchError, match=r"takes images|not a valid ONNX model"):
        bnpatch.load(tmp_path / "model.onnx")


def test_a_wrong_size_is_one_line(tmp_path):
    model = opened(tmp_path, graph(["n", 3, 8, 8]))
    with pytest.raises(BnpatchError, match=r"does not take an input of shape \(1, 3, 9, 9\)") as error:
        model.predict(torch.zeros(1, 3, 9, 9))
    assert "\n" not in str(error.value)


def test_a_torch_export_program(tmp_path):
    torch_model = bnpatch.load(small())
    batch = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(torch_model.module, (INPUTS[:2],), dynamic_shapes=batch)
    torch.export.save(program, tmp_path / "model.pt2")
    model = bnpatch.load(tmp_path / "model.pt2")
    assert model.fingerprints() == torch_model.fingerprints()
    for alpha in (0.0, 0.2):
        model.set_alphas(alpha)
        torch_model.set_alphas(alpha)
        assert_close(model.predict(INPUTS), torch_model.predict(INPUTS))
    (tmp_path / "bad.pt2").write_bytes(b"nothing")
    with pytest.raises(BnpatchError, match=r"damaged or not a torch.export program"):
        bnpatch.load(tmp_path / "bad.pt2")


def test_a_model_with_little_batch_norm_left_is_told_what_to_do(folded, exported):
    model = bnpatch.load(folded, preprocessing=LIKE_TRAINING)
    assert "--recover-folded" in model.notes[-1]
    assert "layer1.0.conv1" in model.fused_convs()
    assert not bnpatch.load(exported).notes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_provider_agrees_with_the_cpu(exported):
    x = images(4, 1, 32, 32)
    on_cpu, on_gpu = (bnpatch.load(exported, device=device) for device in ("cpu", "cuda"))
    for alpha in (0.0, 0.3):
        on_cpu.set_alphas(alpha)
        on_gpu.set_alphas(alpha)
        torch.testing.assert_close(on_gpu.predict(x), on_cpu.predict(x), rtol=1e-3, atol=1e-3)


def test_a_patched_file_says_that_it_is_one(exported, tmp_path):
    model = bnpatch.load(exported)
    model.set_alphas({name: 0.1 for name, shape in model.norm_shapes().items() if shape != (1, 1)})
    export_onnx(model, tmp_path / "patched.onnx")
    patched = bnpatch.load(tmp_path / "patched.onnx")
    with pytest.raises(BnpatchError, match=r"no norm layer 'conv1\.1'|belongs to a patch"):
        patched.set_alphas({"conv1.1": 0.1})
    assert "belongs to a patch" in patched.inventory().skipped_norms[0].reason


@pytest.fixture(scope="module")
def exported_small(tmp_path_factory):
    """Of a kind of norm: a torch model of test_calibration, and its export, which is made once."""
    folder = tmp_path_factory.mktemp("small")

    def of(norm):
        file = folder / f"{norm.__name__}.onnx"
        if not file.exists():
            export_onnx(bnpatch.load(small(norm)), file, INPUTS[:2])
        return bnpatch.load(small(norm)), bnpatch.load(file)

    return of


def assert_same_moments(found, expected):
    assert found.keys() == expected.keys()
    for name, moments in expected.items():
        np.testing.assert_allclose(
            found[name].mean, moments.mean, rtol=1e-4, atol=1e-5, err_msg=name
        )  # float32
        np.testing.assert_allclose(found[name].var, moments.var, rtol=1e-4, atol=1e-5, err_msg=name)


SETTINGS = [(0.0, 0.5), (0.0, 1.0), (0.2, 0.0), (0.2, 0.5), (1.0, 1.0)]


@pytest.mark.parametrize("norm", [torch.nn.BatchNorm2d, group_norm])
def test_target_moments_and_every_setting_agree_with_torch(norm, exported_small):
    models = exported_small(norm)
    assert models[0].fingerprints() == models[1].fingerprints()
    assert models[0].uncalibrated() == models[1].uncalibrated()
    found = []
    for model in models:
        calibrate(model, INPUTS, batch_size=16)
        found.append(target_moments(model, bnpatch.open_examples(DATA, model), batch_size=13))
    assert_same_moments(*found[::-1])
    if norm is group_norm:
        used = models[0].statistics_in_use()
        running = {name: Moments(*(p.numpy() for p in (m.mean, m.var))) for name, m in used.items()}
        assert_same_moments(models[1].statistics_in_use(), running)
        models[1].set_running(running)  # from now on exactly the same
    for model in models:
        model.set_target(found[0])
    for alpha, weight in SETTINGS:
        expected, got = (
            set_and_predict(model, dict.fromkeys(found[0], alpha), dict.fromkeys(found[0], weight))
            for model in models
        )
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)  # float32 through four norms
    names = list(found[0])
    mixed = dict(zip(names, (0.1, 0.0, 1.0), strict=True)), dict(zip(names, (0.0, 0.6, 0.3), strict=True))
    expected, got = (set_and_predict(model, *mixed) for model in models)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)  # likewise


def set_and_predict(model, alphas, lambdas):
    model.set_weights(PatchWeights(alphas, lambdas))
    return model.predict(INPUTS)


def test_observed_moments_agree_with_torch(exported_small):
    torch_model, onnx_model = exported_small(torch.nn.BatchNorm2d)
    for alpha in (0.0, 0.3):
        torch_model.set_alphas(alpha)
        onnx_model.set_alphas(alpha)
        (y, seen), (y2, seen2) = (model.observe(INPUTS) for model in (torch_model, onnx_model))
        torch.testing.assert_close(y2, y, rtol=1e-4, atol=1e-4)  # float32
        assert seen2["norm2"].mean.shape == (2 * len(INPUTS), 8)
        assert_same_moments(seen2, seen)


def test_observed_moments_keep_their_digits_far_from_zero(tmp_path):
    rng = np.random.default_rng(0)
    model = opened(tmp_path, graph(["n", 3, 8, 8]))
    kernel = model.graph.graph.initializers["w"].const_value.numpy()
    x = (1e4 + rng.normal(size=(4, 3, 8, 8))).astype(np.float32)
    _, seen = model.observe(torch.from_numpy(x))
    values = np.einsum("nihw,oi->nohw", x.astype(np.float64), kernel[:, :, 0, 0].astype(np.float64))
    # The convolution itself rounds 1e4 to 1e-3, a thousandth of the standard deviation.
    np.testing.assert_allclose(seen["bn"].var, values.var((2, 3)), rtol=1e-2)


def test_lambda_zero_is_the_file_as_it_is_and_a_refused_setting_changes_nothing(exported_small):
    _, model = exported_small(torch.nn.BatchNorm2d)
    before = model.predict(INPUTS)
    model.set_target(target_moments(model, bnpatch.open_examples(DATA, model)))
    names = dict.fromkeys(model.alphas(), 0.0)
    model.set_weights(PatchWeights(names, dict.fromkeys(names, 1.0)))
    assert not torch.equal(model.predict(INPUTS), before)
    model.set_weights(PatchWeights(names, names))
    assert torch.equal(model.predict(INPUTS), before)
    for wrong in (PatchWeights({"norm1": 0.5}, {"nope": 0.0}), PatchWeights({"norm1": 0.5}, {"norm1": 1.5})):
        with pytest.raises(BnpatchError, match=r"no norm layer 'nope'|lambda = 1.5"):
            model.set_weights(wrong)
    assert model.weights == PatchWeights(names, names, names)


def test_calibration_keeps_the_weights_of_other_sites(tmp_path):
    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.gn = torch.nn.BatchNorm2d(3), torch.nn.GroupNorm(3, 3)

        def forward(self, x):
            return self.gn(self.bn(x)).relu().mean((2, 3))

    export_onnx(Mixed().eval(), tmp_path / "mixed.onnx", INPUTS[:2])
    models = bnpatch.load(Mixed()), bnpatch.load(tmp_path / "mixed.onnx")
    for model in models:
        model.set_alphas({"bn": 0.2})
        calibrate(model, INPUTS)
        assert model.alphas() == {"bn": 0.2, "gn": 1.0}
        model.set_alphas({"gn": 0.5})
        model.set_running({"gn": Moments(np.zeros(3), np.ones(3))})
        assert model.alphas() == {"bn": 0.2, "gn": 0.5}


@pytest.mark.parametrize("batch", [1, 3])
def test_a_fixed_batch_is_filled_up_with_real_examples(tmp_path, batch):
    """Moments by batch are those of whole batches; repeating one example would pull them to it."""
    model = opened(tmp_path, graph([batch, 3, 8, 8]))
    x = images(7, 3, 8, 8)
    expected = opened(tmp_path, graph(["n", 3, 8, 8]))
    torch.testing.assert_close(model.predict(x), expected.predict(x))
    found = model.moments_by_batch(x)
    filled = torch.cat([x, x[:2]]) if batch == 3 else x
    reference = expected.moments_by_batch(filled)  # the input of its one norm does not depend on any
    assert_same_moments(found, reference)


def test_recipes_pass_from_torch_to_onnx_and_back(exported_small):
    torch_model, onnx_model = exported_small(group_norm)
    calibrate(torch_model, INPUTS)
    shifted = (2 * INPUTS, DATA[1])
    torch_model.set_target(target_moments(torch_model, bnpatch.open_examples(shifted, torch_model)))
    torch_model.set_weights(
        PatchWeights({"norm1": 0.6, "norm2": 1.0, "norm3": 0.3}, {"norm1": 0.4, "norm2": 0.9, "norm3": 0.0})
    )
    recipe = torch_model.recipe()
    onnx_model.apply(recipe)
    torch.testing.assert_close(onnx_model.predict(INPUTS), torch_model.predict(INPUTS), rtol=1e-4, atol=1e-4)
    back = onnx_model.recipe().to_json()
    for theirs, own in zip(back["sites"], recipe.to_json()["sites"], strict=True):
        assert theirs | {"kind": ""} == own | {"kind": ""}  # GroupNormalization and GroupNorm


def test_moments_of_sites_in_branches_are_missing(tmp_path):
    from tests.onnx.build import batch_norm, parameters
    from tests.onnx.test_match import in_if

    model = opened(tmp_path, in_if(batch_norm(), parameters()))
    x = images(2, 6, 5, 4)
    assert model.moments_by_batch(x) == {}
    assert model.observe(x)[1] == {}
    model.set_alphas(0.2)
    assert model.predict(x).shape == (2, 6, 5, 4)


def test_maps_that_become_1_x_1_at_run_time_are_those_of_torch(tmp_path):
    """A file of any image size weights examples where torch does: not where a channel has one value."""
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.MaxPool2d(4), torch.nn.BatchNorm2d(4)
    module = settle(torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()))
    open_axes = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)
    program = torch.export.export(module, (images(2, 3, 16, 16),), dynamic_shapes=open_axes)
    torch.export.save(program, tmp_path / "model.pt2")
    found, expected = bnpatch.load(tmp_path / "model.pt2"), bnpatch.load(module, device="cpu")
    for model in (found, expected):
        model.set_alphas(0.4)
    bnpatch.export_onnx(found, tmp_path / "constant.onnx")
    for side in (16, 4):
        x = images(5, 3, side, side)
        assert_close(found.predict(x), expected.predict(x))
        assert_close(bnpatch.load(tmp_path / "constant.onnx").predict(x), expected.predict(x))


@pytest.mark.filterwarnings("ignore:the model is right on")  # its answers are not what this is about
def test_a_file_of_any_size_runs_at_that_of_the_data_only(tmp_path, capfd):
    """Its head is for 2 x 6 pixels, so that it runs at no other size."""
    proto = graph(["n", 3, "h", "w"], last="flat")
    arrays = [numpy_helper.from_array(np.ones((48, 2), np.float32), "head")]
    pool, flat = (node for node in proto.graph.node if node.op_type in ("GlobalAveragePool", "Flatten"))
    pool.op_type = "Identity"
    proto.graph.node.append(helper.make_node("Gemm", [flat.output[0], "head"], ["logits"]))
    proto.graph.initializer.extend(arrays)
    del proto.graph.output[:]
    proto.graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 2]))
    x, labels = images(40, 3, 2, 6).numpy(), np.arange(40) % 2
    model = opened(tmp_path, proto)
    result = bnpatch.tune_alpha(model, (x, labels), granularity="global", trials=1)
    model.save(tmp_path / "patched.onnx", result.recipe)
    assert bnpatch.load(tmp_path / "patched.onnx").preprocessing.input_size == (3, 2, 6)
    assert opened(tmp_path, proto, preprocessing={"img_size": (2, 6)}).num_outputs() == 2
    with pytest.raises(BnpatchError, match="does not take an input"):
        model.predict(torch.zeros(1, 3, 4, 6))
    assert "onnxruntime" not in capfd.readouterr().err

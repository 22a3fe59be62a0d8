import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.core.patch import PatchWeights
from bnpatch.models.load import load
from bnpatch.models.running_stats import recover_fused
from bnpatch.onnx.rewrite import rewrite
from bnpatch_cli.app import app
from tests.onnx.build import bn_model, from_proto, model, parameters
from tests.onnx.rewritten import group_norm_model, two_norms
from tests.remedies.world import SIDE, X, case, onnx_file


def classifier(**change):
    """A convolution with a bias, its Batch Norm or something else, and a mean over positions."""
    arrays = parameters() | {
        "c.weight": np.ones((6, 3, 1, 1), np.float32),
        "c.bias": np.arange(6, dtype=np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "c.weight", "c.bias"][: change.get("inputs", 3)], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["y"]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", 6))]
    return model(nodes, arrays, x=("n", 3, SIDE, SIDE), outputs=outputs)


@case("is not an ONNX model, or is truncated", "compare its size with the source and fetch it again")
def test_a_truncated_graph(w):
    whole = bn_model().SerializeToString()
    return (
        lambda: load(w.file("model.onnx", whole[:200])),
        lambda _: load(w.file("model.onnx", whole)),
    )


@case("uses opset 6; supported are 7", "convert it with onnx.version_converter")
def test_an_old_opset(w):
    proto = bn_model(opset=6, ir_version=3)
    for name in ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"):  # as files had to, then
        proto.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, (6,)))

    def follow(_):
        converted = onnx.version_converter.convert_version(proto, 9)
        assert load(onnx_file(w, converted, "new.onnx")).inventory().norm_layers

    return lambda: load(onnx_file(w, proto)), follow


@case(r"uses opset \d+; supported are 7", "install a newer onnx")
def test_a_new_opset(w):
    path = onnx_file(w, bn_model())

    def with_an_older_onnx():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(onnx.defs, "onnx_opset_version", lambda: 9)
            load(path)

    return with_an_older_onnx, lambda _: load(path)


@case(r"takes 2 inputs \(x, z\)", "give one that takes images alone")
def test_two_inputs(w):
    more = bn_model()
    more.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, (1,)))
    return lambda: load(onnx_file(w, more)), lambda _: load(onnx_file(w, bn_model()))


@case("the graph has no output 'logits'", "choose --output-name among y")
def test_another_output_of_a_graph(w):
    path = onnx_file(w, bn_model())
    return lambda: load(path, output="logits"), lambda _: load(path, output="y")


@case("does not exist", "put it beside the model")
def test_missing_external_data(w):
    source, path = w.folder / "source" / "model.onnx", w.folder / "model.onnx"
    source.parent.mkdir()
    proto = bn_model()
    onnx.save(proto, source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    path.write_bytes(source.read_bytes())

    def follow(_):
        (source.parent / "weights.bin").rename(w.folder / "weights.bin")
        load(path)

    return lambda: load(path), follow


@case("has no norm that could be patched", "add --recover-fused")
def test_a_graph_without_norms(w):
    found = load(onnx_file(w, classifier()))

    def follow(_):
        assert recover_fused(found, X) == 1
        found.set_alphas(0.1)

    return lambda: found.set_alphas(0.1), follow


@case("has no norm that could be patched", "take another model")
def test_a_graph_without_anything(w):
    found = load(onnx_file(w, classifier(inputs=2)))
    with pytest.raises(BnpatchError, match="no convolution"):
        recover_fused(found, X)  # so that the other remedy would not help
    return lambda: found.set_alphas(0.1), lambda _: load(
        onnx_file(w, classifier(), "other.onnx")
    ).fused_convs()


@case("has no norm that could be patched", r"bnpatch\.calibrate\(model, images\) in Python")
def test_a_graph_with_group_norm(w):
    found = load(onnx_file(w, group_norm_model()))

    def follow(_):
        bnpatch.calibrate(found, X.repeat(1, 2, 1, 1)[:, :, :5, :4])
        found.set_alphas(0.1)

    return lambda: found.set_alphas(0.1), follow


@case("onnxruntime refuses the graph", "export the model again with operators of the standard")
def test_an_operator_of_another_domain(w):
    proto = bn_model()
    proto.graph.node[0].output[0] = "b"
    proto.graph.node.append(helper.make_node("Own", ["b"], ["y"], domain="mine"))
    proto.opset_import.append(helper.make_opsetid("mine", 1))
    standard = bn_model()
    standard.graph.node[0].output[0] = "b"
    standard.graph.node.append(helper.make_node("Relu", ["b"], ["y"]))
    x = X.repeat(1, 2, 1, 1)[:, :, :5, :4]
    return lambda: load(onnx_file(w, proto)).predict(x), lambda _: load(onnx_file(w, standard)).predict(x)


@case("cannot write .*taken.onnx: is a directory", "choose another")
def test_a_folder_in_the_place_of_a_file(w):
    found = load(onnx_file(w, classifier()))
    (w.folder / "taken.onnx").mkdir()
    return (
        lambda: bnpatch.export_onnx(found, w.folder / "taken.onnx"),
        lambda _: bnpatch.export_onnx(found, w.folder / "free.onnx"),
    )


@case("is empty", "copy or download it again")
def test_an_empty_graph(w):
    return lambda: load(w.file("model.onnx")), lambda _: load(onnx_file(w, bn_model()))


@case("cannot read .*: no such file", "check the path")
def test_a_graph_that_is_not_there(w):
    return lambda: load(w.folder / "model.onnx"), lambda _: load(onnx_file(w, bn_model()))


@case("is of type .* and rank 2", r"images \(N, C, H, W\), or \(N, C, L\) or \(N, C, D, H, W\)")
def test_a_graph_that_takes_vectors(w):
    def graph(*shape):
        return onnx_file(w, bn_model(x=("n", 6, *shape)))

    return lambda: load(graph()), lambda _: [load(graph(*shape)) for shape in ((5, 4), (5,), (3, 5, 4))]


@case("takes 2 images at a time, not 1", "set --batch-size 2")
def test_timing_another_batch_than_the_graph_takes(w):
    found = load(onnx_file(w, bn_model(x=(2, 6, 5, 4))))

    def follow(remedy):
        found.ready_to_run(torch.zeros(int(remedy.split()[-1]), 6, 5, 4))()

    return lambda: found.ready_to_run(torch.zeros(1, 6, 5, 4)), follow


@case("has no norm layer 'nrm'", "its norm layers are bn")
def test_a_misspelled_norm_layer_of_a_graph(w):
    graph = from_proto(bn_model())
    return lambda: rewrite(graph, PatchWeights({"nrm": 0.1})), lambda remedy: rewrite(
        graph, PatchWeights({remedy.split()[-1]: 0.1})
    )


@case("one alpha input for all norm layers has one default", "adjustable for each: --alpha-input per-site")
def test_one_input_for_alphas_that_differ(w):
    weights = PatchWeights({"bn": 0.1, "bn2": 0.2})
    graph = from_proto(two_norms())

    def follow(remedy):
        rewrite(graph, weights, alpha_inputs=remedy.split()[-1])

    return lambda: rewrite(from_proto(two_norms()), weights, alpha_inputs="global"), follow


def command(*arguments):
    app([str(argument) for argument in arguments], standalone_mode=False)


@case("does not end in .onnx", "name a file that does")
def test_an_export_under_another_name(w):
    path = onnx_file(w, classifier())
    recover_fused(found := load(path), X)
    found.set_alphas(0.1)
    found.recipe().save(recipe := w.folder / "recipe.json")
    more = ("--recipe", recipe, "-o")
    return lambda: command("export", path, *more, w.folder / "out.pt"), lambda _: command(
        "export", path, *more, w.folder / "out.onnx"
    )


@case("is the model itself", "choose another --output")
def test_an_export_onto_the_model(w):
    path = onnx_file(w, classifier())
    return lambda: command("export", path, "-o", path), lambda _: command(
        "export", path, "-o", w.folder / "out.onnx"
    )


@case("--recipe and --alpha both say what to patch with", "leave one out")
def test_a_measurement_with_a_recipe_and_an_alpha(w):
    path = onnx_file(w, bn_model(x=("n", 6, 8, 8)))
    load(path).recipe().save(recipe := w.folder / "recipe.json")
    quick = ("bench", path, "--seconds", 0, "--threads", 1)
    return lambda: command(*quick, "--recipe", recipe, "--alpha", 0.1), lambda _: [
        command(*quick, "--recipe", recipe),
        command(*quick, "--alpha", 0.1),
    ]

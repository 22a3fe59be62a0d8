"""Files of models: others than those of test_files.py and test_onnx.py, in one table."""

import shutil
import zipfile

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import bnpatch
from bnpatch.core.limits import VALUES
from bnpatch.models import architecture
from bnpatch.models.load import load
from bnpatch.models.renamed import check_hugging_face
from bnpatch.onnx import io
from tests.onnx.build import bn_model, from_proto, in_function
from tests.remedies.world import MANY, SIDE, cases, followed, loaded, net, onnx_file


def graph(w, change=lambda proto: None):
    proto = bn_model()
    change(proto)
    return load(onnx_file(w, proto))


def without_opset(proto):
    del proto.opset_import[:]


def sparse(proto):
    values = helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))


def graph_of_many_values(w, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VALUES.name, limit)
        graph(w)


def not_utf8(w, change):
    whole = bn_model().SerializeToString()
    return load(w.file("model.onnx", whole.replace(b"norm", b"n\xffrm") if change else whole))


def external(w, cut):
    """A graph whose weights lie beside it."""
    proto = bn_model()
    onnx.save(proto, w.folder / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    if cut:
        whole = (w.folder / "w.bin").read_bytes()
        (w.folder / "w.bin").write_bytes(whole[: len(whole) - 8])
    load(w.folder / "m.onnx")


def linked(w, copied):
    """A graph whose weights are a link into another folder, as in a cache."""
    proto = bn_model()
    (w.folder / "cache").mkdir(exist_ok=True)
    onnx.save(
        proto, w.folder / "cache" / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0
    )
    (folder := w.folder / ("copied" if copied else "linked")).mkdir()
    for name in ("m.onnx", "w.bin"):
        if copied:
            shutil.copy(w.folder / "cache" / name, folder / name)
        else:
            (folder / name).symlink_to(w.folder / "cache" / name)
    load(folder / "m.onnx")


def with_function(w, opset):
    """A graph with a function that is of another opset, or of the same."""
    proto = in_function(opset=20)
    proto.functions[0].opset_import[0].version = opset
    return load(onnx_file(w, proto))


def unsaved(w, damaged):
    """Write a graph that has a name which UTF-8 has not."""
    graph = from_proto(bn_model())
    if damaged:
        graph.graph.name = "\ud800"
    io.save(graph, w.folder / "out.onnx")


def keras(w):
    with zipfile.ZipFile(path := w.folder / "model.pt", "w") as archive:
        archive.writestr("model.weights.h5", b"")
    load(path)


def expanded(w, contiguous):
    state = {**w.state_dict}
    state["fc.bias"] = torch.zeros(1).expand(10**9) if not contiguous else state["fc.bias"]
    load(w.saved(state))


def hugging_face(**config):
    check_hugging_face({"model_type": "mobilenet_v2", **config})


def size_of_graph(w, size):
    load(onnx_file(w, bn_model(x=("n", 6, 5, 4)))).predict(torch.zeros(1, 6, *size))


def with_running_mean(value):
    module = net()
    nn.init.constant_(module.norm.running_mean, value)
    load(module)


def returning(result):
    load(net(result=result), preprocessing={"img_size": SIDE}).num_outputs()


CASES = {
    "statistics that diverged": (
        lambda w: with_running_mean(float("inf")),
        "running_mean of norm layer 'norm' is not finite",
        "take a checkpoint from before training diverged",
        lambda w: with_running_mean(1.0),
    ),
    "one number for all images": (
        lambda w: returning(torch.mean),
        r"returns \(\) for 3 images",
        "give a model that returns a tensor with a row per image",
        lambda w: returning(torch.exp),
    ),
    "a graph of nothing": (
        lambda w: load(w.file("model.onnx", onnx.ModelProto(producer_name="other").SerializeToString())),
        "is not an ONNX model",
        "export one, with torch.onnx.export",
        graph,
    ),
    "no opset": (
        lambda w: graph(w, without_opset),
        "does not say which opset it uses",
        "it holds no standard operators: nothing to patch",
        lambda w: graph(w).inventory().norm_layers[0],
    ),
    "sparse": (
        lambda w: graph(w, sparse),
        "has sparse tensors",
        "write them as dense ones",
        graph,
    ),
    "not UTF-8": (
        lambda w: not_utf8(w, True),
        "is not a valid ONNX model: its field 'name' is not UTF-8 text",
        "fetch or export it again",
        lambda w: not_utf8(w, False),
    ),
    "short external data": (
        lambda w: external(w, cut=True),
        "is too short",
        "fetch it again",
        lambda w: external(w, cut=False),
    ),
    "external data that are links": (
        lambda w: linked(w, copied=False),
        "external data 'w.bin' of .* cannot be used",
        r"copy the model and its data as plain files into one folder \(cp -L\)",
        lambda w: linked(w, copied=True),
    ),
    "functions of another opset": (
        lambda w: with_function(w, opset=17),
        "functions of the model cannot be inlined: Opset mismatch",
        "export it again without functions, or with the model's opset in all of them",
        lambda w: [graph(w), with_function(w, opset=20)],
    ),
    "a graph that cannot be written": (
        lambda w: unsaved(w, damaged=True),
        "out.onnx cannot be written",
        "the original file is damaged: fetch it again",
        lambda w: unsaved(w, damaged=False),
    ),
    "a graph that vanishes": (
        lambda w: io.load(w.folder / "model.onnx"),
        "cannot read .*: no such file",
        "check the path",
        graph,
    ),
    "values that fill the memory": (
        lambda w: graph_of_many_values(w, "1"),
        "a value of .* numbers",
        "set the environment variable BNPATCH_MAX_VALUES",
        lambda w: graph_of_many_values(w, "1000"),
    ),
    "a size of a graph": (
        lambda w: size_of_graph(w, (7, 4)),
        r"does not take an input of shape \(1, 6, 7, 4\)",
        "set --img-size, or give inputs",
        lambda w: size_of_graph(w, (5, 4)),
    ),
    "TensorFlow Lite": (
        lambda w: load(w.file("model.pt", b"\0\0\0\0TFL3" + bytes(40))),
        "is a TensorFlow Lite file",
        "convert the model to ONNX, with tf2onnx for example",
        graph,
    ),
    "Keras": (keras, "is a Keras archive", "convert the model to ONNX, with tf2onnx", graph),
    "a name that no file has": (
        lambda w: load("a\0b.pt"),
        "cannot read",
        "check the path",
        lambda w: load(w.checkpoint),
    ),
    "an expanded tensor": (
        lambda w: expanded(w, contiguous=False),
        "claims 1000000000 elements and holds 1",
        r"save it after \.contiguous\(\)",
        lambda w: expanded(w, contiguous=True),
    ),
    "weights of nothing": (
        lambda w: architecture.identify({}),
        "has no weights",
        "save a state dict",
        lambda w: architecture.identify(w.state_dict),
    ),
    "another activation": (
        lambda w: hugging_face(hidden_act="gelu"),
        "config.json says hidden_act = 'gelu'",
        "call bnpatch.tune_alpha",
        lambda w: [hugging_face(), bnpatch.tune_alpha(loaded(), MANY, granularity="global", trials=1)],
    ),
}


@pytest.mark.filterwarnings("ignore")
@cases(CASES)
def test_more_files(name, world):
    fails, problem, remedy, follow = CASES[name]
    followed(lambda: fails(world), problem, remedy, lambda _: follow(world))

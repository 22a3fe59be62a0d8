import gzip
import lzma
import zipfile

import pytest
import torch
from torch import nn

from bnpatch.models.load import load
from tests.onnx.build import bn_model
from tests.remedies.world import X, case, onnx_file


@case("is a folder, not a checkpoint", "name the file inside it")
def test_a_folder(w):
    return lambda: load(w.checkpoint.parent), lambda _: load(w.checkpoint)


@case("is empty", "copy or download it again")
def test_an_empty_file(w):
    return lambda: load(w.file("model.pt")), lambda _: load(w.file("model.pt", w.checkpoint.read_bytes()))


@case("is a gzip archive", "unpack it, and give the file inside")
def test_a_gzip_archive(w):
    packed = w.file("model.pt", gzip.compress(w.checkpoint.read_bytes()))
    return lambda: load(packed), lambda _: load(w.file("inside.pt", gzip.decompress(packed.read_bytes())))


@case("is an xz archive", "unpack it, and give the file inside")
def test_an_xz_archive(w):
    packed = w.file("model.pt", lzma.compress(w.checkpoint.read_bytes(), preset=0))
    return lambda: load(packed), lambda _: load(w.file("inside.pt", lzma.decompress(packed.read_bytes())))


@case("is a zip archive that torch.save did not write", "unpack it, and give the file inside")
def test_a_zip_archive(w):
    path = w.folder / "model.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(w.checkpoint, "weights/model.pt")

    def follow(_):
        zipfile.ZipFile(path).extractall(w.folder)
        load(w.folder / "weights" / "model.pt")

    return lambda: load(path), follow


@case("is damaged or not a checkpoint", "copy it again")
def test_a_truncated_file(w):
    whole = w.checkpoint.read_bytes()
    return lambda: load(w.file("model.pt", whole[:9000])), lambda _: load(w.file("model.pt", whole))


@pytest.mark.slow  # torch exports for seconds
@case("is a torch.export program", "give it a name that ends in .pt2")
def test_a_program_under_another_name(w):
    program = torch.export.export(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), (X,))
    torch.export.save(program, path := w.folder / "model.pt")
    return lambda: load(path), lambda _: load(path.rename(path.with_suffix(".pt2")))


@case("is an ONNX model under another name", r"give it a name that ends in \.onnx")
def test_a_graph_under_another_name(w):
    path = onnx_file(w, bn_model(), "model.pt")
    return lambda: load(path), lambda _: load(path.rename(path.with_suffix(".onnx")))


@case("is a file of torch.save under another name", r"give it a name that ends in \.pt")
def test_a_checkpoint_under_another_name(w):
    path = w.file("model.onnx", w.checkpoint.read_bytes())
    return lambda: load(path), lambda _: load(path.rename(path.with_suffix(".pt")))


@case("holds a list, not weights", "save a state dict")
def test_a_list(w):
    return lambda: load(w.saved([1, 2])), lambda _: load(w.saved(w.state_dict))


@case("has no weights that bnpatch can find", "save a state dict")
def test_no_weights(w):
    return lambda: load(w.saved({"epoch": 3})), lambda _: load(w.saved(w.state_dict))


@case("holds a pickled", "save a state dict instead, or add --unsafe-load")
def test_a_pickled_module(w):
    module = load(w.checkpoint).module

    def follow(_):
        load(w.saved(module), unsafe_load=True)
        load(w.saved(module.state_dict()))

    return lambda: load(w.saved(module)), follow


@case("holds a whole model", "leave out --arch")
def test_an_architecture_for_a_module(w):
    path = w.saved(load(w.checkpoint).module)
    return (
        lambda: load(path, unsafe_load=True, arch="test_resnet"),
        lambda _: load(path, unsafe_load=True),
    )


@case("has no averaged weights", "leave out --use-ema")
def test_averaged_weights(w):
    return lambda: load(w.checkpoint, use_ema=True), lambda _: load(w.checkpoint)


@case("is no dense tensor", r"save it after \.to_dense\(\)")
def test_a_sparse_tensor(w):
    state = w.state_dict
    sparse = {**state, "fc.weight": state["fc.weight"].to_sparse()}
    dense = {key: t.to_dense() if t.is_sparse else t for key, t in sparse.items()}
    return lambda: load(w.saved(sparse)), lambda _: load(w.saved(dense))


@case("has no values, only a shape", "save it from another device")
def test_a_tensor_without_values(w):
    state = w.state_dict
    return lambda: load(w.saved({**state, "fc.bias": state["fc.bias"].to("meta")})), lambda _: load(
        w.saved(state)
    )


@case("are not finite", "take a checkpoint from before training diverged")
def test_a_diverged_checkpoint(w):
    state = w.state_dict
    return lambda: load(w.saved({**state, "fc.bias": state["fc.bias"] / 0})), lambda _: load(w.saved(state))


@case(r"\.mean is 'dark', not a number", "correct it or leave it out, and save again")
def test_damaged_preprocessing(w):
    content = torch.load(w.checkpoint, weights_only=True)
    content["args"]["mean"] = "dark"

    def follow(_):
        del content["args"]["mean"]
        load(w.saved(content))
        content["args"]["mean"] = [0.5]
        load(w.saved(content))

    return lambda: load(w.saved(content)), follow


@case("is damaged or not a JSON file", "mend it, or move it away")
def test_damaged_json(w):
    path = w.saved(w.state_dict, "folder/model.pt")
    config = w.file("folder/config.json", "{")

    def follow(_):
        config.write_text("{}")
        load(path)
        config.unlink()
        load(path)

    return lambda: load(path), follow

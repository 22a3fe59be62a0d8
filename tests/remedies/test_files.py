import gzip
import json
import lzma
import os
import re
import sys
import types
import zipfile

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from bnpatch.core.recipe import Recipe
from bnpatch.models import foreign
from bnpatch.models.architecture import parse_name
from bnpatch.models.load import load
from tests.onnx.build import bn_model
from tests.remedies.world import X, case, followed, loaded, onnx_file


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


@pytest.mark.parametrize("start", foreign._OTHERS)
def test_files_of_other_kinds(world, start):
    """What torch has not written is told by its first bytes."""
    kind, remedy = foreign._OTHERS[start]
    path = world.file("model.pt", start + b" and so on")

    def follow(said):
        if said == foreign.TO_ONNX:
            load(onnx_file(world, bn_model()))
        else:
            load(world.file("model.pt", world.checkpoint.read_bytes()))

    followed(lambda: load(path), f"is {kind}", re.escape(remedy), follow)


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


@case("is no regular file but a pipe or a device", "copy it into a file")
def test_a_pipe(w):
    os.mkfifo(w.folder / "pipe.pt")
    return lambda: load(w.folder / "pipe.pt"), lambda _: load(w.file("copy.pt", w.checkpoint.read_bytes()))


@case("there is no file test_resnet", "give a file or timm:test_resnet")
def test_a_name_without_its_library(w):
    def follow(remedy):
        assert parse_name(re.search(r"\S+:\S+", remedy)[0]) == ("timm", "test_resnet")
        load(w.checkpoint)

    return lambda: load("test_resnet"), follow


@case("is quantized", "give the checkpoint from before quantization")
def test_a_quantized_tensor(w):
    state = w.state_dict
    quantized = {**state, "fc.weight": torch.quantize_per_tensor(state["fc.weight"], 0.1, 0, torch.qint8)}
    return lambda: load(w.saved(quantized)), lambda _: load(w.saved(state))


@case(
    "is a TorchScript archive, which can't be patched",
    "give the state dict of the Python model, or an export",
)
def test_a_scripted_model(w):
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten()).eval()
    torch.jit.save(torch.jit.trace(module, X), w.folder / "scripted.pt")

    def follow(_):
        load(w.saved(w.state_dict))
        load(onnx_file(w, bn_model()))

    return lambda: load(w.folder / "scripted.pt"), follow


@case("needs Python code that is not here", "run where it can be imported")
def test_a_module_whose_code_is_elsewhere(w):
    elsewhere = types.ModuleType("elsewhere")
    elsewhere.Own = type("Own", (nn.Sequential,), {"__module__": "elsewhere"})
    sys.modules["elsewhere"] = elsewhere
    path = w.saved(elsewhere.Own(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    del sys.modules["elsewhere"]

    def follow(_):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "elsewhere", elsewhere)
            load(path, unsafe_load=True)

    return lambda: load(path, unsafe_load=True), follow


@case("the weights in .* are in several files", "save them in one: .* max_shard_size='100GB'")
def test_weights_in_several_files(w):
    folder = w.file("hub/config.json", json.dumps({"architecture": "test_resnet", "num_classes": 10})).parent
    index = w.file("hub/model.safetensors.index.json", "{}")

    def follow(_):
        index.unlink()
        module = timm.create_model("test_resnet", num_classes=10)
        save_file(
            {name: t.contiguous() for name, t in module.state_dict().items()}, folder / "model.safetensors"
        )
        load(folder)

    return lambda: load(folder), follow


@case("alpha = 3 at 'norm' is out of range", r"must lie in \[0, 1\]")
def test_a_recipe_with_too_much_weight(w):
    return lambda: recipe(w, alpha=3), lambda _: [recipe(w, alpha=0), recipe(w, alpha=1)]


@case("pools 0 channels", "it must be 1 or more")
def test_a_recipe_that_pools_no_channels(w):
    return lambda: recipe(w, channels_per_group=0), lambda _: recipe(w, channels_per_group=1)


@case("occurs twice", "make one with bnpatch tune-alpha")
def test_a_recipe_with_a_norm_layer_twice(w):
    return lambda: recipe(w, times=2), lambda _: recipe(w)


def recipe(w, times=1, **change):
    """Read a recipe that was changed by hand."""
    content = loaded().recipe().to_json()
    content["sites"] = times * [{**content["sites"][0], **change}]
    return Recipe.load(w.file("recipe.json", json.dumps(content)))

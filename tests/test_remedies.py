"""Errors name a remedy. Here each bad input is made, and what the remedy says is done: it has to succeed."""

import gzip
import io
import json
import lzma
import re
import zipfile
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from torch import nn

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.core.recipe import Recipe
from bnpatch.data.corruptions import parse_kinds
from bnpatch.data.groups import group_by
from bnpatch.evaluation.metrics import as_metric
from bnpatch.models.load import load
from bnpatch.models.running_stats import calibrate, recover_folded
from bnpatch.search.config import SearchConfig
from bnpatch_cli.options import _numbers, _size
from tests.onnx.build import bn_model, model, parameters

SIDE = 8
CASES = {}
SLOW = {"a_program_under_another_name"}  # torch exports for seconds


def case(problem, remedy):
    """Add a function of the world that returns what fails, and what a reader of the remedy does instead."""
    return lambda function: CASES.setdefault(function.__name__, (problem, remedy, function))


@dataclass
class World:
    """What a user has."""

    folder: object
    checkpoint: object

    def file(self, name, content=b""):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def saved(self, content, name="saved.pt"):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return self.file(name, buffer.getvalue())

    @property
    def state_dict(self):
        return torch.load(self.checkpoint, weights_only=True)["state_dict"]

    def images(self, *names, root="data"):
        for number, name in enumerate(names):
            buffer = io.BytesIO()
            Image.new("RGB", (SIDE, SIDE), (20 * number, 90, 120)).save(buffer, "PNG")
            self.file(f"{root}/{name}", buffer.getvalue())
        return self.folder / root


@pytest.fixture
def world(tmp_path, checkpoint):
    return World(tmp_path, checkpoint)


class Net(nn.Module):
    def __init__(self, norm=None, result=lambda logits: logits, channels=3):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4) if norm is None else norm
        self.head = nn.Linear(4 * (SIDE - 2) ** 2, 3)
        self.result = result

    def forward(self, x):
        return self.result(self.head(self.norm(self.conv(x)).flatten(1)))


def net(**options):
    torch.manual_seed(0)
    return Net(**options).eval()


def loaded(names=None, img_size=SIDE, **options):
    found = load(net(**options), preprocessing={"img_size": img_size})
    found.class_names = names
    return found


X = torch.randn(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
Y = np.arange(6) % 3


def opened(data, names=None, **options):
    examples = bnpatch.open_examples(data, loaded(names), **options)
    next(examples.batches(6))
    return examples


# Files


@case("is a folder, not a checkpoint", "name the file inside it")
def a_folder(w):
    return lambda: load(w.checkpoint.parent), lambda _: load(w.checkpoint)


@case("is empty", "copy or download it again")
def an_empty_file(w):
    return lambda: load(w.file("model.pt")), lambda _: load(w.file("model.pt", w.checkpoint.read_bytes()))


@case("is a gzip archive", "unpack it, and give the file inside")
def a_gzip_archive(w):
    packed = w.file("model.pt", gzip.compress(w.checkpoint.read_bytes()))
    return lambda: load(packed), lambda _: load(w.file("inside.pt", gzip.decompress(packed.read_bytes())))


@case("is an xz archive", "unpack it, and give the file inside")
def an_xz_archive(w):
    packed = w.file("model.pt", lzma.compress(w.checkpoint.read_bytes(), preset=0))
    return lambda: load(packed), lambda _: load(w.file("inside.pt", lzma.decompress(packed.read_bytes())))


@case("is a zip archive that torch.save did not write", "unpack it, and give the file inside")
def a_zip_archive(w):
    path = w.folder / "model.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(w.checkpoint, "weights/model.pt")

    def follow(_):
        zipfile.ZipFile(path).extractall(w.folder)
        load(w.folder / "weights" / "model.pt")

    return lambda: load(path), follow


@case("is damaged or not a checkpoint", "copy it again")
def a_truncated_file(w):
    whole = w.checkpoint.read_bytes()
    return lambda: load(w.file("model.pt", whole[:9000])), lambda _: load(w.file("model.pt", whole))


@case("is a torch.export program", "give it a name that ends in .pt2")
def a_program_under_another_name(w):
    program = torch.export.export(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), (X,))
    torch.export.save(program, path := w.folder / "model.pt")
    return lambda: load(path), lambda _: load(path.rename(path.with_suffix(".pt2")))


@case("is an ONNX model under another name", r"give it a name that ends in \.onnx")
def a_graph_under_another_name(w):
    path = onnx_file(w, bn_model(), "model.pt")
    return lambda: load(path), lambda _: load(path.rename(path.with_suffix(".onnx")))


@case("is a file of torch.save under another name", r"give it a name that ends in \.pt")
def a_checkpoint_under_another_name(w):
    path = w.file("model.onnx", w.checkpoint.read_bytes())
    return lambda: load(path), lambda _: load(path.rename(path.with_suffix(".pt")))


@case("holds a list, not weights", "save a state dict")
def a_list(w):
    return lambda: load(w.saved([1, 2])), lambda _: load(w.saved(w.state_dict))


@case("has no weights that bnpatch can find", "save a state dict")
def no_weights(w):
    return lambda: load(w.saved({"epoch": 3})), lambda _: load(w.saved(w.state_dict))


@case("holds a pickled", "save a state dict instead, or add --unsafe-load")
def a_pickled_module(w):
    module = load(w.checkpoint).module

    def follow(_):
        load(w.saved(module), unsafe_load=True)
        load(w.saved(module.state_dict()))

    return lambda: load(w.saved(module)), follow


@case("holds a whole model", "leave out --arch")
def an_architecture_for_a_module(w):
    path = w.saved(load(w.checkpoint).module)
    return (
        lambda: load(path, unsafe_load=True, arch="test_resnet"),
        lambda _: load(path, unsafe_load=True),
    )


@case("has no averaged weights", "leave out --use-ema")
def averaged_weights(w):
    return lambda: load(w.checkpoint, use_ema=True), lambda _: load(w.checkpoint)


@case("is no dense tensor", r"save it after \.to_dense\(\)")
def a_sparse_tensor(w):
    state = w.state_dict
    sparse = {**state, "fc.weight": state["fc.weight"].to_sparse()}
    dense = {key: t.to_dense() if t.is_sparse else t for key, t in sparse.items()}
    return lambda: load(w.saved(sparse)), lambda _: load(w.saved(dense))


@case("has no values, only a shape", "save it from another device")
def a_tensor_without_values(w):
    state = w.state_dict
    return lambda: load(w.saved({**state, "fc.bias": state["fc.bias"].to("meta")})), lambda _: load(
        w.saved(state)
    )


@case("are not finite", "take a checkpoint from before training diverged")
def a_diverged_checkpoint(w):
    state = w.state_dict
    return lambda: load(w.saved({**state, "fc.bias": state["fc.bias"] / 0})), lambda _: load(w.saved(state))


@case(r"\.mean is 'dark', not a number", "correct it or leave it out, and save again")
def damaged_preprocessing(w):
    content = torch.load(w.checkpoint, weights_only=True)
    content["args"]["mean"] = "dark"

    def follow(_):
        del content["args"]["mean"]
        load(w.saved(content))
        content["args"]["mean"] = [0.5]
        load(w.saved(content))

    return lambda: load(w.saved(content)), follow


@case("is damaged or not a JSON file", "mend it, or move it away")
def damaged_json(w):
    path = w.saved(w.state_dict, "folder/model.pt")
    config = w.file("folder/config.json", "{")

    def follow(_):
        config.write_text("{}")
        load(path)
        config.unlink()
        load(path)

    return lambda: load(path), follow


# Architectures


@case("there is no architecture 'test_resnett'", "did you mean test_resnet")
def a_misspelled_architecture(w):
    def follow(remedy):
        load(w.checkpoint, arch=re.search(r"did you mean (\w+)", remedy)[1])

    return lambda: load(w.checkpoint, arch="test_resnett"), follow


@case("'mine:resnet' names no library", "write one of .*timm:NAME")
def another_library(w):
    return lambda: load(w.checkpoint, arch="mine:resnet"), lambda _: load(
        w.checkpoint, arch="timm:test_resnet"
    )


@case("the weights do not fit .*resnet18", "they fit timm:test_resnet: name that, or leave out --arch")
def the_wrong_architecture(w):
    def follow(remedy):
        load(w.checkpoint, arch=re.search(r"they fit (\S+):", remedy)[1])
        load(w.checkpoint)

    return lambda: load(w.checkpoint, arch="resnet18"), follow


@case("but beside them are decoder.weight", "--arch timm:test_resnet leaves these out")
def weights_beside_the_model(w):
    path = w.saved({**{f"encoder.{k}": t for k, t in w.state_dict.items()}, "decoder.weight": torch.ones(2)})
    return lambda: load(path), lambda remedy: load(path, arch=re.search(r"--arch (\S+)", remedy)[1])


@case("fit no architecture of timm or torchvision", r"call bnpatch.tune_alpha\(module, data\) from Python")
def a_model_of_ones_own(w):
    path = w.saved(net().state_dict())

    def follow(_):
        module = net()
        module.load_state_dict(torch.load(path, weights_only=True))
        bnpatch.tune_alpha(
            load(module, preprocessing={"img_size": SIDE}), DATA, granularity="global", trials=1
        )

    return lambda: load(path), follow


DATA = (torch.cat([X] * 10), np.tile(Y, 10))


# Outputs and inputs


@case("returns several outputs: map .*, age .*, kind", "say with --output-name .* by its name or number")
def several_outputs(w):
    module = net(result=lambda y: {"map": y[:, :, None, None].repeat(1, 1, 2, 2), "age": y[:, :2], "kind": y})

    def follow(_):
        for output in ("kind", "2"):
            assert load(module, output=output, preprocessing={"img_size": SIDE}).num_outputs() == 3

    return lambda: load(module, preprocessing={"img_size": SIDE}).num_outputs(), follow


@case("has no output 'classes'", r"choose --output-name among .*kind \(N, 3\)")
def another_output(w):
    module = net(result=lambda y: {"map": y[:, :, None], "kind": y})
    options = {"preprocessing": {"img_size": SIDE}}
    return (
        lambda: load(module, output="classes", **options).num_outputs(),
        lambda _: load(module, output="kind", **options).num_outputs(),
    )


@case("not one number per class", "choose another output with --output-name")
def a_map(w):
    module = net(result=lambda y: {"map": y[:, :, None, None].repeat(1, 1, 2, 2), "kind": y})
    options = {"preprocessing": {"img_size": SIDE}}
    return (
        lambda: load(module, output="map", **options).num_outputs(),
        lambda _: load(module, output="kind", **options).num_outputs(),
    )


@case("the model returns a str", "wrap it so that it returns a tensor")
def no_tensor(w):
    module = net(result=lambda y: "cat")
    wrapped = net(result=lambda y: y)
    predict = {"preprocessing": {"img_size": SIDE}}
    return lambda: load(module, **predict).predict(X), lambda _: load(wrapped, **predict).predict(X)


@case(r"does not take an input of shape \(\d+, 3, 224, 224\)", "set --img-size, or give inputs")
def another_size(w):
    def follow(_):
        load(net(), preprocessing={"img_size": SIDE}).num_outputs()
        load(net()).predict(X)

    return lambda: load(net()).num_outputs(), follow


@case("the model takes 2 channels, image files give 1 or 3", r"float arrays in an \.npz file")
def two_channels(w):
    found = load(net(channels=2), preprocessing={"img_size": SIDE})
    data = w.images("a/1.png", "b/1.png", "c/1.png")
    np.savez(w.folder / "data.npz", x=X[:, :2].numpy(), y=Y)
    return lambda: bnpatch.open_examples(data, found), lambda _: bnpatch.open_examples(
        w.folder / "data.npz", found
    )


# Norm layers


@case(
    "no normalization layer that bnpatch could patch",
    r"patch the model from before, or see bnpatch\.recover_folded",
)
def fused(w):
    def follow(_):
        bnpatch.patch(net(), 0.1)
        found = loaded(norm=nn.Identity())
        assert recover_folded(found, X) == 1
        bnpatch.patch(found.module, 0.1)

    return lambda: bnpatch.patch(net(norm=nn.Identity()), 0.1), follow


@case("have no running statistics", r"bnpatch\.calibrate\(model, images\)")
def group_norm(w):
    found = loaded(norm=nn.GroupNorm(2, 4))

    def follow(_):
        calibrate(found, X)
        bnpatch.patch(found.module, 0.1)

    return lambda: bnpatch.patch(found.module, 0.1), follow


@case("norms can be patched", "run one batch through the model first")
def lazy(w):
    module = net(norm=nn.LazyBatchNorm2d())

    def follow(_):
        module.train()(X)
        bnpatch.patch(module.eval(), 0.1)

    return lambda: bnpatch.patch(module, 0.1), follow


@case("alpha = 2.0 is not a weight", r"must lie in \[0, 1\]")
def too_much_weight(w):
    return lambda: bnpatch.patch(net(), 2), lambda _: [bnpatch.patch(net(), alpha) for alpha in (0, 1)]


@case("slope = 9.0 .*is too steep", r"must lie in \[-4, 4\]")
def too_steep(w):
    return (
        lambda: bnpatch.patch(net(), 0.1, slope=9),
        lambda _: [bnpatch.patch(net(), 0.1, slope=slope) for slope in (-4, 4)],
    )


@case("has no norm layer 'nrm'", "norm")
def a_misspelled_norm_layer(w):
    return lambda: bnpatch.patch(net(), {"nrm": 0.1}), lambda remedy: bnpatch.patch(
        net(), {re.search(r"\bnorm\b", remedy)[0]: 0.1}
    )


@case("the recipe is for another model", "")
def a_recipe_of_another_model(w):
    recipe = loaded().recipe()
    other = net()
    nn.init.constant_(other.norm.bias, 3)
    return lambda: bnpatch.apply(other, recipe), lambda _: bnpatch.apply(net(), recipe)


@case("is not a recipe", "")
def no_recipe(w):
    path = w.file("recipe.json", "[]")

    def follow(_):
        loaded().recipe().save(path)
        Recipe.load(path)

    return lambda: Recipe.load(path), follow


# Data


@case("there is no", "a folder with a folder of images per class, or an .npz file")
def missing_data(w):
    np.savez(w.folder / "data.npz", x=X.numpy(), y=Y)

    def follow(_):
        opened(w.images("a/1.png", "b/1.png", "c/1.png"))
        opened(w.folder / "data.npz")

    return lambda: opened(w.folder / "nowhere"), follow


@case("are in no class folders", "make one folder per class, or search without labels")
def no_class_folders(w):
    flat = w.images("1.png", "2.png")

    def follow(_):
        opened(w.images("a/1.png", "b/2.png", "c/3.png", root="made"))
        opened(flat, labels="optional")

    return lambda: opened(flat), follow


@case("has no images", "a folder of images per class")
def an_empty_folder(w):
    (w.folder / "data").mkdir()
    return lambda: opened(w.folder / "data"), lambda _: opened(w.images("a/1.png", "b/1.png", "c/1.png"))


@case(r"has 2 class folders, the model has 3 outputs", "--class-map FILE: the folders, one a line")
def fewer_folders(w):
    data = w.images("a/1.png", "c/1.png")
    names = w.file("classes.txt", "a\nb\nc\n")

    def follow(_):
        assert opened(data, class_map=names).targets.tolist() == [0, 2]

    return lambda: opened(data), follow


@case("none of the class folders .* has the name of a class", "--class-map FILE")
def other_names(w):
    data = w.images("katze/1.png", "hund/1.png", "maus/1.png")
    names = w.file("classes.txt", "katze\nhund\nmaus\n")

    def follow(_):
        examples = opened(data, ("cat", "dog", "mouse"), class_map=names)
        assert [examples.targets[i] for i in np.argsort([examples.source.name(i) for i in range(3)])] == [
            1,
            0,
            2,
        ]

    return lambda: opened(data, ("cat", "dog", "mouse")), follow


@case("are parts of a data set, not classes", "give .*val")
def the_folder_above(w):
    data = w.images(*(f"{part}/{kind}/1.png" for part in ("train", "val") for kind in "abc"))
    return lambda: opened(data), lambda remedy: opened(re.search(r"give (\S+)", remedy)[1])


@case("cannot read", "remove it, or leave out --strict")
def an_unreadable_image(w):
    data = w.images("a/1.png", "b/1.png", "c/1.png", "c/2.png")
    (data / "c" / "2.png").write_bytes(b"\x89PNG")

    def follow(_):
        assert len(opened(data).skipped) == 1
        (data / "c" / "2.png").unlink()
        opened(data, strict=True)

    return lambda: opened(data, strict=True), follow


@case("there are 6 images and targets of shape", "give one target per image")
def fewer_targets(w):
    return lambda: opened((X, Y[:5])), lambda _: opened((X, Y))


@case("there are images without classes", r"give a pair \(images, classes\), or search without labels")
def no_targets(w):
    return lambda: opened(X), lambda _: [opened((X, Y)), opened(X, labels="optional")]


@case("the targets are of type <U3", "give numbers")
def names_as_targets(w):
    return lambda: opened((X, np.array(["cat"] * 6))), lambda _: opened((X, Y))


@case("the classes are not whole numbers", "one class index per image, or a metric of your own")
def fractions_as_targets(w):
    return lambda: opened((X, Y + 0.5)), lambda _: [opened((X, Y)), opened((X, Y + 0.5), classes=False)]


@case("the data has class 5, Net has the outputs 0 to 2", "the data set that the model was trained for")
def too_many_classes(w):
    return lambda: opened((X, Y + 5)), lambda _: opened((X, Y))


@case("the data has class 3, Net has the outputs 0 to 2", "subtract 1, if the classes count from 1")
def classes_from_1(w):
    return lambda: opened((X, Y + 1)), lambda _: opened((X, Y + 1 - 1))


@case("the images are of type torch.int32", "give bytes, or floating-point inputs")
def integers_as_images(w):
    return (
        lambda: opened((X.int(), Y)),
        lambda _: [opened(((X * 40 + 100).clip(0, 255).byte(), Y)), opened((X.double(), Y))],
    )


@case("has the arrays images, kinds", "name the images x and the classes y")
def other_arrays(w):
    np.savez(w.folder / "data.npz", images=X.numpy(), kinds=Y)

    def follow(_):
        np.savez(w.folder / "data.npz", x=X.numpy(), y=Y)
        opened(w.folder / "data.npz")

    return lambda: opened(w.folder / "data.npz"), follow


@case("is damaged or not an .npz file", "write it again")
def a_damaged_npz(w):
    path = w.file("data.npz", b"PK")

    def follow(_):
        np.savez(path, x=X.numpy(), y=Y)
        opened(path)

    return lambda: opened(path), follow


@case("the data gives dictionaries", r"give pairs \(image, target\)")
def dictionaries(w):
    return (
        lambda: opened([{"image": x[None], "label": y} for x, y in zip(X, Y, strict=True)]),
        lambda _: opened([(x, y) for x, y in zip(X, Y, strict=True)]),
    )


@case("the loader gives no batches", "a generator gives them only once")
def a_generator_that_was_read(w):
    batches = ((x[None], torch.tensor([y])) for x, y in zip(X, Y, strict=True))
    list(batches)
    return lambda: opened(batches), lambda _: opened(iter([(X, torch.from_numpy(Y))]))


@case("takes more memory than the 0.001 GB", r"raise cache_gb .*, give fewer examples, or images as bytes")
def too_much_data(w):
    many = [(torch.cat([X] * 9), torch.from_numpy(np.tile(Y, 9)))] * 50

    def follow(_):
        opened(iter(many), cache_gb=0.1)
        opened(iter(many[:5]), cache_gb=0.001)

    return lambda: opened(iter(many), cache_gb=0.001), follow


@case("is not a class map, 'a' comes twice", "one class folder a line, .* or a name, a tab and its index")
def a_class_map_with_a_name_twice(w):
    data = w.images("a/1.png", "b/1.png", "c/1.png")
    path = w.file("classes.txt", "a\na\nc\n")

    def follow(_):
        for text in ("a\nb\nc\n", "c\t2\na\t0\nb\t1\n"):
            assert sorted(opened(data, class_map=w.file("classes.txt", text)).targets) == [0, 1, 2]

    return lambda: opened(data, class_map=path), follow


@case("the indices of .* are not 0 to 2", "number every output once, from 0")
def a_class_map_from_1(w):
    data = w.images("a/1.png", "b/1.png", "c/1.png")
    return (
        lambda: opened(data, class_map=w.file("classes.txt", "a\t1\nb\t2\nc\t3\n")),
        lambda _: opened(data, class_map=w.file("classes.txt", "a\t0\nb\t1\nc\t2\n")),
    )


@case("is not a class map", r"give a list of names, \{name: index\} or \{index: name\}")
def a_class_map_of_another_layout(w):
    data = w.images("a/1.png", "b/1.png", "c/1.png")

    def follow(_):
        for content in (["a", "b", "c"], {"a": 0, "b": 1, "c": 2}, {"0": "a", "1": "b", "2": "c"}):
            opened(data, class_map=w.file("classes.json", json.dumps(content)))

    return lambda: opened(data, class_map=w.file("classes.json", '{"classes": {"a": 0.5}}')), follow


@case("the class map has", "list every class folder once, in the order of the outputs")
def a_class_map_without_a_folder(w):
    data = w.images("a/1.png", "b/1.png", "c/1.png")
    return (
        lambda: opened(data, class_map=w.file("classes.txt", "a\nb\nd\n")),
        lambda _: opened(data, class_map=w.file("classes.txt", "a\nb\nc\n")),
    )


@case("there are 3 group labels for 6 examples", "give one label per example")
def fewer_groups(w):
    return lambda: opened((X, Y), groups=list("aab")), lambda _: opened((X, Y), groups=list("aabbcc"))


@case("the groups have one example each", "name groups that several examples share .*, or leave groups out")
def groups_of_one(w):
    return (
        lambda: opened((X, Y), groups=list("abcdef")),
        lambda _: [opened((X, Y), groups=list("aabbcc")), opened((X, Y))],
    )


@case("has no parentheses", "put them around what names the group")
def an_expression_without_a_group(w):
    def follow(remedy):
        assert group_by(re.search("'(.*)'", remedy)[1])("video1_frame2.png") == "video1"

    return lambda: group_by("video[0-9]+"), follow


@case("is no regular expression", "write parent, an expression such as .*, or the name of a .csv file")
def a_damaged_expression(w):
    table = w.file("groups.csv", "a/1.png,first\n")

    def follow(remedy):
        assert group_by("parent")("class/video/1.png") == "video"
        assert group_by(re.search("such as '(.*)'", remedy)[1])("x/patient7_2.png") == "patient7"
        assert group_by(str(table))("a/1.png") == "first"

    return lambda: group_by("([a-z"), follow


@case("finds nothing in other.png", "write an expression that fits all names")
def an_expression_that_does_not_fit(w):
    return lambda: group_by("(video[0-9]+)")("other.png"), lambda _: group_by("([a-z]+)")("other.png")


@case("has no group for b/1.png", "list each image by its path below the folder of the data")
def a_table_without_an_image(w):
    return (
        lambda: group_by(str(w.file("groups.csv", "a/1.png,first\n")))("b/1.png"),
        lambda _: group_by(str(w.file("groups.csv", "a/1.png,first\nb/1.png,second\n")))("b/1.png"),
    )


# Options


@case("--img-size '0' is not a size in pixels", "write one side, 224, or height,width: 48,192")
def a_size_of_0(w):
    return lambda: _size("0"), lambda _: [_size("224"), _size("48,192")]


@case("--mean 'grey' is not a list of numbers", "write 0.485,0.456,0.406")
def a_mean_in_words(w):
    return lambda: _numbers("grey", "--mean"), lambda remedy: _numbers(
        remedy.removeprefix("write "), "--mean"
    )


@case("--mean has 2 values, the model 3 channels", "give one, or one each")
def two_means(w):
    def follow(_):
        for mean in ((0.5,), (0.4, 0.5, 0.6)):
            load(net(), preprocessing={"mean": mean})

    return lambda: load(net(), preprocessing={"mean": (0.5, 0.4)}), follow


@case("std = .* is not positive", "give --std as for images in .0, 1.")
def a_deviation_of_0(w):
    return lambda: load(net(), preprocessing={"std": (0.0,)}), lambda _: load(
        net(), preprocessing={"std": (0.2,)}
    )


@case("there is no interpolation 'cubic'", "choose .*bicubic")
def another_interpolation(w):
    return (
        lambda: load(net(), preprocessing={"interpolation": "cubic"}),
        lambda _: load(net(), preprocessing={"interpolation": "bicubic"}),
    )


@case("there is no metric 'precision'", "choose one of accuracy")
def another_metric(w):
    def follow(remedy):
        for name in remedy.removeprefix("choose one of ").split(", "):
            as_metric(name)

    return lambda: as_metric("precision"), follow


@case("there is no augmentation 'rain'", "choose from .*contrast")
def another_augmentation(w):
    return lambda: parse_kinds("rain"), lambda remedy: parse_kinds(remedy.removeprefix("choose from "))


@case("a held-out part of 1.5 is not a fraction", "set --holdout between 0 and 1")
def too_much_held_out(w):
    return lambda: SearchConfig(holdout=1.5), lambda _: SearchConfig(holdout=0.5)


@case("0.9 times the latency is not possible", "write --max-overhead 1.1")
def a_latency_below_1(w):
    return lambda: SearchConfig(max_overhead=0.9), lambda _: SearchConfig(max_overhead=1.1)


@case("a margin of 5 is not a fraction", "set --margin to 0.005")
def a_margin_in_percent(w):
    return lambda: SearchConfig(margin=5), lambda _: SearchConfig(margin=0.005)


# ONNX


def onnx_file(w, proto, name="model.onnx"):
    return w.file(name, proto.SerializeToString())


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
def a_truncated_graph(w):
    whole = bn_model().SerializeToString()
    return (
        lambda: load(w.file("model.onnx", whole[:200])),
        lambda _: load(w.file("model.onnx", whole)),
    )


@case("uses opset 6; supported are 7", "convert it with onnx.version_converter")
def an_old_opset(w):
    proto = bn_model(opset=6, ir_version=3)
    for name in ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"):  # as files had to, then
        proto.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, (6,)))

    def follow(_):
        converted = onnx.version_converter.convert_version(proto, 9)
        assert load(onnx_file(w, converted, "new.onnx")).inventory().norm_layers

    return lambda: load(onnx_file(w, proto)), follow


@case(r"takes 2 inputs \(x, z\)", "give one that takes images alone")
def two_inputs(w):
    more = bn_model()
    more.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, (1,)))
    return lambda: load(onnx_file(w, more)), lambda _: load(onnx_file(w, bn_model()))


@case("has no output 'logits'", "choose --output-name among y")
def another_output_of_a_graph(w):
    path = onnx_file(w, bn_model())
    return lambda: load(path, output="logits"), lambda _: load(path, output="y")


@case("does not exist", "put it beside the model")
def missing_external_data(w):
    source, path = w.folder / "source" / "model.onnx", w.folder / "model.onnx"
    source.parent.mkdir()
    proto = bn_model()
    onnx.save(proto, source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    path.write_bytes(source.read_bytes())

    def follow(_):
        (source.parent / "weights.bin").rename(w.folder / "weights.bin")
        load(path)

    return lambda: load(path), follow


@case("has no norm that could be patched", "add --recover-folded")
def a_graph_without_norms(w):
    found = load(onnx_file(w, classifier()))

    def follow(_):
        assert recover_folded(found, X) == 1
        found.set_alphas(0.1)

    return lambda: found.set_alphas(0.1), follow


@case("has no norm that could be patched", "take another model")
def a_graph_without_anything(w):
    found = load(onnx_file(w, classifier(inputs=2)))
    with pytest.raises(BnpatchError, match="no convolution"):
        recover_folded(found, X)  # so that the other remedy would not help
    return lambda: found.set_alphas(0.1), lambda _: load(
        onnx_file(w, classifier(), "other.onnx")
    ).fused_convs()


@case("onnxruntime refuses the graph", "export the model again with operators of the standard")
def an_operator_of_another_domain(w):
    proto = bn_model()
    proto.graph.node[0].output[0] = "b"
    proto.graph.node.append(helper.make_node("Own", ["b"], ["y"], domain="mine"))
    proto.opset_import.append(helper.make_opsetid("mine", 1))
    standard = bn_model()
    standard.graph.node[0].output[0] = "b"
    standard.graph.node.append(helper.make_node("Relu", ["b"], ["y"]))
    x = X.repeat(1, 2, 1, 1)[:, :, :5, :4]
    return lambda: load(onnx_file(w, proto)).predict(x), lambda _: load(onnx_file(w, standard)).predict(x)


@case("cannot be written|cannot write", "choose another")
def a_folder_in_the_place_of_a_file(w):
    found = load(onnx_file(w, classifier()))
    (w.folder / "taken.onnx").mkdir()
    return (
        lambda: bnpatch.export_onnx(found, w.folder / "taken.onnx"),
        lambda _: bnpatch.export_onnx(found, w.folder / "free.onnx"),
    )


@pytest.mark.filterwarnings("ignore::bnpatch.core.errors.BnpatchWarning")  # they are tested where they belong
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]
)
def test_who_follows_the_remedy_succeeds(name, world):
    problem, remedy, make = CASES[name]
    fails, follow = make(world)
    with pytest.raises(BnpatchError) as error:
        fails()
    assert re.search(problem, error.value.problem)
    assert re.search(remedy, error.value.remedy)
    follow(error.value.remedy)


def test_there_are_many():
    assert len(CASES) >= 70

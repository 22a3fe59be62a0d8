"""Memory, disks, other runs, databases and the network."""

import errno
import os

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import bnpatch
from bnpatch.core.errors import NotEnoughMemoryError
from bnpatch.core.io import check_writable, claimed
from bnpatch.core.leftovers import RUNNING
from bnpatch.data import npz
from bnpatch.models.load import load
from bnpatch.onnx import io
from bnpatch.onnx.runtime import open_session
from bnpatch.search.storages import connect, usable
from tests.onnx.build import bn_model, from_proto
from tests.other_processes import start_of
from tests.remedies.world import MANY, SIDE, X, Y, cases, followed, loaded, opened


def predict(count, side=SIDE, room=3 * 3 * SIDE**2):
    """Run a module that has memory for three examples, or for so many numbers."""
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = load(layers.eval(), preprocessing={"img_size": side})

    def crowded(module, inputs):
        if inputs[0].numel() > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    found.module.register_forward_pre_hook(crowded)
    found.predict(X[:count, :, :side, :side])


def on_the_gpu():
    raise NotEnoughMemoryError("cuda:0", 1)


def claim(folder, until_it_ends=False):
    """Write where another process does: the one that started this one."""
    folder.mkdir(exist_ok=True)
    mark = folder / f"{start_of(os.getppid())}{RUNNING}"
    mark.touch()
    if until_it_ends:
        mark.unlink()
    with claimed(folder):
        pass


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def saved(w, *full):
    with pytest.MonkeyPatch.context() as patch:
        for module in full:
            patch.setattr(module, "save", no_space)
        io.save(from_proto(bn_model()), w.folder / "model.onnx")


def tuned(w, name, trials=1, file="study.db", **options):
    """Search in a study on disk."""
    bnpatch.tune_alpha(
        loaded(), MANY, granularity="global", trials=trials, holdout=0.5,
        storage=f"sqlite:///{w.folder}/{file}", study=name, **options,
    )  # fmt: skip


def stored(url):
    with usable(url):
        connect(url)


def archive(w, error=None, name="data.npz", **arrays):
    np.savez(w.folder / name, **(arrays or {"x": X.numpy(), "y": Y}))
    with pytest.MonkeyPatch.context() as patch:
        if error is not None:

            def fails(*_):
                raise error

            patch.setattr(npz, "_read", fails)
        opened(w.folder / name)


def without_network(name):
    with pytest.MonkeyPatch.context() as patch:

        def fails(*_, **__):
            raise OSError("Name or service not known")

        patch.setattr("torch.hub.download_url_to_file", fails)
        patch.setattr("torch.hub.get_dir", lambda: "/nowhere")
        load(name)


def with_network(name):
    """Load weights that are downloaded from a stand-in."""
    weights = torchvision.models.resnet18().state_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: weights)
        load(name)


def downloaded(w, arch):
    """Name the file that was downloaded elsewhere."""
    load(w.saved(getattr(torchvision.models, arch)(num_classes=3).state_dict(), f"{arch}.pth"))


CASES = {
    "a batch": (
        lambda w: predict(6),
        "not enough memory for a batch of 6",
        "lower --batch-size",
        lambda w: predict(2),
    ),
    "the three images of a probe": (
        lambda w: predict(3, room=2 * 3 * SIDE**2),
        "cpu has not enough memory for a batch of 3",
        "^set a smaller --img-size",
        lambda w: predict(3, side=4, room=2 * 3 * SIDE**2),
    ),
    "one example": (
        lambda w: predict(1, room=150),
        "cpu has not enough memory for a batch of 1",
        "^set a smaller --img-size",
        lambda w: predict(1, side=4, room=150),
    ),
    "one example on a GPU": (
        lambda w: on_the_gpu(),
        "cuda:0 has not enough memory for a batch of 1",
        "choose --device cpu, or set a smaller --img-size",
        lambda w: predict(1),  # on the CPU
    ),
    "an archive": (
        lambda w: archive(w, MemoryError()),
        "does not fit into memory",
        "give fewer examples, or a folder",
        lambda w: [archive(w, x=X[:3].numpy(), y=Y[:3]), opened(w.images("a/1.png", "b/1.png", "c/1.png"))],
    ),
    "an archive with a password": (
        lambda w: archive(w, RuntimeError("File 'x.npy' is encrypted, password required")),
        "cannot read .*File 'x.npy' is encrypted",
        "write it with numpy.savez",
        archive,
    ),
    "an archive that may not be read": (
        lambda w: archive(w, PermissionError(errno.EACCES, "Permission denied")),
        "cannot read",
        "check the path",
        archive,
    ),
    "a file for a folder": (
        lambda w: check_writable(w.file("out", "text")),
        "out: it is a file, not a folder",
        "choose another --output",
        lambda w: check_writable(w.folder / "other"),
    ),
    "another run": (
        lambda w: claim(w.folder / "out"),
        "another run of bnpatch .* writes to",
        "wait for its end, or choose another --output",
        lambda w: [claim(w.folder / "out", until_it_ends=True), check_writable(w.folder / "other")],
    ),
    "a full disk": (
        lambda w: saved(w, io.ir),
        "cannot be written: No space left on device",
        "choose another place",
        saved,
    ),
    "a device that onnxruntime has not": (
        lambda w: open_session(from_proto(bn_model()), torch.device("mps")),
        "this onnxruntime has no provider for mps",
        "use --device cpu",
        lambda w: open_session(from_proto(bn_model()), torch.device("cpu")),
    ),
    "a study of another search": (
        lambda w: [tuned(w, "one"), tuned(w, "one", seed=5)],
        "the study 'one' was made with another",
        "choose another name for this one, or another storage",
        lambda w: [tuned(w, "two", seed=5), tuned(w, "one", seed=5, file="other.db")],
    ),
    "a text for a database": (
        lambda w: stored("study"),
        "'study' is no database, and nothing else shows whether a search was killed",
        "give a database such as sqlite:///study.db",
        lambda w: stored(f"sqlite:///{w.folder}/study.db"),
    ),
    "a database that is none": (
        lambda w: stored(f"sqlite:///{w.file('other.db', 'no database ' * 99)}"),
        "cannot use sqlite",
        "give a database that can be written .*, or a new one",
        lambda w: stored(f"sqlite:///{w.folder}/new.db"),
    ),
    "weights to download": (
        lambda w: without_network("torchvision:resnet18"),
        "cannot download ResNet18_Weights",
        "check the connection, or download the weights and give the file",
        lambda w: downloaded(w, "resnet18"),
    ),
    "a name on the hub": (
        lambda w: load("timm:test_resnet.r160_in1k"),  # no test may reach for the network
        "cannot load test_resnet",
        "check the name and the connection, or download the weights and give the file",
        lambda w: load(w.checkpoint),
    ),
    "a tag that torchvision has not": (
        lambda w: without_network("torchvision:resnet18.v9"),
        "torchvision has no weights 'v9' of resnet18",
        "choose IMAGENET1K_V1",
        lambda w: with_network("torchvision:resnet18.IMAGENET1K_V1"),
    ),
}


@pytest.mark.filterwarnings("ignore")
@cases(CASES, slow=("weights to download", "a study of another search", "a database that is none"))
def test_resources(name, world):
    fails, problem, remedy, follow = CASES[name]
    followed(lambda: fails(world), problem, remedy, lambda _: follow(world))

import copy
import os
import signal
import subprocess
import sys
import warnings

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side, on small models

# A shell that starts the tests in the background has them, and what they start, ignore SIGINT.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What takes longest begins first: at the end no worker waits long for another.
LONGEST = (
    "test_processes.py",
    "test_two_processes",
    "test_browser.py",
    "test_goes_on_bit_for_bit",
)

DIGITS = 600  # of each half: enough to see an effect, few enough to be quick


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONGEST))


def pytest_addoption(parser):
    parser.addoption("--fixture-seed", type=int, default=0, help="seed of the classifier that most tests use")
    parser.addoption(
        "--on-gpu", action="store_true", help="run the models on the GPU where a test names no device"
    )


@pytest.fixture(autouse=True, scope="session")
def on_the_cpu(request):
    """Load models onto the CPU, where the tests' own tensors are; ``--on-gpu`` lets bnpatch choose."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.config.getoption("--on-gpu"):
            patch.setattr("torch.accelerator.is_available", lambda: False)
        yield


@pytest.fixture(scope="session")
def digits():
    """Handwritten digits: (images, labels) to fit a classifier to, and others."""
    from bnpatch_cli import demo

    images, labels = demo.digits()
    return (images[:DIGITS], labels[:DIGITS]), (images[-DIGITS:], labels[-DIGITS:])


@pytest.fixture(scope="session")
def classifier(digits, request):
    """A classifier of digits whose truth is known on every machine, see :mod:`tests.closed_form`."""
    from tests import closed_form

    return closed_form.fitted(*digits[0], seed=request.config.getoption("--fixture-seed"))


@pytest.fixture(scope="session")
def checkpoint(classifier, tmp_path_factory):
    """The same as a file."""
    from tests import closed_form

    path = tmp_path_factory.mktemp("digits") / "model.pt"
    closed_form.save(classifier, path)
    return path


@pytest.fixture(scope="session")
def loaded(checkpoint):
    """The file as bnpatch loads it; :func:`model` is a copy, for a test to change."""
    import bnpatch

    return bnpatch.load(checkpoint)


@pytest.fixture
def model(loaded):
    return copy.deepcopy(loaded)


@pytest.fixture(scope="session")
def clean(digits):
    """The other digits as they are: (images, labels)."""
    return digits[1]


@pytest.fixture(scope="session")
def foggy(clean, classifier):
    """The other digits, with so little contrast that the classifier knows a third: (images, labels)."""
    from tests import closed_form

    return closed_form.fog(classifier, *clean), clean[1]


@pytest.fixture(scope="session")
def folder(foggy, tmp_path_factory):
    """Some foggy digits as PNG files in a folder per class."""
    from bnpatch_cli import demo

    path = tmp_path_factory.mktemp("val")
    demo.write_folders(foggy[0][:120], foggy[1][:120], path)
    return path


@pytest.fixture(scope="session")
def exported(checkpoint, tmp_path_factory):
    """The checkpoint as ONNX, unpatched, with its Batch Norm kept."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    from bnpatch import export_onnx, load

    export_onnx(load(checkpoint), path)
    return path


@pytest.fixture(scope="session")
def folded(checkpoint, tmp_path_factory):
    """The same with every Batch Norm fused away, as most public files are."""
    import torch

    from bnpatch import load

    module = load(checkpoint).module
    path = tmp_path_factory.mktemp("folded") / "model.onnx"
    batch = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.onnx.export(
        module, (torch.zeros(2, 1, 32, 32),), dynamo=True, dynamic_shapes=batch, verbose=False
    )
    program.save(path)
    return path


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Run a command in an empty folder; returns (exit code, stdout, stderr)."""
    from bnpatch_cli import main

    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["bnpatch", *map(str, args)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


@pytest.fixture
def living():
    """The id of a process that lives as long as the test."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.kill()
    process.communicate()

"""Optional packages that are not installed: the extra that a message names has them, and they are enough."""

import re
import sys
from importlib.metadata import requires

import pytest

from bnpatch.core.errors import BnpatchError
from bnpatch.data.standard_corruptions import check_installed
from bnpatch.finetune.config import FineTuneSettings
from bnpatch.finetune.engine import new_accelerator
from bnpatch.search.distributed import Processes
from bnpatch.search.storages import connect, usable
from bnpatch.search.trackers import tracker
from bnpatch_cli.demo import digits
from tests.remedies.world import cases, followed, loaded

CASES = {  # what fails, the module that is missing, the package that has it, and what is said
    "corruptions": (
        lambda path: check_installed(),
        "imagecorruptions",
        "imagecorruptions-imaug",
        "the standard corruptions need",
        "pip install 'bnpatch[robustness]'",
    ),
    "training": (
        lambda path: new_accelerator(FineTuneSettings(), loaded().device),
        "accelerate",
        "accelerate",
        "fine-tuning needs accelerate",
        "pip install 'bnpatch[fine-tune]'",
    ),
    "processes": (
        lambda path: Processes(),
        "accelerate",
        "accelerate",
        "several processes need accelerate",
        "pip install 'bnpatch[distributed]', or start one",
    ),
    "demo": (
        lambda path: digits(),
        "sklearn.datasets",
        "scikit-learn",
        "the demo needs scikit-learn",
        "pip install 'bnpatch[demo]'",
    ),
    "tensorboard": (
        lambda path: tracker("tensorboard", "accuracy", path),
        "torch.utils.tensorboard",
        "tensorboard",
        "tensorboard is not installed",
        "pip install 'bnpatch[tensorboard]'",
    ),
    "wandb": (
        lambda path: tracker("wandb", "accuracy", path),
        "wandb",
        "wandb",
        "wandb is not installed",
        "pip install 'bnpatch[wandb]'",
    ),
}


@cases(CASES, slow=("wandb", "processes"))
def test_a_package_that_is_not_installed(name, tmp_path, monkeypatch):
    use, module, package, problem, remedy = CASES[name]
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module, None)
        with pytest.raises(BnpatchError) as error:
            use(tmp_path)
    assert error.value.problem.startswith(problem)
    assert error.value.remedy == remedy
    extra = re.search(r"pip install 'bnpatch\[(.+)\]'", error.value.remedy)[1]
    assert any(re.match(rf"{package}\b.*extra == .{extra}.$", wanted) for wanted in requires("bnpatch"))
    use(tmp_path)


def test_a_database_without_its_driver(tmp_path):
    def used(url):
        with usable(url):
            connect(url)

    for url in ("mysql://name:secret@host/db", "postgress://name:secret@host/db"):
        followed(
            lambda url=url: used(url),
            "cannot use (mysql|postgress)",
            "install its driver, or give a database such as sqlite:///study.db",
            lambda _: used(f"sqlite:///{tmp_path}/study.db"),
        )


def test_a_driver_without_its_libraries(monkeypatch):
    """OpenCV with windows needs libraries that servers don't have."""

    class Broken:
        def find_spec(self, name, *_):
            if name == "imagecorruptions":
                raise ImportError("libGL.so.1: cannot open shared object file")

    for name in [name for name in sys.modules if name.startswith("imagecorruptions")]:
        monkeypatch.delitem(sys.modules, name)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
        with pytest.raises(BnpatchError, match=r"libGL.*pip install opencv-python-headless"):
            check_installed()
    check_installed()

import shutil

import pytest

from tests.command_line import QUICK, run_in


@pytest.fixture(scope="session")
def tuned(checkpoint, folder, tmp_path_factory):
    """A folder with the results of a search, at another size of images than the checkpoint's own."""
    place = tmp_path_factory.mktemp("tuned")
    run_in(place, "tune-alpha", checkpoint, "--data", folder, "--img-size", 48, *QUICK)
    return place / "bnpatch-out"


@pytest.fixture(scope="session")
def flat(folder, tmp_path_factory):
    """Images without labels, in a plain folder."""
    place = tmp_path_factory.mktemp("flat")
    for number, path in enumerate(sorted(folder.glob("*/*.png"))[:20]):
        shutil.copy(path, place / f"{number}.png")
    return place


@pytest.fixture(scope="session")
def plain(checkpoint, flat, tmp_path_factory):
    """The checkpoint as the command exports it without a recipe, and what the command says."""
    place = tmp_path_factory.mktemp("plain")
    out, _ = run_in(place, "export", checkpoint, "--data", flat, "-o", "model.onnx")
    return place / "model.onnx", out

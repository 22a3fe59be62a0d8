import copy

import pytest

import bnpatch
from bnpatch.search import tune
from tests import closed_form
from tests.search.tiny import classifier, small


@pytest.fixture(scope="session", autouse=True)
def quick():
    """The latency of a small network is measured sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "LATENCY_SECONDS", 0.3)
        yield


@pytest.fixture(scope="session")
def tiny_module(digits, request):
    images, labels = digits[0]
    return classifier(small(images), labels, request.config.getoption("--fixture-seed"))


@pytest.fixture
def tiny(tiny_module):
    """A classifier that takes no time, see :mod:`tests.search.tiny`."""
    return bnpatch.load(copy.deepcopy(tiny_module))


@pytest.fixture(scope="session")
def tiny_onnx(tiny_module, tmp_path_factory):
    """The same as ONNX, with its Batch Norm kept."""
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    bnpatch.export_onnx(bnpatch.load(copy.deepcopy(tiny_module)), path)
    return path


@pytest.fixture(scope="session")
def plain(clean):
    """The other digits as the tiny classifier takes them: (images, labels)."""
    return small(clean[0]), clean[1]


@pytest.fixture(scope="session")
def dim(plain, tiny_module):
    """The same with so little contrast that the tiny classifier knows a third of them."""
    return closed_form.fog(tiny_module, *plain), plain[1]


@pytest.fixture
def url(tmp_path):
    """Where a study may be kept."""
    return f"sqlite:///{tmp_path}/study.db"

"""The wheel is complete: both packages, the index, the type marker, and the command."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import bnpatch

ROOT = Path(__file__).parents[1]


def run(*command, **kwargs):
    return subprocess.run(command, check=True, capture_output=True, text=True, **kwargs).stdout


@pytest.mark.slow
def test_the_wheel_installs_and_runs(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("bnpatch", "cli"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), str(source))
    (wheel,) = tmp_path.glob("bnpatch-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "bnpatch").rglob("*.py")}
    modules |= {f"bnpatch_cli/{p.name}" for p in (ROOT / "cli").glob("*.py")}
    assert modules | {
        "bnpatch/py.typed",
        "bnpatch/__init__.pyi",
        "bnpatch/models/architectures.json",
        "bnpatch/report/report.css",
        "bnpatch/report/report.html.j2",
    } <= set(names)
    assert not [
        name
        for name in names
        if name.split("/")[0] not in ("bnpatch", "bnpatch_cli", wheel.stem.rsplit("-py3")[0] + ".dist-info")
    ]

    site = tmp_path / "site"
    run(*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    environment = {**os.environ, "PYTHONPATH": str(site)}
    version = run(str(site / "bin" / "bnpatch"), "--version", env=environment, cwd=tmp_path)
    assert version.startswith(f"bnpatch {bnpatch.__version__},")
    code = "import bnpatch, bnpatch_cli; print(bnpatch.__file__, bnpatch_cli.__file__)"
    for path in run(sys.executable, "-c", code, env=environment, cwd=tmp_path).split():
        assert Path(path).is_relative_to(site)


def test_the_package_offers_what_its_stub_says():
    stub = ast.parse((ROOT / "bnpatch" / "__init__.pyi").read_text())
    names = {alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names == set(bnpatch.__all__)
    for name in bnpatch.__all__:
        assert getattr(bnpatch, name).__name__ == name
    with pytest.raises(AttributeError, match="nope"):
        bnpatch.nope  # noqa: B018


@pytest.mark.parametrize("statement", ["import bnpatch", "import bnpatch_cli.app"])
def test_starting_is_quick(statement):
    heavy = "torch", "timm", "optuna", "matplotlib", "jinja2", "scipy", "numpy"
    code = f"import sys; {statement}; sys.exit(', '.join(m for m in {heavy} if m in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

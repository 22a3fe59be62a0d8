"""Imports go strictly downward: each module may import only from floors below its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bnpatch

ROOT = Path(bnpatch.__file__).parent
FLOORS = {
    "advice": 0,
    "data.decoding": 0,
    "errors": 0,
    "graph.constants": 0,
    "graph.expr": 0,
    "graph.shapes": 0,
    "moments": 0,
    "report.confusion": 0,
    "report.markup": 0,
    "search.progress": 0,
    "data.classes": 1,
    "data.examples": 1,
    "data.preprocessing": 1,
    "devices": 1,
    "files": 1,
    "graph.group_norm": 1,
    "graph.read": 1,
    "loading.architecture": 1,
    "loading.checkpoint": 1,
    "metrics": 1,
    "nn.norm": 1,
    "nn.observe": 1,
    "search.storages": 1,
    "setting": 1,
    "sites": 1,
    "spec": 1,
    "confidence": 2,
    "data.augment": 2,
    "data.images": 2,
    "finetune.state": 2,
    "graph.match": 2,
    "graph.metadata": 2,
    "graph.session": 2,
    "nn.surgery": 2,
    "nn.training_norm": 2,
    "recipe": 2,
    "search.objectives": 2,
    "search.parts": 2,
    "search.studies": 2,
    "search.plan": 2,
    "search.walk": 2,
    "to_graph": 2,
    "decay": 3,
    "finetune.moments": 3,
    "graph.forms": 3,
    "nn.conversion": 3,
    "nn.folded": 3,
    "nn.functional": 3,
    "nn.paths": 3,
    "patchable": 3,
    "search.standings": 3,
    "data.folders": 4,
    "evaluation": 4,
    "finetune.settings": 4,
    "graph.folded": 4,
    "graph.rewrite": 4,
    "model": 4,
    "search.schedule": 4,
    "data.sources": 5,
    "finetune.data": 5,
    "finetune.engine": 5,
    "onnx_model": 5,
    "output_range": 5,
    "search.judge": 5,
    "search.learn": 5,
    "search.race": 5,
    "search.insurance": 5,
    "bench": 6,
    "finetune.head": 6,
    "finetune.loop": 6,
    "loading.onnx_file": 6,
    "processes": 6,
    "search.goal": 6,
    "search.scoreboard": 6,
    "search.selection": 7,
    "search.verdict": 6,
    "finetune.choose": 7,
    "loading.load": 7,
    "search.trade_off": 7,
    "calibration": 8,
    "export": 8,
    "search.sparse": 8,
    "search.result": 8,
    "search.ladder": 9,
    "search.make_sites": 9,
    "report.summary": 9,
    "search.job": 10,
    "report.curves": 10,
    "search.tune": 11,
    "report.charts": 11,
    "finetune.ablation": 12,
    "finetune.run": 12,
    "report.details": 12,
    "report.findings": 12,
    "report.page": 13,
    "report.files": 14,
    "data": 15,
    "finetune": 15,
    "graph": 15,
    "loading": 15,
    "nn": 15,
    "report": 15,
    "search": 15,
    "": 15,
}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


def imports(path):
    """Modules of bnpatch that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "bnpatch":
            yield from (alias.name for alias in node.names if not alias.name.startswith("__"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bnpatch."):
            module = node.module.removeprefix("bnpatch.")
            inner = [f"{module}.{alias.name}" for alias in node.names if f"{module}.{alias.name}" in FLOORS]
            yield from inner or [module]
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("bnpatch.") for a in node.names if a.name.startswith("bnpatch."))


def test_every_module_has_a_floor():
    assert {name for name, _ in modules()} == set(FLOORS)


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=[name or "bnpatch" for name, _ in modules()])
def test_imports_go_strictly_downward(name, path):
    upward = [other for other in imports(path) if FLOORS[other] >= FLOORS[name]]
    assert not upward


def test_the_package_offers_what_its_index_says():
    for name in bnpatch.__all__:
        assert getattr(bnpatch, name).__name__ == name
    tree = ast.parse((ROOT / "__init__.py").read_text())
    typed = {a.asname for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names if a.asname}
    assert typed == set(bnpatch.__all__)
    with pytest.raises(AttributeError, match="nope"):
        bnpatch.nope  # noqa: B018


@pytest.mark.parametrize("statement", ["import bnpatch", "import bnpatch_cli.app"])
def test_starting_is_quick(statement):
    heavy = "torch", "timm", "optuna", "matplotlib", "scipy", "numpy"
    code = f"import sys; {statement}; sys.exit(', '.join(m for m in {heavy} if m in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""Recipes on the hub, against a local stand-in of its HTTP interface."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bnpatch.core import hub
from bnpatch.core.errors import BnpatchError
from bnpatch.core.recipe import NormRecipe, Recipe

ESTIMATE = {"value": 0.5, "low": 0.25, "high": 0.75}
RECIPE = Recipe(
    (NormRecipe("bn1", "BatchNorm2d", 0.125, "aa"), NormRecipe("bn2", "BatchNorm2d", 0.0, "bb")),
    {
        "architecture": "timm:resnet18",
        "metric": "accuracy",
        "data": {"name": "field", "tuning_examples": 200, "held_out_examples": 100},
        "verdict": "gain",
        "held_out": {
            "accuracy": {"before": ESTIMATE, "after": ESTIMATE, "change": ESTIMATE},
            "flips": {"gained": 1},
        },
    },
)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as makes a repository, takes a commit, and gives files back."""

    def log_message(self, *_):
        pass

    def _answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value):
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server, address = self.server, f"http://127.0.0.1:{self.server.server_port}"
        server.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            name = json.loads(body)
            server.repository = f"{name['organization']}/{name['name']}"
            self._json({"url": f"{address}/{server.repository}", "name": server.repository})
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self.path == f"/api/models/{server.repository}/preupload/main":
            files = json.loads(body)["files"]
            self._json(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
                    ]
                }
            )
        elif self.path == f"/api/models/{server.repository}/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._json(
                {
                    "success": True,
                    "commitOid": "c" * 40,
                    "commitUrl": f"{address}/{server.repository}/commit/c",
                }
            )
        else:
            self._answer(404)

    def do_GET(self):
        start = f"/{self.server.repository}/resolve/main/"
        content = (
            self.server.files.get(self.path.removeprefix(start)) if self.path.startswith(start) else None
        )
        if content is None:
            self._answer(404, X_Error_Code="EntryNotFound" if self.path.startswith(start) else "RepoNotFound")
        else:
            self._answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit="c" * 40)

    do_HEAD = do_GET  # noqa: N815 - as http.server names it


@pytest.fixture
def server():
    """The stand-in, and what came to it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.tokens, server.repository = {}, set(), "nobody/nothing"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def python(server, home, code):
    """Run code in a process whose hub is the stand-in."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=home, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_recipe_is_written_and_read(server, tmp_path):
    RECIPE.save(tmp_path / "mine.json")
    pushed = python(
        server,
        tmp_path,
        "import bnpatch; r = bnpatch.Recipe.load('mine.json');"
        "print(r.push_to_hub('org/name', token='hf_secret', license='mit', base_model='timm/resnet18'))",
    )
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.strip().endswith("/org/name/commit/c")
    assert server.tokens == {"Bearer hf_secret"}
    assert Recipe.from_json(json.loads(server.files["recipe.json"])) == RECIPE
    read = python(
        server,
        tmp_path,
        "import bnpatch; bnpatch.Recipe.load('hf-hub:org/name').save('theirs.json')",
    )
    assert read.returncode == 0, read.stderr
    assert Recipe.load(tmp_path / "theirs.json") == RECIPE
    missing = python(server, tmp_path, "import bnpatch; bnpatch.Recipe.load('hf-hub:org/other')")
    assert "BnpatchError: cannot read recipe.json of hf-hub:org/other" in missing.stderr


def test_without_the_hub_there_is_one_line():
    with pytest.raises(BnpatchError, match=r"cannot read recipe.json of hf-hub:org/name: .*; check the name"):
        Recipe.load("hf-hub:org/name")  # the tests are offline
    with pytest.raises(BnpatchError, match=r"cannot write to hf-hub:org/name: .*logged in"):
        RECIPE.push_to_hub("org/name", token="hf_secret")


def test_the_card_says_what_was_tuned_and_how_it_is_applied():
    card = hub.card(RECIPE, "org/name", "mit", "timm/resnet18")
    assert card.startswith("---\nlibrary_name: bnpatch\nlicense: mit\nbase_model: timm/resnet18\ntags:")
    for part in (
        "Model: timm:resnet18",
        "Norm layers that weight the example: 1 of 2",
        "Tuned for accuracy on field, 200 examples",
        "On 100 examples that the search did not see",
        "| accuracy | 0.5000 | 0.5000 | +0.5000 [+0.2500, +0.7500] |",
        'bnpatch.apply(model, "hf-hub:org/name")',
    ):
        assert part in card
    assert "flips" not in card
    assert "not recommended" in hub.card(Recipe(RECIPE.norm_layers, {"recommended": False}), "org/name")
    assert "\x1b" not in hub.card(Recipe(RECIPE.norm_layers, {"verdict": "\x1b[31mgain"}), "org/name")

"""Names and addresses from elsewhere, made fit to be shown."""

import shutil
import sys

import pytest
import torch

from bnpatch.core.text import masked, visible
from bnpatch_cli.tune import _command
from tests.test_cli import QUICK, cli, one_line  # noqa: F401 - a fixture


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("postgresql://me:se/c:r@t@host/db", "postgresql://me:***@host/db"),
        ("postgresql+psycopg2://:secret@host:5432/db", "postgresql+psycopg2://:***@host:5432/db"),
        ("mysql://host/db?user=me&password=secret&x=1", "mysql://host/db?user=me&password=***&x=1"),
        ("postgres:/me:secret@host/db", "postgres:/me:***@host/db"),
        ("me:secret@host/db", "me:***@host/db"),
        ("postgresql://me@host:5432/db", "postgresql://me@host:5432/db"),
        ("sqlite:////a/b:c@d.db", "sqlite:////a/b:c@d.db"),
        ("x.db", "x.db"),
    ],
)
def test_passwords_of_databases_are_masked(place, shown):
    assert masked(place) == shown
    assert masked(place, f"no {place} here") == f"no {shown} here"
    assert masked("a://b:se%40cret@c", "at se@cret and se%40cret") == "at *** and ***"


def test_a_password_reaches_neither_the_terminal_nor_a_recipe(cli, checkpoint, folder, monkeypatch):  # noqa: F811
    # There is no such kind of database, and then no name of any kind.
    for storage in ("nosuch://me:geheim@host/db", "me:geheim@host/db"):
        code, out, err = cli("tune-alpha", checkpoint, "--data", folder, "--storage", storage, *QUICK)
        assert code == 2
        assert "me:***@host/db" in one_line(err)
        assert "geheim" not in out + err
        for words in (["--storage", storage], [f"--storage={storage}"]):
            monkeypatch.setattr(sys, "argv", ["bnpatch", "tune-alpha", "a b", *words])
            assert "geheim" not in _command(storage)
            assert "me:***@host/db" in _command(storage)
            assert _command(storage).startswith("tune-alpha 'a b' ")


ODD = "a\x1b[31m\u202eb"  # red from here on, and backwards
ESCAPED = r"a\x1b[31m\u202eb"


def test_what_acts_on_a_terminal_is_escaped():
    assert visible(ODD) == ESCAPED
    assert visible("a\nb\x9b\u2028\udce4\u2067", keep="\n") == r"a" + "\n" + r"b\x9b\u2028\udce4\u2067"
    assert visible("grün 猫 naïve\\x") == "grün 猫 naïve\\x"


def test_names_do_not_act_on_the_terminal_or_the_report(cli, checkpoint, folder, tmp_path):  # noqa: F811
    model, data = f"{ODD}\n.pt", tmp_path / ODD
    shutil.copytree(folder, data)
    (data / "3").rename(data / f"3{ODD}")
    content = torch.load(checkpoint, weights_only=True)
    content["class_names"] = [f"3{ODD}" if name == "3" else name for name in content["class_names"]]
    torch.save(content, tmp_path / model)
    (data / "0" / f"{ODD}.png").write_bytes(b"nothing")
    said = [
        cli("tune-alpha", model, "--data", data, "-o", ODD + "out", *QUICK),
        cli("inspect", model, "--sites"),
        cli("evaluate", checkpoint, "--data", data),
        cli("inspect", f"{ODD}.onnx"),
    ]
    assert [code for code, _, _ in said] == [0, 0, said[2][0], 2]
    assert all(ESCAPED in out + err for _, out, err in said)
    report = (tmp_path / f"{ODD}out" / "report.html").read_text()
    assert ESCAPED in report
    for text in (report, *(part for _, out, err in said for part in (out, err))):
        assert not {"\x1b", "\u202e"} & set(text)

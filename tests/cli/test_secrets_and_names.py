"""What the commands never print: passwords, and names that act on a terminal."""

import os
import shutil
import sys

import pytest
import torch

from bnpatch_cli import recipes
from tests.command_line import QUICK, one_line
from tests.core.test_text import ESCAPED, ODD


def test_a_password_reaches_neither_the_terminal_nor_a_recipe(cli, checkpoint, folder, monkeypatch):
    # There is no such kind of database, and then no name of any kind.
    for storage in ("nosuch://me:geheim@host/db", "me:geheim@host/db"):
        code, out, err = cli("tune-alpha", checkpoint, "--data", folder, "--storage", storage, *QUICK)
        assert code == 2
        assert "me:***@host/db" in one_line(err)
        assert "geheim" not in out + err
        for words in (["--storage", storage], [f"--storage={storage}"]):
            monkeypatch.setattr(sys, "argv", ["bnpatch", "tune-alpha", "a b", *words])
            assert "geheim" not in recipes.command(storage)
            assert "me:***@host/db" in recipes.command(storage)
            assert recipes.command(storage).startswith("tune-alpha 'a b' ")


def test_names_of_files_and_classes_need_not_be_text(cli, checkpoint, folder, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    del content["class_names"]
    torch.save(content, "model.pt")
    shutil.copytree(folder, "val")
    try:
        os.rename(b"val/9", b"val/n\xffne")
        (tmp_path / "val" / "3" / os.fsdecode(b"\xfe.png")).write_bytes(b"nothing")
        for path in (tmp_path / "val" / "4").iterdir():
            path.rename(path.with_name(os.fsdecode(b"\xfd") + path.name))
    except OSError:
        pytest.skip("the file system has names of text only")
    code, _, err = cli("tune-alpha", "model.pt", "--data", "val", *QUICK)
    assert code == 0, err
    assert r"left out, because they can't be read: 1 (3/\udcfe.png)" in err
    assert "report.html" in {path.name for path in (tmp_path / "bnpatch-out").iterdir()}
    assert cli("evaluate", "bnpatch-out/patched.pt", "--data", "val", "-j", 0)[0] == 0


@pytest.mark.slow
def test_names_do_not_act_on_the_terminal_or_the_report(cli, checkpoint, folder, tmp_path):
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

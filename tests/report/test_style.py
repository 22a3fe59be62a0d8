"""The colours of the report can be told apart by people who see contrast less well (WCAG 2.2, level AA)."""

import re
from pathlib import Path

import pytest

import bnpatch

STYLE = (Path(bnpatch.__file__).parent / "report" / "report.css").read_text()
SCHEMES = dict(zip(("light", "dark", "print"), re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL), strict=True))


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_contrast(scheme):
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})\b", SCHEMES[scheme]))

    def contrast(a, b):
        low, high = sorted(luminance(colours[name]) for name in (a, b))
        return (high + 0.05) / (low + 0.05)

    assert {
        name: round(contrast(name, "paper"), 1)
        for name in ("ink", "muted", "good", "bad")
        if contrast(name, "paper") < 4.5
    } == {}
    assert {
        name: round(contrast(name, "panel"), 1) for name in ("ink", "muted") if contrast(name, "panel") < 4.5
    } == {}
    assert {
        name: round(contrast(name, "paper"), 1) for name in ("data", "pale") if contrast(name, "paper") < 3
    } == {}


def test_every_colour_has_a_name():
    rules = re.sub(r":root \{.*?\}", "", STYLE, flags=re.DOTALL)
    assert not re.search(r"#[0-9a-fA-F]{3}|rgb|url\(|@import", rules)
    assert set(re.findall(r"var\(--(\w+)\)", rules)) <= set(re.findall(r"--(\w+):", STYLE))

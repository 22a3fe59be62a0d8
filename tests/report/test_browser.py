"""The report in a browser: nothing overflows on a phone, nothing is fetched, and it prints."""

import re
import shutil
import subprocess
from dataclasses import replace

import pytest

import bnpatch
from bnpatch.report.files import write_results

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH"),
    # A classifier may do no better than guessing in fog.
    pytest.mark.filterwarnings("ignore:the model is right on:bnpatch.core.errors.BnpatchWarning"),
]

LONG = "an_unreasonably_long_name_without_any_place_to_break_it_" * 3

# The report in a frame of the width of a screen; once it is there, the title says how wide it came out.
FRAME = """<!doctype html><title>waiting</title>
<iframe src="report.html" style="border:0;width:{width}px;height:800px"></iframe>
<script>
  document.querySelector("iframe").onload = event => {{
    const view = event.target.contentWindow, page = view.document;
    page.querySelectorAll("details").forEach(each => each.open = true);
    const beyond = [...page.body.querySelectorAll("*")].filter(
      each => each.getBoundingClientRect().right > {width} + 0.5);
    document.title = JSON.stringify({{
      width: page.documentElement.scrollWidth,
      beyond: beyond.map(each => each.tagName + "." + (each.getAttribute("class") || "")).slice(0, 5),
      dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
      paper: view.getComputedStyle(page.body).backgroundColor,
    }}).replaceAll('"', "'");
  }};
</script>
"""


@pytest.fixture(scope="module")
def report(checkpoint, foggy, tmp_path_factory):
    """A report with long names in it."""
    model = bnpatch.load(checkpoint)
    result = bnpatch.tune_alpha(model, foggy, granularity="global", trials=5)
    model.name = LONG
    model.class_names = (LONG, *map(str, range(1, 10)))
    folder = tmp_path_factory.mktemp("report")
    write_results(replace(result, notes=[LONG], skipped={LONG: "truncated"}), model, folder)
    return folder / "report.html"


def browse(page, *options):
    """Standard output of the browser, and what it logged."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",  # in a container there is nothing to make one of
        "--disable-gpu",
        "--hide-scrollbars",  # as phones do
        "--disable-background-networking",
        "--enable-logging=stderr",
        "--allow-file-access-from-files",  # the frame looks into the report
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--virtual-time-budget=5000",
        f"--user-data-dir={page.parent / 'profile'}",
        *options,
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_nothing_overflows(report, width, scheme):
    frame = report.parent / "frame.html"
    frame.write_text(FRAME.format(width=width))
    chosen = f"--blink-settings=preferredColorScheme={('dark', 'light').index(scheme)}"
    content, console = browse(frame, "--dump-dom", "--window-size=1400,900", chosen)
    (seen,) = re.findall(r"<title>(.*?)</title>", content)
    paper = {"dark": "rgb(17, 23, 29)", "light": "rgb(255, 255, 255)"}[scheme]
    dark = str(scheme == "dark").lower()
    assert seen == f"{{'width':{width},'beyond':[],'dark':{dark},'paper':'{paper}'}}"
    assert not console  # the page's own policy would complain here of anything fetched


def test_the_policy_would_complain(report, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(
        report.read_text().replace("</main>", '<img src="https://example.org/x.png" alt=""></main>')
    )
    _, console = browse(page, "--dump-dom")
    assert any("Content Security Policy" in line for line in console)


def test_prints(report, tmp_path):
    _, console = browse(report, f"--print-to-pdf={tmp_path / 'report.pdf'}", "--no-pdf-header-footer")
    content = (tmp_path / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 13  # names of 168 letters take most of it
    assert not console

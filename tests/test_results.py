"""docs/results.md says what was measured, and what it claims holds."""

import json
import re

import pytest

from tests.benchmarks import results
from tests.benchmarks.claims import CLAIMS
from tests.benchmarks.results_page import FOLDER, PAGE, TEMPLATE, page, read_results

RESULTS = read_results()


@pytest.mark.parametrize("name", CLAIMS)
def test_what_the_page_claims_was_measured(name):
    assert CLAIMS[name](RESULTS)[0]


def test_the_page_is_made_of_the_measurements():
    """Else: python -m tests.benchmarks.results --page"""
    assert page(RESULTS) == PAGE.read_text()


def test_each_claim_is_on_the_page_once():
    assert sorted(re.findall(r'claim\("(\w+)"\)', TEMPLATE.read_text())) == sorted(CLAIMS)


def test_each_measurement_is_on_the_page():
    named = set(re.findall(r'measured\("(\w+)"\)', TEMPLATE.read_text()))
    assert named == set(RESULTS) == set(results.BENCHMARKS)


@pytest.mark.parametrize(("change", "code"), [({}, 0), ({"after": 0.2}, 1)], ids=["as measured", "changed"])
def test_a_claim_that_no_longer_holds_fails_the_script(change, code, tmp_path, monkeypatch, capsys):
    for path in FOLDER.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    measured = json.loads((tmp_path / "candidates.json").read_text())
    measured["rows"] = [row | change if row["shift"] == "contrast x 0.4" else row for row in measured["rows"]]
    (tmp_path / "candidates.json").write_text(json.dumps(measured))
    monkeypatch.setattr("sys.argv", ["results", "--page", "--output", str(tmp_path)])
    assert results.main() == code
    assert ("no longer true: shared_shift" in capsys.readouterr().err) == bool(code)

# make demo   sets up, trains a small classifier on real digits, tunes it for a shifted camera (some minutes)
# make test   sets up, runs the tests (4 minutes on 2 cores)
# make slow   sets up, runs the tests that are marked slow
# make docs   sets up, builds the site into build/site
# make check  sets up, runs what continuous integration checks besides the tests: ruff and mypy
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test slow docs check format clean

# The stamp is newer than pyproject.toml when everything that it asks for is installed.
.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: .venv/.installed
	$(BIN)/bnpatch demo --output demo

test: .venv/.installed
	$(BIN)/python -m pytest

slow: .venv/.installed
	$(BIN)/python -m pytest -m slow

demo/bnpatch-out/report.html: .venv/.installed
	$(BIN)/bnpatch demo --output demo

docs: demo/bnpatch-out/report.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

check: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv demo build dist *.egg-info

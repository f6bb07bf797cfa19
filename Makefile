PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check docs clean

demo: .venv/installed
	$(BIN)/fastmtp demo

test: check
	$(BIN)/pytest

check: .venv/installed
	$(BIN)/ruff check src tests tools
	$(BIN)/ruff format --check src tests tools
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

.venv/installed: pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

docs: .venv/installed
	$(BIN)/python -m tools.command_help > docs/commands.md.new && mv docs/commands.md.new docs/commands.md

clean:
	rm -rf .venv

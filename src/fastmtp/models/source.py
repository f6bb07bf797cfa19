"""Sources of a target: a packaged model, a Hugging Face directory, a GGUF file, or a hub id."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fastmtp.addresses import without_secrets
from fastmtp.errors import PARSING, reason
from fastmtp.files import check_links, read_json
from fastmtp.models.config import FULL, ModelConfig, check_supported, ids_of
from fastmtp.models.families import ALIASES, FAMILIES, ONLY_TORCH
from fastmtp.models.gguf_config import gguf_config
from fastmtp.models.gguf_file import gguf_parts, read_gguf
from fastmtp.models.gguf_tokenizer import end_ids as gguf_end_ids
from fastmtp.models.gguf_tokenizer import gguf_tokenizer
from fastmtp.models.info import TargetInfo
from fastmtp.models.packaged import file_of
from fastmtp.models.packaged_models import MODELS
from fastmtp.models.quantization import Quantization, quantization
from fastmtp.models.rope import ropes
from fastmtp.models.tensors import check_tensors, family
from fastmtp.models.tokenizer import Tokenizer, directory_tokenizer
from fastmtp.models.weights import (
    GgufWeights,
    SafetensorsWeights,
    Weights,
    directory_weights,
    has_tied_head,
    weight_paths,
)

_DESCRIPTION = ["*.json", "*.jinja", "*.txt", "*.model"]
_READ = [*_DESCRIPTION, "*.safetensors"]


@dataclass(frozen=True)
class Source:
    """A located model: `location` is its directory or hub id, `gguf` its file if it is a GGUF file."""

    name: str
    location: str
    gguf: Path | None = None

    @cached_property
    def directory(self) -> Path:
        """The Hugging Face directory; for a hub id it is fetched without the weights."""
        return self._local() or _fetched(self.location, _DESCRIPTION)

    def read_config(self) -> Any:
        """The configuration: a `ModelConfig` if the native engine runs the model, else transformers' own.

        Raises:
            ValueError: no engine runs such a model.
        """
        if self.gguf is not None:
            return gguf_config(read_gguf(self.gguf), self.name)
        values = self._config_json()
        check_supported(values, self.name)
        if values["model_type"] in ONLY_TORCH:
            return self.read_any_config()
        return ModelConfig.from_json(values, self.name)

    def read_any_config(self) -> Any:
        """transformers' configuration of a model of any kind; for an alias, of the model that it runs as."""
        from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

        values = {} if self.gguf is not None else self._config_json()
        kind = values.get("model_type")
        if self.gguf is not None or kind in (*FAMILIES, *ALIASES):
            return transformers_config(self.read_config())
        if kind not in CONFIG_MAPPING:
            return PreTrainedConfig.from_dict(values)
        return AutoConfig.from_pretrained(self.directory, trust_remote_code=False)

    def _config_json(self) -> dict[str, Any]:
        try:
            return read_json(self.directory / "config.json")
        except ValueError as error:
            raise ValueError(f"{self.name}: damaged or incomplete: {error}") from error

    def read_tokenizer(self) -> Tokenizer:
        if self.gguf is not None:
            return gguf_tokenizer(read_gguf(self.gguf), self.name)
        return directory_tokenizer(self.directory)

    def end_ids(self) -> list[int]:
        """Tokens that end an answer besides those of the configuration and the tokenizer."""
        if self.gguf is not None:
            return gguf_end_ids(read_gguf(self.gguf))
        path = self.directory / "generation_config.json"
        return ids_of(read_json(path).get("eos_token_id"), f"{path}: eos_token_id") if path.is_file() else []

    def weight_files(self) -> list[Path]:
        """The files that hold the tensors."""
        if self.gguf is not None:
            return gguf_parts(self.gguf)
        return weight_paths(self._with_weights())

    def open_weights(self) -> GgufWeights | SafetensorsWeights:
        """The tensors; those of a hub id are fetched first."""
        if self.gguf is not None:
            file = read_gguf(self.gguf)
            return GgufWeights(file, gguf_config(file, self.name))
        return directory_weights(self._with_weights(), self.quantization())

    def quantization(self) -> Quantization | None:
        """How the tensors of a Hugging Face directory are quantised; None if they are not.

        Raises:
            ValueError: the method is not supported.
        """
        if self.gguf is not None:
            return None
        return quantization(self._config_json().get("quantization_config"), self.name)

    def _with_weights(self) -> Path:
        return self._local() or _fetched(self.location, _READ)

    def _local(self) -> Path | None:
        """The directory, if the model is no hub id; none of the files that are read is a link out of it."""
        directory = Path(self.location)
        if not directory.is_dir():
            return None
        check_links(path for pattern in _READ for path in sorted(directory.glob(pattern)))
        return directory


def _fetched(hub_id: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(hub_id, allow_patterns=patterns))


def open_model(source: Source) -> tuple[ModelConfig, Weights]:
    """A model's configuration and tensors, which fit each other and which every engine runs.

    The tensors decide whether the LM head is tied.

    Raises:
        ValueError: the model runs in transformers only, a setting is not supported, or a tensor is missing, has
            another shape or type, or has no place in the model.
    """
    config = source.read_config()
    if not isinstance(config, ModelConfig):
        raise ValueError(
            f"{source.name}: architecture {config.model_type!r} runs in PyTorch only; give --engine torch"
        )
    weights = source.open_weights()
    check_tensors(config, weights.shapes(), source.name)
    ropes(config, sorted({*config.layer_types, FULL}), weights.rope_factors, source.name)
    return replace(config, tie_word_embeddings=has_tied_head(weights)), weights


def transformers_config(config: ModelConfig) -> Any:
    """A configuration as transformers' own class."""
    from transformers import CONFIG_MAPPING

    own = CONFIG_MAPPING[config.model_type]
    values = asdict(config) | {
        "hidden_activation": config.hidden_act,
        "layer_types": list(config.layer_types),
        "use_sliding_window": config.sliding_window is not None,
    }
    # Every class takes `head_dim`, though not all declare it.
    known = {"head_dim", *(field.name for field in fields(own))}
    return own(**{name: value for name, value in values.items() if name in known})


def locate(name: str) -> Source:
    """Find a model by what a user calls it.

    Raises:
        FileNotFoundError: there is no such file or directory.
        ValueError: the file is not a GGUF file.
    """
    path = file_of(name) or Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"{name}: no such GGUF file")
        with path.open("rb") as stream:
            magic = stream.read(4)
        if magic != b"GGUF":
            raise ValueError(f"{name}: not a GGUF file (it does not start with GGUF)")
        return Source(name, str(path.parent), path)
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{name}: has no config.json; give a Hugging Face model directory")
        return Source(name, str(path))
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(
            f"{without_secrets(name) or 'an empty name'}: no such model; give {' or '.join(MODELS)}, a Hugging "
            "Face directory, a .gguf file, or a hub id such as Qwen/Qwen3-0.6B"
        )
    return Source(name, name)


def describe(name: str) -> TargetInfo:
    """A target without its weights.

    Raises:
        FileNotFoundError, ValueError: as for loading the target.
    """
    source = locate(name)
    with reading(source):
        config = source.read_config()
        return TargetInfo(config, source.end_ids(), source.read_tokenizer(), model_class(config), name)


def model_class(config: Any) -> str:
    """transformers' name of the model's class, which heads on disk hold."""
    if isinstance(config, ModelConfig):
        return family(config).model_class
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return str(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__)


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """Turn any error while a model's files are read into one that names the model.

    Raises:
        FileNotFoundError: a hub id cannot be loaded.
        ValueError: the model is damaged or not supported.
    """
    try:
        yield
    except (OSError, RuntimeError, *PARSING) as error:
        raise _explained(source.name, error) from error


def _explained(name: str, error: Exception) -> Exception:
    if isinstance(error, ValueError) and str(error).startswith(name):
        return error
    if Path(name).expanduser().exists() or name in MODELS:
        return ValueError(
            f"{name}: the model cannot be read, its files may be damaged or incomplete: {reason(error)}"
        )
    return FileNotFoundError(f"{name}: cannot be loaded from the hub: {reason(error)}")

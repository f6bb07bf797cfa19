"""What a Hugging Face directory means: both engines compute what transformers does, or refuse it by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastmtp.engines.open import EngineOptions, open_engine, open_torch
from fastmtp.export.gguf.file import write_gguf
from fastmtp.export.gguf.layout import Stored
from fastmtp.models.source import locate, open_model
from fastmtp.models.weights import directory_weights
from tests.checkpoints import make_checkpoint
from tests.conftest import FAMILIES, byte_tokenizer, random_ids, tiny_target

IDS = random_ids(40)
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ENGINES = [("native", "bfloat16"), ("torch", "float32")]
UP = "model.layers.0.mlp.up_proj.weight"


def write(directory: Path, tensors: Mapping[str, Tensor], family: str = "llama", **changes: Any) -> Path:
    """A directory with a tiny model's configuration, some of its keys changed; None removes one."""
    config = {
        **tiny_target(family).model.config.to_dict(),
        "architectures": [type(tiny_target(family).model).__name__],
    }
    config = {
        name: value for name, value in {**config, **changes}.items() if value is not None or name not in changes
    }
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(directory)
    save_file(
        {name: value.clone() for name, value in tensors.items()}, directory / SINGLE, metadata={"format": "pt"}
    )
    return directory


def own_tensors(family: str = "llama") -> dict[str, Tensor]:
    return dict(tiny_target(family).model.state_dict())


def logits(directory: Path, engine: Any, dtype: str) -> Tensor:
    sequence = open_engine(str(directory), EngineOptions(engine, dtype, "cpu")).new_sequence()
    return torch.as_tensor(sequence.prefill(IDS))


def assert_as_transformers(directory: Path) -> None:
    """Or refused, where transformers fills in random numbers or leaves a tensor aside."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    for engine, dtype in ENGINES:
        if wrong:
            with pytest.raises(ValueError, match=r"tensors do not fit the configuration") as error:
                logits(directory, engine, dtype)
            assert any(name in str(error.value) for name in wrong)
            continue
        with torch.no_grad():
            expected = model(torch.tensor([IDS])).logits[0, -1]
        close = (
            {"rtol": 1e-4, "atol": 1e-4} if engine == "torch" else {"rtol": 0, "atol": 0.3 * float(expected.std())}
        )
        torch.testing.assert_close(logits(directory, engine, dtype), expected, **close)


@pytest.mark.parametrize("stored", ["none", "equal", "different"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_lm_heads(tmp_path: Path, family: str, tied: bool, stored: str) -> None:
    """A stored LM head is used whatever the configuration says; one that is needed and missing is named."""
    tensors = own_tensors(family)
    del tensors["lm_head.weight"]
    if stored != "none":
        random = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] if stored == "equal" else random
    directory = write(tmp_path / "model", tensors, family, tie_word_embeddings=tied)
    assert_as_transformers(directory)
    if tied or stored != "none":
        config, _ = open_model(locate(str(directory)))
        assert config.tie_word_embeddings == (stored != "different")
        assert open_torch(str(directory), device="cpu").target.config.tie_word_embeddings == (stored != "different")


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_declared_and_stored(tmp_path: Path, family: str) -> None:
    plain = {name: value for name, value in own_tensors(family).items() if not name.endswith(".bias")}
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    parts = {"attention_bias": attention, "mlp_bias": [f"mlp.{name}_proj" for name in ("gate", "up", "down")]}
    torch.manual_seed(0)
    for key, modules in parts.items():
        names = [name for name in plain if any(module in name for module in modules)]
        biases = {name.replace("weight", "bias"): torch.randn(len(plain[name])) for name in names}
        queries = {name: value for name, value in biases.items() if ".o_proj" not in name and "attn" in name}
        for declared in (True, False, None):
            for stored in ({}, biases, queries):
                directory = write(tmp_path / "model", plain | stored, family, **{key: declared})
                assert_as_transformers(directory)


@pytest.mark.parametrize(("engine", "dtype"), ENGINES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, engine: str, dtype: str, value: float
) -> None:
    for name in (UP, "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"):
        tensors = own_tensors()
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[3] = value
        directory = write(tmp_path / "model", tensors)
        with pytest.raises(ValueError, match=rf"model: {name}: holds values that are infinite or not a number"):
            logits(directory, engine, dtype)


def test_large_weights_are_finite(tmp_path: Path) -> None:
    """Though their sum is not."""
    save_file({"x": torch.full((9, 9), 3e38)}, tmp_path / SINGLE)
    assert (directory_weights(tmp_path).rows("x", 0, 9) > 2e38).all()


def test_weights_beyond_float16_are_refused_by_name(tmp_path: Path) -> None:
    tensors = own_tensors() | {UP: torch.full((48, 32), 1e5)}
    directory = write(tmp_path / "model", tensors)
    with pytest.raises(
        ValueError, match=rf"model: {UP}: .* not finite in float16, whose largest is 65504; give an"
    ):
        logits(directory, "torch", "float16")
    assert logits(directory, "torch", "float32").isfinite().all()


def test_states_beyond_float16_are_refused_by_name(tmp_path: Path) -> None:
    """Where a text begins: in decoding, in a batch, and in the states for training."""
    name = "model.layers.0.mlp.down_proj.weight"
    directory = write(tmp_path / "model", own_tensors() | {name: torch.full((32, 48), 6e4)})
    assert logits(directory, "torch", "float32").isfinite().all()
    engine = open_engine(str(directory), EngineOptions("torch", "float16", "cpu"))
    for compute in (
        lambda: engine.new_sequence().prefill(IDS),
        lambda: engine.batch(2).prefill({0: IDS, 1: IDS[:3]}),
        lambda: engine.forward([IDS, IDS[:3]]),
    ):
        with pytest.raises(ValueError, match=r"model: the states of a text: .* not finite in float16"):
            compute()


def test_values_beyond_an_exports_type_are_refused_by_name(tmp_path: Path) -> None:
    stored = Stored("x.weight", (2, 32), lambda: np.full((2, 32), 1e5, np.float32))
    with pytest.raises(ValueError, match=r"x\.weight: holds values beyond the range of F16"):
        write_gguf(tmp_path / "model.gguf", {}, [stored], "F16")
    write_gguf(tmp_path / "model.gguf", {}, [stored], "BF16")


def shard(directory: Path) -> tuple[dict[str, str], str, str]:
    """Split the model into two files; the index, and a tensor of each file."""
    tensors = load_file(directory / SINGLE)
    (directory / SINGLE).unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (name in names[9:])}-of-00002.safetensors" for name in names}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return files, names[0], names[-1]


@pytest.mark.parametrize(("engine", "dtype"), ENGINES)
def test_indices_that_contradict_their_files_are_refused(tmp_path: Path, engine: str, dtype: str) -> None:
    directory = write(tmp_path / "model", own_tensors())
    expected = logits(directory, engine, dtype)
    files, early, late = shard(directory)
    assert torch.equal(logits(directory, engine, dtype), expected)
    first, second = files[early], files[late]
    unlisted = {name: file for name, file in files.items() if name != early}
    for index, message in (
        ({}, "weight_map is None, must be an object"),
        ({"weight_map": [first]}, "weight_map is .*must be an object"),
        ({"weight_map": {**files, early: 7}}, "names 7, which is not a safetensors file of the directory"),
        ({"weight_map": {**files, early: ".."}}, r"names '\.\.', which is not a safetensors file of the directory"),
        ({"weight_map": {**files, early: "elsewhere.safetensors"}}, "elsewhere.safetensors: no such file"),
        ({"weight_map": {**files, early: second}}, f"places {early} in {second}, but it is in {first}"),
        ({"weight_map": {**files, "more": second}}, f"places more in {second}, but it is in no file"),
        ({"weight_map": unlisted}, f"places {early} in no file, but it is in {first}"),
    ):
        (directory / INDEX).write_text(json.dumps(index))
        with pytest.raises(ValueError, match=message):
            logits(directory, engine, dtype)
    (directory / INDEX).write_text(json.dumps({"weight_map": files}))
    tensors = load_file(directory / second)
    save_file({**tensors, early: torch.zeros(300, 32)}, directory / second)
    with pytest.raises(ValueError, match=f"places {early} in {first}, but it is in {second}"):
        logits(directory, engine, dtype)
    save_file(tensors, directory / second)
    save_file(tensors, directory / "consolidated.safetensors")
    assert torch.equal(logits(directory, engine, dtype), expected)
    save_file(tensors, directory / SINGLE)
    with pytest.raises(ValueError, match=f"has {SINGLE}, which {INDEX} does not name"):
        logits(directory, engine, dtype)


@pytest.mark.parametrize(("engine", "dtype"), ENGINES)
def test_links_of_a_hub_cache_are_followed(tmp_path: Path, engine: str, dtype: str) -> None:
    """Its files lie in `blobs`; one that is not there is named."""
    directory = write(tmp_path / "model", own_tensors())
    expected = logits(directory, engine, dtype)
    shard(directory)
    snapshot, blobs = tmp_path / "snapshots" / "1a2b", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(directory.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert torch.equal(logits(snapshot, engine, dtype), expected)
    (snapshot / "model-00002-of-00002.safetensors").resolve().unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: no such file"):
        logits(snapshot, engine, dtype)


@pytest.mark.parametrize(("engine", "dtype"), ENGINES)
def test_other_files_of_weights_are_not_read(tmp_path: Path, engine: str, dtype: str) -> None:
    directory = write(tmp_path / "model", own_tensors())
    (directory / SINGLE).rename(directory / "consolidated.safetensors")
    with pytest.raises(ValueError, match=f"has neither {SINGLE} nor {INDEX}$"):
        logits(directory, engine, dtype)
    torch.save(own_tensors(), directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has neither .*\.bin .* are not read: save the model as safetensors"):
        logits(directory, engine, dtype)


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attn_logit_softcapping": 50.0}),
    ("llama", {"num_experts": 8}),
    ("llama", {"attention_multiplier": 0.1}),
    ("llama", {"residual_multiplier": 0.22}),
    ("llama", {"embedding_multiplier": 12}),
    ("llama", {"logits_scaling": 8.0}),
    ("llama", {"no_rope_layers": [1, 1, 0]}),
    ("llama", {"is_causal": False}),
    ("llama", {"rope_interleaved": True}),
    ("llama", {"hidden_act": "gelu"}),
    ("gemma3", {"hidden_activation": "silu_and_mul"}),
    ("gemma3", {"query_pre_attn_scalar": 100.5}),
    ("llama", {"rms_norm_eps": float("nan")}),
    ("llama", {"rms_norm_eps": 0}),
    ("llama", {"head_dim": 7}),
    ("llama", {"num_key_value_heads": 3}),
    ("llama", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    ("mistral", {"layer_types": ["full_attention"] * 3}),
    ("mistral", {"sliding_window": 0}),
    ("qwen3", {"layer_types": ["chunked_attention"] * 3}),
    ("qwen2", {"use_sliding_window": False}),
    ("gemma3", {"sliding_window": None, "layer_types": ["sliding_attention"] * 3}),
]
ROPES: list[tuple[str, dict[str, Any]]] = [
    ("rope_type 'spiral'", {"rope_type": "spiral", "factor": 2.0}),
    ("partial_rotary_factor", {"rope_type": "default", "partial_rotary_factor": 0.5}),
    ("rope_theta", {"rope_type": "default", "rope_theta": float("inf")}),
    ("factor", {"rope_type": "linear", "factor": 0.0}),
    ("mrope_section", {"rope_type": "default", "mrope_section": [1, 1, 2]}),
]


@pytest.mark.parametrize(("engine", "dtype"), ENGINES)
def test_keys_that_change_the_arithmetic_are_refused_by_name(tmp_path: Path, engine: str, dtype: str) -> None:
    for family, changes in REFUSED:
        # transformers gives null a meaning of its own.
        config = {**tiny_target(family).model.config.to_dict(), **changes}
        directory = write(tmp_path / "model", own_tensors(family), family)
        (directory / "config.json").write_text(json.dumps(config))
        named = "activation" if "hidden_act" in next(iter(changes)) else next(iter(changes))
        named = "sliding_window" if named == "use_sliding_window" else named
        with pytest.raises(ValueError, match=rf"model: .*{named}"):
            logits(directory, engine, dtype)
    for named, rope in ROPES:
        directory = write(tmp_path / "model", own_tensors(), rope_parameters=None, rope_scaling=rope)
        with pytest.raises(ValueError, match=rf"model: .*{named}"):
            logits(directory, engine, dtype)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_dropout": 0.3, "initializer_range": 1.0, "use_cache": False, "pretraining_tp": 2},
        {"num_experts": 0, "logits_scaling": 1.0, "no_rope_layers": [1, 1, 1], "rope_interleaved": False},
        {"sliding_window": 16, "something_of_a_tool": "2.0", "layer_types": ["full_attention"] * 3},
    ],
)
def test_keys_without_effect_are_allowed(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert_as_transformers(write(tmp_path / "model", own_tensors(), **changes))


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_models_that_only_transformers_reads_are_checked_too(tmp_path: Path, name: str) -> None:
    """MTP layers, which follow the last layer, are heads and do not count."""
    made = make_checkpoint(name, tmp_path / "model")
    path = made.directory / SINGLE
    tensors = load_file(path)
    open_torch(str(made.directory), device="cpu")
    norm = "model.layers.1.input_layernorm.weight"
    for changes, message in (
        ({norm: None}, rf"tensors are missing:\n  {norm}"),
        ({"model.layers.1.more.weight": torch.ones(2)}, r"no place in a \w+:\n  model\.layers\.1\.more\.weight"),
        ({norm: torch.full((32,), torch.nan)}, rf"{norm}: holds values that are not finite"),
    ):
        changed = {key: value for key, value in {**tensors, **changes}.items() if value is not None}
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            open_torch(str(made.directory), device="cpu")
    config = json.loads((made.directory / "config.json").read_text())
    (made.directory / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(ValueError, match=rf"model: a quantised {name} is not supported"):
        open_torch(str(made.directory), device="cpu")


@pytest.mark.parametrize(("engine", "dtype"), ENGINES)
def test_end_ids_of_every_file(tmp_path: Path, engine: Any, dtype: str) -> None:
    """Of the configuration, of generation, of the tokenizer, and of the template's turn; ids that the model lacks
    are left out, and what is no id is named."""
    directory = write(tmp_path / "model", own_tensors(), eos_token_id=[2, 3])
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4, -1, 300]}))
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|user|>"}))
    options = EngineOptions(engine, dtype, "cpu")
    assert open_engine(str(directory), options).target.end_ids == {2, 3, 4, 257, 258}
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id: '</s>' must be a token id"):
        open_engine(str(directory), options)
    write(directory, own_tensors(), eos_token_id=["</s>"])
    with pytest.raises(ValueError, match=r"model: eos_token_id: \['</s>'\] must be a token id"):
        open_engine(str(directory), options)

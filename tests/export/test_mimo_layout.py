"""Heads as MiMo's MTP layer: the engines' formula gives our logits, and every bit comes back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from fastmtp.cli.main import commands
from fastmtp.engines.torch.engine import TorchEngine
from fastmtp.engines.torch.target import Target, load_target
from fastmtp.export.vllm_plugin import LISTS
from fastmtp.heads.format import save_head
from fastmtp.method.head import MTPHead
from fastmtp.models.layers import causal_mask
from fastmtp.vocabulary.lists import VocabularyLists
from tests.checkpoints import make_checkpoint
from tests.conftest import random_ids, tiny_target
from tests.models.test_target import write_gguf

BLOCK = "model.mtp_layers.0"
# The keys and shapes that SGLang 0.5.23's mimo_mtp.py and qwen2.py load; H hidden, I intermediate, Q and K rows of
# the query and key heads.
LOADED = {
    "token_layernorm.weight": "H",
    "hidden_layernorm.weight": "H",
    "input_proj.weight": "H 2H",
    "final_layernorm.weight": "H",
    "input_layernorm.weight": "H",
    "post_attention_layernorm.weight": "H",
    "self_attn.q_proj.weight": "Q H",
    "self_attn.q_proj.bias": "Q",
    "self_attn.k_proj.weight": "K H",
    "self_attn.k_proj.bias": "K",
    "self_attn.v_proj.weight": "K H",
    "self_attn.v_proj.bias": "K",
    "self_attn.o_proj.weight": "H Q",
    "mlp.gate_proj.weight": "I H",
    "mlp.up_proj.weight": "I H",
    "mlp.down_proj.weight": "H I",
}
LISTED = VocabularyLists({"en": [5, 9, 70], "zh": [9, 200]})


def made(family: str, out: Path) -> Path:
    """A target on disk and a random head for it."""
    tiny = tiny_target(family)
    tiny.model.save_pretrained(out / "model")
    tiny.tokenizer.save_pretrained(out / "model")
    target = load_target(str(out / "model"), device="cpu")
    torch.manual_seed(1)
    head = MTPHead(target.model)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_head(out / "head", head, target, draft_steps=3, vocabulary=LISTED, provenance={})
    return out


def export(engine: str, made: Path, *options: object) -> Any:
    common = ["--to", engine, "--target", made / "model", "--head", made / "head", "--out", made / "export"]
    arguments = ["export", *map(str, [*common, "--no-measure", "--force", "--json", *options])]
    result = CliRunner().invoke(commands, arguments)
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout)


def engines_formula(tensors: dict[str, Tensor], config: dict[str, Any], states: Tensor, embedded: Tensor) -> Tensor:
    """The states [T, H] that vLLM's and SGLang's mimo_mtp.py compute, in plain torch."""
    w = {name.removeprefix(f"{BLOCK}."): tensor.float() for name, tensor in tensors.items()}
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * w[f"{name}.weight"]

    def projected(x: Tensor, name: str, count: int) -> Tensor:
        rows = linear(x, w[f"self_attn.{name}.weight"], w[f"self_attn.{name}.bias"])
        return rows.unflatten(-1, (count, -1)).transpose(0, 1)

    def turned(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        frequencies = config["rope_parameters"]["rope_theta"] ** (-torch.arange(half) / half)
        angles = torch.arange(x.shape[1])[:, None] * frequencies
        first, second = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    embedded = embedded.clone()
    embedded[0] = 0
    joined = torch.cat([norm(states, "hidden_layernorm"), norm(embedded, "token_layernorm")], -1)
    residual = linear(joined, w["input_proj.weight"])
    x = norm(residual, "input_layernorm")
    q, k = turned(projected(x, "q_proj", heads)), turned(projected(x, "k_proj", groups))
    v = projected(x, "v_proj", groups)
    mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    residual = residual + linear(mixed.transpose(0, 1).flatten(1), w["self_attn.o_proj.weight"])
    x = norm(residual, "post_attention_layernorm")
    gated = silu(linear(x, w["mlp.gate_proj.weight"])) * linear(x, w["mlp.up_proj.weight"])
    return norm(residual + linear(gated, w["mlp.down_proj.weight"]), "final_layernorm")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_engines_formula(engine: str, family: str, tmp_path: Path) -> None:
    """The engines' convention on an export's tensors gives our head's logits, recursively, to rounding.

    They zero the embedding at position 0 and we do not; given that, they agree at every position.
    """
    export(engine, made(family, tmp_path))
    target = load_target(str(tmp_path / "model"), device="cpu")
    head = TorchEngine(target).load_head(tmp_path / "head").weights
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    config = target.config.to_dict() | json.loads((tmp_path / "export" / "config.json").read_text())
    # Longer than the target's window, which the head does not have.
    ids = torch.tensor([random_ids(41)])
    states = target.model.model(ids[:, :-1]).last_hidden_state[0]
    embedded = target.embed(ids[:, 1:])[0]
    theirs, ours = states, states
    for _ in range(2):
        theirs = engines_formula(tensors, config, theirs, embedded)
        ours = _ours(target, head, ours, embedded)
        torch.testing.assert_close(target.logits(theirs), target.logits(ours), rtol=1e-3, atol=1e-3)


def _ours(target: Target, head: MTPHead, states: Tensor, embedded: Tensor) -> Tensor:
    """The states [T, H] of our head, given the engines' embedding at position 0."""
    count, embedded = len(states), embedded.clone()
    embedded[0] = 0
    rotation = target.rotations(torch.arange(count)[None])
    mask = causal_mask(0, count, None, states.device)
    found: Tensor = head(states[None], embedded[None], rotation, mask, None)
    return found[0]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_loaded_keys(engine: str, tmp_path: Path) -> None:
    """SGLang 0.5.23 (and vLLM 0.32) finds every tensor that it loads, in its shape; biases not in a head are 0."""
    export(engine, made("llama", tmp_path))
    stored = load_file(tmp_path / "export" / "model.safetensors")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    size = config["hidden_size"] // config["num_attention_heads"]
    sizes = {
        "H": config["hidden_size"],
        "2H": 2 * config["hidden_size"],
        "I": config["intermediate_size"],
        "Q": size * config["num_attention_heads"],
        "K": size * config["num_key_value_heads"],
    }
    expected = {f"{BLOCK}.{key}": tuple(sizes[name] for name in shape.split()) for key, shape in LOADED.items()}
    found = {key: tuple(tensor.shape) for key, tensor in stored.items() if not key.startswith(LISTS)}
    assert found == expected
    assert not any(stored[key].any() for key in found if key.endswith(".bias"))
    assert config["architectures"] == ["MiMoForCausalLM"]
    assert config["num_nextn_predict_layers"] == 1
    assert config["rope_parameters"] == tiny_target("llama").config.rope_parameters


@pytest.mark.parametrize(
    ("engine", "family"),
    [*(("vllm", family) for family in ("llama", "mistral", "qwen2", "qwen3", "gemma3")), ("sglang", "qwen2")],
)
def test_there_and_back(engine: str, family: str, tmp_path: Path) -> None:
    """A head comes out of an export with every bit and every list that it had; what it is for is in the README."""
    written = export(engine, made(family, tmp_path))
    assert written["exact"]
    result = CliRunner().invoke(commands, ["import", str(tmp_path / "export"), "--out", str(tmp_path / "again")])
    assert result.exit_code == 0, result.output
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("head", "again"))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) and before[name].dtype == after[name].dtype for name in before)
    for name in ("config.json", "vocabulary.json", "provenance.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "head" / name).read_bytes()
    readme = (tmp_path / "export" / "README.md").read_text()
    assert str(tmp_path / "export") in readme and "DIR" not in readme.replace("verify-export DIR", "")
    if engine == "vllm":
        # What vLLM's own MiMo model cannot run is not offered to it.
        assert ("--hf-overrides" in readme) == (family in ("llama", "mistral", "qwen2"))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_verification_without_the_engine(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files alone are checked, and that is said; what is missing or damaged in them is named."""
    monkeypatch.setattr("fastmtp.others.vllm.version", lambda: None)
    export(engine, made("qwen2", tmp_path))
    arguments = ["verify-export", str(tmp_path / "export")]
    result = CliRunner().invoke(commands, arguments)
    assert result.exit_code == 0 and "files read back, nothing replayed" in result.output
    path = tmp_path / "export" / "model.safetensors"
    whole = path.read_bytes()
    stored = load_file(path)
    save_file({key: tensor for key, tensor in stored.items() if "gate_proj" not in key}, path)
    refused = CliRunner().invoke(commands, arguments)
    assert f"missing tensor {BLOCK}.mlp.gate_proj.weight" in str(refused.exception)
    path.write_bytes(whole[:-100])
    refused = CliRunner().invoke(commands, arguments)
    assert "damaged or incomplete" in str(refused.exception)


def test_token_maps(tmp_path: Path) -> None:
    """SGLang loads a list of ids for each of the head's lists, with the ends of an answer, and one of all."""
    export("sglang", made("llama", tmp_path))
    found = {path.name: torch.load(path, weights_only=True) for path in (tmp_path / "export").glob("*.pt")}
    assert found == {
        "token_map_all.pt": [5, 9, 70, 257, 200],
        "token_map_en.pt": [5, 9, 70, 257],
        "token_map_zh.pt": [9, 200, 257],
    }
    assert (
        f"--speculative-token-map {tmp_path / 'export'}/token_map_all.pt"
        in (tmp_path / "export" / "README.md").read_text()
    )


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_gguf_target(engine: str, tmp_path: Path) -> None:
    """A target in a GGUF file is written as a directory that loads as the same model."""
    made("llama", tmp_path)
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf" / "model.gguf", tiny_target("llama"))
    before = load_target(str(tmp_path / "gguf" / "model.gguf"), device="cpu")
    head = MTPHead(before.model)
    save_head(tmp_path / "head", head, before, draft_steps=3, vocabulary=LISTED, provenance={})
    (tmp_path / "model").rename(tmp_path / "other")
    common = ["export", "--to", engine, "--target", str(tmp_path / "gguf" / "model.gguf"), "--no-measure"]
    common += ["--head", str(tmp_path / "head"), "--out", str(tmp_path / "export"), "--force"]
    result = CliRunner().invoke(commands, [*common, "--type", "F32"])
    assert result.exit_code == 0, (result.output, result.exception)
    after = load_target(str(tmp_path / "export" / "target"), device="cpu")
    assert before.identity == after.identity
    ids = torch.tensor([random_ids(20)])
    assert torch.equal(before.model(ids).logits, after.model(ids).logits)
    refused = CliRunner().invoke(commands, [*common, "--type", "Q8_0"])
    assert re.search("--type is Q8_0; .*BF16", str(refused.exception))


def test_what_is_refused(tmp_path: Path) -> None:
    """What an engine cannot carry is one error that says what can, and leaves nothing behind."""
    made("qwen3", tmp_path)
    with pytest.raises(ValueError, match=r"(?s)a MiMo block is like llama, mistral, qwen2"):
        export("sglang", tmp_path)
    with pytest.raises(ValueError, match=r"--type is for a target in a GGUF file"):
        export("vllm", tmp_path, "--type", "F32")
    with pytest.raises(ValueError, match=r"'eagle3'.*choose another"):
        export("vllm", tmp_path, "--out", tmp_path / "not-eagle3")
    with pytest.raises(ValueError, match=r"--split is not an option of --to vllm"):
        export("vllm", tmp_path, "--split")
    model = make_checkpoint("mimo", tmp_path / "mimo").directory
    CliRunner().invoke(commands, ["head", "import", "--target", str(model), "--out", str(tmp_path / "vanilla")])
    with pytest.raises(ValueError, match=r"before its final norm.*--to sglang"):
        export("vllm", tmp_path, "--target", model, "--head", tmp_path / "vanilla")
    assert (
        not list(tmp_path.glob("*export*"))
        and not list(tmp_path.glob(".*"))
        and not (tmp_path / "not-eagle3").exists()
    )
    export("sglang", tmp_path, "--target", model, "--head", tmp_path / "vanilla")

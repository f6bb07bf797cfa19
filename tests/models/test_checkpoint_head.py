"""Heads that checkpoints carry: the published formula, and back into the checkpoint without a changed bit."""

from __future__ import annotations

import errno
import json
import os
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastmtp.engines.torch.engine import TorchEngine
from fastmtp.engines.torch.kv_cache import KVCache
from fastmtp.engines.torch.target import load_target
from fastmtp.heads.checkpoint import find_head, import_head, write_back
from fastmtp.heads.format import save_head
from fastmtp.method.head import MTPHead
from fastmtp.method.recursion import ChainCache
from fastmtp.models.checkpoint import Checkpoint
from fastmtp.models.config import FULL
from fastmtp.models.layers import rotations, skeleton
from tests.checkpoints import KINDS, Made, make_checkpoint
from tests.conftest import random_ids, tiny_target

TOKENS, STEPS = 7, 4


@cache
def checkpoint(name: str) -> Made:
    return make_checkpoint(name, Path(mkdtemp(prefix=name)))


@pytest.fixture(params=list(KINDS))
def made(request: pytest.FixtureRequest) -> Made:
    return checkpoint(request.param)


@pytest.fixture
def own(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    """A checkpoint that a test may damage."""
    return make_checkpoint(getattr(request, "param", "mimo"), tmp_path / "model")


def reference(made: Made, states_TH: Tensor, ids: Tensor) -> list[Tensor]:
    """The logits of K greedy draft steps, written out from the published tensors; no cache."""
    kind, config = made.kind, made.model.config
    offset = 1.0 if kind.token_norm.startswith("mtp.") else 0.0
    embedding = made.model.model.embed_tokens.weight

    def norm(x: Tensor, name: str) -> Tensor:
        gain = offset + made.tensors[f"{name}.weight"].float()
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.rms_norm_eps) * gain

    def project(states: Tensor, tokens: Tensor) -> Tensor:
        state, token = norm(states, kind.hidden_norm), norm(embedding[tokens], kind.token_norm)
        halves = [token, state] if kind.embedding_first else [state, token]
        return torch.cat(halves, dim=-1) @ made.tensors[f"{kind.projection}.weight"].float().T

    rows = project(states_TH, ids[1:])
    logits = []
    for _ in range(STEPS):
        count = len(rows)
        turned = made.model.model.rotary_emb(rows[None], torch.arange(count)[None])
        mask = torch.ones(count, count, dtype=torch.bool).tril()[None, None]
        hidden = made.layer(rows[None], position_embeddings=turned, attention_mask=mask)[0, -1]
        state = norm(hidden, kind.final_norm)
        logits.append(state @ made.model.lm_head.weight.T)
        rows = torch.cat([rows, project(state[None], logits[-1].argmax()[None])])
    return logits


@torch.no_grad()
def test_formula(made: Made) -> None:
    """Our head with the imported tensors gives the published layer's logits, K steps deep, on its own cache."""
    states, ids = torch.randn(TOKENS, 32), torch.tensor(random_ids(TOKENS + 1))
    found = find_head(str(made.directory))
    head = MTPHead(skeleton(found.target.config))
    head.load_state_dict({name: tensor.float() for name, tensor in found.tensors().items()}, assign=True)
    model, cache = made.model, ChainCache()
    state, tokens, start = states[None], ids[None, 1:], 0
    for expected in reference(made, states, ids):
        positions = torch.arange(start, start + tokens.shape[1])[None]
        turned = rotations(model.model.rotary_emb, state, positions, {FULL})
        state = head(state, model.model.embed_tokens(tokens), turned, None, cache)[:, -1:]
        logits = model.lm_head(state)[0, -1]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        start, tokens = start + tokens.shape[1], logits.argmax()[None, None]


def test_round_trip_changes_no_bit(made: Made, tmp_path: Path) -> None:
    """Import, write back, import: equal files; every tensor of the overlay is the checkpoint's, bit for bit."""
    import_head(str(made.directory), tmp_path / "head")
    write_back(str(made.directory), tmp_path / "head", tmp_path / "overlay")
    import_head(str(tmp_path / "overlay"), tmp_path / "again")
    first, second = (tmp_path / name / "model.safetensors" for name in ("head", "again"))
    assert first.read_bytes() == second.read_bytes()
    before, after = Checkpoint(made.directory), Checkpoint(tmp_path / "overlay")
    assert before.files.keys() == after.files.keys()
    old, new = before.read(before.files), after.read(after.files)
    for key, tensor in old.items():
        assert new[key].dtype == tensor.dtype
        assert torch.equal(new[key], tensor), key


def test_overlay_is_hard_links_and_one_file(made: Made, tmp_path: Path) -> None:
    """The new file has the head's tensors and sorts last, nothing is missing, and there are no symbolic links."""
    import_head(str(made.directory), tmp_path / "head")
    write_back(str(made.directory), tmp_path / "head", tmp_path / "overlay")
    weights = sorted(path.name for path in (tmp_path / "overlay").glob("*.safetensors"))
    assert weights == ["model-00001-of-00001.safetensors", "mtp.safetensors"]
    assert (tmp_path / "overlay" / weights[0]).samefile(made.directory / "model.safetensors")
    assert not any(path.is_symlink() for path in (tmp_path / "overlay").iterdir())
    files = Checkpoint(tmp_path / "overlay").files
    assert {key for key, name in files.items() if name == weights[1]} == load_file(
        tmp_path / "overlay" / weights[1]
    ).keys()
    originals = {path.name for path in made.directory.iterdir() if path.suffix != ".safetensors"}
    assert originals <= {path.name for path in (tmp_path / "overlay").iterdir()}


def test_overlay_of_an_overlay(tmp_path: Path) -> None:
    """Writing back again replaces the file of the first time, and links to the originals."""
    made, head = checkpoint("mimo"), tmp_path / "head"
    import_head(str(made.directory), head)
    write_back(str(made.directory), head, tmp_path / "one")
    write_back(str(tmp_path / "one"), head, tmp_path / "two")
    assert not (tmp_path / "two" / "mtp.safetensors").samefile(tmp_path / "one" / "mtp.safetensors")
    linked = tmp_path / "two" / "model-00001-of-00001.safetensors"
    assert linked.samefile(made.directory / "model.safetensors")


def test_overlay_on_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where hard links cannot be made the files are copied."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    made = checkpoint("mimo")
    import_head(str(made.directory), tmp_path / "head")
    monkeypatch.setattr(os, "link", refuse)
    write_back(str(made.directory), tmp_path / "head", tmp_path / "overlay")
    copied = tmp_path / "overlay" / "model-00001-of-00001.safetensors"
    assert copied.read_bytes() == (made.directory / "model.safetensors").read_bytes()


def test_another_head_changes_the_head_only(tmp_path: Path) -> None:
    """A changed head comes out of the overlay as it went in; the target's states are as before."""
    made, head = checkpoint("mimo"), tmp_path / "head"
    import_head(str(made.directory), head)
    changed = {name: tensor * 2 for name, tensor in load_file(head / "model.safetensors").items()}
    save_file(changed, head / "model.safetensors")
    write_back(str(made.directory), head, tmp_path / "overlay")
    for name, tensor in find_head(str(tmp_path / "overlay")).tensors().items():
        assert torch.equal(tensor, changed[name])
    before, after = (load_target(str(path), device="cpu") for path in (made.directory, tmp_path / "overlay"))
    for name, tensor in before.model.state_dict().items():
        assert torch.equal(after.model.state_dict()[name], tensor), name


def test_mimo_is_a_qwen2() -> None:
    """A MiMo target gives the states of the Qwen2 that it was made from, without its remote code."""
    made = checkpoint("mimo")
    target = load_target(str(made.directory), device="cpu")
    ids = torch.tensor([random_ids(20)])
    with torch.no_grad():
        expected = made.model.model(ids).last_hidden_state
    torch.testing.assert_close(target.forward(ids, KVCache()), expected, atol=1e-5, rtol=1e-5)
    assert target.identity == find_head(str(made.directory)).target.identity


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3"])
def test_targets_with_experts(name: str) -> None:
    """The states are transformers' own, in one forward and in pieces, and after a rollback."""
    made, ids, cache = checkpoint(name), torch.tensor([random_ids(60)]), KVCache(4)
    target = load_target(str(made.directory), device="cpu")
    with torch.no_grad():
        expected = made.model.model(ids).last_hidden_state
    pieces = [target.forward(part, cache) for part in ids.split([1, 30, 1, 28], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-4, rtol=1e-4)
    cache.truncate(20)
    torch.testing.assert_close(target.forward(ids[:, 20:], cache), expected[:, 20:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3"])
def test_correction_biases_keep_their_precision(name: str, tmp_path: Path) -> None:
    """A target in bfloat16 has a head whose routers choose by float32 biases, as its own do; on disk too."""
    made = checkpoint(name)
    import_head(str(made.directory), tmp_path / "head")
    target = load_target(str(made.directory), device="cpu", dtype=torch.bfloat16)
    loaded = TorchEngine(target).load_head(tmp_path / "head")
    head, steps = loaded.weights, loaded.draft_steps
    save_head(tmp_path / "again", head, target, draft_steps=steps, vocabulary=loaded.lists, provenance={})
    bias = find_head(str(made.directory)).tensors()["layer.mlp.gate.e_score_correction_bias"]
    assert not bias.equal(bias.bfloat16().float())
    assert head.layer.mlp.gate.e_score_correction_bias.equal(bias)
    first, second = (tmp_path / part / "model.safetensors" for part in ("head", "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("qwen")])
def test_decoding_with_an_unsupported_target(name: str) -> None:
    with pytest.raises(ValueError, match=rf"architecture '{name}' is not supported; supported: llama.* mimo"):
        load_target(str(checkpoint(name).directory))


def damage(directory: Path, file: str = "model.safetensors", **changes: Tensor | None) -> None:
    tensors = load_file(directory / file)
    for key, value in changes.items():
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value
    save_file(tensors, directory / file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("own", "key", "value", "message"),
    [
        (
            "mimo",
            "model.mtp_layers.0.input_proj.weight",
            None,
            "missing tensor model.mtp_layers.0.input_proj.weight",
        ),
        ("mimo", "model.mtp_layers.1.mlp.up_proj.weight", torch.ones(2), "unknown tensor model.mtp_layers.1.mlp"),
        ("mimo", "model.mtp_layers.0.input_proj.weight", torch.ones(2, 2), r"input_proj.weight: shape \[2, 2\]"),
        ("glm4_moe", "model.layers.5.enorm.weight", torch.ones(32), "unknown tensor model.layers.5.enorm.weight"),
        ("glm4_moe", "model.layers.4.shared_head.head.weight", torch.ones(300, 32), "differs from lm_head.weight"),
        (
            "deepseek_v3",
            "model.layers.4.self_attn.o_proj.weight",
            torch.ones(32, 48).to(torch.float8_e4m3fn),
            "o_proj.weight: stored as float8_e4m3fn",
        ),
    ],
    indirect=["own"],
)
def test_what_is_wrong_is_named(own: Made, key: str, value: Tensor | None, message: str, tmp_path: Path) -> None:
    """Nothing is written of a head that is not whole, not one layer, quantised, or has embeddings of its own."""
    damage(own.directory, **{key: value})
    with pytest.raises(ValueError, match=message):
        import_head(str(own.directory), tmp_path / "head")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_checkpoints_without_a_head(tmp_path: Path) -> None:
    for family, message in (("qwen2", "carries no MTP layer"), ("llama", "no MTP layers are known for .*'llama'")):
        target = tiny_target(family)
        target.model.save_pretrained(tmp_path / family)
        target.tokenizer.save_pretrained(tmp_path / family)
        with pytest.raises(ValueError, match=message):
            find_head(str(tmp_path / family))
    with pytest.raises(ValueError, match="give a Hugging Face model directory"):
        find_head("someone/model")


def test_nothing_is_overwritten(own: Made, tmp_path: Path) -> None:
    """Neither command takes a model's directory for its output, and a head of another model is not written."""
    import_head(str(own.directory), tmp_path / "head")
    with pytest.raises(ValueError, match="exists; choose another --out"):
        import_head(str(own.directory), own.directory)
    with pytest.raises(ValueError, match="exists; choose another --out"):
        write_back(str(own.directory), tmp_path / "head", own.directory)
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    config["target"]["architecture"] = "OtherForCausalLM"
    (tmp_path / "head" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not fit"):
        write_back(str(own.directory), tmp_path / "head", tmp_path / "overlay")
    assert not (tmp_path / "overlay").exists()


def test_missing_and_damaged_weights(own: Made) -> None:
    path = own.directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        find_head(str(own.directory))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="has neither"):
        find_head(str(own.directory))


def test_index_that_does_not_hold(tmp_path: Path) -> None:
    """Of an overlay: no map, a file that is gone, a tensor that is not where the map says."""
    made, overlay = checkpoint("mimo"), tmp_path / "overlay"
    import_head(str(made.directory), tmp_path / "head")
    write_back(str(made.directory), tmp_path / "head", overlay)
    index = overlay / "model.safetensors.index.json"
    written = json.loads(index.read_text())
    damage(overlay, "mtp.safetensors", **{"model.mtp_layers.0.input_proj.weight": None})
    with pytest.raises(ValueError, match=r"mtp\.safetensors: damaged or missing: .*input_proj"):
        find_head(str(overlay)).tensors()
    (overlay / "mtp.safetensors").unlink()
    with pytest.raises(ValueError, match=r"mtp\.safetensors: damaged or missing"):
        find_head(str(overlay)).tensors()
    index.write_text(json.dumps({"metadata": written["metadata"]}))
    with pytest.raises(ValueError, match="weight_map is None"):
        find_head(str(overlay))

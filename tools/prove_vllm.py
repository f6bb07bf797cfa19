"""Runs exports in vLLM and compares with fastmtp: `make prove-vllm`, in an environment of its own.

In fp32: the shipped head by the plugin, the same by vLLM's own MiMo model, and by the plugin a random model of each
family with a head that nearly knows what it will say. Greedy text must be that of vLLM without the head, and
acceptance by step that of fastmtp on the answers with the same text.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from fastmtp.decode.drafting.drafter import chains
from fastmtp.decode.drafting.open import Drafting
from fastmtp.engines.open import open_torch
from fastmtp.export import vllm
from fastmtp.export.job import open_job
from fastmtp.export.measure import measure, union_of
from fastmtp.export.package import write_export
from fastmtp.export.verify import compared
from fastmtp.heads.format import save_head
from fastmtp.heads.shipped import shipped_head
from fastmtp.method.head import MTPHead
from fastmtp.models.packaged_models import EMBEDDED
from fastmtp.models.source import describe
from fastmtp.vocabulary.lists import VocabularyLists

STEPS = 3
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
# Heads larger than hidden_size / num_attention_heads, and windows that the head does not have.
LARGE_HEADS, WINDOW = {**SHAPE, "head_dim": 64}, 48
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**LARGE_HEADS),
    "mistral": MistralConfig(**SHAPE, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**LARGE_HEADS),
    # Without a layer of each kind it has no rope for the other.
    "gemma3": Gemma3TextConfig(
        **{**LARGE_HEADS, "num_hidden_layers": 2},
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
}


def main() -> None:
    shipped = shipped_head(EMBEDDED)
    assert shipped is not None
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        good = [
            prove(EMBEDDED, shipped, place / "plugin", {"type": "F32"}),
            prove(EMBEDDED, shipped, place / "own", {"type": "F32"}, own_model=True),
        ]
        for family, config in FAMILIES.items():
            model, head = make(config, place / family)
            good.append(prove(str(model), head, place / family / "export", {}))
    sys.exit(not all(good))


def prove(name: str, head: Path, out: Path, options: dict[str, str], *, own_model: bool = False) -> bool:
    """Export a head, measure it here, replay it in vLLM, and print how they compare."""
    job = open_job(name, head, out, options)
    engine = open_torch(name, "float32", "cpu")
    lists = None if own_model else union_of(job.vocabulary, engine.target.vocabulary_size)
    drafting = Drafting(engine, engine.load_head(head), lists, chains(STEPS))
    measured = measure(drafting, "full" if own_model else "union")
    manifest = write_export("vllm", job, measured, force=False)
    found = compared(manifest, vllm.replayed(out, manifest, own_model=own_model))
    here, there = (
        " / ".join(f"{100 * share:.1f}" for share in kept) for kept in (measured.acceptance, found.acceptance)
    )
    same = sum(answer.text == now for answer, (now, _) in zip(measured.answers, found.parts, strict=True))
    print(
        f"{engine.target.architecture}, {'its own MiMo model' if own_model else 'plugin'} in {found.replayed_by}: "
        f"{found.identical} of {found.answers} answers as without the head, {same} as in fastmtp; "
        f"kept by step {there} %, in fastmtp {here} %",
        *found.problems,
        sep="\n  ",
        flush=True,
    )
    return not found.problems


def make(config: PreTrainedConfig, out: Path) -> tuple[Path, Path]:
    """A random model whose last layer alone does something, and a head that is that layer.

    So the head knows what the model will say, but for the first token's key and value, and for the model's window.

    Embeddings have unit length per element, so the head's norm of them changes nothing.
    """
    tokenizer = describe(EMBEDDED).tokenizer
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    scale = float(getattr(model.model.embed_tokens, "embed_scale", 1.0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 2 / parameter.shape[1] ** 0.5)
        for layer in model.model.layers[:-1]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        rows = model.model.embed_tokens.weight
        rows.div_(rows.pow(2).mean(-1, keepdim=True).sqrt() * scale)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    head, size = MTPHead(model), int(config.hidden_size)
    with torch.no_grad():
        head.input_proj.weight.copy_(torch.cat([torch.zeros(size, size), torch.eye(size)], dim=1))
    half = VocabularyLists({"even": list(range(0, config.vocab_size, 2)), "few": list(range(1, 9999, 2))})
    save_head(out / "head", head, describe(str(out / "model")), draft_steps=STEPS, vocabulary=half, provenance={})
    return out / "model", out / "head"


if __name__ == "__main__":
    main()

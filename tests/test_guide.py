"""The guide's examples do what the guide says of them."""

from __future__ import annotations

import re
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import MinistralConfig, MinistralForCausalLM

from fastmtp.config import SamplingConfig
from fastmtp.decode.plain import plain
from fastmtp.decode.speculative import speculative
from fastmtp.engines.open import EngineOptions, open_engine
from fastmtp.export import registry
from fastmtp.export.package import export_head, import_export
from fastmtp.heads.format import save_head
from fastmtp.method.head import MTPHead
from fastmtp.models.families import FAMILIES
from fastmtp.vocabulary.lists import VocabularyLists
from tests.conftest import COMMON, byte_tokenizer, random_ids, tiny_target
from tests.engines import ENGINES, Engine

GREEDY = SamplingConfig()
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"


def example(title: str) -> dict[str, Any]:
    """The names that the Python block under a title defines."""
    section = PAGE.read_text(encoding="utf-8").partition(f"### {title}\n")[2]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    assert len(found[1].splitlines()) <= 40
    names: dict[str, Any] = {"__name__": title}
    exec(compile(found[1], str(PAGE), "exec"), names)
    return names


@pytest.mark.parametrize("engine", list(ENGINES.values()), ids=list(ENGINES))
def test_a_drafter(engine: Engine) -> None:
    """It drafts where the text repeats itself, and the output is plain decoding's."""
    target, prompt = tiny_target("llama"), random_ids(12) * 3
    drafter = example("A drafter")["Repeats"](prompt, GREEDY)
    rounds = list(islice(speculative(engine.sequence(target), prompt, drafter, GREEDY), 150))
    tokens = [token for one in rounds for token in one.tokens]
    assert tokens == list(islice(plain(engine.sequence(target), prompt, GREEDY), len(tokens)))
    assert sum(one.drafted for one in rounds) > 0


def test_an_engine() -> None:
    """It gives the other engine's tokens, plainly and with a drafter."""
    target, prompt = tiny_target("qwen2"), random_ids(9) * 2
    expected = list(islice(plain(Engine().sequence(target), prompt, GREEDY), 20))
    uncached = example("An engine")["Uncached"]
    assert list(islice(plain(uncached(target), prompt, GREEDY), 20)) == expected
    drafter = example("A drafter")["Repeats"](prompt, GREEDY)
    tokens = [
        token for one in islice(speculative(uncached(target), prompt, drafter, GREEDY), 20) for token in one.tokens
    ]
    assert tokens[:20] == expected


def test_an_exporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that went through it comes back with its own bits."""
    module = ModuleType("numpy_export")
    module.__dict__.update(example("An exporter"))
    monkeypatch.setitem(sys.modules, "numpy_export", module)
    monkeypatch.setitem(registry.MODULES, "numpy", "numpy_export")
    target = tiny_target("llama")
    target.model.save_pretrained(tmp_path / "model")
    target.tokenizer.save_pretrained(tmp_path / "model")
    head = MTPHead(target.model)
    torch.nn.init.normal_(head.input_proj.weight)
    save_head(
        tmp_path / "head", head, target, draft_steps=2, vocabulary=VocabularyLists({}), provenance={"made": "here"}
    )
    model, out = str(tmp_path / "model"), tmp_path / "out"
    manifest = export_head("numpy", model, out, head=tmp_path / "head", measured=False)
    assert manifest.exact
    import_export(out, tmp_path / "again")
    again, before = (tmp_path / name / "model.safetensors" for name in ("again", "head"))
    assert again.read_bytes() == before.read_bytes()


def test_a_model_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of such a model is refused before; after, both engines decode what transformers computes."""
    torch.manual_seed(0)
    model = MinistralForCausalLM(MinistralConfig(**COMMON, sliding_window=24)).eval().bfloat16()
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'ministral' is not supported"):
        open_engine(str(tmp_path))
    # Taken back after the test.
    monkeypatch.setitem(FAMILIES, "ministral", FAMILIES["mistral"])
    example("A model family")
    ids = random_ids(40)
    with torch.no_grad():
        expected = model.float()(torch.tensor([ids])).logits[0, -1]
    for options in (EngineOptions("torch", "float32"), EngineOptions("native", "bfloat16")):
        found = torch.as_tensor(open_engine(str(tmp_path), options).new_sequence().prefill(ids))
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(expected.std()))

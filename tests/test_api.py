"""The library as its documentation shows it."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest

from fastmtp import SamplingConfig, load
from fastmtp.api import IDLE
from fastmtp.engines.torch.target import load_target
from fastmtp.heads.format import save_head
from fastmtp.vocabulary.lists import VocabularyLists
from tests.conftest import tiny_target
from tests.models.test_head import trained_looking_head

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model and a head for it, in directories."""
    directory = tmp_path_factory.mktemp("api")
    target = tiny_target("qwen2")
    target.model.save_pretrained(directory / "model")
    target.tokenizer.save_pretrained(directory / "model")
    target = load_target(str(directory / "model"), device="cpu")
    lists = VocabularyLists({"all": [257, *range(120)]})
    save_head(
        directory / "head", trained_looking_head(target), target, draft_steps=3, vocabulary=lists, provenance={}
    )
    return {"target": str(directory / "model"), "head": str(directory / "head")}


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_documented_examples_run(page: str, arguments: dict[str, str]) -> None:
    """The Python blocks of a page, one after the other, in one program; on a tiny model instead of the embedded."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    tiny = "target={target!r}, head={head!r}".format(**arguments)
    program = "\n".join(blocks).replace('load("smollm2"', f"load({tiny}")
    assert tiny in program
    exec(compile(program, page, "exec"), {})


def test_the_same_answer_every_way(arguments: dict[str, str]) -> None:
    """Greedy answers do not depend on what is drafted, nor on the cache that an answer before left behind."""
    plain, trees = load(**arguments, draft="plain"), load(**arguments)
    expected = plain.generate("one two", max_new_tokens=20)
    assert trees.generate("one two", max_new_tokens=20).tokens == expected.tokens
    stream = trees.stream([{"role": "user", "content": "one two"}], max_new_tokens=20)
    assert "".join(stream) == expected.text
    assert stream.result.tokens == expected.tokens


def test_drawing_is_repeatable(arguments: dict[str, str]) -> None:
    """A seed draws the same answer again, where the drafts are of one shape whatever the time they take."""
    model = load(**arguments, draft="chain:2")
    first, second, other = (
        model.generate("one", max_new_tokens=20, sampling=SamplingConfig(temperature=1.0, seed=seed)).tokens
        for seed in (1, 1, 2)
    )
    assert first == second != other


def test_decoding_needs_neither_torch_nor_transformers(arguments: dict[str, str]) -> None:
    """Nor anything of the terminal: a core install has no more than the native engine needs."""
    pytest.importorskip("fastmtp._native")
    program = (
        "import sys, fastmtp\n"
        "model = fastmtp.load({target!r}, head={head!r}, device='cpu')\n"
        "model.generate('one two', max_new_tokens=4)\n"
        "model.generate('one', max_new_tokens=4, sampling=fastmtp.SamplingConfig(temperature=1.0))\n"
        "print([name for name in ('torch', 'transformers', 'click', 'rich', 'pyarrow') if name in sys.modules])"
    ).format(**arguments)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_messages_are_not_continued_as_text(arguments: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="raw continues a text"):
        load(**arguments).generate([{"role": "user", "content": "x"}], raw=True)


def test_an_answer_gives_its_sequence_back_once(arguments: dict[str, str]) -> None:
    """However it ends: to the end, closed early, iterated over again, refused, or never begun."""
    model = load(**arguments)
    stream = model.stream("one two", max_new_tokens=20)
    expected, (first,) = "".join(stream), model._idle
    assert "".join(stream) == expected and model._idle == [first]
    pieces = iter(model.stream("one two", max_new_tokens=20))
    assert next(pieces) and model._idle == []
    pieces.close()  # type: ignore[attr-defined]
    assert model._idle == [first]
    model.stream("one two")
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        model.stream("one two", max_new_tokens=0)
    assert model._idle == [first]


def test_answers_at_once_have_a_sequence_each(arguments: dict[str, str]) -> None:
    """Even those of one stream; a few sequences are kept afterwards."""
    model = load(**arguments)
    expected = model.generate("one two", max_new_tokens=20).text
    stream = model.stream("one two", max_new_tokens=20)
    turns = zip_longest(*[iter(stream) for _ in range(IDLE + 2)], fillvalue="")
    assert ["".join(pieces) for pieces in zip(*turns, strict=True)] == [expected] * (IDLE + 2)
    assert len(set(map(id, model._idle))) == len(model._idle) == IDLE

"""What a data set is said to hold is what it holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fastmtp.cli.data import draw_statistics
from fastmtp.distill.dataset import Exchange
from fastmtp.distill.statistics import measure, spans
from tests.conftest import tiny_target
from tests.distill.test_clean import exchange, write

TARGET = tiny_target("llama")


def of_kind(index: int, kind: str, **more: bool) -> Exchange:
    return replace(exchange(index, "b" * (index + 1), prompt="Who are you?", **more), kind=kind)


def test_counts_lengths_and_tokens(tmp_path: Path) -> None:
    """Over two directories: counts, quantiles, the commonest tokens of the answers alone."""
    first = write(tmp_path / "a", [of_kind(index, "x") for index in range(9)])
    second = write(tmp_path / "b", [of_kind(9, "y", finished=False)])
    found = measure([first, second], TARGET, 3)
    assert (found.exchanges, found.finished) == (10, 9)
    assert found.kinds == {"x": 9, "y": 1}
    assert found.domains == {"question": 10}
    assert found.answer_tokens == sum(range(2, 11)) + 10
    assert found.answer_lengths["0%"] == 2 and found.answer_lengths["100%"] == 10
    prompt = TARGET.encode_chat([{"role": "user", "content": "Who are you?"}])
    assert set(found.prompt_lengths.values()) == {len(prompt)}
    assert found.distinct_tokens == 2
    assert found.frequent_tokens == [("b", 55 / 64), ("<|end|>", 9 / 64)]
    # One of each kind before the second of any.
    assert [sample[1].text.removesuffix("<|end|>") for sample in found.samples] == ["b", "b" * 10, "bb"]


def test_a_sample_shows_the_mask() -> None:
    """The pieces joined are the whole exchange, special tokens and all, divided where the mask divides."""
    prompt, answer = spans(exchange(0, "yes"), TARGET)
    assert prompt.text.endswith("<|end|><|assistant|>") and not prompt.is_answer
    assert (answer.text, answer.is_answer) == ("yes<|end|>", True)


def test_the_report_marks_prompt_and_answer(tmp_path: Path) -> None:
    """Prompt dim, answer bold; brackets in a text are no markup."""
    source = write(tmp_path / "a", [exchange(0, "[red]no[/red]", prompt="hello")])
    console = Console(force_terminal=True, width=100, color_system="standard", record=True)
    with console.capture() as caught:
        draw_statistics(measure([source], TARGET, 1), console)
    text = caught.get()
    assert "\x1b[1m[red]no[/red]<|end|>" in text
    assert "\x1b[2m<|user|>hello<|end|>" in text


def test_another_tokenizer_is_an_error(tmp_path: Path) -> None:
    source = write(tmp_path / "a", [exchange(0)])
    (source / "provenance.json").write_text('{"tokenizer_sha256": "0"}')
    with pytest.raises(ValueError, match="its token ids are not those of tiny-llama; give its --target"):
        measure([source], TARGET, 1)

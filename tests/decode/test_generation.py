"""Answers as text: what is shown is the text, piece by piece, whatever the rounds."""

from __future__ import annotations

from itertools import islice

import pytest

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.drafter import chains
from fastmtp.decode.generation import Generation
from fastmtp.decode.plain import plain
from fastmtp.decode.speculative import Round
from fastmtp.engines.torch.target import Target
from fastmtp.method.head import MTPHead
from tests.conftest import random_ids
from tests.engines import Engine

GREEDY = SamplingConfig()


class Told(Generation):
    """An answer whose tokens are given, in rounds of a given size."""

    def __init__(self, target: Target, text: str, size: int, stop: tuple[str, ...] = ()) -> None:
        super().__init__(
            Engine().sequence(target),
            target,
            [1],
            new_drafter=None,
            sampling=GREEDY,
            max_new_tokens=1000,
            stop=stop,
        )
        ids = [*target.encode(text), 257]
        self._given = [Round(ids[start : start + size], 0) for start in range(0, len(ids), size)]

    def _rounds(self, sequence, drafter, grammar):  # type: ignore[no-untyped-def]
        return iter(self._given)


TEXT = "naïve café — 春天的天气 🌸 done"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_pieces_make_the_text(llama: Target, size: int) -> None:
    """Characters of several tokens come out whole, wherever the rounds cut them."""
    told = Told(llama, TEXT, size)
    pieces = list(told)
    assert "".join(pieces) == told.result.text == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert told.result.stopped == "end"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("stop", [("天气",), ("café", "🌸"), ("e c",), ("done",), ("nothing like it",)])
def test_stop_strings_are_never_shown(llama: Target, size: int, stop: tuple[str, ...]) -> None:
    """Not even their beginnings, unless the text goes on differently."""
    told = Told(llama, TEXT, size, stop)
    shown = "".join(told)
    places = [TEXT.index(text) for text in stop if text in TEXT]
    assert shown == told.result.text == (TEXT[: min(places)] if places else TEXT)
    assert told.result.stopped == ("stop_string" if places else "end")


def test_incomplete_last_character_is_shown_as_such(llama: Target) -> None:
    """An answer cut inside a character shows the replacement character once, at the end."""
    told = Told(llama, "ab春", 1)
    told._given = told._given[:4]
    told._max_new_tokens = 4
    assert "".join(told) == told.result.text == "ab\ufffd"


def test_statistics(llama: Target) -> None:
    """Rounds times tau are the tokens after the first one; speeds are positive."""
    head = MTPHead(llama.model)
    generation = Generation(
        Engine().sequence(llama, head),
        llama,
        random_ids(5),
        new_drafter=chains(2),
        sampling=GREEDY,
        max_new_tokens=20,
    )
    result = generation.run()
    assert result.acceptance.rounds * result.acceptance.tau == pytest.approx(len(result.tokens) - 1)
    assert len(result.acceptance.kept) == 2
    assert result.tokens_per_second > 0
    assert result.prefill_seconds > 0


def test_same_seed_same_answer(llama: Target) -> None:
    """Sampling is reproducible, and another seed gives another answer."""
    answers = [
        Generation(
            Engine().sequence(llama, MTPHead(llama.model)),
            llama,
            random_ids(5),
            new_drafter=chains(3),
            sampling=sampling,
            max_new_tokens=20,
        )
        .run()
        .tokens
        for sampling in (SamplingConfig(temperature=1.0, seed=seed) for seed in (1, 1, 2))
    ]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("prompt", "limit", "stop", "message"),
    [
        ([], 5, (), "the prompt is empty"),
        ([1] * 512, 5, (), "512 tokens and the context ends at 512"),
        ([1], 0, (), "max_new_tokens is 0"),
        ([1], 5, ("",), "a stop string is empty"),
    ],
)
def test_bad_requests(llama: Target, prompt: list[int], limit: int, stop: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Generation(
            Engine().sequence(llama),
            llama,
            prompt,
            new_drafter=None,
            sampling=GREEDY,
            max_new_tokens=limit,
            stop=stop,
        )


def test_plain_draws_from_the_law_it_is_given(llama: Target) -> None:
    """The oracle at top-k 1 is greedy, whatever the temperature."""
    prompt = random_ids(6)
    sampled = SamplingConfig(temperature=2.0, top_k=1)
    streams = [plain(Engine().sequence(llama), prompt, one) for one in (sampled, GREEDY)]
    assert list(islice(streams[0], 15)) == list(islice(streams[1], 15))

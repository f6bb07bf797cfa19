"""Plain greedy decoding, whose next step is launched before the host has read the last one's token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fastmtp.config import SamplingConfig
from fastmtp.decode.plain import plain
from fastmtp.engines.cuda.engine import CudaEngine
from fastmtp.engines.cuda.graphs import Graphs
from fastmtp.engines.protocol import EngineSequence, Head
from fastmtp.engines.torch.target import Target
from fastmtp.engines.tree import Tree
from tests.conftest import random_ids
from tests.cuda.conftest import DEVICE, shallow
from tests.cuda.engine import Cuda, convert, cuda_engine

GREEDY = SamplingConfig()
CUDA = Cuda()
PROMPT = random_ids(3, seed=7)


@pytest.fixture
def llama() -> Target:
    return shallow("llama", 1)


def one_by_one(target: Target, text: list[int], count: int) -> list[int]:
    """The tokens after a text."""
    sequence = CUDA.sequence(target)
    token = int(sequence.prefill(text).argmax())
    return [token, *drawn(sequence, token, count - 1)]


def blank(engine: CudaEngine, ids: list[int], head: Head | None = None) -> EngineSequence:
    """A sequence whose keys, values and last state are zeros, which nobody had to compute: an engine's first."""
    sequence = engine.new_sequence(head)
    sequence._tokens = list(ids)
    if head is not None:
        sequence._drafted, sequence._waiting = len(ids) - 1, [torch.zeros(1, 32, device=DEVICE)]
    return sequence


def drawn(sequence: EngineSequence, token: int, count: int) -> list[int]:
    """As `extend`, each from the logits of a forward that nothing follows."""
    found = list[int]()
    for _ in range(count):
        token = int(sequence.verify(Tree(token))[0].argmax())
        sequence.commit([0])
        found.append(token)
    return found


def extend(sequence: EngineSequence, token: int, count: int) -> list[int]:
    """Greedy tokens after a sequence's text and one more."""
    found = list[int]()
    for _ in range(count):
        (token,) = sequence.verify_greedy(Tree(token))
        sequence.commit([0])
        found.append(token)
    return found


def test_sequences_take_turns(llama: Target) -> None:
    """While a step of each is in flight, others get theirs."""
    prompts = [PROMPT, random_ids(5)]
    streams = [plain(CUDA.sequence(llama), prompt, GREEDY) for prompt in prompts]
    found: list[list[int]] = [[], []]
    for turn in (0, 0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 1):
        found[turn].append(next(streams[turn]))
    assert found == [one_by_one(llama, prompt, len(own)) for prompt, own in zip(prompts, found, strict=True)]


def another_token(sequence: EngineSequence, token: int) -> list[int]:
    return [token ^ 1]


def another_tree(sequence: EngineSequence, token: int) -> list[int]:
    """That nobody commits, and whose keys lie where the step ahead has put its own."""
    sequence.verify_greedy(Tree.chain([token ^ 1, 5, 6]))
    return [token]


def a_drawn_token(sequence: EngineSequence, token: int) -> list[int]:
    sequence.verify(Tree(token))
    sequence.commit([0])
    return [token, 9]


def the_same_text(sequence: EngineSequence, token: int) -> list[int]:
    """Begun again."""
    sequence.prefill([*sequence.tokens])
    return [token]


def another_text(sequence: EngineSequence, token: int) -> list[int]:
    sequence.prefill([*sequence.tokens[:4], 8, 9, 10])
    return [token]


@pytest.mark.parametrize("change", [another_token, another_tree, a_drawn_token, the_same_text, another_text])
def test_a_text_goes_on_otherwise(llama: Target, change: Callable[[EngineSequence, int], list[int]]) -> None:
    """What was launched ahead leaves no trace."""
    sequence = CUDA.sequence(llama)
    sequence.prefill(PROMPT)
    token = extend(sequence, 4, 4)[-1]
    more = change(sequence, token)
    text = [*sequence.tokens, more[-1]]
    assert extend(sequence, more[-1], 4) == one_by_one(llama, text, 4)


def test_a_copy_goes_on_by_itself(llama: Target) -> None:
    """As does the sequence whose step is in flight."""
    one, other = CUDA.sequence(llama), CUDA.sequence(llama)
    one.prefill(PROMPT)
    token = extend(one, 4, 4)[-1]
    text = [*one.tokens, token]
    other.share(one, len(one.tokens))
    assert extend(other, token, 3) == extend(one, token, 3) == one_by_one(llama, text, 3)


def counts(graphs: Graphs, run: Callable[[], object]) -> tuple[int, int]:
    """Launches and copies."""
    graphs.launched = graphs.copied = 0
    run()
    return graphs.launched, graphs.copied


def test_launches_and_copies_of_a_token(llama: Target) -> None:
    """The second step of a text launches the third, too; where one is dropped it begins again."""
    graphs, sequence = cuda_engine(llama).machine.graphs, CUDA.sequence(llama)
    sequence.prefill(PROMPT)
    token, found = 4, []
    for wanted in (0, 0, 0, 1, 0, 0):
        found.append(counts(graphs, lambda given=token ^ wanted: extend(sequence, given, 1)))
        (token,) = sequence._runner._plain._next[0][2:3]
    assert found == [(1, 1), (2, 1), (1, 1), (1, 1), (2, 1), (1, 1)]


def test_nothing_is_launched_beyond_the_context(llama: Target) -> None:
    engine = CudaEngine(convert(llama, torch.float32), 256)
    engine.target.context_limit = 9
    sequence, graphs, found = engine.new_sequence(), engine.machine.graphs, list[int]()
    assert counts(graphs, lambda: found.extend(plain(sequence, PROMPT, GREEDY))) == (2 + 6, 1 + 6)
    assert found == one_by_one(llama, PROMPT, 7)


def test_pages_that_are_missing_ahead_are_no_error(llama: Target) -> None:
    """Only those of a token that is asked for are; a page that comes back is used."""
    engine = CudaEngine(convert(llama, torch.float32), 128)
    sequence, other = blank(engine, random_ids(60)), engine.new_sequence()
    other.prefill(PROMPT)
    found = extend(sequence, 4, 4)
    with pytest.raises(MemoryError, match="a context of 65 tokens does not fit"):
        sequence.verify_greedy(Tree(found[-1]))
    del other
    found += extend(sequence, found[-1], 3)
    another = CudaEngine(convert(llama, torch.float32), 128)
    assert found == drawn(blank(another, random_ids(60)), 4, 7)


def test_logits_are_the_rows_own(llama: Target) -> None:
    """Of a token whose next step has been launched."""
    ahead, alone = CUDA.sequence(llama), CUDA.sequence(llama)
    token = 4
    for one in (ahead, alone):
        one.prefill(PROMPT)
    for _ in range(4):
        (following,) = ahead.verify_greedy(Tree(token))
        found_V = ahead.logits(0)
        assert np.array_equal(found_V, alone.verify(Tree(token))[0])
        for one in (ahead, alone):
            one.commit([0])
        token = following


def test_a_step_of_another_that_fails(llama: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row is on the device then."""
    sequence, other = CUDA.sequence(llama), CUDA.sequence(llama)
    for one in (sequence, other):
        one.prefill(PROMPT)
    token = extend(sequence, 4, 3)[-1]
    text = [*sequence.tokens, token]
    with monkeypatch.context() as patch:
        patch.setattr(Graphs, "run", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            other.verify_greedy(Tree(9))
    assert extend(sequence, token, 3) == one_by_one(llama, text, 3)

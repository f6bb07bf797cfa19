"""Replayed answers: the rounds are those that decoding goes through, and the bounds are bounds."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.drafter import NewDrafter, chains
from fastmtp.decode.drafting.estimates import Estimates
from fastmtp.decode.drafting.learned import MAX_NODES, PLANNING_MS, Learned
from fastmtp.decode.plain import plain
from fastmtp.decode.speculative import speculative
from fastmtp.engines.protocol import Ask, Costs
from fastmtp.engines.torch.target import Target
from fastmtp.engines.tree import Tree
from fastmtp.evaluate import recording, replay
from fastmtp.evaluate.recording import Recorded, Recording
from tests.conftest import random_ids, tiny_target
from tests.engines import Engine
from tests.train.test_recursion import tuned_head

COSTS = Costs({128: {1: 5.0, 8: 7.0, 16: 12.0}}, {1: 0.2})
SETTINGS = [SamplingConfig(), SamplingConfig(temperature=0.8, top_k=12, seed=4)]
ANSWER = 60


@pytest.fixture(scope="module", params=SETTINGS, ids=["greedy", "drawn"])
def recorded(request: pytest.FixtureRequest) -> tuple[Target, Recording]:
    target, prompt = tiny_target("llama"), random_ids(12) * 2
    answer = list(islice(plain(Engine().sequence(target), prompt, request.param), ANSWER))
    sequence = Engine().sequence(target, tuned_head(target))
    return target, recording.record(sequence, "kind", "one", prompt, answer, request.param)


WAYS: dict[str, Callable[[], NewDrafter]] = {
    "chain-1": lambda: chains(1),
    "chain-3": lambda: chains(3),
    "auto": lambda: replay.adaptive(Learned(COSTS)),
}


@pytest.mark.parametrize("way", WAYS)
def test_replayed_rounds_are_the_decoders(recorded: tuple[Target, Recording], way: str) -> None:
    """As many rounds, tokens verified and drafts asked for as decoding has; what is missing is counted."""
    target, one = recorded
    found = replay.replay(one, WAYS[way](), COSTS)
    again = WAYS[way]()(one.prompt, one.sampling)
    sequence = Engine().sequence(target, tuned_head(target))
    tokens, rounds = 1, []
    for settled in islice(speculative(sequence, one.prompt, again, one.sampling), 1, None):
        rounds.append(settled)
        tokens += len(settled.tokens)
        if tokens >= ANSWER:
            break
    # The last round may draft beyond the answer's end.
    assert found.missed <= 0.02 * found.asked
    assert abs(found.rounds - len(rounds)) <= (1 if found.missed else 0)
    assert abs(found.verified - sum(1 + round_.drafted for round_ in rounds)) <= 8
    assert found.tokens == ANSWER - 1
    planning_ms = PLANNING_MS if way == "auto" else 0.0
    least = found.rounds * 5.0 + found.asked * (0.2 + planning_ms)
    assert least < found.milliseconds < found.rounds * 12.0 + found.asked * (0.2 + planning_ms)
    assert found.plain_ms == pytest.approx(5.0 * found.tokens)


def test_no_drafter_passes_the_bounds(recorded: tuple[Target, Recording]) -> None:
    _, one = recorded
    compared = replay.compare([one], COSTS, Estimates())
    speedups = {name: by_benchmark["kind"].speedup for name, by_benchmark in compared.items()}
    assert compared["chain:3"]["kind"].tau > 1
    assert speedups["auto"] <= speedups[replay.HINDSIGHT] <= speedups[replay.ORACLE]


def test_the_oracle_by_hand() -> None:
    """Every round verifies as many right tokens as a tree may hold, where that costs nothing."""
    one = Recording("kind", "one", SamplingConfig(), [1, 2], list(range(2 * MAX_NODES + 1)), [{}] * 2 * MAX_NODES)
    found = replay.oracle(one, Costs({128: {1: 5.0, 16: 5.0}}, {1: 1.0}))
    assert (found.rounds, found.tokens, found.milliseconds) == (2, 2 * MAX_NODES, 10.0)
    # Where each token costs what one costs alone, nothing is gained.
    assert replay.oracle(one, Costs({128: {1: 1.0, 16: 16.0}}, {1: 1.0})).speedup == 1


def test_hindsight_by_hand() -> None:
    """A head that is right at once draws level with what asking it costs."""
    said = [{(): recording.Candidates([index + 1], [0.9])} for index in range(10)]
    one = Recording("kind", "one", SamplingConfig(), [50, 51], list(range(11)), said)
    cheap = replay.hindsight(one, Costs({128: {1: 5.0, 16: 5.0}}, {1: 1.0}))
    assert (cheap.rounds, cheap.tokens) == (5, 10)
    assert cheap.milliseconds == pytest.approx(5 * (5.0 + 1.0 + PLANNING_MS))
    dear = replay.hindsight(one, Costs({128: {1: 5.0, 16: 5.0}}, {1: 6.0}))
    assert (dear.rounds, dear.milliseconds) == (10, 50.0)


def test_what_is_learned_is_what_was_right(recorded: tuple[Target, Recording]) -> None:
    """Counts of verified drafts, with which a new drafter starts."""
    _, one = recorded
    found = replay.fit([one], COSTS, Estimates())
    assert found.counts
    assert all(0 <= right <= verified for right, verified in found.counts.values())
    assert sum(verified for _, verified in found.counts.values()) > 20


def test_a_recording_is_read_as_it_was_written(recorded: tuple[Target, Recording], tmp_path: Path) -> None:
    _, one = recorded
    path = tmp_path / "one.gz"
    recording.save([one], path)
    (again,) = recording.load(path)
    assert (again.prompt, again.answer, again.sampling) == (one.prompt, one.answer, one.sampling)
    for ours, theirs in zip(one.said, again.said, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(ours[node].tokens == theirs[node].tokens for node in ours)


@pytest.mark.parametrize("data", [b"", b"no gzip", None])
def test_what_is_no_recording_is_named(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "some.gz"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises((ValueError, FileNotFoundError), match=r"some\.gz: "):
        list(recording.load(path))


def test_what_a_recording_lacks_is_never_right(recorded: tuple[Target, Recording]) -> None:
    """And it is counted."""
    _, one = recorded
    sequence, tree = Recorded(one), Tree(one.answer[0])
    sequence.ask(Ask(tree, [0], 4))
    (found,) = sequence.ask(Ask(tree, [tree.add(0, -5)], 4))
    assert sequence.missed == 1
    assert found.tokens == [-1]

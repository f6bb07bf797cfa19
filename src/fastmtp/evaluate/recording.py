"""The head's candidates after every token of an answer, recorded once, so that any drafter can be replayed on it.

Output does not depend on what is drafted, so an answer is the same for every drafter, and so are the head's
candidates after each of its tokens. `Recorded` is a sequence that answers from a recording, without a model.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.drafter import DRAWN_AMONG
from fastmtp.decode.drafting.learned import MAX_DEPTH
from fastmtp.decode.drafting.lookup import Lookup
from fastmtp.decode.sampling import race
from fastmtp.engines.protocol import Ask, Candidates, TokenSequence
from fastmtp.engines.tree import Tree
from fastmtp.errors import PARSING, reason
from fastmtp.evaluate.records import PLAIN, Turn
from fastmtp.files import parse_json, replacing
from fastmtp.progress import QUIET, Progress

FORMAT = "fastmtp recording 1"
# Candidates of a node, and nodes of a level that are expanded besides the lookup's and the right one.
WIDTH, BEAM = 8, 6

# The head's candidates after a node, by the drafted tokens on the path to it.
Said = dict[tuple[int, ...], Candidates]


@dataclass(frozen=True)
class Recording:
    """An answer, its first token included, and the head's candidates after every token but the last."""

    benchmark: str
    id: str
    sampling: SamplingConfig
    prompt: list[int]
    answer: list[int]
    said: list[Said]


def record_all(
    sequence: TokenSequence, turns: Iterable[Turn], sampling: SamplingConfig, progress: Progress = QUIET
) -> list[Recording]:
    """Record plain decoding's answers to a benchmark's turns, of the first repeat."""
    answered = [(turn, plain.tokens) for turn in turns if turn.repeat == 0 and (plain := turn.answer(PLAIN))]
    long = [(turn, tokens) for turn, tokens in answered if len(tokens) > 1]
    found = []
    with progress.bar("record", len(long)) as bar:
        for turn, tokens in long:
            found.append(record(sequence, turn.benchmark, turn.id, turn.prompt, tokens, sampling))
            bar.advance(1, len(tokens))
    return found


def record(
    sequence: TokenSequence,
    benchmark: str,
    id: str,
    prompt: Sequence[int],
    answer: Sequence[int],
    sampling: SamplingConfig,
) -> Recording:
    """Step through an answer, and ask the head for trees that contain what any drafter would ask for."""
    lookup, said = Lookup(), []
    lookup.extend(prompt)
    sequence.reset()
    sequence.prefill(prompt)
    for index, token in enumerate(answer[:-1]):
        lookup.extend([token])
        said.append(_ask(sequence, token, answer[index + 1 :], lookup.continuation(MAX_DEPTH)[1], sampling))
        sequence.verify_greedy(Tree(token))
        sequence.commit([0])
    return Recording(benchmark, id, sampling, list(prompt), list(answer), said)


def _ask(
    sequence: TokenSequence, token: int, right: Sequence[int], text: Sequence[int], sampling: SamplingConfig
) -> Said:
    width, position = DRAWN_AMONG if sampling.temperature > 0 else WIDTH, len(sequence.tokens) + 1
    tree = Tree(token)
    said: Said = {(): sequence.ask(Ask(tree, [0], width))[0]}
    nodes: dict[tuple[int, ...], int] = {(): 0}
    level: dict[tuple[int, ...], float] = {(): 1.0}
    for depth in range(1, MAX_DEPTH):
        ahead: dict[tuple[int, ...], float] = {}
        for path, chance in level.items():
            found = said[path]
            drawn = race(found.tokens, found.confidences, sampling, position + depth - 1)
            for next_token, share in zip(*drawn, strict=True):
                ahead[(*path, next_token)] = chance * share
        best = dict(sorted(ahead.items(), key=lambda item: -item[1])[:BEAM])
        for path in (tuple(text[:depth]), tuple(right[:depth])):
            if len(path) == depth and path[:-1] in nodes:
                best.setdefault(path, ahead.get(path, 0.0))
        nodes |= {path: tree.add(nodes[path[:-1]], path[-1]) for path in best}
        said |= zip(best, sequence.ask(Ask(tree, [nodes[path] for path in best], width)), strict=True)
        level = best
    return said


class Recorded:
    """A DraftingSequence that reads a recording; `missed` counts requests that it does not contain."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self.tokens = list(recording.prompt)
        self.missed = 0

    def ask(self, ask: Ask) -> list[Candidates]:
        return [self._said(ask.tree.tokens_after_root(node), ask.width) for node in ask.nodes]

    def _said(self, path: Sequence[int], width: int) -> Candidates:
        index = len(self.tokens) - len(self._recording.prompt)
        found = self._recording.said[index].get(tuple(path))
        if found is None:
            self.missed += 1
            return Candidates([-1], [1e-9])
        return Candidates(found.tokens[:width], found.confidences[:width])


def save(recordings: Sequence[Recording], path: Path) -> None:
    with replacing(path) as temporary, gzip.open(temporary, "wt", encoding="utf-8") as stream:
        stream.write(json.dumps({"format": FORMAT}) + "\n")
        for one in recordings:
            said = [
                [
                    [list(path), found.tokens, [round(share, 5) for share in found.confidences]]
                    for path, found in tree.items()
                ]
                for tree in one.said
            ]
            stream.write(json.dumps({**asdict(one), "said": said}) + "\n")


def load(path: Path) -> Iterator[Recording]:
    """Raises FileNotFoundError if there is no file, ValueError if it is no recording."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recording; `fastmtp bench --record` makes one")
    try:
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            if parse_json(stream.readline()).get("format") != FORMAT:
                raise ValueError("another format")
            found = [_recording(parse_json(line)) for line in stream]
    except (OSError, *PARSING) as error:
        raise ValueError(
            f"{path}: is no recording of `fastmtp bench --record` of this version: {reason(error)}"
        ) from error
    yield from found


def _recording(row: dict[str, Any]) -> Recording:
    said = [{tuple(path): Candidates(tokens, shares) for path, tokens, shares in tree} for tree in row["said"]]
    return Recording(**{**row, "sampling": SamplingConfig(**row["sampling"]), "said": said})

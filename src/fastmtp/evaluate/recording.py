"""What the head says after every token of an answer, recorded once, so that any drafter can be run on it again.

Output does not depend on what is drafted, so an answer is the same for every drafter, and so is what the head says
after each of its tokens. `Recorded` is a backend that answers from a recording, without model and without clock.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.adaptive import MAX_DEPTH
from fastmtp.decode.drafting.drafter import DRAWN_AMONG
from fastmtp.decode.drafting.lookup import Lookup
from fastmtp.decode.sampling import race
from fastmtp.engines.protocol import Backend, Candidates
from fastmtp.evaluate.records import PLAIN, Turn
from fastmtp.files import replacing
from fastmtp.progress import QUIET, Progress

FORMAT = "fastmtp recording 1"
# Candidates of a node, and nodes of a level that the head goes on from, beside the text's and the right one.
WIDTH, BEAM = 8, 6

# The tokens from the first one drafted to a node, and what the head says after it.
Said = dict[tuple[int, ...], Candidates]


@dataclass(frozen=True)
class Recording:
    """An answer, the first token included, and for every place in it what the head says of what follows."""

    benchmark: str
    id: str
    sampling: SamplingConfig
    prompt: list[int]
    answer: list[int]
    said: list[Said]


def record_all(
    backend: Backend, turns: Iterable[Turn], sampling: SamplingConfig, progress: Progress = QUIET
) -> list[Recording]:
    """Plain decoding's answers of a benchmark's turns, each with what the head says along it."""
    answered = [(turn, plain.tokens) for turn in turns if turn.repeat == 0 and (plain := turn.answer(PLAIN))]
    long = [(turn, tokens) for turn, tokens in answered if len(tokens) > 1]
    found = []
    with progress.bar("record", len(long)) as bar:
        for turn, tokens in long:
            found.append(record(backend, turn.benchmark, turn.id, turn.prompt, tokens, sampling))
            bar.advance(1, len(tokens))
    return found


def record(
    backend: Backend,
    benchmark: str,
    id: str,
    prompt: Sequence[int],
    answer: Sequence[int],
    sampling: SamplingConfig,
) -> Recording:
    """Go through an answer token by token, and ask the head for trees that hold what any drafter would ask for."""
    lookup, said = Lookup(), []
    lookup.extend(prompt)
    backend.reset()
    backend.prefill(prompt)
    for index, token in enumerate(answer[:-1]):
        lookup.extend([token])
        said.append(_ask(backend, token, answer[index + 1 :], lookup.continuation(MAX_DEPTH)[1], sampling))
        backend.choices([token])
    return Recording(benchmark, id, sampling, list(prompt), list(answer), said)


def _ask(backend: Backend, token: int, right: Sequence[int], text: Sequence[int], sampling: SamplingConfig) -> Said:
    width, place = DRAWN_AMONG if sampling.temperature > 0 else WIDTH, len(backend.tokens) + 1
    said: Said = {(): backend.start_tree(token, width)}
    nodes: dict[tuple[int, ...], int] = {(): 0}
    level: dict[tuple[int, ...], float] = {(): 1.0}
    for depth in range(1, MAX_DEPTH):
        ahead: dict[tuple[int, ...], float] = {}
        for path, chance in level.items():
            found = said[path]
            for next_token, share in zip(
                *race(found.tokens, found.confidences, sampling, place + depth - 1), strict=True
            ):
                ahead[(*path, next_token)] = chance * share
        best = dict(sorted(ahead.items(), key=lambda item: -item[1])[:BEAM])
        for path in (tuple(text[:depth]), tuple(right[:depth])):
            if len(path) == depth and path[:-1] in nodes:
                best.setdefault(path, ahead.get(path, 0.0))
        paths = list(best)
        found_all = backend.extend_tree([nodes[path[:-1]] for path in paths], [path[-1] for path in paths], width)
        for path, candidates in zip(paths, found_all, strict=True):
            nodes[path], said[path] = len(nodes), candidates
        level = best
    return said


class Recorded:
    """A HeadBackend from a recording; `missed` counts what was asked for and is not there."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self.tokens = list(recording.prompt)
        self.missed = 0
        self._paths: list[tuple[int, ...]] = []

    def draft(self, token: int, steps: int) -> list[int]:
        found, drafted = self.start_tree(token, 1), list[int]()
        while True:
            drafted += found.tokens[:1]
            if len(drafted) == steps:
                return drafted
            found = self.extend_tree([len(drafted) - 1], drafted[-1:], 1)[0]

    def start_tree(self, token: int, width: int) -> Candidates:
        self._paths = [()]
        return self._said((), width)

    def extend_tree(self, parents: Sequence[int], tokens: Sequence[int], width: int) -> list[Candidates]:
        added = [(*self._paths[parent], token) for parent, token in zip(parents, tokens, strict=True)]
        self._paths += added
        return [self._said(path, width) for path in added]

    def _said(self, path: tuple[int, ...], width: int) -> Candidates:
        index = len(self.tokens) - len(self._recording.prompt)
        found = self._recording.said[index].get(path)
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
    """Raises FileNotFoundError without the file, ValueError where it is no recording."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recording; `fastmtp bench --record` makes one")
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        try:
            if json.loads(stream.readline()).get("format") != FORMAT:
                raise ValueError("another format")
            rows = [json.loads(line) for line in stream]
        except (OSError, ValueError, AttributeError, EOFError) as error:
            raise ValueError(
                f"{path}: is no recording of `fastmtp bench --record` of this version: {error}"
            ) from error
    for row in rows:
        said = [{tuple(path): Candidates(tokens, shares) for path, tokens, shares in tree} for tree in row["said"]]
        yield Recording(**{**row, "sampling": SamplingConfig(**row["sampling"]), "said": said})

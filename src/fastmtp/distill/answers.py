"""Self-distillation: the target answers prompts, its own answers are the training data (FastMTP, section 3.1)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastmtp.config import BATCH_SLOTS, DistillConfig
from fastmtp.decode.batch import Completion, Request, decode_batch
from fastmtp.distill.dataset import Exchange, ShardWriter, check_claim, claim_directory, finished_indices
from fastmtp.distill.domains import Mix
from fastmtp.distill.endpoints import Endpoints
from fastmtp.distill.own_prompts import Opening, UserTurn, check_mix, opening
from fastmtp.distill.prompts import Prompt, prompts_sha256, read_prompts, user
from fastmtp.distill.requests import (
    Endings,
    answer_request,
    checked_ids,
    exchange_of,
    how_to_answer,
    prompt_ids,
    prompt_request,
)
from fastmtp.engines.protocol import Engine
from fastmtp.locking import sole_writer
from fastmtp.models.info import TargetInfo
from fastmtp.progress import QUIET, Progress
from fastmtp.provenance import provenance
from fastmtp.rows import RowError, Skipped

# These may change between a run and its continuation without changing any exchange.
FREE_SETTINGS = ("count", "minutes", "slots", "shard_rows", "concurrency", "timeout", "retries")

# So many exchanges are judged for the mix, and then one in so many.
_ALL_JUDGED, _ONE_IN = 1000, 16
# In groups of what ended at the same time.
Decode = Callable[[deque[Request], int], Iterator[list[Completion]]]


@dataclass
class DistillSummary(Mix):
    """What one run added to a data directory, and the mix that resulted, of the first thousand and one in sixteen.

    `skipped` counts rows of prompts that were left out (`first_skipped` is what the first one's error says), and
    `unended` the target's own prompts that never came to an end.

    For endpoints only: `refused` counts requests that a later run tries again, `retokenised` completions that came
    as text without token ids and were tokenised here, `mismatched` those of them that decode to another text, and
    `malformed` replies that were no completion.
    """

    exchanges: int = 0
    truncated: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0
    refused: int = 0
    retokenised: int = 0
    mismatched: int = 0
    malformed: int = 0
    skipped: int = 0
    first_skipped: str = ""
    unended: int = 0

    def add(self, exchange: Exchange) -> None:
        self.exchanges += 1
        self.truncated += not exchange.finished
        self.answer_tokens += sum(exchange.answer_mask)
        # To judge one takes longer than a GPU takes to make it.
        if self.exchanges <= _ALL_JUDGED or self.exchanges % _ONE_IN == 0:
            self.count(exchange.kind, exchange.prompt, exchange.answer)


def check(config: DistillConfig, out: Path, prompts: str | None, *, strict: bool = False) -> None:
    """What can be said of a run before the target is loaded; arguments and errors as for `distill`."""
    mix = config.mix_weights()
    check_mix(mix)
    if mix and prompts is not None:
        raise ValueError("--mix is of the model's own prompts; leave out --mix or --prompts")
    if prompts is not None:
        read_prompts(prompts, Skipped(strict=strict))
    check_claim(out, vars(config), FREE_SETTINGS, vars(DistillConfig()))


def distill(
    engine: Engine | Endpoints,
    config: DistillConfig,
    out: Path,
    prompts: str | None,
    progress: Progress = QUIET,
    *,
    strict: bool = False,
) -> DistillSummary:
    """Fill the data directory `out`, continuing an earlier run that stopped.

    Args:
        engine: decodes in this process, or by endpoints.
        prompts: a prompt file or a data set on the hub; None lets the target write `config.count` prompts itself.
        strict: a prompt that cannot be used is an error before anything is answered; else it is left out.
    Raises:
        FileNotFoundError, ValueError: the prompts, the target or the directory do not fit, or the target ends none
            of its own prompts; the message says how. The answers so far are on disk.
        ConnectionError: no endpoint is left; the answers so far are on disk.
        OSError: somebody else writes there.
    """
    with sole_writer(out):
        target = engine.target
        mix = config.mix_weights()
        skipped = Skipped(strict=strict)
        listed = None if prompts is None else read_prompts(prompts, skipped)
        turn = UserTurn(target) if listed is None else None
        if strict:
            with progress.status("checking the prompts"):
                for prompt in listed or []:
                    prompt_ids(target, prompt)
        facts = provenance(
            config,
            target=target.source,
            tokenizer_sha256=target.identity.tokenizer_sha256,
            prompts_sha256=None if prompts is None or listed is None else prompts_sha256(prompts, listed),
            endpoints=engine.urls if isinstance(engine, Endpoints) else [],
        )
        claim_directory(out, facts, FREE_SETTINGS, vars(DistillConfig()))
        done = finished_indices(out)
        indices = range(config.count) if listed is None else [prompt.index for prompt in listed]
        remaining = [index for index in indices if index not in done]
        in_time = _InTime(remaining, config.minutes)
        by_index = {prompt.index: prompt for prompt in listed or []}
        work = (opening(config.seed, i, mix) if listed is None else by_index[i] for i in in_time)
        writer = ShardWriter(out, config.shard_rows)
        decode: Decode
        if isinstance(engine, Endpoints):
            decode, width = _one_by_one(engine.decode), config.concurrency
        else:
            left = [by_index[index] for index in remaining if index in by_index]
            decode, width = open_decoder(engine, config, left, turn, len(remaining), progress)
        endings = Endings(target, config, len(done), min(width, len(remaining)), progress)
        asking = Asking(target, config, width, work, turn, endings, skipped)
        summary = DistillSummary()
        started = time.monotonic()
        before = len(indices) - len(remaining)
        with progress.bar("distill", len(indices), before, seconds=60 * config.minutes or None) as bar:
            try:
                for exchange in asking.exchanges(decode):
                    in_time.end(exchange.index)
                    writer.add(exchange)
                    summary.add(exchange)
                    bar.advance(1, sum(exchange.answer_mask), f"{summary.truncated} truncated")
            finally:
                writer.flush()
        summary.seconds = time.monotonic() - started
        if skipped.count:
            progress.say(f"fastmtp: {skipped}")
        summary.skipped, summary.first_skipped, summary.unended = skipped.count, skipped.first, endings.given_up
        if isinstance(engine, Endpoints):
            summary.refused, summary.retokenised = engine.refused, engine.retokenised
            summary.mismatched = engine.mismatched
            summary.malformed = engine.malformed
            if engine.refused and not summary.exchanges:
                raise ValueError(f"every request was refused: {engine.refusal}")
        if not summary.exchanges and not done:
            if summary.unended:
                raise endings.error()
            if summary.skipped:
                raise skipped.nothing(f"{prompts}: holds no prompt")
        return summary


def runs_in_slots(engine: Engine) -> bool:
    """Whether the engine is where decoding in slots pays off: on a GPU."""
    return engine.device.startswith("cuda")


def open_decoder(
    engine: Engine,
    config: DistillConfig,
    prompts: Sequence[Prompt],
    turn: UserTurn | None,
    count: int,
    progress: Progress = QUIET,
) -> tuple[Decode, int]:
    """What decodes the requests of a run, and how many of them together.

    Args:
        prompts: those that are left to answer, if they are given.
        turn: for those that the target writes.
        count: exchanges to make.
    """
    if runs_in_slots(engine) and count:
        from fastmtp.distill.slots.open import open_slots

        slots = open_slots(engine, config, prompts, turn, count, progress)
        if slots is not None:
            return slots, slots.machine.slots
    return _one_by_one(partial(decode_batch, engine)), config.slots or BATCH_SLOTS


def _one_by_one(decode: Callable[[deque[Request], int], Iterator[Completion]]) -> Decode:
    return lambda queue, width: ([completion] for completion in decode(queue, width))


class _InTime:
    """Indices of exchanges, as long as one that begins now is likely to end in time.

    Those under way at the end are finished: dropping them would favour short ones.
    """

    def __init__(self, indices: Sequence[int], minutes: float) -> None:
        """
        Args:
            minutes: 0 is no limit.
        """
        self._indices, self._limit = indices, 60 * minutes
        self._begun: dict[int, float] = {}
        self._seconds = 0.0
        self._ended = 0

    def __iter__(self) -> Iterator[int]:
        started = time.monotonic()
        for index in self._indices:
            now = time.monotonic()
            typical = self._seconds / max(1, self._ended)
            if self._limit and now - started + typical > self._limit:
                return
            self._begun[index] = now
            yield index

    def end(self, index: int) -> None:
        """Learn from an exchange how long they take."""
        self._seconds += time.monotonic() - self._begun.pop(index)
        self._ended += 1


@dataclass
class Asking:
    """Lets the target write prompts, and answer them or those of a file.

    Attributes:
        width: how many requests are decoded together.
        work: what to begin with.
        turn: where the target writes its prompts; None if it writes none.
        skipped: told of prompts that cannot be asked.
    """

    target: TargetInfo
    config: DistillConfig
    width: int
    work: Iterator[Opening | Prompt]
    turn: UserTurn | None
    endings: Endings
    skipped: Skipped

    def __post_init__(self) -> None:
        self._queue: deque[Request] = deque()

    def exchanges(self, decode: Decode) -> Generator[Exchange, None, None]:
        """In order of completion. A prompt that the target has finished writing is queued for its answer."""
        yield from self._refill()
        if not self._queue:
            return
        for group in decode(self._queue, len(self._queue)):
            texts = self.target.decode_many([completion.tokens for completion in group])
            written = self._written(group, texts)
            for completion, text in zip(group, texts, strict=True):
                request = completion.request
                if not completion.tokens:
                    pass  # Refused: it is not written to disk, so the next run asks again.
                elif isinstance(request.key, Prompt):
                    made = (text, completion.tokens, completion.finished)
                    yield exchange_of(request.key, request.prompt, *made)
                else:
                    self._take_prompt(request, written.get(request.key))
            yield from self._refill()

    def _refill(self) -> Iterator[Exchange]:
        """Fill the queue; prompts that have an answer already come out at once."""
        while len(self._queue) < self.width and (item := next(self.work, None)) is not None:
            if isinstance(item, Opening):
                assert self.turn is not None
                self._queue.append(prompt_request(self.target, self.config, self.turn, item))
                continue
            try:
                ids = prompt_ids(self.target, item)
                if item.answer_ids is None:
                    how = how_to_answer(self.target, self.config, item.index)
                    self._queue.append(answer_request(self.target, item, ids, how))
                else:
                    answer = self.target.decode(item.answer_ids)
                    yield exchange_of(item, ids, answer, item.answer_ids, item.finished)
            except RowError as error:
                self.skipped.add(error)

    def _written(
        self, group: Sequence[Completion], texts: Sequence[str]
    ) -> dict[Opening, tuple[Prompt, list[int] | Exception]]:
        """The prompts of the target's own that have come to their end, with their token ids as they are asked."""
        prompts: dict[Opening, Prompt] = {}
        for completion, text in zip(group, texts, strict=True):
            task = completion.request.key
            if isinstance(task, Opening) and completion.finished and (whole := (task.words + text).strip()):
                prompts[task] = Prompt(task.index, task.kind, user(whole))
        ids = self.target.encode_chats([prompt.messages for prompt in prompts.values()])
        return {task: (prompt, own) for (task, prompt), own in zip(prompts.items(), ids, strict=True)}

    def _take_prompt(self, request: Request, written: tuple[Prompt, list[int] | Exception] | None) -> None:
        """Queue a prompt of the target's own for its answer, or one that did not end to be written anew."""
        if written is not None:
            # It may fill the context, or hold what the template refuses.
            with suppress(RowError):
                prompt, found = written
                ids = checked_ids(self.target, prompt, found)
                how = request.then or how_to_answer(self.target, self.config, prompt.index)
                self._queue.appendleft(answer_request(self.target, prompt, ids, how))
                self.endings.ended()
                return
        if (again := self.endings.again(request)) is not None:
            self._queue.append(again)

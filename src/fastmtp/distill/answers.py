"""Self-distillation: the target answers prompts, its own answers are the training data (FastMTP, section 3.1)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fastmtp.config import DistillConfig, SamplingConfig
from fastmtp.decode.batch import Completion, Request, decode_batch
from fastmtp.decode.sampling import derived_seed
from fastmtp.distill.dataset import Exchange, ShardWriter, check_claim, claim_directory, finished_indices
from fastmtp.distill.domains import Mix
from fastmtp.distill.endpoints import Endpoints
from fastmtp.distill.own_prompts import Opening, UserTurn, check_mix, opening
from fastmtp.distill.prompts import Prompt, prompts_sha256, read_prompts, user
from fastmtp.engines.protocol import Engine
from fastmtp.models.info import TargetInfo
from fastmtp.progress import QUIET, Progress
from fastmtp.provenance import provenance

# These may change between a run and its continuation without changing any exchange.
FREE_SETTINGS = ("count", "minutes", "slots", "shard_rows", "concurrency", "timeout", "retries")

Decode = Callable[[deque[Request], int], Iterator[Completion]]


@dataclass
class DistillSummary(Mix):
    """What one run added to a data directory, and the mix that resulted.

    For endpoints only: `refused` counts requests that a later run tries again, `retokenised` completions that came
    as text without token ids and were tokenised here, and `mismatched` those of them that decode to another text.
    """

    exchanges: int = 0
    truncated: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0
    refused: int = 0
    retokenised: int = 0
    mismatched: int = 0

    def add(self, exchange: Exchange) -> None:
        self.exchanges += 1
        self.truncated += not exchange.finished
        self.answer_tokens += sum(exchange.answer_mask)
        self.count(exchange.kind, exchange.prompt, exchange.answer)


def check(config: DistillConfig, out: Path, prompts: str | None) -> None:
    """What can be said of a run before the target is loaded; arguments and errors as for `distill`."""
    mix = config.mix_weights()
    check_mix(mix)
    if mix and prompts is not None:
        raise ValueError("--mix is of the model's own prompts; leave out --mix or --prompts")
    if prompts is not None:
        read_prompts(prompts)
    check_claim(out, vars(config), FREE_SETTINGS, vars(DistillConfig()))


def distill(
    engine: Engine | Endpoints,
    config: DistillConfig,
    out: Path,
    prompts: str | None,
    progress: Progress = QUIET,
) -> DistillSummary:
    """Fill the data directory `out`, continuing an earlier run that stopped.

    Args:
        engine: decodes in this process, or by endpoints.
        prompts: a prompt file or a data set on the hub; None lets the target write `config.count` prompts itself.
    Raises:
        FileNotFoundError, ValueError: the prompts, the target or the directory do not fit; the message says how.
        ConnectionError: no endpoint is left; the answers so far are on disk.
    """
    target = engine.target
    mix = config.mix_weights()
    listed = None if prompts is None else read_prompts(prompts)
    turn = UserTurn(target) if listed is None else None
    facts = provenance(
        config,
        target=target.source,
        tokenizer_sha256=target.identity.tokenizer_sha256,
        prompts_sha256=None if prompts is None or listed is None else prompts_sha256(prompts, listed),
        endpoints=engine.urls if isinstance(engine, Endpoints) else [],
    )
    claim_directory(out, facts, FREE_SETTINGS, vars(DistillConfig()))
    done = finished_indices(out)
    total = config.count if listed is None else len(listed)
    remaining = [index for index in range(total) if index not in done]
    in_time = _InTime(remaining, config.minutes)
    work = (opening(config.seed, i, mix) if listed is None else listed[i] for i in in_time)
    writer = ShardWriter(out, config.shard_rows)
    if isinstance(engine, Endpoints):
        decode, width = engine.decode, config.concurrency
    else:
        decode, width = partial(decode_batch, engine), config.slots
    summary = DistillSummary()
    started = time.monotonic()
    with progress.bar("distill", total, total - len(remaining), seconds=60 * config.minutes or None) as bar:
        try:
            for exchange in _exchanges(target, decode, width, config, work, turn):
                in_time.end(exchange.index)
                writer.add(exchange)
                summary.add(exchange)
                bar.advance(1, sum(exchange.answer_mask), f"{summary.truncated} truncated")
        finally:
            writer.flush()
    summary.seconds = time.monotonic() - started
    if isinstance(engine, Endpoints):
        summary.refused, summary.retokenised = engine.refused, engine.retokenised
        summary.mismatched = engine.mismatched
        if engine.refused and not summary.exchanges:
            raise ValueError(f"every request was refused: {engine.refusal}")
    return summary


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


def _exchanges(
    target: TargetInfo,
    decode: Decode,
    width: int,
    config: DistillConfig,
    work: Iterator[Opening | Prompt],
    turn: UserTurn | None,
) -> Iterator[Exchange]:
    """Exchanges in order of completion. A prompt that the target has finished writing is queued for its answer."""
    queue: deque[Request] = deque()

    def refill() -> Iterator[Exchange]:
        """Fill the queue; prompts that have an answer already come out at once."""
        while len(queue) < width and (item := next(work, None)) is not None:
            if isinstance(item, Opening):
                assert turn is not None
                queue.append(_prompt_request(config, turn, item))
            elif item.answer_ids is not None:
                yield _exchange(target, item, item.answer_ids, item.finished)
            else:
                queue.append(_answer_request(target, config, item))

    yield from refill()
    for completion in decode(queue, len(queue)):
        task = completion.request.key
        if not completion.tokens:
            pass  # Refused: it is not written to disk, so the next run asks again.
        elif isinstance(task, Prompt):
            yield _exchange(target, task, completion.tokens, completion.finished)
        else:
            text = (task.words + target.decode(completion.tokens)).strip()
            if completion.finished and text:
                prompt = Prompt(task.index, task.kind, user(text))
                queue.appendleft(_answer_request(target, config, prompt))
            else:
                # A prompt that did not end is written again, with other draws.
                queue.append(completion.request.again())
        yield from refill()


def _prompt_request(config: DistillConfig, turn: UserTurn, task: Opening) -> Request:
    return Request(
        key=task,
        prompt=turn.open(task),
        max_new_tokens=config.max_prompt_tokens,
        sampling=_seeded(config.prompt_sampling(), 2 * task.index),
        end_ids=turn.end_ids,
    )


def _answer_request(target: TargetInfo, config: DistillConfig, prompt: Prompt) -> Request:
    return Request(
        key=prompt,
        prompt=target.encode_chat(prompt.messages),
        max_new_tokens=config.max_new_tokens,
        sampling=_seeded(config.answer_sampling(prompt.index), 2 * prompt.index + 1),
        end_ids=target.end_ids,
    )


def _seeded(sampling: SamplingConfig, stream: int) -> SamplingConfig:
    """A seed for each request, so that a resumed run draws what an uninterrupted one would have drawn."""
    return replace(sampling, seed=derived_seed(sampling.seed, stream))


def _exchange(target: TargetInfo, prompt: Prompt, answer_ids: list[int], finished: bool) -> Exchange:
    prompt_ids = target.encode_chat(prompt.messages)
    return Exchange(
        index=prompt.index,
        kind=prompt.kind,
        prompt=prompt.messages[-1]["content"],
        answer=target.decode(answer_ids),
        finished=finished,
        ids=prompt_ids + answer_ids,
        answer_mask=[False] * len(prompt_ids) + [True] * len(answer_ids),
    )

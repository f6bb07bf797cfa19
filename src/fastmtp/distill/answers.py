"""Self-distillation: the target answers prompts, its own answers are the training data (FastMTP, section 3.1)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fastmtp.config import DistillConfig
from fastmtp.decode.backend import Batch
from fastmtp.decode.batch import Request, decode_batch
from fastmtp.distill.dataset import Exchange, ShardWriter, claim_directory, finished_indices
from fastmtp.distill.prompts import Opening, Prompt, UserTurn, opening, read_prompts, user
from fastmtp.files import file_sha256
from fastmtp.models.info import TargetInfo, tokenizer_sha256
from fastmtp.progress import bar
from fastmtp.provenance import provenance

# These may change between a run and its continuation without changing any exchange.
FREE_SETTINGS = ("count", "slots", "shard_rows")


@dataclass(frozen=True)
class DistillSummary:
    """What one run added to a data directory."""

    exchanges: int
    truncated: int
    answer_tokens: int
    seconds: float


def distill(engine: Batch, config: DistillConfig, out: Path, prompts: Path | None) -> DistillSummary:
    """Fill the data directory `out`; goes on where an earlier run stopped.

    Args:
        prompts: a prompt file; None lets the target write `config.count` prompts itself.
    Raises:
        FileNotFoundError, ValueError: the prompts, the target or the directory do not fit; the message says how.
    """
    target = engine.target
    listed = None if prompts is None else read_prompts(prompts)
    turn = UserTurn(target) if listed is None else None
    facts = provenance(
        config,
        target=target.source,
        tokenizer_sha256=tokenizer_sha256(target.tokenizer),
        prompts_sha256=None if prompts is None else file_sha256(prompts),
    )
    claim_directory(out, facts, FREE_SETTINGS)
    done = finished_indices(out)
    total = config.count if listed is None else len(listed)
    remaining = [index for index in range(total) if index not in done]
    work = (opening(config.seed, i) if listed is None else listed[i] for i in remaining)
    writer = ShardWriter(out, config.shard_rows)
    exchanges = truncated = answer_tokens = 0
    started = time.monotonic()
    with bar("distill", total, total - len(remaining)) as progress:
        try:
            for exchange in _exchanges(engine, config, work, turn):
                writer.add(exchange)
                exchanges += 1
                truncated += not exchange.finished
                answer_tokens += sum(exchange.answer_mask)
                progress.advance(1, sum(exchange.answer_mask), f"{truncated} truncated")
        finally:
            writer.flush()
    return DistillSummary(exchanges, truncated, answer_tokens, time.monotonic() - started)


def _exchanges(
    engine: Batch, config: DistillConfig, work: Iterator[Opening | Prompt], turn: UserTurn | None
) -> Iterator[Exchange]:
    """Exchanges in order of completion. The queue feeds itself: a prompt that is written asks for its answer."""
    target = engine.target
    queue: deque[Request] = deque()
    answered: deque[Exchange] = deque()

    def refill() -> None:
        while len(queue) < config.slots and (item := next(work, None)) is not None:
            if isinstance(item, Opening):
                assert turn is not None
                queue.append(_prompt_request(config, turn, item))
            elif item.answer_ids is not None:
                answered.append(_exchange(target, item, item.answer_ids, item.finished))
            else:
                queue.append(_answer_request(target, config, item))

    refill()
    yield from answered
    answered.clear()
    for completion in decode_batch(engine, queue, slots=len(queue)):
        task = completion.request.key
        if isinstance(task, Prompt):
            yield _exchange(target, task, completion.tokens, completion.finished)
        else:
            text = (task.words + target.decode(completion.tokens)).strip()
            if completion.finished and text:
                prompt = Prompt(task.index, task.kind, user(text))
                queue.appendleft(_answer_request(target, config, prompt))
            else:
                # A prompt that did not end is written anew, from the next draws of the same generator.
                queue.append(completion.request)
        refill()
        yield from answered
        answered.clear()


def _prompt_request(config: DistillConfig, turn: UserTurn, task: Opening) -> Request:
    return Request(
        key=task,
        prompt=turn.open(task.words),
        max_new_tokens=config.max_prompt_tokens,
        sampling=config.prompt_sampling(),
        end_ids=turn.end_ids,
        generator=_generator(config.seed, 2 * task.index),
    )


def _answer_request(target: TargetInfo, config: DistillConfig, prompt: Prompt) -> Request:
    return Request(
        key=prompt,
        prompt=target.encode_chat(prompt.messages),
        max_new_tokens=config.max_new_tokens,
        sampling=config.answer_sampling(),
        end_ids=target.end_ids,
        generator=_generator(config.seed, 2 * prompt.index + 1),
    )


def _generator(seed: int, stream: int) -> torch.Generator:
    """A generator of its own for every request, so that a resumed run draws what an uninterrupted one would."""
    return torch.Generator().manual_seed(hash((seed, stream)) & 0x7FFFFFFFFFFFFFFF)


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

"""Whether and how a run of distillation decodes in slots: how long they are, and how many."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch

from fastmtp.config import BATCH_SLOTS, DistillConfig
from fastmtp.decode.batch import Completion, Request
from fastmtp.distill.own_prompts import KINDS, Opening, UserTurn
from fastmtp.distill.prompts import Prompt
from fastmtp.distill.requests import prompt_ids
from fastmtp.distill.slots.decode import decode_slots
from fastmtp.distill.slots.machine import SlotMachine
from fastmtp.distill.slots.memory import fitting_slots
from fastmtp.engines.memory import free_bytes
from fastmtp.engines.protocol import Engine
from fastmtp.engines.torch.slots import is_supported
from fastmtp.engines.torch.target import Target
from fastmtp.models.families import FAMILIES
from fastmtp.progress import Progress
from fastmtp.rows import RowError

# Of so many prompts, those with the most characters, the longest one in tokens is taken to be the longest of all.
_MEASURED = 16


class Slots:
    """A slot machine that stands for an engine's `decode_batch`."""

    def __init__(self, engine: Engine, machine: SlotMachine) -> None:
        self._engine, self.machine = engine, machine

    def __call__(self, queue: deque[Request], _: int) -> Iterator[list[Completion]]:
        return decode_slots(self.machine, self._engine, queue)


def open_slots(
    engine: Engine,
    config: DistillConfig,
    prompts: Sequence[Prompt],
    turn: UserTurn | None,
    count: int,
    progress: Progress,
) -> Slots | None:
    """Slots for a run; None, after a line that says why, if the engine's target does not run in them.

    Args:
        prompts: those that are left to answer, if they are given.
        turn: for those that the target writes.
        count: exchanges to make.
    Raises:
        ValueError: the GPU's memory has no room for one.
    """
    target = engine.target
    if not isinstance(target, Target) or not is_supported(target):
        model = target.config.model_type if isinstance(target, Target) else engine.name
        progress.say(
            f"distilling without slots on the GPU, which is slower: they run {', '.join(FAMILIES)} in PyTorch with "
            f"Triton, not {model}"
        )
        return None
    length = min(target.context_limit, longest_text(target, config, prompts, turn))
    most = _most(config, turn, target.vocabulary_size)
    slots = config.slots
    if not slots and target.device.type == "cpu":
        slots = BATCH_SLOTS
    elif not slots:
        element = torch.empty((), dtype=target.dtype).element_size()
        slots = fitting_slots(free_bytes(target.device), target.config, length, most, element)
    slots = min(slots, count)
    with progress.status(f"making {slots} slots of {length} tokens"):
        machine = SlotMachine(target, slots, length, most, turn.after_ids if turn else [])
    progress.say(f"{slots} slots of {length} tokens on {target.device}")
    return Slots(engine, machine)


def longest_text(target: Target, config: DistillConfig, prompts: Sequence[Prompt], turn: UserTurn | None) -> int:
    """Tokens of the longest prompt with its answer, as far as can be known beforehand."""
    if turn is not None:
        mix = config.mix_weights()
        kinds = {name: KINDS[name] for name in mix} or {name: kind for name, kind in KINDS.items() if kind.weight}
        openings = [
            Opening(0, name, words, kind.system if mix else "")
            for name, kind in kinds.items()
            for words in kind.openings
        ]
        opened = [len(turn.open(own)) for own in openings]
        prompt = max(opened) + config.max_prompt_tokens + len(turn.after_ids)
        return prompt + config.max_new_tokens
    asked = [prompt for prompt in prompts if prompt.answer_ids is None]
    asked.sort(key=lambda prompt: -sum(len(message["content"].encode()) for message in prompt.messages))
    longest = 1
    for one in asked[:_MEASURED]:
        # Those that cannot be asked are left out when their turn comes.
        with suppress(RowError):
            longest = max(longest, len(prompt_ids(target, one)))
    return longest + config.max_new_tokens


def _most(config: DistillConfig, turn: UserTurn | None, vocabulary: int) -> int:
    """The largest number of tokens that a draw chooses from."""
    kept = [config.top_k] if config.temperature else [1]
    if turn is not None:
        kept.append(config.prompt_top_k if config.prompt_temperature else 1)
    return vocabulary if 0 in kept else min(vocabulary, max(kept))

"""How fast the stages' work is here, each kind timed for a few seconds on the real model.

On a GPU that is the work as it is done there: many slots that advance together, forwards over batches, and steps of
the batch that fits. On a CPU the target is not loaded in PyTorch for a plan; there training is timed on the head
itself, of the target's own sizes, over a stand-in for the target of one layer.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from fastmtp.config import DistillConfig, TrainConfig
from fastmtp.decode.batch import LOOP_EVERY, Request
from fastmtp.decode.sampler import Sampler
from fastmtp.distill.answers import open_decoder, runs_in_slots
from fastmtp.distill.own_prompts import UserTurn
from fastmtp.distill.slots.open import Slots
from fastmtp.engines.copies import to_device
from fastmtp.engines.costs import forwards_ms, some_ids, timed
from fastmtp.engines.protocol import Engine
from fastmtp.engines.torch.engine import TorchEngine
from fastmtp.engines.torch.slots import is_supported
from fastmtp.engines.torch.target import Target, throughput_dtype
from fastmtp.method.head import MTPHead
from fastmtp.method.recursion import trained_starts
from fastmtp.models.config import FULL, ModelConfig
from fastmtp.models.layers import steady_attention
from fastmtp.models.source import transformers_config
from fastmtp.progress import QUIET
from fastmtp.train.batches import make_batch
from fastmtp.train.memory import CPU_BATCH, planned
from fastmtp.train.objective import Objective
from fastmtp.train.optimizers import make_optimizers
from fastmtp.train.pace import GPU, pace_of
from fastmtp.train.step import forward_backward

# Sequences answered together: few, and as many as are quickly timed.
FEW, _MANY = 8, (96, 32)
_PREFILL, _CONTEXT, _STEPS = 512, 100, 50
_FORWARD_CONTEXT, _TURNS = 32, 5
# A training text.
_TEXT = 256
# Tokens that a text in a slot has on average; exchanges, of which there are more than slots.
_SLOT_CONTEXT, _EXCHANGES = 192, 1_000_000


def read_per_second(engine: Engine, seconds: float) -> float:
    """Tokens that the target reads a second where many are read, in about so many seconds."""
    if engine.device == "cpu":
        return prefill_per_second(engine, seconds)
    return batches_per_second(engine, seconds)


def batches_per_second(engine: Engine, seconds: float) -> float:
    """Tokens a second of forwards over batches of whole texts."""
    target = engine.target
    length = min(_TEXT, target.context_limit - 1)
    texts = [some_ids(target.vocabulary_size, length)] * max(1, GPU.tokens // length)

    def read() -> None:
        engine.forward(texts)
        _wait(engine.device)

    return len(texts) * length / _settled(read, seconds)


def prefill_per_second(engine: Engine, seconds: float) -> float:
    """Tokens that the target reads a second, in about so many seconds."""
    sequence, target = engine.new_sequence(), engine.target
    most = min(_PREFILL, target.context_limit - 1)
    ids = some_ids(target.vocabulary_size, most)

    def take(count: int) -> float:
        sequence.reset()
        return timed(lambda: sequence.prefill(ids[:count]))

    count = min(16, most)
    # The first reads the weights into memory.
    take(count)
    rate = count / take(count)
    count = max(count, min(most, int(rate * seconds / 3)))
    return max(rate, *(count / take(count) for _ in range(2)))


def forward_ms(engine: Engine, counts: Sequence[int]) -> dict[int, float]:
    """The least milliseconds of rounds over so many tokens each, behind a short text."""
    ids = some_ids(engine.target.vocabulary_size, min(_FORWARD_CONTEXT, engine.target.context_limit // 2))
    sequence = engine.new_sequence()
    return forwards_ms(sequence, ids, counts, 1, _TURNS)


def many_slots(few_per_second: float, plain_ms: float, seconds: float) -> int:
    """How many sequences can be timed together in so many seconds beside FEW, which is the least.

    Args:
        few_per_second: tokens that FEW sequences draw.
        plain_ms: of a forward, which each takes to begin.
    """
    fitting = [slots for slots in _MANY if slots * (plain_ms / 1e3 + 2 / few_per_second) <= seconds]
    return max(fitting, default=FEW)


def answered_per_second(engine: Engine, slots: int, prefill: float, seconds: float) -> float:
    """Tokens a second that so many sequences draw together, as `distill` draws them, in about so many seconds.

    Args:
        prefill: tokens read a second.
    """
    config, target = DistillConfig(), engine.target
    context = min(_CONTEXT, target.context_limit // 2, max(4, int(seconds / 3 * prefill / slots)))
    ids = some_ids(target.vocabulary_size, context)
    samplers = [Sampler(replace(config.answer_sampling(0), seed=slot), ids) for slot in range(slots)]
    batch = engine.batch(slots)
    logits_RV = batch.prefill(dict.fromkeys(range(slots), ids))
    steps, started = 0, time.perf_counter()
    while steps < min(_STEPS, target.context_limit - context - 1):
        drawn = [sampler.draw(logits_V) for sampler, logits_V in zip(samplers, logits_RV, strict=True)]
        for sampler, token in zip(samplers, drawn, strict=True):
            sampler.extend([token])
        logits_RV = batch.step(dict(enumerate(drawn)))
        steps += 1
        if time.perf_counter() - started > seconds:
            break
    return slots * steps / (time.perf_counter() - started)


def decodes_in_slots(engine: Engine) -> bool:
    """Whether `distill` does so."""
    return runs_in_slots(engine) and isinstance(engine.target, Target) and is_supported(engine.target)


def answered_in_slots(engine: Engine, slots: int, seconds: float) -> tuple[int, float]:
    """How many slots `distill` decodes in, and the tokens a second that they draw together.

    Args:
        slots: 0 is as many as the memory holds.
    """
    config, target = DistillConfig(slots=slots), engine.target
    decode, _ = open_decoder(engine, config, [], UserTurn(target), _EXCHANGES)
    assert isinstance(decode, Slots)
    machine = decode.machine
    ids = some_ids(target.vocabulary_size, min(_SLOT_CONTEXT, machine.length // 2))
    # Alike, so that they are read once. None ends; one that is cut takes part in every step all the same.
    request = Request(
        key=None,
        prompt=ids,
        max_new_tokens=config.max_new_tokens,
        sampling=config.answer_sampling(0),
        end_ids=frozenset(),
    )
    assert machine.fits(request)
    machine.fill(dict.fromkeys(range(machine.slots), request))

    def advance() -> None:
        machine.advance()
        # Waits for the device.
        machine.finished()

    return machine.slots, machine.slots * LOOP_EVERY / _settled(advance, seconds)


def batch_tokens(engine: Engine) -> int:
    """Tokens of a training step on this device."""
    if not isinstance(engine, TorchEngine):
        return CPU_BATCH
    config, target = TrainConfig(), engine.target
    columns = min(config.draft_vocabulary, target.vocabulary_size)
    chosen = planned(target, config, columns, 1, False, QUIET).batch_tokens
    assert chosen != "auto"
    return chosen


def training_seconds(engine: Engine, seconds: float, batch_tokens: int = CPU_BATCH) -> tuple[float, float]:
    """Seconds of training the head for a token, and of an optimiser step, measured in about so many seconds.

    Args:
        batch_tokens: of the largest step that is timed.
    """
    config = TrainConfig()
    target = engine.target if isinstance(engine, TorchEngine) else _StandIn(engine.target.config)
    head = MTPHead(target.model).float()
    optimizers = make_optimizers(head, config)
    drafted = list(range(min(config.draft_vocabulary, target.vocabulary_size)))
    objective = Objective(config.objective, target, drafted)
    length = pace_of(target.device).padded(_TEXT)
    length = min(length, int(target.config.max_position_embeddings) - config.draft_steps - 1)

    def train(texts: int, tokens: int) -> tuple[float, float]:
        if target.device.type != "cpu":
            # The first step of a shape compiles and takes memory.
            once(texts, tokens)
        return once(texts, tokens)

    def once(texts: int, tokens: int) -> tuple[float, float]:
        started = time.perf_counter()
        with steady_attention():
            _step(head, target, objective, config, texts, tokens)
        between = time.perf_counter()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        _wait(target.device)
        return (between - started) / (texts * tokens), time.perf_counter() - between

    small = min(64, length)
    for_token, for_step = train(1, small)
    left = seconds - small * for_token - for_step
    # The first is slower for each token, so that the next takes less than this.
    texts = min(max(1, batch_tokens // length), int((left - for_step) / (length * for_token)))
    return train(texts, length) if texts >= 1 else (for_token, for_step)


def _step(
    head: MTPHead, target: Target, objective: Objective, config: TrainConfig, texts: int, tokens: int
) -> None:
    """The trainer's forward and backward over random states."""
    device = target.device
    ids = [some_ids(min(target.vocabulary_size, config.draft_vocabulary), tokens)] * texts
    batch = make_batch(ids, [[True] * tokens] * texts)
    ids_BT = to_device(batch.ids_BT, device)
    size = int(target.config.hidden_size)
    states_BTH = torch.randn(texts, tokens, size, device=device, generator=_generator(device)).to(target.dtype)
    starts_S = trained_starts(tokens, 0, torch.device("cpu"))
    forward_backward(head, target, objective, config, batch, ids_BT, states_BTH, starts_S)
    _wait(device)


def _settled(run: Callable[[], None], seconds: float) -> float:
    """The seconds that something takes on average, after a first time, in about so many seconds."""
    run()
    taken = [timed(run)]
    while sum(taken) < seconds:
        taken.append(timed(run))
    return sum(taken) / len(taken)


def _wait(device: str | torch.device) -> None:
    """Until all that was launched there is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


class _StandIn(Target):
    """One random layer of a target's sizes on the CPU, and an LM head of the draft vocabulary's size; no text."""

    def __init__(self, config: Any) -> None:
        whole = transformers_config(config) if isinstance(config, ModelConfig) else copy.deepcopy(config)
        whole.num_hidden_layers, whole.tie_word_embeddings = 1, True
        if getattr(whole, "layer_types", None) is not None:
            whole.layer_types = [FULL]
        # Ids of special tokens lie beyond it.
        whole.vocab_size = min(int(whole.vocab_size), TrainConfig().draft_vocabulary)
        whole.pad_token_id = None
        self.dtype = throughput_dtype("cpu")
        self.model = AutoModelForCausalLM.from_config(whole, dtype=self.dtype, attn_implementation="sdpa")
        self.model.eval().requires_grad_(False)
        self.config, self.kinds = whole, [FULL]
        self.vocabulary_size = int(whole.vocab_size)
        self.lm_head = self.model.lm_head
        self.device = self.lm_head.weight.device

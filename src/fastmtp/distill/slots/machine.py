"""Slots as state machines on the device: known tokens, a text of the target's own, and the one that follows it.

A step appends a token to every slot: a known one, or one drawn from (seed, position), so that a text depends on
neither its slot nor its neighbours. When the first text of a slot has ended (a user's turn, say), known tokens and
a second text (its answer) may follow without the host. Texts are told, and slots filled again, every few steps.

Prompts are read ahead in chunks of about as many tokens as a step has slots, where they fill half of one: it takes
no more memory than a step, and about half of its time. The tokens that are left are fed by the steps.

Shapes: S slots, R slots that are filled or of a chunk, C tokens of it, L room for tokens, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmtp.decode.batch import LOOP_EVERY, LOOP_TOKENS, Request
from fastmtp.distill.slots.chunks import chunks_to_read, common_beginning
from fastmtp.engines.capture import captured, shared_memory
from fastmtp.engines.copies import Sent, to_device
from fastmtp.engines.torch.draws import Sampling, choose, signed
from fastmtp.engines.torch.slots import CHUNK, SlotModel
from fastmtp.engines.torch.target import Target

RUNS, ENDED, CUT, IDLE = range(4)
# Sets of end tokens that a run may have: those of user's turns and those of answers.
_END_SETS = 4
# Prompts of a chunk, at least: a GPU hardly takes longer for 256 tokens than for fewer.
_TOGETHER = 4
# After every step.
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Text:
    """What the target wrote, the end token included; not finished if cut at the limit or in a loop."""

    tokens: list[int]
    finished: bool


@dataclass(frozen=True)
class Finished:
    """A slot's first text, and the second one if the slot went on to it, with all tokens before it."""

    slot: int
    first: Text
    prompt: list[int]
    second: Text | None


class SlotMachine:
    """`slots` texts of at most `length` tokens each."""

    @torch.no_grad()
    def __init__(self, target: Target, slots: int, length: int, most: int, between: Sequence[int]) -> None:
        """
        Args:
            most: the largest top_k of all requests to come; the size of the vocabulary if one keeps all.
            between: the tokens between a first and a second text, from the end token of the first on.
        """
        device = target.device
        self.slots, self.length, self.most, self._device = slots, length, most, device
        self.steps = 0
        # A text that reaches the model's context is cut there; one that would reach a smaller length does not fit.
        self._is_context = length == target.context_limit
        self._target, self._model = target, SlotModel(target, slots, room(length))
        self._tokens = torch.zeros(slots, self._model.room, dtype=torch.long, device=device)
        # One row for each number that describes a slot, so that slots are filled by one copy.
        self._numbers = torch.zeros(15, slots, dtype=torch.long, device=device)
        self._state, self._newest, self._given, self._part, self._goes_on = self._numbers[:5]
        parts = self._numbers[5:].view(5, 2, slots)
        self._starts, self._limits, self._seeds, self._top_k, self._end_sets = parts
        self._factors = torch.ones(4, slots, device=device)
        self._temperatures, self._top_p = self._factors.view(2, 2, slots)
        self._is_end = torch.zeros(_END_SETS, target.vocabulary_size, dtype=torch.bool, device=device)
        self._known_sets: dict[frozenset[int], int] = {}
        self._between = torch.tensor(list(between), dtype=torch.long, device=device)
        self._drawn = torch.zeros((), dtype=torch.long, device=device)
        self._beginning: list[int] | None = None
        self._state.fill_(IDLE)
        # The slots of a chunk, and the position where it begins.
        self._chunk = torch.zeros(max(_TOGETHER, slots // CHUNK) + 1, dtype=torch.long, device=device)
        self._holds_beginning = np.zeros(slots, np.bool_)
        memory = shared_memory(device)
        self._run, self._cut, self._read = (
            captured(part, device, memory) for part in (self._step, self._end_loops, self._read_chunk)
        )
        # What the slots were after each of the last advances, and after which one each text may have ended.
        self._sent: deque[tuple[int, Sent]] = deque()
        self._since = np.full(slots, _NEVER)
        self._beside = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def fits(self, request: Request) -> bool:
        """Whether a slot has room for a request, and the step for its sampling."""
        top_k = request.sampling.top_k
        return (
            len(request.prompt) < self.length
            and (self._is_context or len(request.prompt) + request.max_new_tokens <= self.length)
            and (self.most == self._is_end.shape[1] or 0 < top_k <= self.most or request.sampling.temperature == 0)
            and not request.sampling.adjusts
            and request.sampling.min_p == 0
        )

    @torch.inference_mode()
    def fill(self, requests: Mapping[int, Request]) -> None:
        """Begin requests that fit in the slots named: their prompts are read but for the last tokens of each."""
        if not requests:
            return
        slots = sorted(requests, key=lambda slot: len(requests[slot].prompt))
        prompts = [requests[slot].prompt for slot in slots]
        lengths = np.array([len(prompt) for prompt in prompts])
        ids = np.zeros((len(slots), lengths.max()), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        slots_R, ids_RL = (to_device(torch.from_numpy(np.asarray(part)), self._device) for part in (slots, ids))
        self._tokens[slots_R, : ids_RL.shape[1]] = ids_RL
        read = self._prefill(np.array(slots), lengths, prompts).tolist()
        described = [self._described(requests[slot], first) for slot, first in zip(slots, read, strict=True)]
        numbers_RN, factors_RF = (torch.tensor(part) for part in zip(*described, strict=True))
        self._numbers[:, slots_R] = to_device(numbers_RN, self._device).T
        self._factors[:, slots_R] = to_device(factors_RF, self._device).T
        self._since[slots] = self.steps

    @torch.inference_mode()
    def advance(self) -> None:
        """As many steps as there are between two looks for loops; on a GPU they are only begun."""
        for _ in range(LOOP_EVERY):
            self._run()
        self._cut()
        self._sent.append((self.steps, Sent(self._numbers)))
        self.steps += LOOP_EVERY

    @property
    def begun(self) -> int:
        """How many advances there were of which `finished` has not told."""
        return len(self._sent)

    @torch.inference_mode()
    def finished(self) -> list[Finished]:
        """What ended in the first advance that was not told of, in order of slots, which are free then.

        Waits for that advance alone.
        """
        step, sent = self._sent.popleft()
        numbers = sent.wait()[:7]
        # A slot that was filled after this advance still shows the text before, which has been told.
        ended = np.flatnonzero((self._since <= step) & np.isin(numbers[0], (ENDED, CUT)))
        if not len(ended):
            return []
        self._since[ended] = _NEVER
        found, between = [], len(self._between)
        for slot, described, tokens in zip(
            ended.tolist(), numbers[:, ended].T.tolist(), self._texts(ended), strict=True
        ):
            state, newest, _, part, _, first, second = described
            ids = tokens[: newest + 1].tolist()
            is_ended = state == ENDED
            if part:
                whole = Text(ids[first : second - between + 1], True)
                found.append(Finished(slot, whole, ids[:second], Text(ids[second:], is_ended)))
            else:
                found.append(Finished(slot, Text(ids[first:], is_ended), [], None))
        return found

    def _texts(self, ended: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens of slots whose texts have ended: no step changes them, so nothing under way is waited for."""
        with torch.cuda.stream(self._beside) if self._beside is not None else nullcontext():
            return self._tokens[to_device(torch.from_numpy(ended), self._device)].cpu().numpy()

    def drawn(self) -> int:
        """How many tokens were drawn so far, those of texts that were given up included. Waits for the device."""
        return int(self._drawn)

    def _described(self, request: Request, read: int) -> tuple[list[int], list[float]]:
        """The numbers and factors of a slot that begins a request, of whose prompt so many tokens were read."""
        length, then = len(request.prompt), request.then or request
        first, second = request.sampling, then.sampling
        numbers = [
            *(RUNS, read, length, 0, request.then is not None),
            # A second text begins where the first ends.
            *(length, 0),
            *(request.max_new_tokens, then.max_new_tokens),
            *(signed(first.seed), signed(second.seed)),
            *(first.top_k, second.top_k),
            *(self._end_set(request.end_ids), self._end_set(then.end_ids)),
        ]
        return numbers, [first.temperature, second.temperature, first.top_p, second.top_p]

    def _end_set(self, end_ids: frozenset[int]) -> int:
        if end_ids not in self._known_sets:
            number = self._known_sets[end_ids] = len(self._known_sets)
            assert number < _END_SETS
            self._is_end[number, torch.tensor(sorted(end_ids), dtype=torch.long, device=self._device)] = True
        return self._known_sets[end_ids]

    def _prefill(
        self, slots: NDArray[np.int64], lengths: NDArray[np.int64], prompts: list[list[int]]
    ) -> NDArray[np.int64]:
        """Read prompts, which ascend in length, as far as they fill chunks; their common beginning once in a run.

        Returns:
            how many tokens of each were read. The others are known to the next steps.
        """
        if self._beginning is None:
            self._beginning = common_beginning(prompts)
            self._read_first(int(slots[-1]), self._beginning or prompts[-1][:CHUNK])
        common = self._beginning
        begins = np.array([len(common) if prompt[: len(common)] == common else 0 for prompt in prompts])
        # No text writes where it begins.
        lacking = slots[(begins > 0) & ~self._holds_beginning[slots]]
        if len(lacking):
            self._model.begin_alike(to_device(torch.from_numpy(lacking), self._device))
        self._holds_beginning[slots] = begins > 0
        together, least = len(self._chunk) - 1, self.slots // 2
        chunks, read = chunks_to_read(begins, lengths, together, least, self._model.room)
        if chunks:
            described = np.array([[*slots[rows], start] for rows, start in chunks])
            for chunk in to_device(torch.from_numpy(described), self._device):
                self._chunk.copy_(chunk)
                self._read()
        return read

    def _read_first(self, slot: int, ids: list[int]) -> None:
        """Read the first tokens of all, for slots that begin alike; no graph can look whether states are finite."""
        for start in range(0, len(ids), CHUNK):
            given = [slot], [ids[start : start + CHUNK]], start
            states_NH = self._model.prefill(*(torch.tensor(part, device=self._device) for part in given))
            self._target.check_states(states_NH)
        self._model.keep_beginning(slot, len(ids))

    def _read_chunk(self) -> None:
        """Read the tokens of the slots that `_chunk` names, from the position there on."""
        slots_R, start = self._chunk[:-1], self._chunk[-1]
        cells_C = start + torch.arange(CHUNK, device=self._device)
        self._model.prefill(slots_R, self._tokens[slots_R[:, None], cells_C], start)

    def _step(self) -> None:
        """Append a token to every text that runs; the others stay as they are."""
        tokens, newest = self._tokens, self._newest
        logits_SV = self._model.logits(tokens.gather(1, newest[:, None])[:, 0], newest)
        next_S = newest + 1
        # A full slot does not run.
        cells_S1 = next_S.clamp(max=self._model.room - 1)[:, None]
        known_S = tokens.gather(1, cells_S1)[:, 0]
        runs_S = self._state == RUNS
        own_S = runs_S & (next_S >= self._given)
        sampling = Sampling(*map(self._of_part, (self._seeds, self._temperatures, self._top_k, self._top_p)))
        token_S = choose(logits_SV, sampling, next_S, self.most).where(own_S, known_S)
        tokens.scatter_(1, cells_S1, token_S[:, None])
        self._drawn += own_S.sum()

        ended_S = own_S & self._is_end[self._of_part(self._end_sets), token_S]
        length_S = next_S - self._of_part(self._starts) + 1
        full_S = (length_S >= self._of_part(self._limits)) | (next_S + 1 >= self.length)
        goes_on_S = self._go_on(ended_S, next_S, token_S)
        self._newest.copy_(next_S.where(runs_S, newest))
        self._state.masked_fill_(ended_S & ~goes_on_S, ENDED)
        self._state.masked_fill_(own_S & ~ended_S & full_S, CUT)

    def _go_on(self, ended_S: Tensor, next_S: Tensor, token_S: Tensor) -> Tensor:
        """Which slots go on to their second text; the tokens between are written there."""
        if not len(self._between):
            return torch.zeros_like(ended_S)
        start_S = next_S + len(self._between)
        has_room_S = start_S < self.length
        if not self._is_context:
            has_room_S &= start_S + self._limits[1] <= self.length
        goes_on_S: Tensor = (
            ended_S & (self._part == 0) & (self._goes_on > 0) & (token_S == self._between[0]) & has_room_S
        )
        cells_SB = next_S[:, None] + torch.arange(len(self._between), device=self._device)
        cells_SB = cells_SB.clamp(max=self._model.room - 1)
        known_SB = self._tokens.gather(1, cells_SB)
        self._tokens.scatter_(1, cells_SB, self._between.where(goes_on_S[:, None], known_SB))
        self._given.copy_(start_S.where(goes_on_S, self._given))
        self._starts[1].copy_(start_S.where(goes_on_S, self._starts[1]))
        self._part.masked_fill_(goes_on_S, 1)
        return goes_on_S

    def _end_loops(self) -> None:
        """Cut texts that loop where decode_batch would have cut them; at most one place to look at came by."""
        ends = (self._starts[1] - len(self._between)).where(self._part == 1, self._newest), self._newest
        for part, end_S in enumerate(ends):
            length_S = end_S - self._starts[part] + 1
            looked_S = length_S // LOOP_EVERY * LOOP_EVERY
            # An end token is no part of a loop: it comes once.
            looks_S = (looked_S >= LOOP_TOKENS) & (self._part >= part) & (self._state != IDLE)
            last_S = self._starts[part] + looked_S - 1
            tail = torch.arange(LOOP_TOKENS, device=self._device)
            cells_ST = (last_S[:, None] - LOOP_TOKENS + 1 + tail).clamp(0, self._model.room - 1)
            loops_S = looks_S & _is_looping(self._tokens.gather(1, cells_ST))
            self._state.masked_fill_(loops_S, CUT)
            self._newest.copy_(last_S.where(loops_S, self._newest))
            self._part.masked_fill_(loops_S, part)

    def _of_part(self, values: Tensor) -> Tensor:
        """Of two rows, each slot's own."""
        own: Tensor = values[1].where(self._part == 1, values[0])
        return own


def room(length: int) -> int:
    """A slot's room for a text of so many tokens."""
    return -(-length // CHUNK) * CHUNK


def _is_looping(tails_ST: Tensor) -> Tensor:
    """`is_looping` of decode/batch.py for many texts."""
    place_T = torch.arange(LOOP_TOKENS, device=tails_ST.device)
    earlier_PT = place_T - torch.arange(1, LOOP_TOKENS // 2 + 1, device=tails_ST.device)[:, None]
    before_SPT = tails_ST[:, earlier_PT.clamp(min=0)]
    return ((tails_ST[:, None] == before_SPT) | (earlier_PT < 0)).all(-1).any(-1)

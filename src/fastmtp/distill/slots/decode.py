"""Requests decoded by a slot machine: the completions of decode_batch, whatever the slots and the order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from fastmtp.decode.batch import Completion, Request, decode_batch
from fastmtp.distill.slots.machine import Finished, SlotMachine
from fastmtp.engines.protocol import Engine

# Slots of the requests that do not fit the machine.
_FEW = 8


def decode_slots(machine: SlotMachine, engine: Engine, queue: deque[Request]) -> Iterator[Completion]:
    """Decode every request in the queue, in order of completion; the caller may append to it as for `decode_batch`.

    What came out of some steps is told, and its slots' next requests prepared by the caller, while the device is at
    the next steps. Requests that do not fit a slot are decoded by `decode_batch` in the end.
    """
    running: dict[int, Request] = {}
    done: list[tuple[Request, Finished]] = []
    unfit: deque[Request] = deque()
    while queue or running or done:
        fresh = _fresh(machine, queue, running, unfit)
        machine.fill(fresh)
        running |= fresh
        if running:
            machine.advance()
        for request, finished in done:
            yield from _completions(request, finished, queue)
        done = [(running.pop(own.slot), own) for own in machine.finished()] if running else []
        if unfit and not (queue or running or done):
            yield from decode_batch(engine, unfit, _FEW)


def _fresh(
    machine: SlotMachine, queue: deque[Request], running: dict[int, Request], unfit: deque[Request]
) -> dict[int, Request]:
    """The next requests, by the free slots that they take."""
    fresh: dict[int, Request] = {}
    free = iter(slot for slot in range(machine.slots) if slot not in running)
    slot = next(free, None)
    while queue and slot is not None:
        request = queue.popleft()
        if machine.fits(request):
            fresh[slot] = request
            slot = next(free, None)
        else:
            unfit.append(request)
    return fresh


def _completions(request: Request, finished: Finished, queue: deque[Request]) -> Iterator[Completion]:
    """A request's completion, and that of the next one if the slot went on with what was then asked."""
    yield Completion(request, finished.first.tokens, finished.first.finished)
    if finished.second is not None and queue and _is_foreseen(queue[0], request, finished):
        yield Completion(queue.popleft(), finished.second.tokens, finished.second.finished)


def _is_foreseen(asked: Request, request: Request, finished: Finished) -> bool:
    then = request.then
    return (
        then is not None
        and asked.prompt == finished.prompt
        and asked.sampling == then.sampling
        and asked.max_new_tokens == then.max_new_tokens
        and asked.end_ids == then.end_ids
    )

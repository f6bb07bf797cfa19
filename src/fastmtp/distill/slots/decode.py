"""Requests decoded by a slot machine: the completions of decode_batch, whatever the slots and the order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from fastmtp.decode.batch import Completion, Request, decode_batch
from fastmtp.distill.slots.machine import Finished, SlotMachine
from fastmtp.engines.protocol import Engine

# Slots of the requests that do not fit the machine.
_FEW = 8


def decode_slots(machine: SlotMachine, engine: Engine, queue: deque[Request]) -> Iterator[list[Completion]]:
    """Decode every request in the queue, in groups of what ended in the same steps; the caller may append to it.

    While the device is at some steps, what came out of the steps before is told, the caller prepares the next
    requests, and slots are filled for the steps to come: the device never waits for the host. Requests that do not
    fit a slot are decoded by `decode_batch` in the end.
    """
    running: dict[int, Request] = {}
    done: list[tuple[Request, Finished]] = []
    unfit: deque[Request] = deque()
    while queue or running or done or machine.begun:
        fresh = _fresh(machine, queue, running, unfit)
        machine.fill(fresh)
        running |= fresh
        if running:
            machine.advance()
        if done:
            yield [Completion(request, own.first.tokens, own.first.finished) for request, own in done]
        if seconds := _seconds(done, queue):
            yield seconds
        # While there is something to do one advance is always under way.
        ended = machine.finished() if machine.begun > (1 if running else 0) else []
        done = [(running.pop(own.slot), own) for own in ended]
        if unfit and not (queue or running or done):
            yield from ([completion] for completion in decode_batch(engine, unfit, _FEW))


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


def _seconds(done: Sequence[tuple[Request, Finished]], queue: deque[Request]) -> list[Completion]:
    """The completions of what was then asked, where the slot went on with it; these requests leave the queue."""
    ahead = {tuple(own.prompt): (request, own.second) for request, own in done if own.second is not None}
    found: list[Completion] = []
    others: list[Request] = []
    # What was asked just now is in front.
    for _ in range(min(len(queue), len(done)) if ahead else 0):
        asked = queue.popleft()
        request, second = ahead.get(tuple(asked.prompt), (None, None))
        if request is not None and second is not None and _is_foreseen(asked, request):
            found.append(Completion(asked, second.tokens, second.finished))
        else:
            others.append(asked)
    queue.extendleft(reversed(others))
    return found


def _is_foreseen(asked: Request, request: Request) -> bool:
    then = request.then
    return (
        then is not None
        and asked.sampling == then.sampling
        and asked.max_new_tokens == then.max_new_tokens
        and asked.end_ids == then.end_ids
    )

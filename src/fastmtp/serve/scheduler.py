"""Requests wait, run together a step at a time, and end: continuous batching on one engine.

Every answer is that of plain decoding of the request alone, on the native engine to the bit, whatever is decoded
beside it, however its prompt is divided, and whatever of it was taken from an earlier request.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from queue import SimpleQueue
from threading import Condition, Thread

from fastmtp.decode.drafting.open import Drafting
from fastmtp.decode.grammar import Grammar, open_grammar
from fastmtp.serve.counts import Counts
from fastmtp.serve.prefixes import Prefixes
from fastmtp.serve.requests import (
    STOPPED,
    Event,
    Finish,
    OnEvent,
    QueueFull,
    Reason,
    Request,
    Stats,
    Stopping,
    Usage,
)
from fastmtp.serve.running import Running
from fastmtp.serve.step import step

log = logging.getLogger("fastmtp")

# Tokens of prompts in one step.
CHUNK = 256


class Answer:
    """An answer under way. Without `on_event` its events are kept until somebody iterates."""

    def __init__(self, request: Request, grammar: Grammar | None, on_event: OnEvent | None) -> None:
        self.request, self.grammar, self.submitted = request, grammar, time.monotonic()
        self.cancelled = False
        self.running: Running | None = None
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._tell: OnEvent = on_event or self._events.put

    def __iter__(self) -> Iterator[Event]:
        """The events, of which `Finish` is the last; waits for each."""
        while True:
            event = self._events.get()
            yield event
            if isinstance(event, Finish):
                return

    def cancel(self) -> None:
        """End the answer before the next step, from any thread; if it has ended already, nothing changes."""
        self.cancelled = True

    def tell(self, event: Event) -> None:
        """A consumer that fails is not told again."""
        try:
            self._tell(event)
        except Exception:
            log.exception("a consumer of an answer failed")
            self.cancelled = True

    def usage(self) -> Usage:
        if self.running is not None:
            return self.running.usage(self.submitted)
        return Usage(len(self.request.prompt), 0, 0, 0, 0, 0, None, time.monotonic() - self.submitted)


class Scheduler:
    """Decodes requests in its own thread (`start`), or a step at a time in the caller's (`step`)."""

    def __init__(
        self,
        drafting: Drafting,
        *,
        slots: int = 8,
        context: int | None = None,
        queue: int = 64,
        prefix_bytes: int = 10**9,
        chunk: int = CHUNK,
    ) -> None:
        """
        Args:
            slots: the most requests that run together.
            context: the most tokens of a prompt and its answer; None, and at most, the model's own.
            queue: the most requests that wait.
            prefix_bytes: memory for finished requests' caches, which later prompts may share; 0: none is shared.
            chunk: the most tokens of prompts in one step.
        """
        target = drafting.engine.target
        self.context = min(context or target.context_limit, target.context_limit)
        self._drafting, self._slots, self._queue, self._chunk = drafting, slots, queue, chunk
        self._prefixes = Prefixes(prefix_bytes)
        self._counts = Counts()
        self._waiting: deque[Answer] = deque()
        self._running: list[Answer] = []
        # Guards what waits, and whether requests are accepted.
        self._changed = Condition()
        self._deadline: float | None = None
        self._thread: Thread | None = None

    @property
    def stats(self) -> Stats:
        kept, used = len(self._prefixes), self._prefixes.bytes
        now = Stats(running=len(self._running), waiting=len(self._waiting), kept=kept, kept_bytes=used)
        return self._counts.added_to(now)

    def submit(self, request: Request, on_event: OnEvent | None = None) -> Answer:
        """Let a request wait for a slot; first come, first served. From any thread.

        Raises:
            MissingExtraError: there is a grammar, and llguidance is not installed.
            ValueError: the prompt is empty or fills the context, a value is out of range, or the grammar is wrong;
                the message names it.
            QueueFull: as many wait as may.
            Stopping: `stop` was called.
        """
        self._check(request)
        # Here, since nobody decodes while a grammar is compiled later.
        target = self._drafting.engine.target
        grammar = None if request.grammar is None else open_grammar(target, request.grammar)
        answer = Answer(request, grammar, on_event)
        with self._changed:
            if self._deadline is not None:
                raise Stopping
            free = self._slots - len(self._running)
            if sum(not one.cancelled for one in self._waiting) >= self._queue + free:
                raise QueueFull(self._counts.retry_after(len(self._waiting) + len(self._running), self._slots))
            self._waiting.append(answer)
            self._changed.notify()
        return answer

    def start(self) -> None:
        self._thread = Thread(target=self._run, name="fastmtp-scheduler", daemon=True)
        self._thread.start()

    def stop(self, grace: float) -> None:
        """Accept nothing more; answers end within `grace` seconds, then with an error. Returns when all have."""
        with self._changed:
            self._deadline = time.monotonic() + grace
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        else:
            self._end_all(STOPPED)

    def step(self) -> bool:
        """Admit what waits, and go on with all that runs by one forward; False if there was nothing to do."""
        with self._changed:
            cancelled = [one for one in (*self._running, *self._waiting) if one.cancelled]
            self._waiting = deque(one for one in self._waiting if not one.cancelled)
        for answer in cancelled:
            self._finish(answer, "cancelled")
        self._admit()
        answers = {id(one.running): one for one in self._running}
        running = [one.running for one in self._running if one.running is not None]

        def fail(one: Running, error: Exception) -> None:
            log.warning("a request failed: %s: %s", type(error).__name__, error)
            self._finish(answers[id(one)], "error", f"{type(error).__name__}: {error}")

        found = step(self._drafting.engine, running, self._chunk, fail)
        self._counts.step(found)
        for work, tokens in found:
            answer = answers[id(work.running)]
            if tokens:
                answer.tell(tokens)
            if work.running.reason is not None:
                self._finish(answer, work.running.reason)
        return bool(running)

    def _run(self) -> None:
        while True:
            while self._is_idle() and self._drafting.engine.prepare():
                pass
            with self._changed:
                while self._is_idle():
                    self._changed.wait()
                if self._deadline is not None:
                    over = time.monotonic() >= self._deadline
                    if over or not (self._waiting or self._running):
                        break
            try:
                self.step()
            except Exception as error:
                # A fault of ours: nobody knows what state the sequences are in.
                log.exception("a step failed")
                self._end_all(f"{type(error).__name__}: {error}")
        self._end_all(STOPPED)

    def _is_idle(self) -> bool:
        return not (self._waiting or self._running or self._deadline is not None)

    def _admit(self) -> None:
        """Fill the free slots, and begin in them, but for prompts whose beginning another slot is computing."""
        with self._changed:
            while self._waiting and len(self._running) < self._slots:
                self._running.append(self._waiting.popleft())
        for answer in [one for one in self._running if one.running is None]:
            prompt = answer.request.prompt
            others = [one.running for one in self._running if one.running is not None]
            filling = [(one.request.prompt, len(one.sequence.tokens)) for one in others if one.prompt_left]
            if self._prefixes.comes_soon(prompt, filling):
                continue
            try:
                sequence = self._drafting.new_sequence()
                self._prefixes.share(sequence, prompt, [one.sequence for one in others])
                answer.running = Running(answer.request, answer.grammar, self._drafting, sequence, self.context)
                self._counts.begin(len(prompt), answer.running.cached)
            except Exception as error:
                self._finish(answer, "error", f"{type(error).__name__}: {error}")

    def _finish(self, answer: Answer, reason: Reason, error: str | None = None) -> None:
        """Free the slot, and tell."""
        if answer in self._running:
            self._running.remove(answer)
        usage = answer.usage()
        self._counts.finish(reason, usage.seconds)
        if answer.running is not None and reason != "error":
            self._prefixes.keep(answer.running.sequence)
        answer.running = None
        answer.tell(Finish(reason, usage, error))

    def _end_all(self, why: str) -> None:
        with self._changed:
            left = [*self._running, *self._waiting]
            self._waiting.clear()
        for answer in left:
            self._finish(answer, "error", why)

    def _check(self, request: Request) -> None:
        target = self._drafting.engine.target
        vocabulary = target.vocabulary_size
        target.room(len(request.prompt), request.max_new_tokens, self.context)
        if not all(0 <= token < vocabulary for token in request.prompt):
            raise ValueError(f"a token of the prompt is outside the vocabulary of {vocabulary}")
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {request.max_new_tokens}; it must be 1 or more")
        if not all(request.stop):
            raise ValueError("a stop string is empty")
        if not 0 <= (request.top_logprobs or 0) <= vocabulary:
            raise ValueError(f"top_logprobs is {request.top_logprobs}; it must be from 0 to {vocabulary}")
        for token, _ in request.sampling.logit_bias:
            if token >= vocabulary:
                raise ValueError(f"logit_bias names token {token}; the vocabulary has {vocabulary} tokens")

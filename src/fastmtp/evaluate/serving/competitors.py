"""Who answers in a benchmark of servers: ways to ask a server, and our own decoding without one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastmtp.config import SamplingConfig
from fastmtp.decode.grammar import json_schema_grammar
from fastmtp.evaluate.competitors import Own
from fastmtp.evaluate.serving.clients import Request, Server
from fastmtp.evaluate.serving.document import ALONE
from fastmtp.evaluate.serving.figures import Pass, Reply
from fastmtp.evaluate.serving.questions import Question
from fastmtp.progress import Bar

# A chat request to llama.cpp's server that draws from all tokens, as ours does.
FROM_ALL = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
# Behind the name of a competitor whose answers keep to a schema.
SCHEMA = "+schema"


class Competitor(Protocol):
    """Gives answers of at most `limit` tokens, `concurrency` at once; drawn ones with the question's seed."""

    @property
    def name(self) -> str: ...

    def ask_all(self, asked: Sequence[Question], concurrency: int, turn: int, limit: int, bar: Bar) -> Pass: ...


@dataclass(frozen=True)
class Way:
    """A way to ask the server at `url`.

    Attributes:
        more: what requests hold besides the question.
        schema: whether answers must keep to the questions' schemas.
    """

    name: str
    url: str
    more: Mapping[str, Any]
    temperature: float = 0.0
    schema: bool = False

    def ask_all(self, asked: Sequence[Question], concurrency: int, turn: int, limit: int, bar: Bar) -> Pass:
        requests = [self._request(question, limit) for question in asked]
        return Server(self.name, self.url).ask_all(requests, concurrency, turn, bar)

    def _request(self, question: Question, limit: int) -> Request:
        messages = [{"role": "user", "content": question.text}]
        body = {"messages": messages, "temperature": self.temperature, "max_tokens": limit, **self.more}
        if self.temperature:
            body["seed"] = question.seed
        if not self.schema:
            return Request(question.id, body)
        schema = {"name": "record", "strict": True, "schema": question.schema}
        form = {"type": "json_schema", "json_schema": schema}
        return Request(question.id + SCHEMA, body | {"response_format": form})


def ways(
    name: str, url: str, more: Mapping[str, Any], temperature: float, *, schemas: bool, free: bool = True
) -> list[Way]:
    """A server's ways: with schemas where the questions have them, and as free text."""
    kept = [Way(name + SCHEMA, url, more, temperature, schema=True)] if schemas else []
    return [*kept, Way(name, url, more, temperature)] if free or not schemas else kept


class Alone:
    """Our decoding in this process, one question after the other, as `fastmtp generate` does it."""

    name = ALONE

    def __init__(self, own: Own, temperature: float, *, schema: bool = False) -> None:
        """
        Args:
            schema: whether answers must keep to the questions' schemas.
        """
        self._own, self._temperature, self._schema = own, temperature, schema

    def ask_all(self, asked: Sequence[Question], concurrency: int, turn: int, limit: int, bar: Bar) -> Pass:
        assert concurrency == 1
        replies = []
        started = time.perf_counter()
        for question in asked:
            replies.append(self._reply(question, limit))
            bar.advance(1, replies[-1].tokens)
        return Pass(self.name, concurrency, turn, time.perf_counter() - started, replies)

    def _reply(self, question: Question, limit: int) -> Reply:
        prompt = self._own.engine.target.encode_chat([{"role": "user", "content": question.text}])
        grammar = json_schema_grammar(question.schema) if self._schema and question.schema is not None else None
        sampling = SamplingConfig(temperature=self._temperature, seed=question.seed)
        found = self._own.answer(prompt, limit, sampling, grammar)
        return Reply(
            asked=question.id if grammar is None else question.id + SCHEMA,
            text=found.text,
            prompt_tokens=len(prompt),
            cached_tokens=0,
            tokens=found.length,
            first_token_seconds=found.prefill_seconds,
            seconds=found.prefill_seconds + found.decode_seconds,
            rounds=len(found.rounds) or None,
        )

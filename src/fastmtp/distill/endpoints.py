"""Decoding by OpenAI-compatible servers (vLLM, SGLang, llama-server): many requests at once, over many servers.

Requests go to the text-completions route, with the prompt as token ids in the target's own chat template. So the
prompt is exactly the one that is stored, and servers can also write the model's own prompts.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# Its connections are pooled, and asyncio can cancel them at Ctrl-C.
import httpx2

from fastmtp.decode.batch import Completion, Request
from fastmtp.distill.prompts import user
from fastmtp.models.info import TargetInfo
from fastmtp.progress import QUIET, Progress

# Wrong key, address or model: another try does not help.
_HOPELESS = (401, 403, 404, 405)
# Client errors that are worth another try: timeout, too early, too many requests.
_AGAIN = (408, 425, 429)


@dataclass
class _Endpoint:
    url: str
    running: int = 0
    answered_at: float = 0.0
    dead: str = ""


class _FailedError(Exception):
    """The endpoint does not work, for now or for good."""

    def __init__(self, reason: str, *, worth_another_try: bool) -> None:
        super().__init__(reason)
        self.worth_another_try = worth_another_try


class _RefusedError(Exception):
    """The endpoint works, but not for this request."""


def check_addresses(urls: Sequence[str]) -> None:
    """Raises ValueError if one is no http address."""
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--endpoint {url}: must be an address such as http://localhost:8000/v1")


class Endpoints:
    """Servers of one target; counts `refused` requests, and completions `retokenised` and `mismatched`."""

    def __init__(
        self,
        target: TargetInfo,
        urls: Sequence[str],
        model: str | None = None,
        *,
        timeout: float = 600.0,
        retries: int = 5,
        wait: float = 1.0,
        progress: Progress = QUIET,
    ) -> None:
        """Check the addresses; nothing is sent yet.

        Args:
            urls: the servers' addresses, with or without `/v1`.
            model: the name the servers know the target by; None where each serves only one.
            timeout: seconds to wait for a reply.
            retries: further tries after a failed one, before an endpoint is given up.
            wait: seconds before the first retry; the wait doubles with each further one.
            progress: told of a refused request and of endpoints that are given up.
        Raises:
            ValueError: a url is no http address.
        """
        check_addresses(urls)
        self.target = target
        self.urls = [url.rstrip("/").removesuffix("/v1") + "/v1/completions" for url in urls]
        self.refused = 0
        self.refusal = ""
        self.retokenised = 0
        self.mismatched = 0
        self._model = model
        self._timeout = httpx2.Timeout(timeout, connect=min(timeout, 10.0))
        self._retries = retries
        self._wait = wait
        self._end = _end_token(target)
        self._progress = progress

    def decode(self, queue: deque[Request], concurrency: int) -> Iterator[Completion]:
        """Decode every request in the queue, up to `concurrency` at a time; yields in order of completion.

        The caller may append to the queue between completions. A completion without tokens stands for a request
        that was refused.

        Raises:
            ConnectionError: no endpoint is left.
        """
        pool = [_Endpoint(url) for url in self.urls]
        key = os.environ.get("OPENAI_API_KEY")
        with asyncio.Runner() as runner:
            client = httpx2.AsyncClient(
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=self._timeout,
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=concurrency),
            )
            running: set[asyncio.Task[Completion]] = set()
            try:
                while queue or running:
                    while queue and len(running) < concurrency:
                        work = self._complete(client, pool, queue.popleft())
                        running.add(runner.get_loop().create_task(work))
                    done, running = runner.run(_first_of(running))
                    # Completions first: a failure at the same moment must not lose them.
                    for task in sorted(done, key=lambda task: task.exception() is not None):
                        yield task.result()
            finally:
                runner.run(_close(client, running))

    async def _complete(self, client: httpx2.AsyncClient, pool: list[_Endpoint], request: Request) -> Completion:
        body = self._body(request)
        while True:
            endpoint = _least_busy(pool)
            endpoint.running += 1
            try:
                choice = await self._ask(client, endpoint, body)
            except _RefusedError as error:
                self.refused += 1
                self.refusal = self.refusal or str(error)
                if self.refused == 1:
                    self._progress.say(f"fastmtp: a request is left out: {error}")
                return Completion(request, [], False)
            finally:
                endpoint.running -= 1
            if choice is not None:
                return self._completion(request, choice)

    async def _ask(
        self, client: httpx2.AsyncClient, endpoint: _Endpoint, body: dict[str, Any]
    ) -> dict[str, Any] | None:
        """The reply's one choice, after retries if need be; None if the endpoint is given up."""
        clock = asyncio.get_running_loop().time
        failed_at, reason = math.inf, ""
        for attempt in range(self._retries + 1):
            if attempt:
                # Jitter keeps requests that failed together from coming back together.
                await asyncio.sleep(self._wait * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
            if endpoint.dead:
                return None
            try:
                choice = await _post(client, endpoint.url, body)
            except _FailedError as error:
                failed_at, reason = min(failed_at, clock()), str(error)
                if not error.worth_another_try:
                    break
            else:
                endpoint.answered_at = clock()
                return choice
        # It has answered others since, so the cause is this request.
        if endpoint.answered_at > failed_at:
            raise _RefusedError(f"{endpoint.url}: {reason}")
        if not endpoint.dead:
            endpoint.dead = reason
            self._progress.say(f"fastmtp: {endpoint.url} is given up: {reason}")
        return None

    def _body(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        body = {
            "prompt": request.prompt,
            "max_tokens": request.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "seed": sampling.seed % 2**31,
            "stop_token_ids": sorted(request.end_ids),
            # Servers have other defaults: llama-server for min_p, vLLM (from the model's files) for both.
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            # Ask for token ids: the first is for vLLM and SGLang, the others are for llama-server.
            "return_token_ids": True,
            "return_tokens": True,
            "verbose": True,
        }
        return body if self._model is None else body | {"model": self._model}

    def _completion(self, request: Request, choice: dict[str, Any]) -> Completion:
        tokens: list[int] | None = choice["token_ids"]
        if tokens is None:
            tokens = self._retokenise(choice["text"])
        elif any(not 0 <= token < self.target.vocabulary_size for token in tokens):
            raise ValueError(
                f"an endpoint gave token ids beyond the vocabulary of {self.target.source}; serve the same target"
            )
        ends = [length for length, token in enumerate(tokens, 1) if token in request.end_ids]
        if ends:
            tokens = tokens[: ends[0]]
        elif choice["finish_reason"] == "stop":
            # Some servers leave out the end token.
            tokens = [*tokens, self._end]
        return Completion(request, tokens, bool(tokens) and tokens[-1] in request.end_ids)

    def _retokenise(self, text: str) -> list[int]:
        ids: list[int] = self.target.tokenizer.encode(text, add_special_tokens=False)
        self.retokenised += 1
        self.mismatched += self.target.decode(ids) != text
        return ids


async def _post(client: httpx2.AsyncClient, url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The reply's one choice: `text`, `finish_reason`, and `token_ids` (None where only text came)."""
    try:
        response = await client.post(url, json=body)
    except httpx2.TransportError as error:
        raise _FailedError(f"{type(error).__name__} {error}".strip(), worth_another_try=True) from error
    status = response.status_code
    if status == 200:
        choice = _choice(response)
        if choice is None:
            reason = "its reply is not that of an OpenAI-compatible completions server"
            raise _FailedError(reason, worth_another_try=False)
        return choice
    reason = f"HTTP {status}: {response.text.strip()[:200]}"
    if 400 <= status < 500 and status not in (*_HOPELESS, *_AGAIN):
        raise _RefusedError(f"{url}: {reason}")
    raise _FailedError(reason, worth_another_try=status not in _HOPELESS)


def _choice(response: httpx2.Response) -> dict[str, Any] | None:
    """None if the reply holds no completion."""
    try:
        reply = response.json()
        choice = reply["choices"][0]
        text, finish_reason = choice["text"], choice["finish_reason"]
        token_ids = choice.get("token_ids") or (reply.get("__verbose") or {}).get("tokens") or None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
    if not isinstance(text, str) or not isinstance(token_ids, list | None):
        return None
    return {"text": text, "finish_reason": finish_reason, "token_ids": token_ids}


def _least_busy(pool: list[_Endpoint]) -> _Endpoint:
    living = [endpoint for endpoint in pool if not endpoint.dead]
    if not living:
        reasons = "; ".join(f"{endpoint.url}: {endpoint.dead}" for endpoint in pool)
        raise ConnectionError(
            f"no endpoint is left ({reasons}); what is answered is kept, the same command goes on"
        )
    return min(living, key=lambda endpoint: endpoint.running)


def _end_token(target: TargetInfo) -> int:
    """The token that ends an answer in the chat template; without a template the tokenizer's end token."""
    marker = "the-answer-goes-here"
    if target.tokenizer.chat_template:
        messages = [*user("question"), {"role": "assistant", "content": marker}]
        _, _, after = target.tokenizer.apply_chat_template(messages, tokenize=False).partition(marker)
        ids = target.tokenizer.encode(after, add_special_tokens=False)[:1]
        if set(ids) <= target.end_ids and ids:
            return int(ids[0])
    return min(target.end_ids) if target.tokenizer.eos_token_id is None else int(target.tokenizer.eos_token_id)


async def _first_of(
    tasks: set[asyncio.Task[Completion]],
) -> tuple[set[asyncio.Task[Completion]], set[asyncio.Task[Completion]]]:
    return await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


async def _close(client: httpx2.AsyncClient, running: set[asyncio.Task[Completion]]) -> None:
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await client.aclose()

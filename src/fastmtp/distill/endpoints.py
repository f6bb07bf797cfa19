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
from typing import Any

# Its connections are pooled, and asyncio can cancel them at Ctrl-C.
import httpx2

from fastmtp.addresses import address, key_of
from fastmtp.decode.batch import Completion, Request
from fastmtp.distill.completions import PATH, Endpoint, FailedError, MalformedError, RefusedError, post
from fastmtp.distill.prompts import user
from fastmtp.errors import reason as reason_of
from fastmtp.models.info import TargetInfo
from fastmtp.progress import QUIET, Progress
from fastmtp.rows import not_unicode

# How often one request may be told so by an endpoint that answers others, and how often the wait doubles then.
_BUSY_TRIES, _DOUBLED = 30, 4
# Longer waits are told.
_TOLD_SECONDS = 5.0
# Characters of an answer's text for each of its tokens.
_TOKEN_CHARACTERS = 256
# Of answers that were not written to an end or to the limit.
_BROKEN_OFF = ("abort", "error", "content_filter")


def check_addresses(urls: Sequence[str]) -> None:
    """Raises ValueError if one is no http address."""
    for url in urls:
        address(url, "--endpoint")


class Endpoints:
    """Servers of one target.

    Attributes:
        urls: where they are, without user names, passwords and queries.
        refused, malformed, retokenised, mismatched: counts of requests, of replies, and of completions.
        refusal: what the first refused request was told.
    """

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
            urls: the servers' addresses, with or without `/v1`; a user name and password in one are sent to it.
            model: the name the servers know the target by; None where each serves only one.
            timeout: seconds to wait for a reply, and the longest that a server may ask to wait.
            retries: further tries after a failed one, before an endpoint is given up.
            wait: seconds before the first retry; the wait doubles with each further one.
            progress: told of a refused request and of endpoints that are given up.
        Raises:
            ValueError: a url is no http address, or OPENAI_API_KEY no key.
        """
        self.target = target
        self._addresses = [address(url, "--endpoint") for url in urls]
        self.urls = [one.shown + PATH for one in self._addresses]
        self.refused = self.malformed = self.retokenised = self.mismatched = 0
        self.refusal = ""
        self._key = key_of("OPENAI_API_KEY", os.environ.get("OPENAI_API_KEY") or None)
        self._model = model
        self._seconds = timeout
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
        pool = [Endpoint(one) for one in self._addresses]
        with asyncio.Runner() as runner:
            client = self._client(concurrency)
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

    def _client(self, concurrency: int) -> httpx2.AsyncClient:
        try:
            return httpx2.AsyncClient(
                headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
                timeout=self._timeout,
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=concurrency),
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--endpoint: nothing can be asked, {reason_of(error)}; look at SSL_CERT_FILE, SSL_CERT_DIR, and "
                "the variables for proxies, such as ALL_PROXY"
            ) from error

    async def _complete(self, client: httpx2.AsyncClient, pool: list[Endpoint], request: Request) -> Completion:
        while True:
            endpoint = _least_busy(pool)
            endpoint.running += 1
            try:
                completion = await self._ask(client, endpoint, request)
            except RefusedError as error:
                self.refused += 1
                self.refusal = self.refusal or str(error)
                if self.refused == 1:
                    self._progress.say(f"fastmtp: a request is left out: {error}")
                return Completion(request, [], False)
            finally:
                endpoint.running -= 1
            if completion is not None:
                return completion

    async def _ask(self, client: httpx2.AsyncClient, endpoint: Endpoint, request: Request) -> Completion | None:
        """The endpoint's answer, after retries if need be; None if the endpoint is given up."""
        clock, shown = asyncio.get_running_loop().time, endpoint.address.shown
        alive_at, failed_at, reason = clock(), math.inf, ""
        tries = busy = 0
        while tries <= self._retries and busy < _BUSY_TRIES:
            if tries or busy:
                # Jitter keeps requests that failed together from coming back together.
                doubled = tries - 1 if not busy else min(tries + busy - 1, _DOUBLED)
                await asyncio.sleep(self._wait * 2**doubled * random.uniform(0.5, 1.5))
            while not endpoint.dead and (left := endpoint.ready_at - clock()) > 0:
                await asyncio.sleep(left)
            if endpoint.dead:
                return None
            endpoint.asked += 1
            try:
                async with asyncio.timeout(self._seconds):
                    choice = await post(client, endpoint, self._body(request))
                completion = self._completion(request, choice)
            except (FailedError, TimeoutError) as found:
                error = found if isinstance(found, FailedError) else self._late()
                failed_at, reason = min(failed_at, clock()), str(error)
                self.malformed += isinstance(error, MalformedError)
                if error.seconds > self._seconds:
                    reason = f"{reason}; it asks to wait {error.seconds:.0f} s"
                    break
                if not error.worth_another_try:
                    break
                self._leave_alone(endpoint, clock(), error.seconds)
                # An endpoint that answers others meanwhile will answer this one too.
                if error.busy and (endpoint.asked > 1 or endpoint.answered_at > alive_at):
                    tries, busy, alive_at = 0, busy + 1, clock()
                else:
                    tries += 1
            else:
                endpoint.answered_at = clock()
                return completion
            finally:
                endpoint.asked -= 1
        # It has answered others since, so the cause is this request.
        if endpoint.answered_at > failed_at:
            raise RefusedError(f"{shown}: {reason}")
        if not endpoint.dead:
            endpoint.dead = reason
            self._progress.say(f"fastmtp: {shown} is given up: {reason}")
        return None

    def _late(self) -> FailedError:
        return FailedError(f"no whole reply came within {self._seconds:g} s (--timeout)")

    def _leave_alone(self, endpoint: Endpoint, now: float, seconds: float) -> None:
        """Send an endpoint nothing for some seconds."""
        if endpoint.ready_at <= now and seconds > _TOLD_SECONDS:
            self._progress.say(f"fastmtp: {endpoint.address.shown} asks to wait {seconds:.0f} s")
        endpoint.ready_at = max(endpoint.ready_at, now + seconds)

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
        """Raises MalformedError if it cannot be the target's."""
        tokens: list[int] | None = choice["token_ids"]
        reason = choice["finish_reason"]
        if reason in _BROKEN_OFF:
            raise MalformedError(f"its answer was broken off: {reason}")
        retokenised = tokens is None
        if tokens is None:
            if wrong := not_unicode(choice["text"]):
                raise MalformedError(f"its text {wrong}")
            if len(choice["text"]) > _TOKEN_CHARACTERS * request.max_new_tokens:
                raise MalformedError(f"its text is too long for {request.max_new_tokens} tokens")
            tokens = self.target.tokenizer.encode(choice["text"], add_special_tokens=False)
        elif not all(type(token) is int and 0 <= token < self.target.vocabulary_size for token in tokens):
            raise MalformedError(
                f"it gave token ids beyond the vocabulary of {self.target.source}; serve the same target"
            )
        tokens = tokens[: request.max_new_tokens]
        ends = [length for length, token in enumerate(tokens, 1) if token in request.end_ids]
        if ends:
            tokens = tokens[: ends[0]]
        elif reason == "stop" and len(tokens) < request.max_new_tokens:
            # Some servers leave out the end token.
            tokens = [*tokens, self._end]
        if not tokens:
            raise MalformedError("its answer is empty")
        if retokenised:
            self.retokenised += 1
            self.mismatched += self.target.decode(tokens) != choice["text"]
        return Completion(request, tokens, tokens[-1] in request.end_ids)


def _least_busy(pool: list[Endpoint]) -> Endpoint:
    living = [endpoint for endpoint in pool if not endpoint.dead]
    if not living:
        reasons = "; ".join(f"{endpoint.address.shown}: {endpoint.dead}" for endpoint in pool)
        raise ConnectionError(
            f"no endpoint is left ({reasons}); what is answered is kept, the same command goes on"
        )
    now = asyncio.get_running_loop().time()
    return min(living, key=lambda endpoint: (endpoint.ready_at > now, endpoint.running))


def _end_token(target: TargetInfo) -> int:
    """The token that ends an answer in the chat template; without a template the tokenizer's end token."""
    marker = "the-answer-goes-here"
    if target.tokenizer.chat_template:
        messages = [*user("question"), {"role": "assistant", "content": marker}]
        _, _, after = target.chat_text(messages).partition(marker)
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

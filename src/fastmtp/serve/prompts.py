"""From what a client sent to requests for the scheduler."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from fastmtp.config import SamplingConfig
from fastmtp.decode.grammar import check_grammar
from fastmtp.decode.sampling import derived_seed
from fastmtp.serve.constraints import offered
from fastmtp.serve.conversation import plain, taught
from fastmtp.serve.errors import ApiError, invalid
from fastmtp.serve.functions import Tool
from fastmtp.serve.requests import Request
from fastmtp.serve.schema import ChatBody, CompletionBody, Message
from fastmtp.serve.service import Service
from fastmtp.serve.styles import takes_tools

# What OpenAI's text completions give where a request names no length.
COMPLETION_TOKENS = 16
_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "seed",
)


async def chat_requests(service: Service, body: ChatBody) -> list[Request]:
    """One for each choice, without its grammar.

    Raises:
        ApiError: a field does not fit the model or another field.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "needs logprobs: true")
    if None not in (body.max_tokens, body.max_completion_tokens):
        raise invalid("max_tokens", "give this or max_completion_tokens, not both")
    prompt = await chat_tokens(service, body.messages, offered(body))
    longest = body.max_completion_tokens or body.max_tokens or service.context
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _requests(service, body, [prompt], longest, logprobs, "messages")


async def chat_grammar(service: Service, body: ChatBody) -> str | None:
    """What the answer must fit, compiled; None: it is free.

    Raises:
        ApiError: a field does not fit the model or another field, or a schema is not supported.
    """
    if body.response_format is None and not offered(body) and body.tool_choice in (None, "none"):
        return None
    return await asyncio.get_running_loop().run_in_executor(service.compiling, _grammar, service, body)


def _grammar(service: Service, body: ChatBody) -> str | None:
    grammar = service.constraints.grammar(body)
    if grammar is not None:
        param = "tools" if offered(body) else "response_format"
        try:
            check_grammar(service.target, grammar)
        except ValueError as error:
            raise invalid(param, str(error)) from None
    return grammar


async def completion_requests(service: Service, body: CompletionBody) -> list[Request]:
    """As `chat_requests`; the choices of the first prompt come first."""
    prompts = [
        await text_tokens(service, prompt) if isinstance(prompt, str) else known(service, prompt, "prompt")
        for prompt in body.prompt
    ]
    return _requests(service, body, prompts, body.max_tokens or COMPLETION_TOKENS, body.logprobs, "prompt")


async def chat_tokens(service: Service, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
    """A conversation in the chat template, with the start of a reply."""
    told, shown = plain(messages), [tool.shown() for tool in tools]
    tokenizer = service.target.tokenizer
    if not takes_tools(tokenizer.chat_template):
        told, shown = taught(told, shown), []

    def encoded() -> list[int]:
        if not tokenizer.chat_template:
            return service.target.encode_chat(told)
        text = tokenizer.apply_chat_template(told, add_generation_prompt=True, tools=shown)
        return service.target.encode(text, special=False)

    return await _encoded(service.rendering, "messages", encoded)


async def text_tokens(service: Service, text: str, *, special: bool = True) -> list[int]:
    return await _encoded(None, "prompt", lambda: service.target.encode(text, special=special))


def known(service: Service, tokens: list[int], param: str) -> list[int]:
    """Token ids as they came.

    Raises:
        ApiError: the model has no such token.
    """
    size = service.target.vocabulary_size
    for token in tokens:
        if not 0 <= token < size:
            raise invalid(param, f"{token} is no token id; they go from 0 to {size - 1}")
    return tokens


async def _encoded(pool: Executor | None, param: str, encode: Callable[[], list[int]]) -> list[int]:
    try:
        # A long text takes long; the event loop goes on meanwhile.
        return await asyncio.get_running_loop().run_in_executor(pool, encode)
    except ValueError as error:
        raise ApiError(400, str(error), param=param, code="invalid_value") from None


def _requests(
    service: Service,
    body: ChatBody | CompletionBody,
    prompts: Sequence[Sequence[int]],
    longest: int,
    logprobs: int | None,
    param: str,
) -> list[Request]:
    if (count := len(prompts) * body.n) > service.most:
        most = f"{count} answers at once are more than this server takes, {service.most}"
        raise invalid("n" if body.n > 1 else param, most)
    for prompt in prompts:
        _check_length(service, len(prompt), param)
    sampling = _sampling(service, body)
    return [
        Request(
            prompt=tuple(prompt),
            sampling=sampling[choice],
            max_new_tokens=service.target.room(len(prompt), longest, service.context),
            stop=tuple(body.stop),
            top_logprobs=logprobs,
            draft=body.draft,
            ignore_end=body.ignore_eos,
        )
        for prompt in prompts
        for choice in range(body.n)
    ]


def _check_length(service: Service, length: int, param: str) -> None:
    if length == 0:
        raise invalid(param, "is empty; give at least one token")
    if length >= service.context:
        message = f"{param}: has {length} tokens, and the context ends at {service.context}; shorten it"
        raise ApiError(400, message, param=param, code="context_length_exceeded")


def _sampling(service: Service, body: ChatBody | CompletionBody) -> list[SamplingConfig]:
    """For each choice: the same with seeds of their own. Without a seed each request has another."""
    asked = {name: getattr(body, name) for name in _SAMPLING if getattr(body, name) is not None}
    if body.seed is not None and body.seed < 0:
        asked["seed"] = body.seed % 2**64
    # As in vLLM and llama.cpp, -1 is as good as none.
    if body.seed in (None, -1):
        asked["seed"] = secrets.randbits(63)
    settings = service.sampling | asked
    try:
        first = SamplingConfig(**settings, logit_bias=_bias(service, body.logit_bias))
    except ValueError as error:
        # Settings' errors begin with the name.
        raise ApiError(400, str(error), param=str(error).partition(" ")[0], code="invalid_value") from None
    seeds = [first.seed, *(derived_seed(first.seed, choice) for choice in range(1, body.n))]
    return [SamplingConfig(**{**vars(first), "seed": seed}) for seed in seeds]


def _bias(service: Service, biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    for key in biases:
        if not (key.isascii() and key.isdecimal() and int(key) < service.target.vocabulary_size):
            size = service.target.vocabulary_size
            raise invalid("logit_bias", f"{key!r} is no token id; give ids as text, below {size}")
    return tuple((int(key), bias) for key, bias in biases.items())

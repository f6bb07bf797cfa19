"""The endpoints."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from fastmtp.serve import requests
from fastmtp.serve.answers import Answers, stopping
from fastmtp.serve.constraints import offered
from fastmtp.serve.errors import ApiError, api_error, fault, gone, http_error
from fastmtp.serve.formats import Chat, ChatLogprobs, Envelope, Format, Text, TextLogprobs
from fastmtp.serve.openapi import document
from fastmtp.serve.prompts import chat_grammar, chat_requests, chat_tokens, completion_requests, known, text_tokens
from fastmtp.serve.reply import Reply, unless_gone
from fastmtp.serve.response import ResponseReply
from fastmtp.serve.responses import ResponsesBody, renamed
from fastmtp.serve.schema import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    parsed,
)
from fastmtp.serve.service import Service

MAX_BODY = 8 << 20
_PAGE = Path(__file__).with_name("page.html")
# The page asks this server and nobody else, whatever a model writes.
_POLICY = (
    "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Endpoints:
    """What a client can ask for. The model may come later: until `ready` it is said to be loading."""

    def __init__(self) -> None:
        self._service: Service | None = None
        self._stopping = False
        self._created = int(time.time())

    def ready(self, service: Service) -> None:
        """Answer from now on."""
        self._service = service

    def stop(self) -> None:
        """Take no more requests."""
        self._stopping = True

    def app(self, guards: Sequence[Middleware], lifespan: Any = None) -> Starlette:
        return Starlette(
            routes=[
                Route("/", self.page),
                Route("/health", self.health),
                Route("/metrics", self.metrics),
                Route("/openapi.json", self.openapi),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/responses", self.responses, methods=["POST"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/tokenize", self.tokenize, methods=["POST"]),
                Route("/detokenize", self.detokenize, methods=["POST"]),
            ],
            middleware=list(guards),
            exception_handlers={
                ApiError: api_error,
                HTTPException: http_error,
                ClientDisconnect: gone,
                Exception: fault,
            },
            lifespan=lifespan,
        )

    async def page(self, _: Request) -> Response:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": _POLICY})

    async def health(self, _: Request) -> Response:
        status = "stopping" if self._stopping else "loading" if self._service is None else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def metrics(self, _: Request) -> Response:
        return Response(self._loaded().metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, _: Request) -> Response:
        return JSONResponse(document())

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described(self._loaded())]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._described(self._of_model(request.path_params["name"])))

    async def chat(self, request: Request) -> Response:
        body = parsed(ChatBody, await _json(request))
        service = self._of_model(body.model)
        logprobs = ChatLogprobs(service.pieces, service.target.end_ids) if body.logprobs else None
        asked = await _asked(request, service, body)
        form = Chat(logprobs, service.style if offered(body) else None)
        return await self._reply(request, body, asked, form, Envelope.new(service.name, "chatcmpl"))

    async def responses(self, request: Request) -> Response:
        body = parsed(ResponsesBody, await _json(request))
        service = self._of_model(body.model)
        try:
            chat = body.chat()
            asked = await _asked(request, service, chat)
        except ApiError as error:
            raise renamed(error) from None
        answers = Answers(service.scheduler, asked, service.metrics)
        form, envelope = Chat(None, service.style if offered(chat) else None), Envelope.new(service.name, "resp")
        reply = ResponseReply(answers, envelope, form, 1, 1, timings=False, sources=False, asked=body)
        return reply.stream(usage=False) if body.stream else await reply.whole(request)

    async def completions(self, request: Request) -> Response:
        body = parsed(CompletionBody, await _json(request))
        service = self._of_model(body.model)
        logprobs = TextLogprobs(service.pieces, service.target.end_ids) if body.logprobs is not None else None
        asked = await completion_requests(service, body)
        return await self._reply(request, body, asked, Text(logprobs), Envelope.new(service.name, "cmpl"))

    async def tokenize(self, request: Request) -> Response:
        body = parsed(TokenizeBody, await _json(request))
        service = self._of_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give prompt or messages", param="prompt", code="invalid_value")
        if body.messages is not None:
            if body.add_special_tokens is not None:
                message = "add_special_tokens is for a prompt; the chat template says what messages get"
                raise ApiError(400, message, param="add_special_tokens", code="invalid_value")
            tokens = await chat_tokens(service, body.messages)
        else:
            tokens = await text_tokens(service, body.prompt or "", special=body.add_special_tokens is not False)
        words = [service.pieces.name_of(token) for token in tokens] if body.return_token_strs else None
        return JSONResponse(
            {"count": len(tokens), "max_model_len": service.context, "tokens": tokens, "token_strs": words}
        )

    async def detokenize(self, request: Request) -> Response:
        body = parsed(DetokenizeBody, await _json(request))
        service = self._of_model(body.model)
        tokens = known(service, body.tokens, "tokens")
        return JSONResponse({"prompt": service.target.tokenizer.decode(tokens)})

    async def _reply(
        self,
        request: Request,
        body: ChatBody | CompletionBody,
        asked: Sequence[requests.Request],
        form: Format,
        envelope: Envelope,
    ) -> Response:
        if body.stream_options is not None and not body.stream:
            message = "stream_options needs stream: true"
            raise ApiError(400, message, param="stream_options", code="invalid_value")
        service = self._loaded()
        answers = Answers(service.scheduler, asked, service.metrics)
        reply = Reply(answers, envelope, form, len(asked), len(asked) // body.n, body.timings, body.sources)
        if body.stream:
            return reply.stream(usage=body.stream_options is not None and body.stream_options.include_usage)
        return await reply.whole(request)

    def _loaded(self) -> Service:
        if self._stopping:
            raise stopping()
        if self._service is None:
            raise ApiError(503, "the model is being loaded", code="loading", headers={"Retry-After": "5"})
        return self._service

    def _of_model(self, name: str | None) -> Service:
        service = self._loaded()
        if name not in (None, service.name):
            message = f"there is no model {name!r} here; this server has {service.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return service

    def _described(self, service: Service) -> dict[str, Any]:
        return {
            "id": service.name,
            "object": "model",
            "created": self._created,
            "owned_by": "fastmtp",
            "max_model_len": service.context,
        }


async def _asked(request: Request, service: Service, body: ChatBody) -> list[requests.Request]:
    """One for each choice. No grammar is compiled for a client that left while it waited."""
    grammar = await unless_gone(request, chat_grammar(service, body))
    asked = await chat_requests(service, body)
    return [replace(one, grammar=grammar) for one in asked]


async def _json(request: Request) -> bytes:
    """A request's body.

    Only declared as JSON: browsers let any page send other types to any address, without asking that.
    """
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send JSON, with Content-Type: application/json", code="unsupported_media_type")
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            message = f"the body is larger than {MAX_BODY >> 20} MiB"
            raise ApiError(413, message, code="request_too_large")
    return bytes(data)

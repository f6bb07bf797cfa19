"""The server's life: listening, loading, answering, and stopping within a time."""

from __future__ import annotations

import asyncio
import math
import os
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from threading import Thread

import uvicorn
from starlette.applications import Starlette

from fastmtp.serve.app import Endpoints
from fastmtp.serve.connections import Connection
from fastmtp.serve.security import guards
from fastmtp.serve.service import Service
from fastmtp.serve.styles import takes_tools

# uvicorn closes connections beyond these with a line of plain text; requests have a smaller limit (security.py).
MAX_CONNECTIONS = 2048
# For the last events of answers that were cut off at the end of the grace.
LAST_SECONDS = 1.0


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any that is free.

    Raises:
        ValueError: another program listens there already, or this machine has no such address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small pieces at once (TCP_NODELAY) only where the protocol is given.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise ValueError(f"--host {host} --port {port}: {reason}; choose another") from error
    return listener


def serve(
    listener: socket.socket,
    load: Callable[[], Service],
    *,
    host: str,
    key: str | None,
    grace: float,
    on_ready: Callable[[Service], None],
) -> None:
    """Answer on a socket until Ctrl-C or SIGTERM; `load` runs meanwhile, in a thread of its own.

    Args:
        key: what clients must send; None lets all in.
        grace: seconds that answers under way have at the end, before they are cut off.
    Raises:
        Exception: what `load` raised.
    """
    server = Server(load, host=host, key=key, grace=grace, on_ready=on_ready)
    # A signal ends `run` and is raised again after that.
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    if server.error is not None:
        raise server.error


class Server(uvicorn.Server):
    """uvicorn's, with a model that comes later and answers that end before it does."""

    def __init__(
        self,
        load: Callable[[], Service],
        *,
        host: str = "127.0.0.1",
        key: str | None = None,
        grace: float = 10.0,
        on_ready: Callable[[Service], None] = lambda _: None,
    ) -> None:
        self.error: Exception | None = None
        self._load, self._grace, self._on_ready = load, grace, on_ready
        self._endpoints = Endpoints()
        self._service: Service | None = None
        super().__init__(
            uvicorn.Config(
                self._endpoints.app(guards(host, key), self._life),
                # With h11, which alone of uvicorn's two bounds the size of a request's head.
                http=Connection,
                log_config=None,
                access_log=False,
                lifespan="on",
                server_header=False,
                proxy_headers=False,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_graceful_shutdown=math.ceil(grace + LAST_SECONDS),
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, and let those under way finish within the grace; a second Ctrl-C ends it."""
        self._endpoints.stop()
        self._begun.cancel()
        await asyncio.wait([self._begun])
        service = self._service
        stopped = asyncio.create_task(
            asyncio.sleep(0) if service is None else asyncio.to_thread(service.scheduler.stop, self._grace)
        )
        await super().shutdown(sockets)
        if self.force_exit and service is not None:
            # A second Ctrl-C: nobody wants to wait.
            await asyncio.to_thread(service.scheduler.stop, 0)
            await asyncio.sleep(LAST_SECONDS if self.server_state.tasks else 0)
        await stopped

    @asynccontextmanager
    async def _life(self, _: Starlette) -> AsyncIterator[None]:
        self._begun = asyncio.create_task(self._begin())
        yield
        if self._service is not None:
            for pool in (self._service.compiling, self._service.rendering):
                pool.shutdown(wait=False, cancel_futures=True)

    async def _begin(self) -> None:
        loaded: Future[Service] = Future()
        # A daemon, so that nobody has to wait for a large model in order to stop.
        Thread(target=self._run_load, args=(loaded,), name="load", daemon=True).start()
        try:
            service = await asyncio.wrap_future(loaded)
            # Starts the process for chat templates, so that no conversation waits for it.
            await asyncio.to_thread(takes_tools, service.target.tokenizer.chat_template)
            service.scheduler.start()
        except Exception as error:
            self.error, self.should_exit = error, True
            return
        self._service = service
        self._endpoints.ready(service)
        self._on_ready(service)

    def _run_load(self, loaded: Future[Service]) -> None:
        loaded.set_running_or_notify_cancel()
        try:
            loaded.set_result(self._load())
        except BaseException as error:
            loaded.set_exception(error)

"""Chat templates rendered in a child process, within a time and a size."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from fastmtp.models.tokenizer import Tokenizer
from fastmtp.serve.render import MAX_CHARACTERS

SECONDS = 2.0
# Of the first conversation, which waits for the process to start.
START_SECONDS = 30.0


class TemplateError(ValueError):
    """The template refuses the conversation, fails, or takes too long."""


class Templates:
    """One model's chat template. Conversations are rendered one after the other."""

    def __init__(self, tokenizer: Tokenizer, seconds: float = SECONDS) -> None:
        self._tokenizer, self._seconds = tokenizer, seconds
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()

    async def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The text of a conversation with the start of a reply.

        Args:
            tools: functions that the model may call.
        Raises:
            TemplateError: see there; the message says which.
        """
        job = {
            "template": self._tokenizer.chat_template,
            "messages": list(messages),
            "tools": list(tools),
            "named": self._tokenizer.named_tokens,
        }
        async with self._lock:
            reply = await self._ask(json.dumps(job).encode() + b"\n")
        answer = json.loads(reply)
        if "error" in answer:
            raise TemplateError(f"the model's chat template refuses these messages: {answer['error']}")
        text: str = answer["text"]
        return text

    async def start(self) -> None:
        """Have the process ready, so that no conversation waits for its start."""
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fastmtp.serve.render"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=8 * MAX_CHARACTERS,  # of a line of JSON, where a character may take six bytes
        )
        await self._line(self._process, START_SECONDS)

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _ask(self, job: bytes) -> bytes:
        if self._process is None:
            await self.start()
        process = self._process
        assert process is not None and process.stdin is not None
        process.stdin.write(job)
        return await self._line(process, self._seconds)

    async def _line(self, process: asyncio.subprocess.Process, seconds: float) -> bytes:
        assert process.stdout is not None
        try:
            line = await asyncio.wait_for(process.stdout.readline(), seconds)
        except TimeoutError:
            await self.close()
            raise TemplateError(f"the model's chat template took more than {seconds:g} s") from None
        except asyncio.CancelledError:
            # Its reply would be taken for the next conversation's.
            await self.close()
            raise
        if not line:
            await self.close()
            raise TemplateError("the model's chat template ended its process")
        return line

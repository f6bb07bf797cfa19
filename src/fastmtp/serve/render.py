"""A process of its own that renders chat templates: `python -m fastmtp.serve.render`.

Templates come with models, and messages with requests; together they may take for ever or fill the memory. Here
they can be killed. A line of JSON on standard input is a conversation, a line on standard output its text.
"""

from __future__ import annotations

import json
import sys
from threading import Thread
from typing import Any

from jinja2 import TemplateError

from fastmtp.models.chat import render

MEMORY = 1 << 30
MAX_CHARACTERS = 1 << 24


def main() -> None:
    """Render until standard input ends: then the server is gone, and whatever is under way ends at once."""
    _limit_memory()
    print("ready", flush=True)
    for line in sys.stdin:
        # A thread that does not hold up the end.
        Thread(target=_answer, args=(json.loads(line),), daemon=True).start()


def _answer(job: dict[str, Any]) -> None:
    try:
        text = render(job["template"], job["messages"], reply=True, named=job["named"], tools=job["tools"])
        reply = {"text": text} if len(text) <= MAX_CHARACTERS else {"error": "it makes too long a text"}
    except TemplateError as error:
        reply = {"error": str(error)}
    except MemoryError:
        reply = {"error": "it needs too much memory"}
    except Exception as error:  # a template is a program, and may fail in any way
        reply = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(reply), flush=True)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


if __name__ == "__main__":
    main()

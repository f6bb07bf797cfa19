"""A process of its own that renders chat templates: `python -m fastmtp.models.template_process`.

Templates come with models, and messages with requests; together they may take for ever or fill the memory. Here
they can be killed. A line of JSON on standard input is a job, a line on standard output its result.
"""

from __future__ import annotations

import json
import sys
from threading import Thread
from typing import Any

from jinja2 import TemplateError

from fastmtp.models.chat import render, variables

MEMORY = 1 << 30
MAX_CHARACTERS = 1 << 24


def main() -> None:
    """Work until standard input ends: then the parent is gone, and whatever is under way ends at once."""
    _limit_memory()
    print("ready", flush=True)
    for line in sys.stdin:
        # A thread that does not hold up the end.
        Thread(target=_answer, args=(json.loads(line),), daemon=True).start()


def _answer(job: dict[str, Any]) -> None:
    print(json.dumps(_result(job)), flush=True)


def _result(job: dict[str, Any]) -> dict[str, Any]:
    """A failure is a result, too; of several conversations each has its own."""
    try:
        if "conversations" in job:
            return {"results": [_result({**job, "messages": own}) for own in job.pop("conversations")]}
        if "messages" not in job:
            return {"variables": sorted(variables(job["template"]))}
        text = render(job["template"], job["messages"], reply=job["reply"], named=job["named"], tools=job["tools"])
        return {"text": text} if len(text) <= MAX_CHARACTERS else {"exceeded": "makes too long a text"}
    except TemplateError as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"exceeded": "needs too much memory"}
    except Exception as error:  # a template is a program, and may fail in any way
        return {"refused": f"{type(error).__name__}: {error}"}


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


if __name__ == "__main__":
    main()

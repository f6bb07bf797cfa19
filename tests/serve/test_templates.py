"""Chat templates in their own process: the same text, and no way to hang or to fill the memory."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import psutil
import pytest

from fastmtp.models.tokenizer import Tokenizer
from fastmtp.serve.templates import TemplateError, Templates
from tests.conftest import CHAT_TEMPLATE
from tests.serve.serving import tokenizer

T = TypeVar("T")
MESSAGES = [{"role": "system", "content": "né"}, {"role": "user", "content": "a\nb"}]
COUNTS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def run(template: str, work: Callable[[Templates], Awaitable[T]], seconds: float = 5) -> T:
    async def whole() -> T:
        one = Tokenizer(tokenizer().backend_tokenizer, {"eos": "<|end|>"}, template)
        templates = Templates(one, seconds)
        try:
            return await work(templates)
        finally:
            await templates.close()

    return asyncio.run(whole())


def child_of(templates: Templates) -> psutil.Process:
    assert templates._process is not None
    return psutil.Process(templates._process.pid)


def test_text_is_that_of_the_tokenizer() -> None:
    """With the special tokens that templates know by name."""
    template = CHAT_TEMPLATE + "{{ eos_token }}"
    one = Tokenizer(tokenizer().backend_tokenizer, {"eos": "<|end|>"}, template)
    expected = one.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert run(template, lambda templates: templates.render(MESSAGES)) == expected
    assert expected.endswith("<|assistant|><|end|>")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ 1 / 0 }}", "refuses these messages: ZeroDivisionError"),
        ("{{ nothing.at.all }}", "refuses these messages: 'nothing' is undefined"),
        ("{{ ().__class__.__base__ }}", "refuses these messages: .*unsafe"),
        ("{% if %}", "refuses these messages"),
        (COUNTS, "took more than 0.3 s"),
        ("{{ 'a' * 5000000000 }}", "needs too much memory"),
        ("{{ 'a' * 20000000 }}", "makes too long a text"),
    ],
)
def test_templates_that_fail(template: str, said: str) -> None:
    """The reason is told, and the next conversation is rendered."""

    async def work(templates: Templates) -> None:
        for _ in range(2):
            with pytest.raises(TemplateError, match=said):
                await templates.render(MESSAGES)

    run(template, work, 0.3 if template == COUNTS else 5)


def test_a_conversation_that_nobody_waits_for_is_not_taken_for_the_next() -> None:
    """Its process is ended with it."""
    template = "{{ messages[0].content }}{% if messages[0].content == 'slow' %}" + COUNTS + "{% endif %}"

    async def work(templates: Templates) -> str:
        await templates.start()
        first = asyncio.create_task(templates.render([{"role": "user", "content": "slow"}]))
        await asyncio.sleep(0.1)
        child = child_of(templates)
        first.cancel()
        await asyncio.wait([first])
        assert not child.is_running()
        return await templates.render([{"role": "user", "content": "quick"}])

    assert run(template, work, 20) == "quick"


def test_no_process_is_left() -> None:
    """Also where a template was under way when its server went away: its standard input ends."""

    async def work(templates: Templates) -> psutil.Process:
        await templates.start()
        child = child_of(templates)
        task = asyncio.create_task(templates.render(MESSAGES))
        await asyncio.sleep(0.1)
        process = templates._process
        assert process is not None and process.stdin is not None
        process.stdin.close()
        with pytest.raises(TemplateError, match="ended its process"):
            await task
        return child

    child = run(COUNTS, work, 20)
    child.wait(5)
    assert not child.is_running()

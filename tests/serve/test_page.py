"""The page in a browser: `make test-web`, with Playwright and a Chromium."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from fastmtp.serve.requests import Event, OnEvent, Request
from tests.serve.conftest import Running
from tests.serve.serving import REPLY, FakeAnswer, FakeScheduler, eventually, service, serving

pytestmark = pytest.mark.web
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which(os.environ.get("CHROMIUM", "chromium"))
SOURCES = ("target", "head", "text")


class Coloured(FakeScheduler):
    """Tokens come from everywhere in turn: a round has three, and the first is the prompt's own."""

    def submit(self, request: Request, on_event: OnEvent) -> FakeAnswer:
        count = -1

        def coloured(event: Event) -> None:
            nonlocal count
            if isinstance(event, list):
                event = [replace(token, source=SOURCES[(count := count + 1) % 3]) for token in event]
            on_event(event)

        return super().submit(request, coloured)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.fail("there is no Chromium: install Debian's chromium, or name one in CHROMIUM")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def scheduler() -> FakeScheduler:
    return Coloured()


@pytest.fixture(params=["desktop", "phone in the dark"])
def page(request: pytest.FixtureRequest, browser: Any, scheduler: FakeScheduler) -> Iterator[Any]:
    """The page, which must neither fail nor ask anybody but the server."""
    loaded, phone = service(scheduler), request.param != "desktop"
    size = {"width": 360, "height": 640} if phone else {"width": 1200, "height": 800}
    with serving(lambda: loaded) as url:
        context = browser.new_context(viewport=size, color_scheme="dark" if phone else "light")
        opened, wrong = context.new_page(), []
        opened.on("pageerror", lambda error: wrong.append(str(error)))
        opened.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        opened.on(
            "request", lambda asked: None if asked.url.startswith((url, "data:")) else wrong.append(asked.url)
        )
        opened.set_default_timeout(5000)
        opened.goto(url)
        playwright.expect(opened.locator("#prompt")).to_be_focused()
        yield opened
        assert wrong == []
        assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
        context.close()


def ask(page: Any, question: str) -> None:
    page.keyboard.type(question)
    page.keyboard.press("Enter")


def said(page: Any) -> list[str]:
    return [one.text_content() for one in page.locator(".said").all()]


def answered(page: Any, count: int) -> None:
    """Wait for so many messages, and for the end of the last."""
    playwright.expect(page.locator(".said")).to_have_count(count)
    playwright.expect(page.locator("#send")).to_be_visible()


def test_a_conversation_from_the_keyboard(page: Any, scheduler: FakeScheduler) -> None:
    """The prompt has the focus; the second question goes with the first and its answer."""
    playwright.expect(page.locator("h1")).to_have_text("tiny")
    ask(page, "first")
    answered(page, 2)
    ask(page, "second")
    answered(page, 4)
    assert said(page) == ["first", REPLY, "second", REPLY]
    figures = page.locator(".figures").last.text_content()
    assert re.fullmatch(r"\d+ tokens, [\d.]+ tokens/s, [\d.]+ tokens a round", figures), figures
    prompts = [len(request.prompt) for request in scheduler.requests]
    assert prompts[1] > prompts[0] + len(REPLY.encode())
    page.get_by_role("button", name="New chat").click()
    assert said(page) == []
    ask(page, "third")
    answered(page, 2)
    assert len(scheduler.requests[-1].prompt) == prompts[0]


def test_tokens_a_round(page: Any, scheduler: FakeScheduler) -> None:
    """While an answer comes they are its rounds', however many came together; at the end what was measured."""
    scheduler.reply, scheduler.pace = REPLY * 20, 0.01
    ask(page, "hi")
    page.locator(".said .target").nth(9).wait_for(state="attached")
    page.keyboard.press("Escape")
    answered(page, 2)
    tokens, rounds = (page.locator(f".said {kind}").count() for kind in ("span", ".target"))
    figures = page.locator(".figures").last.text_content()
    shown = re.fullmatch(r"(\d+) tokens, [\d.]+ tokens/s, ([\d.]+) tokens a round, stopped", figures)
    assert shown is not None, figures
    assert int(shown[1]) == tokens
    assert float(shown[2]) == pytest.approx((tokens - 1) / (rounds - 1), abs=0.006) == pytest.approx(3.1, abs=0.2)
    scheduler.reply, scheduler.pace = REPLY, 0.0
    ask(page, "hi")
    answered(page, 4)
    # Of the five rounds that the scheduler says it took.
    assert page.locator(".figures").last.text_content().endswith(f", {len(REPLY.encode()) / 5:.2f} tokens a round")


def test_settings(page: Any, scheduler: FakeScheduler) -> None:
    """They reach the request; plain decoding is compared with drafts on the same seed."""
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System message").fill("be brief")
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Most tokens").fill("9")
    page.get_by_label("Answer plainly too").check()
    page.locator("#prompt").focus()
    ask(page, "hi")
    answered(page, 3)
    first, second = scheduler.requests
    assert (first.draft, second.draft) == (True, False)
    assert first.sampling == second.sampling
    assert (first.sampling.temperature, first.max_new_tokens) == (0.7, 9)
    assert "cut at the limit" in page.locator(".figures").nth(1).text_content()
    assert "the same text" in page.locator(".figures").last.text_content()


def test_colours(page: Any) -> None:
    """By source, where the switch is on, with a legend; others' text has no colour."""
    page.get_by_role("button", name="Settings").click()
    page.locator("#prompt").focus()
    ask(page, "hi")
    answered(page, 2)

    def shades() -> list[str]:
        return [
            page.locator(f".said .{source}").first.evaluate("one => getComputedStyle(one).backgroundColor")
            for source in SOURCES
        ]

    assert len(set(shades())) == 1
    page.get_by_label("Colour tokens").check()
    assert len(set(shades())) == 3
    assert page.locator("#legend").is_visible()


def test_a_schema(page: Any, scheduler: FakeScheduler) -> None:
    """It reaches the request, from the keyboard; what is none is said beside the field, and nothing is sent."""
    field, wrong = page.get_by_label("JSON schema"), page.get_by_role("alert")
    page.get_by_role("button", name="Settings").click()
    for text, said_of_it in [
        ('{"type": ', "This is no JSON: "),
        ("[]", "a schema is a JSON object"),
        ("null", "a schema"),
    ]:
        field.fill(text)
        page.get_by_role("button", name="Settings").click()
        page.locator("#prompt").focus()
        ask(page, "hi")
        playwright.expect(field).to_be_focused()
        playwright.expect(wrong).to_contain_text(said_of_it)
        playwright.expect(wrong).to_be_in_viewport()
        assert field.get_attribute("aria-invalid") == "true"
        assert page.locator("#prompt").input_value() == "hi"
        page.locator("#prompt").fill("")
    assert (scheduler.requests, said(page)) == ([], [])
    field.fill("")
    page.keyboard.type('{"type": "object",')
    page.keyboard.press("Enter")
    page.keyboard.type('"properties": {"kind": {"const": "celsius"}}}')
    assert wrong.count() == 0
    page.keyboard.press("Tab")
    page.locator("#prompt").focus()
    ask(page, "hi")
    answered(page, 2)
    assert '"celsius"' in (scheduler.requests[0].grammar or "")
    field.fill(" ")
    page.locator("#prompt").focus()
    ask(page, "hi")
    answered(page, 4)
    assert scheduler.requests[1].grammar is None


def test_a_refused_schema(browser: Any, scheduler: FakeScheduler) -> None:
    """With the server's words; the question comes back."""
    loaded = service(scheduler)
    with serving(lambda: loaded) as url:
        opened = browser.new_page()
        opened.goto(url)
        opened.get_by_role("button", name="Settings").click()
        opened.get_by_label("JSON schema").fill('{"type": "array", "contains": {}}')
        opened.locator("#prompt").focus()
        ask(opened, "hi")
        answered(opened, 2)
        assert "contains" in opened.locator(".figures.bad").text_content()
        assert opened.locator("#prompt").input_value() == "hi"
        assert scheduler.requests == []
        opened.close()


def test_all_sources(browser: Any, running: Running) -> None:
    """A real grammar forces tokens, the head and the text draft others: each has a colour."""
    note = {"type": "string", "maxLength": 200}
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["celsius", "fahrenheit"]}, "first": note, "second": note},
        "required": ["kind", "first", "second"],
        "additionalProperties": False,
    }
    opened = browser.new_page()
    opened.goto(running.url)
    opened.get_by_role("button", name="Settings").click()
    opened.get_by_label("JSON schema").fill(json.dumps(schema))
    opened.get_by_label("Colour tokens").check()
    opened.locator("#prompt").focus()
    ask(opened, "abcabcabc " * 10)
    answered(opened, 2)
    assert list(json.loads(said(opened)[1])) == schema["required"]
    # Those of the model's own have the page's colour.
    shades = {
        opened.locator(f".said .{source}").first.evaluate("one => getComputedStyle(one).backgroundColor")
        for source in ("target", "head", "text", "grammar")
    }
    assert len(shades) == 4
    opened.close()


def test_what_is_said_is_never_markup(browser: Any) -> None:
    """Neither the model's name, nor a question, an answer or an error runs anything or builds an element."""
    evil = "<img src=x onerror=document.title='run'><b>x</b><script>document.title='run'</script>"
    loaded = service(FakeScheduler(reply=evil))
    loaded.name = evil
    with serving(lambda: loaded) as url:
        opened = browser.new_page()
        opened.goto(url)
        playwright.expect(opened.locator("h1")).to_have_text(evil)
        opened.locator("#prompt").focus()
        ask(opened, evil)
        answered(opened, 2)
        assert said(opened) == [evil, evil]
        assert opened.locator("img, b, article script").count() == 0
        assert opened.title() != "run"
        opened.close()


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_stop(page: Any, scheduler: FakeScheduler, how: str) -> None:
    """The answer ends at once, in the server too, and stays in the conversation."""
    scheduler.pace = 0.1
    ask(page, "hi")
    page.locator(".said .head").first.wait_for()
    if how == "Escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()
    answered(page, 2)
    assert "stopped" in page.locator(".figures").last.text_content()
    eventually(lambda: scheduler.running == 0)
    assert 0 < len(said(page)[1]) < len(REPLY)


def test_errors_are_shown(page: Any, scheduler: FakeScheduler) -> None:
    """With the server's words; the question comes back to be sent again."""
    scheduler.fails = 3
    ask(page, "hi")
    answered(page, 2)
    assert page.locator(".figures.bad").text_content() == "decoding failed: out of luck"
    assert page.locator("#prompt").input_value() == "hi"


def test_a_key_is_asked_for(browser: Any) -> None:
    loaded = service(FakeScheduler())
    with serving(lambda: loaded, key="secret-key") as url:
        opened = browser.new_page()
        opened.goto(url)
        opened.get_by_label("API key").fill("secret-key")
        opened.get_by_label("API key").press("Tab")
        playwright.expect(opened.locator("h1")).to_have_text("tiny")
        opened.locator("#prompt").focus()
        ask(opened, "hi")
        answered(opened, 2)
        assert said(opened) == ["hi", REPLY]
        opened.close()

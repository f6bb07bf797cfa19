"""Chat templates of any model: the same text as in transformers, and no way to hang, to fill the memory, or in."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from click.testing import CliRunner

from fastmtp.cli.main import commands
from fastmtp.models.info import TargetInfo
from fastmtp.models.templates import PROCESS, TemplateError, TemplateLimitError, render, variables
from fastmtp.models.tokenizer import Tokenizer
from tests.conftest import CHAT_TEMPLATE, VOCABULARY, tiny_target
from tests.serve.serving import tokenizer

MESSAGES = [{"role": "system", "content": "né"}, {"role": "user", "content": "a\nb"}]
COUNTS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def rendered(template: str, messages: list[dict[str, str]] = MESSAGES) -> str:
    return render(template, messages, reply=False, named={})


def described(template: str) -> TargetInfo:
    config = SimpleNamespace(vocab_size=VOCABULARY, max_position_embeddings=512, eos_token_id=257)
    own = Tokenizer(tokenizer().backend_tokenizer, {"eos": "<|end|>"}, template)
    return TargetInfo(config, (), own, "LlamaForCausalLM", "some-model")


def child() -> psutil.Process:
    assert PROCESS._process is not None
    return psutil.Process(PROCESS._process.pid)


@pytest.mark.parametrize("refuses", ["{{ raise_exception('no') }}", "{{ nothing.at.all }}", COUNTS])
def test_conversations_together_are_those_one_by_one(refuses: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where some are refused, are no valid Unicode, or exceed the time that all have together."""
    monkeypatch.setattr(PROCESS, "seconds", 0.5)
    one = described(CHAT_TEMPLATE + "{% if messages[0].content == 'x' %}" + refuses + "{% endif %}")
    chats = [[{"role": "user", "content": text}] for text in ("a", "x", "b\nc", "\ud800", "né")]
    found, expected = one.encode_chats(chats), []
    for chat in chats:
        try:
            expected.append(one.encode_chat(chat))
        except ValueError as error:
            expected.append(str(error))
    assert [str(own) if isinstance(own, Exception) else own for own in found] == expected
    assert sum(isinstance(own, list) for own in expected) == 3


def test_many_conversations_take_one_job(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, ask = [], PROCESS.ask
    monkeypatch.setattr(PROCESS, "ask", lambda job, refusal: jobs.append(job) or ask(job, refusal))
    described(CHAT_TEMPLATE).encode_chats([MESSAGES] * 5)
    assert len(jobs) == 1


def test_special_tokens_by_name() -> None:
    """A template knows the tokens that have a role."""
    one = Tokenizer(tokenizer().backend_tokenizer, {"eos": "<|end|>"}, CHAT_TEMPLATE + "{{ eos_token }}")
    text = one.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert text == "<|system|>né<|end|><|user|>a\nb<|end|><|assistant|><|end|>"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ raise_exception('one\\n\\x1b[2Jtwo') }}", r"refuses these messages: one \[2Jtwo"),
        ("{{ 1 / 0 }}", "refuses these messages: ZeroDivisionError"),
        ("{{ nothing.at.all }}", "refuses these messages: 'nothing' is undefined"),
        ("{{ ().__class__.__base__ }}", "refuses these messages: .*unsafe"),
        ("{{ messages.append(1) }}", "refuses these messages: .*unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses these messages: RecursionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "chat template (refuses these messages|ended its process)"),
        ("{% if %}", "refuses these messages"),
        ("{% include '/etc/passwd' %}", "refuses these messages"),
        ("{{ 'a' * 5000000000 }}", "needs too much memory"),
        ("{{ 'a' * 20000000 }}", "makes too long a text"),
    ],
)
def test_failures_are_one_line_and_the_next_conversation_is_rendered(template: str, said: str) -> None:
    with pytest.raises(TemplateError, match=said) as raised:
        rendered(template)
    assert str(raised.value).isprintable()
    assert rendered(CHAT_TEMPLATE).startswith("<|system|>")


@pytest.mark.parametrize("template", [COUNTS, "{{ 9 ** (9 ** 9) }}"])
def test_templates_that_do_not_end(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither loops nor arithmetic that nothing interrupts; the message names the model."""
    monkeypatch.setattr(PROCESS, "seconds", 0.5)
    begun = time.monotonic()
    with pytest.raises(TemplateLimitError, match=r"^some-model: the model's chat template took more than 0.5 s$"):
        described(template).encode_chat(MESSAGES)
    with pytest.raises(TemplateLimitError, match="took more than"):
        _ = described(template).end_ids
    assert time.monotonic() - begun < 10
    monkeypatch.undo()
    assert rendered("{{ 'next' }}") == "next"


def test_templates_that_fail_do_not_decide_where_answers_end() -> None:
    """A refusal of the example conversation says nothing of the tokens that the files name."""
    assert described("{{ raise_exception('no') }}").end_ids == {257}


def test_names_taken_from_outside() -> None:
    assert variables("{{ tools }}{% set own = messages %}{{ own }}") == {"tools", "messages"}
    with pytest.raises(TemplateError, match="chat template is invalid"):
        variables("{% if %}")


def test_text_that_no_encoding_takes() -> None:
    """A lone surrogate in a message goes in and out, as without a process."""
    assert rendered("{{ messages[0].content }}", [{"role": "user", "content": "a\ud800"}]) == "a\ud800"


def test_many_threads_get_their_own_texts() -> None:
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        found[number] = rendered("{{ messages[0].content }}", [{"role": "user", "content": str(number)}])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: str(number) for number in range(16)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_has_a_process_of_its_own() -> None:
    """It would take the replies to its parent's conversations."""
    assert rendered("{{ 1 }}") == "1"
    parents = child().pid
    if (pid := os.fork()) == 0:
        works = rendered("{{ 2 }}") == "2" and child().pid != parents
        PROCESS.close()
        os._exit(0 if works else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert rendered("{{ 3 }}") == "3" and child().pid == parents


def test_no_process_is_left(tmp_path: Path) -> None:
    """Also where its parent is killed while a template runs: the child's standard input ends."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, signal, threading, time\n"
        "from fastmtp.models.templates import PROCESS, render\n"
        f"threading.Thread(target=render, args=({COUNTS!r}, []), kwargs=dict(reply=False, named={{}})).start()\n"
        "while PROCESS._process is None: time.sleep(0.01)\n"
        "print(PROCESS._process.pid, flush=True); time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    left = int(ran.stdout)
    until = time.monotonic() + 10
    while psutil.pid_exists(left) and time.monotonic() < until:
        time.sleep(0.05)
    assert not psutil.pid_exists(left)


def test_modules_in_the_current_directory_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the model's, with a file that is named like a module."""
    (tmp_path / "jinja2.py").write_text("raise SystemExit('taken over')")
    monkeypatch.chdir(tmp_path)
    PROCESS.close()
    assert rendered("{{ 'safe' }}") == "safe"


def test_a_command_says_it_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose template hangs ends the command in seconds, with the model's name."""
    model = tmp_path / "model"
    target = tiny_target("llama")
    target.model.save_pretrained(model)
    target.tokenizer.save_pretrained(model)
    (model / "chat_template.jinja").write_text(COUNTS)
    monkeypatch.setattr(PROCESS, "seconds", 0.5)
    error = CliRunner().invoke(commands, ["generate", "--target", str(model), "hello"]).exception
    assert str(error) == f"{model}: the model's chat template took more than 0.5 s"

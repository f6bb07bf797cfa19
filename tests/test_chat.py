"""`fastmtp chat`: what a message is, what Ctrl-C stops, what is remembered, and that nothing reaches the shell."""

from __future__ import annotations

import io
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from click.testing import CliRunner
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from fastmtp.api import Model
from fastmtp.cli import terminal
from fastmtp.cli.conversation import Conversation
from fastmtp.cli.main import commands
from fastmtp.cli.prompting import Editor
from fastmtp.decode.drafting.open import open_drafting
from fastmtp.decode.drafting.options import DraftOptions
from fastmtp.engines.open import open_engine
from tests.conftest import tiny_target

# As it is drawn.
PROMPT = r">\x08?(\x1b\[2C| )"
PASTE, END = "\x1b[200~", "\x1b[201~"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    target = tiny_target("qwen2")
    target.model.save_pretrained(directory)
    target.tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(directory: Path) -> Model:
    return Model(open_drafting(open_engine(str(directory)), DraftOptions(draft="plain")))


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe:
        yield pipe


def editor(keys: PipeInput, history: Path | None = None) -> Editor:
    return Editor(history, keys, DummyOutput())


def test_a_paste_is_one_message(keys: PipeInput) -> None:
    """Empty lines, tabs and 20,000 characters included; what is typed afterwards goes to its end."""
    text = "first line\n\n\tthird " + "x" * 20_000
    keys.send_text(f"{PASTE}{text}{END} and\r")
    keys.send_text("alone\r")
    asked = editor(keys)
    assert asked.ask() == text + " and"
    assert asked.ask() == "alone"


def test_a_line_is_edited(keys: PipeInput) -> None:
    """Arrow keys move, Alt-Enter begins another line, the arrow up brings an earlier message back."""
    asked = editor(keys)
    keys.send_text("worl\x1b[D\x1b[D\x1b[Dd \x1b[Fd\r")
    assert asked.ask() == "wd orld"
    keys.send_text("one\x1b\rtwo\r")
    assert asked.ask() == "one\ntwo"
    keys.send_text("\x1b[A\x1b[A\x1b[A\r")
    assert asked.ask() == "wd orld"


def test_control_keys_end_only_where_nothing_is_typed(keys: PipeInput) -> None:
    """Ctrl-C takes a line back and keeps it in the history; at an empty prompt it ends, as Ctrl-D does."""
    asked = editor(keys)
    keys.send_text("half a thought\x03next\r")
    assert asked.ask() == "next"
    keys.send_text("\x1b[A\x1b[A\r")
    assert asked.ask() == "half a thought"
    for key in ("\x03", "\x04"):
        keys.send_text(key)
        assert asked.ask() is None


def test_the_history_is_the_users_alone(keys: PipeInput, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Kept for the next conversation, and nobody else reads it, also if he could; said where there is no place."""
    path = tmp_path / "data" / "chat-history"
    path.parent.mkdir()
    path.touch(0o644)
    keys.send_text(f"{PASTE}two\nlines{END}\r")
    assert editor(keys, path).ask() == "two\nlines"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    keys.send_text("\x1b[A\r")
    assert editor(keys, path).ask() == "two\nlines"
    keys.send_text("still works\r")
    assert editor(keys, path / "in a file").ask() == "still works"
    assert "no history is kept" in caplog.text


def test_a_stopped_answer_stays(model: Model) -> None:
    """What was said is the model's turn; the next answer goes on from it, as that of one who was told the same."""
    talk = Conversation(model, max_new_tokens=40)
    pieces = list(talk.answer("hello", stops=lambda: True))
    assert len(pieces) == 1 and talk.last is None
    assert talk.turns == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": pieces[0]}]
    went_on = "".join(talk.answer("go on"))
    messages = [*talk.turns[:2], {"role": "user", "content": "go on"}]
    assert went_on == model.generate(messages, max_new_tokens=40).text
    # An answer that is stopped before its first word takes the message with it.
    answer = talk.answer("nothing comes")
    next(answer)
    before = list(talk.turns)
    too_long = talk.answer("x" * 600)
    with pytest.raises(ValueError, match="the context ends at 512"):
        next(too_long)
    assert talk.turns == before


def test_a_system_message_is_heard_or_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Conversation(model, system="be brief", max_new_tokens=4)
    list(talk.answer("hello"))
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant"]
    talk.new()
    assert talk.messages == [{"role": "system", "content": "be brief"}]
    template = "{% for message in messages %}{% if message.role == 'system' %}{{ TEXT }}{% endif %}x{% endfor %}"
    for does, told in (("raise_exception('no')", "takes no system message: .*no$"), ("''", "a")):
        monkeypatch.setattr(model.target.tokenizer, "chat_template", template.replace("TEXT", does))
        if told == "a":
            silent = "{% for message in messages if message.role == 'user' %}x{% endfor %}"
            monkeypatch.setattr(model.target.tokenizer, "chat_template", silent)
            told = "leaves the system message out"
        with pytest.raises(ValueError, match=told):
            Conversation(model, system="be brief")


def run(directory: Path, text: str, *arguments: str) -> str:
    common = ["chat", "--target", str(directory), "--draft", "plain", "--max-new-tokens", "8"]
    result = CliRunner().invoke(commands, [*common, *arguments], input=text)
    assert result.exit_code == 0, result.output
    return result.stderr


def test_commands(directory: Path) -> None:
    """From a pipe too. Unknown ones, and known ones with too much, are refused and not sent; a space sends them."""
    told = run(directory, "/help\n/system\n/system be brief\nhello\n/stats\n/new\n/stats\n/exit\nnever\n")
    assert all(f"\n/{word}" in "\n" + told for word in ("help", "new", "system TEXT", "stats", "exit"))
    assert "there is no system message\nsystem: be brief\n" in told
    assert told.count("1 answer, 8 tokens") == 2
    assert told.count(" tokens/s, plain") == 1
    refused = run(directory, "/etc/hosts\n/new idea\n/stats\n /etc/hosts\n")
    assert "there is no /etc/hosts; it was not sent" in refused
    assert "/new takes nothing after it; it was not sent" in refused
    assert "0 answers, 0 tokens" in refused
    assert refused.count(" tokens/s, plain") == 1


def test_a_pipe_is_read_line_by_line(directory: Path) -> None:
    """To its end, without a limit of a line's length; what cannot be sent is said, and the next line is."""
    told = run(directory, f"hello\n\n{'x' * 9000}\nand again\n")
    assert told.count(" tokens/s, plain") == 2
    assert "the prompt has 9" in told and "the message was not sent; /new begins another conversation" in told


def test_a_model_cannot_command_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Escape sequences of an answer are shown, not obeyed; in a file they are what the model wrote."""

    class Shown(io.StringIO):
        tty = True

        def isatty(self) -> bool:
            return self.tty

    for tty in (True, False):
        stream = Shown()
        stream.tty = tty
        monkeypatch.setattr(sys, "stdout", stream)
        written = "a\tb\x1b]0;title\x07\x9b6n\r\n"
        terminal.show_piece(written)
        assert stream.getvalue() == ("a\tb␛]0;title␇\N{REPLACEMENT CHARACTER}6n\n" if tty else written)


# Answers that take some seconds, to be stopped.
SLOW = """
import os, sys, time
import importlib
from fastmtp.cli import conversation
chat = importlib.import_module("fastmtp.cli.chat")
from fastmtp.cli.main import main
real = conversation.Conversation.answer
def slow(self, text, stops):
    for piece in real(self, text, stops):
        yield piece
        time.sleep(0.05)
conversation.Conversation.answer = slow
def load(*arguments):
    print("loading", flush=True)
    time.sleep(60)
if "SLOWLY" in os.environ:
    chat.open_model = load
sys.argv[0] = "fastmtp"
main()
"""


def test_in_a_real_terminal(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A paste during an answer is the next message; Ctrl-C stops the answer alone; the shell gets nothing of it."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "slow.py").write_text(SLOW)
    chat = f"{sys.executable} {tmp_path / 'slow.py'} chat --target {directory} --draft plain --max-new-tokens 400"
    shell = pexpect.spawn("sh", cwd=str(tmp_path), encoding="utf-8", timeout=30, codec_errors="replace")
    shell.sendline("PS1=READY; unset ENV")
    shell.expect("READY")
    shell.sendline(chat)
    shell.expect(PROMPT)
    shell.send("hello\r")
    # Pastes are marked again while nobody asks.
    shell.expect(r"\x1b\[\?2004l.*?\x1b\[\?2004h")
    # More than the system holds for a program that does not read.
    shell.send(f"{PASTE}touch leaked\n\n{'y' * 9000}\ntouch leaked\n{END}")
    shell.send("\x03")
    shell.expect("stopped; what was said so far stays in the conversation")
    shell.expect(PROMPT)
    shell.send("\r")
    shell.expect(r"the prompt has 9\d\d\d tokens")
    shell.send("\x1b[A\x03")
    shell.send("/stats\r")
    shell.expect("0 answers")
    shell.send("go on\r")
    shell.expect("go on.*\n")
    shell.send("/exit\rtouch leaked\r")
    shell.send("\x03")
    shell.expect("READY")
    # What nobody took in, as while the model is loaded, does not go to the shell either.
    shell.sendline(f"SLOWLY=1 {chat}")
    shell.expect("loading")
    shell.send("touch leaked\r")
    time.sleep(0.2)
    shell.send("\x03")
    shell.expect("the conversation is over")
    shell.expect("READY")
    shell.sendline("echo still-$((6*7))")
    shell.expect("still-42")
    shell.sendline("exit")
    shell.expect(pexpect.EOF)
    assert not (tmp_path / "leaked").exists()
    assert stat.S_IMODE((tmp_path / "data" / "fastmtp" / "chat-history").stat().st_mode) == 0o600

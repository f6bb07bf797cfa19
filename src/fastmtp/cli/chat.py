"""`fastmtp chat`: a conversation on the terminal."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from fastmtp.cli.generate import described, open_model, tell_plans
from fastmtp.cli.options import decoding_options, engine_options, settings_options, tokens_option, verbose_option
from fastmtp.cli.stopping import on_stop
from fastmtp.cli.terminal import TERMINAL, show_piece, visible
from fastmtp.config import SamplingConfig, load_config
from fastmtp.decode.drafting.options import DraftOptions
from fastmtp.engines.open import EngineOptions
from fastmtp.models.packaged import file_of

if TYPE_CHECKING:
    from fastmtp.cli.conversation import Conversation
    from fastmtp.cli.prompting import Editor

_HELP = """\
/help         this
/new          forget the conversation; the system message stays
/system TEXT  set the system message; without TEXT show it
/stats        figures of the answers, and how full the context is
/exit         end, as Ctrl-C and Ctrl-D do where nothing is typed
Alt-Enter begins another line, a paste is one message, and the arrow keys bring earlier messages back. Ctrl-C during
an answer stops the answer alone. A space before a message that begins with / sends it to the model."""


@click.command()
@engine_options
@decoding_options
@settings_options(SamplingConfig)
@tokens_option
@click.option("--system", default="", help="system message, before the conversation")
@verbose_option
def chat(
    target: str,
    options: EngineOptions,
    drafting: DraftOptions,
    max_new_tokens: int,
    system: str,
    verbose: bool,
    **settings: Any,
) -> None:
    """Talk to the model; /help says how. The cache is kept between turns.

    From a pipe each line is a message.
    """
    from fastmtp.cli.conversation import Conversation
    from fastmtp.cli.prompting import Editor, Lines, at_terminal, history_path

    sampling = load_config(SamplingConfig, None, settings)
    editor = Editor(history_path()) if at_terminal() else None
    source = editor or Lines()
    typed = " but what was typed, for the arrow keys" if editor else ""
    on_stop(lambda: f"the conversation is over, and nothing of it is kept{typed}")
    # Here, since it may ask.
    file_of(target, TERMINAL)
    with editor.alone() if editor else nullcontext():
        model = open_model(target, options, drafting)
        try:
            conversation = Conversation(
                model, max_new_tokens=max_new_tokens, sampling=sampling, system=system.strip()
            )
        except ValueError as error:
            raise ValueError(f"--system: {error}") from error
        with _Answering(editor) if editor else nullcontext() as answering:
            while (text := source.ask()) is not None:
                if text.startswith("/"):
                    if not _command(text, conversation):
                        break
                elif message := text.strip():
                    if answering:
                        answering.begin()
                    _reply(conversation, message, answering.stops if answering else lambda: False, verbose)


def _command(text: str, conversation: Conversation) -> bool:
    """Do what a message that begins with / asks for; False if it ends the conversation."""
    word, *rest = text.split(maxsplit=1)
    if word == "/system":
        try:
            if rest:
                conversation.set_system(rest[0].strip())
        except ValueError as error:
            _remark(str(error))
        _remark(f"system: {conversation.system}" if conversation.system else "there is no system message")
    elif word not in ("/help", "/new", "/stats", "/exit") or rest:
        wrong = f"{word} takes nothing after it" if rest and word in _HELP.split() else f"there is no {word}"
        _remark(f"{wrong}; it was not sent. /help lists the commands; with a space before / it is a message")
    elif word == "/help":
        _remark(_HELP)
    elif word == "/new":
        conversation.new()
        _remark("the conversation is forgotten")
    elif word == "/stats":
        _remark(conversation.figures())
    return text.strip() != "/exit"


def _reply(conversation: Conversation, message: str, stops: Callable[[], bool], verbose: bool) -> None:
    turns = len(conversation.turns)
    try:
        for piece in conversation.answer(message, stops):
            show_piece(piece)
    except ValueError as error:
        _remark(f"{error}; the message was not sent" + ("; /new begins another conversation" if turns else ""))
        return
    click.echo("\n")
    if (result := conversation.last) is None:
        kept = len(conversation.turns) > turns
        _remark(f"stopped; {'what was said so far stays' if kept else 'the message is not'} in the conversation")
        return
    if verbose:
        tell_plans(result)
    _remark(described(result))


class _Answering:
    """Ctrl-C, which inside ends nothing by itself: an answer stops between two rounds."""

    def __init__(self, editor: Editor) -> None:
        self._editor, self._pressed = editor, False

    def __enter__(self) -> _Answering:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def begin(self) -> None:
        """An answer begins: Ctrl-C is for it from now on."""
        self._pressed = False
        self._editor.mark_pastes()

    def stops(self) -> bool:
        self._editor.collect()
        return self._pressed

    def _press(self, number: int, frame: object) -> None:
        self._pressed = True


def _remark(text: str) -> None:
    click.echo(click.style(visible(text), dim=True), err=True)

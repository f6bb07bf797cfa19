"""Where `fastmtp chat` gets its messages: an editor at a terminal, or the lines of a pipe.

At a terminal a paste is one message, whatever it holds, and nothing that was typed is left for the shell.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input, create_input
from prompt_toolkit.input.typeahead import store_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output, create_output
from prompt_toolkit.output.vt100 import Vt100_Output

try:
    import termios
except ImportError:  # Windows, whose console has no line that could be cut
    termios = None  # type: ignore[assignment]

PROMPT = "> "
log = logging.getLogger("fastmtp")


def history_path() -> Path:
    """Where messages are kept for the arrow keys, in the user's own data directory."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "fastmtp" / "chat-history"


class Lines:
    """Messages from a pipe or a file, one a line."""

    def ask(self) -> str | None:
        """The next message; None after the last one.

        Raises:
            ValueError: the input is no text.
        """
        try:
            return input(PROMPT)
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is no text: {error}") from error


class Editor:
    """Messages that are edited at a terminal; Alt-Enter begins another line."""

    def __init__(self, history: Path | None, source: Input | None = None, output: Output | None = None) -> None:
        self._input = source or create_input()
        self._output = output or _terminal()
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            history=InMemoryHistory() if history is None else _opened(history),
            key_bindings=_keys(),
            prompt_continuation=" " * len(PROMPT),
            input=self._input,
            output=self._output,
        )

    def ask(self) -> str | None:
        """The next message; None at Ctrl-C or Ctrl-D where nothing is typed."""
        try:
            return self._session.prompt()
        except (EOFError, KeyboardInterrupt):
            return None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """What is typed or pasted while nobody asks waits for the next `ask`, whole and unseen; none is left after.

        The system's own editing of lines would cut them, and would make many lines of a paste.
        """
        if termios is None:
            yield
            return
        terminal = self._input.fileno()
        before = termios.tcgetattr(terminal)
        mode = termios.tcgetattr(terminal)
        mode[0] &= ~(termios.ICRNL | termios.INLCR | termios.IGNCR)
        mode[3] &= ~(termios.ICANON | termios.ECHO)
        # Ctrl-C throws nothing away.
        mode[3] |= termios.NOFLSH
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        termios.tcsetattr(terminal, termios.TCSANOW, mode)
        try:
            self.mark_pastes()
            yield
        finally:
            self._output.disable_bracketed_paste()
            self._output.flush()
            termios.tcsetattr(terminal, termios.TCSAFLUSH, before)

    def mark_pastes(self) -> None:
        """Have the terminal put marks around a paste; an `ask` ends with it unmarked."""
        self._output.enable_bracketed_paste()
        self._output.flush()

    def collect(self) -> None:
        """Take in what was typed, for the next `ask`: the system holds little of it, and Ctrl-C waits behind."""
        store_typeahead(self._input, self._input.read_keys())


def at_terminal() -> bool:
    return sys.stdin.isatty()


def _terminal() -> Output:
    # Answers may go to a file.
    output = create_output(always_prefer_tty=True)
    if isinstance(output, Vt100_Output):
        # Its answers where the cursor is would come as if typed, and the line is drawn without them.
        output.enable_cpr = False
    return output


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @Condition
    def typed() -> bool:
        from prompt_toolkit.application import get_app

        return bool(get_app().current_buffer.text)

    @keys.add("c-c", filter=typed)
    def _(event: KeyPressEvent) -> None:
        # The arrow keys bring it back.
        event.current_buffer.append_to_history()
        event.current_buffer.reset()

    return keys


def _opened(path: Path) -> History:
    """A history in a file that nobody else can read; in memory alone where there can be none."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.close(descriptor)
        path.chmod(0o600)
    except OSError as error:
        log.warning("%s: no history is kept: %s", path, error.strerror or error)
        return InMemoryHistory()
    return _Kept(str(path))


class _Kept(FileHistory):
    def store_string(self, string: str) -> None:
        try:
            # Bytes that are no text arrive as surrogates.
            super().store_string(string.encode("utf-8", "replace").decode("utf-8"))
        except OSError as error:
            log.warning("%s: the message is not in the history: %s", self.filename, error.strerror or error)

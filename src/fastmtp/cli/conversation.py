"""What `fastmtp chat` remembers: the messages so far, and figures of the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from fastmtp.config import SamplingConfig
from fastmtp.models.templates import TemplateError

if TYPE_CHECKING:
    from fastmtp.api import Model
    from fastmtp.decode.generation import Result


class Conversation:
    """Messages in turn: the system's, if there is one, then the user's and the model's."""

    def __init__(
        self, model: Model, *, max_new_tokens: int = 512, sampling: SamplingConfig | None = None, system: str = ""
    ) -> None:
        """Raises ValueError if the model's chat template has no place for a system message that is given."""
        self._model, self._max_new_tokens, self._sampling = model, max_new_tokens, sampling
        self.system = ""
        self.turns: list[dict[str, str]] = []
        self._results: list[Result] = []
        # Of the answer before, if it came to its end.
        self.last: Result | None = None
        self.set_system(system)

    @property
    def messages(self) -> list[dict[str, str]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def set_system(self, text: str) -> None:
        """Put another system message before the conversation; an empty one takes it away.

        Raises:
            ValueError: the chat template refuses it, or leaves it out.
        """
        question = [{"role": "user", "content": "a question"}]
        if text:
            encode = self._model.target.encode_chat
            try:
                heard = encode([{"role": "system", "content": text}, *question]) != encode(question)
            except TemplateError as error:
                raise ValueError(f"the model's chat template takes no system message: {error}") from error
            if not heard:
                raise ValueError("the model's chat template leaves the system message out")
        self.system = text

    def new(self) -> None:
        """Forget all turns; the system message stays."""
        self.turns.clear()

    def answer(self, text: str, stops: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """The answer to a message, in pieces.

        What was said stays in the conversation, also of an answer that `stops` ended, asked after every piece. A
        message with no answer at all is taken back, so that the turns alternate.

        Raises:
            ValueError: the message cannot be sent; the conversation is as before.
        """
        message = {"role": "user", "content": text}
        try:
            generation = self._model.stream(
                [*self.messages, message], max_new_tokens=self._max_new_tokens, sampling=self._sampling
            )
        except TemplateError as error:
            raise ValueError(f"the model's chat template refuses the conversation: {error}") from error
        self.last, said = None, ""
        pieces = iter(generation)
        try:
            for piece in pieces:
                said += piece
                yield piece
                if stops():
                    return
            self.last = generation.result
            self._results.append(generation.result)
        finally:
            # Gives the sequence back between two rounds, where it is whole.
            pieces.close()  # type: ignore[attr-defined]
            if self.last is not None:
                said = self.last.text
            if said or self.last is not None:
                self.turns += [message, {"role": "assistant", "content": said}]

    def figures(self) -> str:
        """The answers that came to their end, and the room that is taken."""
        found, target = self._results, self._model.target
        tokens, seconds = sum(len(one.tokens) for one in found), sum(one.decode_seconds for one in found)
        used = len(target.encode_chat(self.messages, reply=False)) if self.messages else 0
        line = f"{len(found)} answer{'' if len(found) == 1 else 's'}, {tokens} tokens"
        if tokens > len(found):
            line += f", {(tokens - len(found)) / seconds:.1f} tokens/s"
            if any(one.plans for one in found):
                rounds = [settled for one in found for settled in one.rounds]
                line += f", tau {sum(rounds) / len(rounds):.2f}"
        return f"{line}; the conversation takes {used} of {target.context_limit} tokens"

"""The library as a user meets it: load a model, and let it answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.open import AUTO, GROWING, DraftOptions, open_backend
from fastmtp.engines.open import EngineName, EngineOptions, open_target

if TYPE_CHECKING:
    from fastmtp.decode.drafting.drafter import Drafter
    from fastmtp.decode.generation import Generation, Result
    from fastmtp.engines.protocol import Backend
    from fastmtp.models.info import TargetInfo

# A question, or a conversation: {"role": "user" or "assistant" or "system", "content": text} for each message.
Prompt = str | Sequence[dict[str, str]]


def load(
    target: str = "smollm2",
    *,
    head: Path | str | None = None,
    draft: str = AUTO,
    draft_vocabulary: str = GROWING,
    engine: EngineName | None = None,
    dtype: str | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> Model:
    """A target with its head in the engine that suits the machine.

    Args:
        target: `smollm2` (embedded), a Hugging Face directory, a `.gguf` file or a hub id.
        head: a head directory; None takes the one that ships with the target, if there is one.
        draft: `auto` (trees, as large as pays), `chain:K`, or `plain`.
        draft_vocabulary: `growing`, `listed`, `full`, or the name of one list.
        engine: `native` (CPU) or `torch`; None takes what is fastest here. `dtype`, `device` and `threads` are its.
    Raises:
        FileNotFoundError: no such target or head.
        ValueError: options that contradict each other, an unsupported architecture, or a head that does not fit.
    """
    loaded = open_target(target, EngineOptions(engine, dtype, device, threads))
    chosen = DraftOptions(None if head is None else Path(head), draft, draft_vocabulary)
    return Model(loaded, *open_backend(loaded, target, chosen))


class Model:
    """A loaded target that answers one prompt at a time; what two prompts begin with is computed once."""

    def __init__(self, target: TargetInfo, backend: Backend, drafter: Drafter | None) -> None:
        self.target = target
        self.backend = backend
        self._drafter = drafter

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 512,
        sampling: SamplingConfig | None = None,
        stop: Sequence[str] = (),
        raw: bool = False,
    ) -> Result:
        """The whole answer at once, with its statistics; arguments as for `stream`."""
        return self.stream(prompt, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, raw=raw).run()

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 512,
        sampling: SamplingConfig | None = None,
        stop: Sequence[str] = (),
        raw: bool = False,
    ) -> Generation:
        """An answer in pieces of text: iterate over it, then read its `result`.

        Args:
            prompt: a question, or messages; they are put into the model's chat template.
            sampling: None is greedy.
            stop: the answer ends before the first of these strings.
            raw: continue `prompt`, a text, as it is.
        Raises:
            ValueError: the prompt is empty or fills the context, a limit is below 1, or messages with `raw`.
        """
        from fastmtp.decode.generation import Generation

        if raw and not isinstance(prompt, str):
            raise ValueError("raw continues a text; messages need the chat template")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return Generation(
            self.backend,
            self.target,
            self.target.encode(prompt) if raw and isinstance(prompt, str) else self.target.encode_chat(messages),
            drafter=self._drafter,
            sampling=sampling or SamplingConfig(),
            max_new_tokens=max_new_tokens,
            stop=stop,
        )

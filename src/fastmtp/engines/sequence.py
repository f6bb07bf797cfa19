"""What sequences of all engines share: the text, and the head's catching up with the target.

Shapes: T tokens, H hidden, V vocabulary, D draft vocabulary with the sequence's own tokens. States are an engine's
own kind of array.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar, cast

from fastmtp.engines.protocol import Candidates, EngineSequence, Logits
from fastmtp.engines.tree import Tree
from fastmtp.models.info import TargetInfo
from fastmtp.vocabulary.draft import DraftVocabulary

States = TypeVar("States", bound=Any)
# Runners, where each one's tokens begin, the tokens, and their parents; the states of each.
ForwardMany = Callable[
    [Sequence[Any], Sequence[int], Sequence[Sequence[int]], Sequence[Sequence[int] | None]], list[States]
]


class Runner(Protocol[States]):
    """What an engine computes for one sequence, and its caches: the target's, and the head's own (the draft cache).

    Neither cache knows its length: the caller says where tokens begin, and overwrites what was there.
    """

    @property
    def no_states(self) -> States | None:
        """[0, H]; None if there is no head that would want states."""
        ...

    def forward(self, start: int, tokens: Sequence[int], parents: Sequence[int] | None) -> States:
        """The target's states [T, H] of tokens, or of a tree given by its rows' parents, from `start` on."""
        ...

    def commit(self, start: int, rows: Sequence[int]) -> None:
        """Make these rows of the last forward, which began at `start`, the tokens from there on."""
        ...

    def logits(self, states_TH: States) -> Logits:
        """[T, V]"""
        ...

    def argmax(self, states_TH: States) -> list[int]:
        """Of each row of logits; of equal ones the first."""
        ...

    def draft(self, start: int, states_TH: States, inputs: Sequence[int], steps: int) -> list[int]:
        """The head's likeliest tokens, one after the other, from the states and tokens at `start` on."""
        ...

    def start_tree(self, start: int, states_TH: States, inputs: Sequence[int], width: int) -> list[Candidates]:
        """The head over states and tokens at `start`; the last token is node 0 of a tree in the draft cache."""
        ...

    def extend_tree(self, parents: Sequence[int], tokens: Sequence[int], width: int) -> list[Candidates]:
        """The head over tokens that follow nodes of that tree; they become its next nodes."""
        ...

    def fit_rows(self, vocabulary: DraftVocabulary, changed: dict[int, int]) -> None:
        """Score the LM head's rows of the chosen lists; `changed` are own tokens to copy the rows of, by slot."""
        ...

    def join(self, states_TH: States, more_TH: States) -> States:
        """One after the other."""
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
    State t of it depends on token t + 1, so it may lag behind the target's: `_states_TH` are the target's states
    that the head has not consumed yet, the first of them at position `_drafted` of the text.
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
        self._states_TH = runner.no_states
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
            if other._states_TH is not None:
                self._states_TH = other._states_TH[: tokens - self._drafted]

    def pages(self) -> dict[int, int]:
        waiting = {} if self._states_TH is None else {id(self._states_TH): int(self._states_TH.nbytes)}
        return self._runner.pages() | waiting

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
            return self._runner.argmax(self._run(tree))

    def commit(self, path: Sequence[int]) -> None:
        with self._alone:
            assert self._verified is not None, "nothing was verified since the last commit"
            tree, states_TH = self._verified
            rows = [tree.rows[node] for node in path]
            if rows == list(range(len(rows))):
                states_TH = states_TH[: len(rows)]
            else:
                self._runner.commit(len(self._tokens), rows)
                states_TH = states_TH[rows]
            self._append(tree.tokens_of(path), states_TH)

    def draft(self, token: int, steps: int) -> list[int]:
        with self._alone:
            drafted = self._runner.draft(*self._waiting(token), steps)
            self._caught_up()
            return drafted

    def ask(self, tree: Tree, nodes: Sequence[int], width: int) -> list[Candidates]:
        with self._alone:
            if nodes[0] == 0:
                self._asked = {0: 0}
                found = self._runner.start_tree(*self._waiting(tree.nodes[0].token), width)
                self._caught_up()
                return found
            asked = [tree.nodes[node] for node in nodes]
            parents = [self._asked[node.parent] for node in asked]
            for node in nodes:
                self._asked[node] = len(self._asked)
            return self._runner.extend_tree(parents, [node.token for node in asked], width)

    def _run(self, tree: Tree) -> States:
        parents = None if tree.is_chain else tree.parents
        states_TH = self._runner.forward(len(self._tokens), tree.tokens, parents)
        self._verified = tree, states_TH
        return states_TH

    def _append(self, tokens: Sequence[int], states_TH: States) -> None:
        """Append tokens whose keys and values are in the cache already."""
        self._verified = None
        if self._states_TH is not None:
            waiting = len(self._states_TH) > 0
            self._states_TH = self._runner.join(self._states_TH, states_TH) if waiting else states_TH
        self._tokens.extend(tokens)

    def _waiting(self, token: int) -> tuple[int, States, list[int]]:
        """Where the head continues, the states that it takes from there on, and the tokens after them."""
        assert self._states_TH is not None, "this sequence has no head"
        inputs = [*self._tokens[self._drafted + 1 :], token]
        if self._vocabulary is not None:
            self._runner.fit_rows(self._vocabulary, self._vocabulary.see(inputs))
        return self._drafted, self._states_TH, inputs

    def _caught_up(self) -> None:
        """The head has consumed all states; its next forward overwrites the draft's."""
        self._drafted, self._states_TH = len(self._tokens), self._runner.no_states

    def _rewind(self, length: int) -> None:
        """Begin another text with the first `length` tokens; their draft states must not depend on later ones."""
        self.texts += 1
        self._verified = None
        del self._tokens[length:]
        self._drafted = min(length, self._drafted)
        if self._states_TH is not None:
            self._states_TH = self._states_TH[: length - self._drafted]


def forward_together(
    sequences: Sequence[EngineSequence], trees: Sequence[Tree], forward: ForwardMany[States]
) -> list[States]:
    """`verify` of several sequences of one engine in one forward; the states [T, H] of each tree.

    Args:
        forward: from the sequences' runners, and for each where its tokens begin, the tokens, and their parents.
    """
    with ExitStack() as stack:
        texts = [cast("TextSequence[States]", sequence) for sequence in sequences]
        for text in texts:
            stack.enter_context(text._alone)
        every = forward(
            [text._runner for text in texts],
            [len(text._tokens) for text in texts],
            [tree.tokens for tree in trees],
            [None if tree.is_chain else tree.parents for tree in trees],
        )
        for text, tree, states_TH in zip(texts, trees, every, strict=True):
            text._verified = tree, states_TH
        return every


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

"""The forwards of one sequence in the CUDA engine.

Shapes: T tokens, N nodes of a tree, H hidden, D draft vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastmtp.config import SamplingConfig
from fastmtp.engines.cuda.ahead import DEEPEST, Ahead, Steps
from fastmtp.engines.cuda.drafted import DraftTree, Foreseen
from fastmtp.engines.cuda.graphs import upload
from fastmtp.engines.cuda.kernels.scores import BLOCK
from fastmtp.engines.cuda.machine import Machine, Text
from fastmtp.engines.cuda.plain import Plain, PlainSteps
from fastmtp.engines.cuda.rounds import Chain, Rounds
from fastmtp.engines.cuda.scoring import GREEDY, guess
from fastmtp.engines.cuda.weights import CudaHead
from fastmtp.engines.protocol import Candidates, Logits
from fastmtp.engines.sequence import Question
from fastmtp.method.acceptance import follow
from fastmtp.models.torch_tensors import check_finite
from fastmtp.vocabulary.draft import DraftVocabulary


class CudaRunner:
    """`Runner` whose caches are pages of the engine's pool."""

    def __init__(
        self,
        machine: Machine,
        rounds: Callable[[int], Rounds],
        plain: PlainSteps,
        ahead: Ahead,
        head: CudaHead | None,
        vocabulary: DraftVocabulary | None,
    ) -> None:
        """
        Args:
            rounds: the engine's, by number of drafts.
        """
        target = machine.target
        self._machine, self._target, self._rounds, self._head = machine, target, rounds, head
        self._ahead = ahead
        self.room = machine.pool.room()
        weakref.finalize(self, machine.pool.give_back, self.room)
        self._plain = Plain(plain, self.room)
        # How often the caches were used: what was launched ahead of the last time may write to the same places.
        self._calls = 0
        self.has_head = head is not None
        # The tokens that draft steps score, those of the lists and then the own ones; -1 is none.
        self.ids_D: Tensor | None = None
        self._listed, self._own = np.zeros(0, np.int32), np.zeros(0, np.int32)
        # How often they changed.
        self._fitted = 0
        self._tree = DraftTree(0, target.embedding.new_empty(0, target.config.hidden_size), [], 0)
        self._foreseen: Foreseen | None = None
        # Of how many nodes in a row, each the likeliest, it was asked in this round and in the last one that asked;
        # and for how many candidates.
        self._levels, self._usual, self._width = 0, 1, 0
        # How the last tokens were drawn.
        self._sampling = GREEDY

    def forward(self, start: int, tokens: Sequence[int], parents: Sequence[int] | None) -> Tensor:
        return forward_many([self], [start], [tokens], [parents])[0]

    def commit(self, start: int, rows: Sequence[int]) -> None:
        with self._machine.held():
            self._calls += 1
            self._machine.pool.move(self.room, [start + row for row in rows], start)

    def logits(self, states_TH: Tensor) -> Logits:
        return self._machine.scoring.logits(states_TH)

    def forward_greedy(
        self, start: int, tokens: Sequence[int], parents: Sequence[int] | None
    ) -> tuple[Tensor, list[int]]:
        states_TH = self.forward(start, tokens, parents)
        return states_TH, self._machine.scoring.argmax(states_TH)

    def drawn(self, states_TH: Tensor, positions: Sequence[int], sampling: SamplingConfig) -> list[int | None]:
        return self._machine.scoring.drawn(states_TH, positions, [sampling] * len(positions))

    def verify(
        self,
        start: int,
        tokens: Sequence[int],
        parents: Sequence[int] | None,
        sampling: SamplingConfig,
        *,
        is_followed: bool,
    ) -> tuple[Tensor, list[int]]:
        """The target's states of at most 16 rows, and what the host is told of its token after each.

        If the head was asked in this round, it will be in the next: its drafts come with these.

        Args:
            is_followed: whether the head has consumed everything before these rows.
        """
        machine, text = self._machine, Text(self.room, start, tokens, parents)
        with machine.held():
            levels, self._sampling = self.end_round(), sampling
            if len(tokens) == 1 and not (levels and is_followed):
                states_1H, code = self._plain.verify(self._calls, start, tokens[0], sampling)
                return states_1H, [code]
            if not (levels and is_followed):
                (states_MH,) = machine.verify([text], [sampling])
                return states_MH, machine.verified(len(tokens))
            steps, fitted = self._steps(max(2, levels), self._width), self._fitted
            states_MH, codes, drafts = self._ahead.verify(text, steps)
            found = list(map(guess, codes))
            befores = range(-1, len(tokens) - 1) if parents is None else parents
            rows = {(before, token): row for row, (before, token) in enumerate(zip(befores, tokens, strict=True))}
            path, _ = follow(found.__getitem__, lambda row, token: rows.get((row, token)))
            accepted = [found[row] for row in path]
            self._foreseen = Foreseen(start, accepted, steps.width, fitted, drafts)
            return states_MH, codes

    def end_round(self) -> int:
        """A forward begins: what was foreseen is of no use after it. Returns how many nodes were asked for."""
        self._calls += 1
        levels, self._levels, self._foreseen = self._levels, 0, None
        self._usual = levels or self._usual
        return levels

    def ask(self, question: Question[Tensor]) -> list[Candidates]:
        return ask_many([self], [question])[0]

    def known(self, question: Question[Tensor]) -> list[Candidates] | None:
        """The answer, if it was drafted ahead."""
        if question.states_TH is None:
            if not self._tree.goes_on(question) or self._tree.asked == len(self._tree.candidates):
                return None
            self._tree.asked += 1
        else:
            seen, self._foreseen = self._foreseen, None
            key = question.start, list(question.tokens), question.width, self._fitted
            if seen is None or (seen.start, seen.tokens, seen.width, seen.fitted) != key:
                return None
            self._tree = DraftTree.chain(question.start + len(question.tokens) - 1, seen.drafts, question.width)
        return self._answer()

    def drafted(self, question: Question[Tensor]) -> list[Candidates] | None:
        """The answer of draft steps along the likeliest path; None if it asks for something else."""
        tokens, states_TH = question.tokens, question.states_TH
        if not question.width:
            return None
        if states_TH is not None:
            steps = self._steps(self._usual, question.width)
            found = self._ahead.draft(steps, self.room, question.start, tokens, states_TH)
            self._tree = DraftTree.chain(question.start + len(tokens) - 1, found, question.width)
        elif self._tree.goes_on(question):
            tree, steps = self._tree, self._steps(1, question.width)
            found = self._ahead.draft(steps, self.room, tree.root + tree.asked, tokens, tree.states_NH[-1:])
            tree.parents.append(tree.asked - 1)
            tree.candidates, tree.following = tree.candidates + found.candidates, tree.following + found.following
            tree.states_NH, tree.asked = torch.cat([tree.states_NH, found.states_LH]), tree.asked + 1
        else:
            return None
        return self._answer()

    def _answer(self) -> list[Candidates]:
        """After the node of the chain that was asked for last."""
        self._levels, self._width = self._tree.asked, self._tree.width
        return [self._tree.candidates[self._tree.asked - 1]]

    def asked_rows(self, question: Question[Tensor]) -> tuple[Text, Tensor]:
        """The rows that the head is to run over for a question, and the states that they follow."""
        if question.states_TH is not None:
            return Text(self.room, question.start, question.tokens), question.states_TH
        # What was drafted ahead and not asked for is in the way.
        parents = [*self._tree.parents[: self._tree.asked], *question.parents]
        given = self._tree.states_NH[list(question.parents)]
        return Text(self.room, self._tree.root, question.tokens, parents), given

    def take(self, text: Text, states_TH: Tensor) -> Tensor:
        """Take the head's states of these rows; returns those of the nodes, [N, H]."""
        if text.parents is None:
            self._tree = DraftTree(text.start + len(text.tokens) - 1, states_TH[-1:], [-1], 1)
            return states_TH[-1:]
        states_NH = torch.cat([self._tree.states_NH[: self._tree.asked], states_TH])
        self._tree = DraftTree(self._tree.root, states_NH, list(text.parents), len(text.parents))
        return states_TH

    @property
    def head(self) -> CudaHead:
        assert self._head is not None, "this sequence has no head"
        return self._head

    def _steps(self, levels: int, width: int) -> Steps:
        return Steps(self.head, self.ids_D, min(levels, DEEPEST), width, self._sampling)

    def chain(self, question: Question[Tensor], steps: int, sampling: SamplingConfig) -> Chain:
        """After the text's tokens of a question, draft tokens of the head, and verify them (rounds.py)."""
        assert self._head is not None and question.states_TH is not None, "this sequence has no head"
        with self._machine.held():
            self.end_round()
            start, tokens, states_TH = question.start, question.tokens, question.states_TH
            run = self._rounds(steps).run
            return run(self._head, self.room, start, tokens, states_TH, self.ids_D, sampling, self._calls)

    def fit_rows(self, vocabulary: DraftVocabulary, changed: dict[int, int]) -> None:
        listed, own = vocabulary.ids_D, vocabulary.own_ids
        if listed is self._listed and np.array_equal(own, self._own):
            return
        ids_D = np.full(scored(vocabulary), -1, np.int32)
        ids_D[: len(listed)], ids_D[len(listed) : len(listed) + len(own)] = listed, own
        first = 0 if listed is not self._listed or self.ids_D is None else len(listed)
        with self._machine.held():
            if not first:
                self.ids_D = torch.empty(len(ids_D), dtype=torch.int32, device=self._target.device)
            assert self.ids_D is not None
            upload(ids_D[first:], self.ids_D[first:])
        self._fitted += 1
        self._listed, self._own = listed, own.copy()

    def share(self, other: CudaRunner, tokens: int, drafted: int) -> None:
        with self._machine.held():
            self._machine.pool.copy(other.room, self.room, max(tokens, drafted))

    def pages(self) -> dict[int, int]:
        return self._machine.pool.addresses(self.room)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))


def scored(vocabulary: DraftVocabulary) -> int:
    """How many tokens draft steps score: whichever lists a text has, there is room for all of them."""
    return -(-(vocabulary.most_listed + vocabulary.own_tokens) // BLOCK) * BLOCK


def forward_many(
    runners: Sequence[CudaRunner],
    starts: Sequence[int],
    tokens: Sequence[Sequence[int]],
    parents: Sequence[Sequence[int] | None],
) -> list[Tensor]:
    """The states [T, H] of each runner's tokens, from its start on; they are a tree where it has parents."""
    return _run_many(runners, starts, tokens, parents, runners[0]._machine.forward)


def verify_many(
    samplings: Sequence[SamplingConfig],
    runners: Sequence[CudaRunner],
    starts: Sequence[int],
    tokens: Sequence[Sequence[int]],
    parents: Sequence[Sequence[int] | None],
) -> list[Tensor]:
    """As `forward_many`, of at most 16 tokens, with the target's token after each (`Machine.verified`).

    Args:
        samplings: how those of each runner are drawn.
    """
    verify = runners[0]._machine.verify
    return _run_many(runners, starts, tokens, parents, lambda texts: verify(texts, samplings))


def ask_many(runners: Sequence[CudaRunner], questions: Sequence[Question[Tensor]]) -> list[list[Candidates]]:
    """The candidates that each runner's question is about, from one forward of the head and one copy."""
    machine = runners[0]._machine
    with machine.held():
        for runner in runners:
            runner._calls += 1
        found = [runner.known(question) for runner, question in zip(runners, questions, strict=True)]
        left = [index for index, candidates in enumerate(found) if candidates is None]
        if len(left) == 1:
            found[left[0]] = runners[left[0]].drafted(questions[left[0]])
            left = [index for index in left if found[index] is None]
        if left:
            asked = [runners[index].asked_rows(questions[index]) for index in left]
            texts, given = [text for text, _ in asked], [states_TH for _, states_TH in asked]
            every = machine.head_forward(runners[left[0]].head, texts, given)
            nodes = [runners[i].take(*own) for i, own in zip(left, zip(texts, every, strict=True), strict=True)]
            for index, own in zip(left, _answers(machine, runners, questions, left, nodes), strict=True):
                found[index] = own
        return [candidates for candidates in found if candidates is not None]


def _answers(
    machine: Machine,
    runners: Sequence[CudaRunner],
    questions: Sequence[Question[Tensor]],
    asked: Sequence[int],
    nodes: Sequence[Tensor],
) -> list[list[Candidates]]:
    """After the nodes of each of these runners."""
    answers = [[Candidates([], []) for _ in states_NH] for states_NH in nodes]
    wanted = [place for place, index in enumerate(asked) if questions[index].width]
    if wanted:
        width = max(questions[asked[place]].width for place in wanted)
        states, ids = [nodes[place] for place in wanted], [runners[asked[place]].ids_D for place in wanted]
        for place, own in zip(wanted, machine.scoring.likeliest(states, ids, width), strict=True):
            most = questions[asked[place]].width
            answers[place] = [Candidates(one.tokens[:most], one.confidences[:most]) for one in own]
    return answers


def _run_many(
    runners: Sequence[CudaRunner],
    starts: Sequence[int],
    tokens: Sequence[Sequence[int]],
    parents: Sequence[Sequence[int] | None],
    run: Callable[[Sequence[Text]], list[Tensor]],
) -> list[Tensor]:
    machine = runners[0]._machine
    for runner in runners:
        runner.end_round()
    rooms = [runner.room for runner in runners]
    found = run(list(map(Text, rooms, starts, tokens, parents)))
    for start, states_TH in zip(starts, found, strict=True):
        if start == 0 and machine.target.dtype == torch.float16:
            check_finite(states_TH, f"{machine.target.source}: the states of a text")
    return found

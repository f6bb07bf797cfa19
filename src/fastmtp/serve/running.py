"""A request in a slot: its sequence, its drafter, and the tokens so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.drafter import Drafter, Load, Planning
from fastmtp.decode.drafting.open import Drafting
from fastmtp.decode.grammar import Grammar
from fastmtp.decode.sampler import Sampler
from fastmtp.decode.transcript import Transcript
from fastmtp.engines.protocol import EngineSequence, Value, Values
from fastmtp.engines.tree import Tree
from fastmtp.method.acceptance import follow
from fastmtp.serve.logprobs import logprobs
from fastmtp.serve.requests import Reason, Request, Source, Token, Usage


class Running:
    """Either its prompt is not computed yet, a part of it a step, or it decodes, a round a step.

    Attributes:
        cached: of the prompt, the tokens that its sequence began with.
        verified: how many tokens its last round verified.
    """

    def __init__(
        self,
        request: Request,
        grammar: Grammar | None,
        drafting: Drafting,
        sequence: EngineSequence,
        context: int,
    ) -> None:
        """
        Args:
            grammar: at its beginning.
            sequence: new, but for what it shares with others.
        """
        target = drafting.engine.target
        self.request, self.sequence = request, sequence
        self.verified = 1
        self._drafting = drafting
        self._drafter: Drafter | None = None
        self._grammar = grammar
        self._sampler = Sampler(request.sampling, request.prompt, self._grammar)
        ends = frozenset[int]() if request.ignore_end else target.end_ids
        special = self._grammar is not None and not request.ignore_end
        self._room = target.room(len(request.prompt), request.max_new_tokens, context)
        self._transcript = Transcript(target, self._room, request.stop, ends, special=special)
        self.cached = sequence.begin(request.prompt)
        self._token: int | None = None  # the next one, which is not in the sequence yet
        self._rounds = self._drafted = self._accepted = self._forced = 0
        self._first_token: float | None = None

    @property
    def prompt_left(self) -> int:
        """Tokens of the prompt that are not computed."""
        return len(self.request.prompt) - len(self.sequence.tokens) if self._token is None else 0

    @property
    def sampling(self) -> SamplingConfig | None:
        """How its tokens are chosen, if they are all it needs, or the argmax where that is allowed; else None."""
        is_enough = self._sampler.is_argmax or self._sampler.is_unaltered
        return self.request.sampling if is_enough and self.request.top_logprobs is None else None

    @property
    def reason(self) -> Reason | None:
        """Why the answer has ended; None: it goes on."""
        stopped = self._transcript.stopped
        return stopped if stopped in (None, "length") else "stop"

    def next_of_prompt(self, count: int) -> tuple[Tree, Sequence[int]]:
        """The next `count` tokens of the prompt, and the rows whose values are wanted: of its last token."""
        start = len(self.sequence.tokens)
        rows = [count - 1] if count == self.prompt_left else []
        return Tree.chain(self.request.prompt[start : start + count]), rows

    def propose(self, load: Load) -> Planning:
        """The tree to verify next."""
        assert self._token is not None
        tree, drafter, length = Tree(self._token), self._new_drafter(), len(self.sequence.tokens)
        if drafter is not None:
            room = self._room - len(self._transcript.tokens)
            tree = yield from drafter.propose(length, self._token, room, load)
        self.verified = len(tree.verified)
        return tree

    def take(self, tree: Tree, values: Values) -> list[Token]:
        """What verification of the tree gives: tokens of the answer, none while the prompt is not complete."""
        if self._token is None:
            first = [self._choice(values[0], tree.verified[-1])] if len(values) else []
            self.sequence.commit(tree.verified)
            return self._settle(tree, [], first, [values[0]]) if first else []
        path, token = follow(
            lambda node: self._choice(values[tree.rows[node]], node, partial(tree.tokens_after_root, node)),
            tree.child,
        )
        self.sequence.commit(path)
        if self._drafter is not None:
            self._drafter.learn(tree, path)
        chosen_from = [values[tree.rows[node]] for node in path]
        settled = self._settle(tree, path[1:], [*tree.tokens_of(path[1:]), token], chosen_from)
        self._rounds += 1
        self._drafted += len(tree.verified) - 1
        if len(tree.verified) > 1:
            self._accepted += sum(one.source != "target" for one in settled)
            self._forced += sum(one.source == "grammar" for one in settled)
        return settled

    def usage(self, submitted: float) -> Usage:
        """As it is now, for a request submitted then."""
        first = self._first_token
        return Usage(
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.cached,
            completion_tokens=len(self._transcript.tokens),
            rounds=self._rounds,
            drafted=self._drafted,
            accepted=self._accepted,
            first_token_seconds=None if first is None else first - submitted,
            seconds=time.monotonic() - submitted,
            forced=self._forced,
        )

    def _new_drafter(self) -> Drafter | None:
        """The request's one, made when it decodes first; None: it decodes plainly."""
        new_drafter = self._drafting.drafters(self._grammar is not None)
        if self._drafter is None and self.request.draft and new_drafter is not None:
            self._drafter = new_drafter(self.request.prompt, self.request.sampling, self._grammar)
        return self._drafter

    def _choice(self, value: Value, node: int, path: Callable[[], Sequence[int]] = tuple) -> int:
        """The token after a node, which the tokens of `path` lead to from the text."""
        if value is None:
            value = self.sequence.logits(node)
        if isinstance(value, np.ndarray):
            return self._sampler.draw(value, path())
        return self._sampler.draw_argmax(value, lambda: self.sequence.logits(node), path)

    def _settle(
        self, tree: Tree, nodes: Sequence[int], tokens: Sequence[int], values: Sequence[Value]
    ) -> list[Token]:
        """Take tokens, until the answer ends: accepted nodes, and the target's own after them.

        Args:
            values: those that each token was chosen from.
        """
        if self._first_token is None:
            self._first_token = time.monotonic()
        self._token = tokens[-1]
        self._sampler.extend(tokens)
        sources: list[Source] = [tree.nodes[node].source for node in nodes]
        settled: list[Token] = []
        for token, source, value in zip(tokens, [*sources, "target"], values, strict=True):
            self._transcript.extend([token])
            settled.append(self._described(token, self._transcript.take(), source, value))
            if self._transcript.stopped:
                break
        if self.reason is not None:
            settled[-1] = replace(settled[-1], text=settled[-1].text + self._transcript.finish())
        return settled

    def _described(self, token: int, text: str, source: Source, value: Value) -> Token:
        wanted = self.request.top_logprobs
        if wanted is None:
            return Token(token, text, source)
        assert isinstance(value, np.ndarray)
        return Token(token, text, source, *logprobs(value, token, wanted))

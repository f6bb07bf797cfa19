"""Answers that must fit a grammar: which tokens it allows to follow, and which it forces.

The library llguidance parses. A grammar is a text as its LLMatcher takes it: Lark, or its own JSON form.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from fastmtp.engines.sequence import common_prefix
from fastmtp.extras import require
from fastmtp.models.info import TargetInfo

if TYPE_CHECKING:
    from llguidance import LLMatcher

# How many compiled grammars a target keeps.
KEPT = 32
# The least common multiple of a schema's `multipleOf`, without decimal point and last zeros. The library has a
# state for each remainder, which none of its limits bounds: half a second for this, hours for a billion.
MOST_REMAINDERS = 100_000
# As models write JSON by themselves. Without a choice of spaces, more of its tokens are forced.
SEPARATORS: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def json_schema_grammar(schema: str | Mapping[str, Any]) -> str:
    """The grammar of JSON that a schema allows, in one line, with a space after each comma and colon.

    Raises:
        MissingExtraError: llguidance is not installed.
        ValueError: the text is no JSON, or the schema is not supported.
    """
    require("grammar")
    from llguidance import LLMatcher

    text = schema if isinstance(schema, str) else json.dumps(schema)
    grammar = LLMatcher.grammar_from_json_schema(text, defaults=SEPARATORS)
    # Of all together, since those that hold for one number are multiplied.
    if math.lcm(*_divisors(json.loads(text, parse_float=Decimal))) > MOST_REMAINDERS:
        raise ValueError(f"multipleOf: too large a divisor, or too many; at most {MOST_REMAINDERS:,} together")
    wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if wrong:
        raise ValueError(_one_line(messages[0]))
    return grammar


def _divisors(schema: Any) -> Iterator[int]:
    """The digits of every `multipleOf`, without decimal point and last zeros."""
    if isinstance(schema, list):
        for one in schema:
            yield from _divisors(one)
    elif isinstance(schema, dict):
        divisor = schema.get("multipleOf")
        if isinstance(divisor, int | Decimal) and Decimal(divisor).is_finite() and divisor > 0:
            yield int("".join(map(str, Decimal(divisor).as_tuple().digits)).rstrip("0"))
        for one in schema.values():
            yield from _divisors(one)


def check_grammar(target: TargetInfo, text: str) -> None:
    """Compile a grammar for a target, which keeps it for later; a large one can take a second.

    Raises:
        MissingExtraError: llguidance is not installed.
        ValueError: the grammar is wrong or too large, or the target has no end token or an unsuitable tokenizer.
    """
    _grammars(target).compiled(text)


def open_grammar(target: TargetInfo, text: str) -> Grammar:
    """The beginning of a grammar; raises as `check_grammar`."""
    grammars = _grammars(target)
    return Grammar(grammars.compiled(text), target.end_ids, target.vocabulary_size)


@dataclass(frozen=True, slots=True)
class Tokens:
    """A set of tokens: bit `token % 8` of byte `token // 8` is set for those in it."""

    packed: bytes

    @classmethod
    def of(cls, mask: bytes, vocabulary_size: int) -> Tokens:
        """Those of a mask that are in the vocabulary."""
        size, bits = divmod(vocabulary_size, 8)
        if not bits:
            return cls(mask[:size])
        return cls(mask[:size] + bytes([mask[size] & (1 << bits) - 1]))

    def __contains__(self, token: int) -> bool:
        return bool(self.packed[token >> 3] >> (token & 7) & 1)

    def __bool__(self) -> bool:
        return self.packed != bytes(len(self.packed))

    @property
    def count(self) -> int:
        return int.from_bytes(self.packed, "little").bit_count()

    @property
    def only(self) -> int | None:
        """The token, if there is just one."""
        packed = np.frombuffer(self.packed, np.uint8)
        place = int(packed.argmax())
        byte = self.packed[place]
        if byte.bit_count() != 1 or np.count_nonzero(packed) != 1:
            return None
        return 8 * place + byte.bit_length() - 1


class Grammar:
    """How far a text has come in a grammar. An end token ends it, wherever the grammar allows one."""

    def __init__(self, compiled: LLMatcher, end_ids: Collection[int], vocabulary_size: int) -> None:
        self._compiled, self._matcher = compiled, compiled.deep_copy()
        self._end_ids, self.vocabulary_size = end_ids, vocabulary_size
        ends = sum(1 << token for token in end_ids)
        self._ends = Tokens(ends.to_bytes((vocabulary_size + 7) // 8, "little"))
        self._text: list[int] = []
        # What the matcher has taken after the text.
        self._path: list[int] = []
        self._known: dict[tuple[int, ...], Tokens] = {}

    def accept(self, tokens: Sequence[int]) -> None:
        """Take the next tokens of the text, each of which was allowed."""
        if not self.is_over(tokens):
            self._go(tokens)
        self._text += tokens
        self._path.clear()
        self._known.clear()

    def allowed(self, path: Sequence[int] = ()) -> Tokens:
        """The tokens that may follow the text and then `path`: end tokens alone where nothing else can.

        Args:
            path: each of its tokens was allowed.
        Raises:
            ValueError: the grammar is too complex to be followed.
        """
        key = tuple(path)
        if key not in self._known:
            self._known[key] = self._ends if self.is_over(path) else self._computed(path)
        return self._known[key]

    def forced(self, path: Sequence[int], limit: int) -> list[int]:
        """Up to `limit` tokens that follow the text and `path`, each the only one allowed."""
        forced: list[int] = []
        while len(forced) < limit and not self.is_over(reached := [*path, *forced]):
            token = self.allowed(reached).only
            if token is None:
                break
            forced.append(token)
        return forced

    def masked(self, logits_V: NDArray[np.float32], path: Sequence[int] = ()) -> NDArray[np.float32]:
        """The logits [V] after the text and `path`, minus infinity for all tokens that may not follow."""
        packed = np.frombuffer(self.allowed(path).packed, np.uint8)
        bits_V = np.unpackbits(packed, count=len(logits_V), bitorder="little")
        return np.where(bits_V.view(np.bool_), logits_V, np.float32(-np.inf))

    def is_over(self, path: Sequence[int] = ()) -> bool:
        """Whether the text and then `path` have come to an end token."""
        last = path or self._text[-1:]
        return any(token in self._end_ids for token in last)

    def _computed(self, path: Sequence[int]) -> Tokens:
        self._go(path)
        # Tokens beyond the vocabulary are special ones that the model has no embedding for.
        found = Tokens.of(self._matcher.compute_bitmask(), self.vocabulary_size)
        if self._matcher.is_error():
            message = _one_line(self._matcher.get_error())
            # It stays in error, so the text begins again with a fresh one.
            self._matcher = self._compiled.deep_copy()
            self._matcher.try_consume_tokens(self._text)
            self._path.clear()
            if not message.startswith("NoExtension"):
                raise ValueError(f"the grammar cannot be followed: {message}")
        return found or self._ends

    def _go(self, path: Sequence[int]) -> None:
        """Move the matcher to the end of `path`."""
        shared = common_prefix(self._path, path)
        self._matcher.rollback(len(self._path) - shared)
        taken = self._matcher.try_consume_tokens(list(path[shared:]))
        assert taken == len(path) - shared, "a token that the grammar does not allow"
        self._path = list(path)


class _Grammars:
    """A target's tokens as llguidance takes them, and the grammars used last."""

    def __init__(self, target: TargetInfo) -> None:
        require("grammar")
        from llguidance import LLMatcher, LLParserLimits, LLTokenizer

        if not target.end_ids:
            raise ValueError(f"{target.source}: has no end token, which an answer under a grammar needs")
        size = max(target.vocabulary_size, 1 + max(target.tokenizer.get_vocab().values()))
        try:
            tokenizer = LLTokenizer(
                target.tokenizer.backend_tokenizer.to_str(), n_vocab=size, eos_token=sorted(target.end_ids)
            )
        except ValueError as error:
            raise ValueError(f"{target.source}: grammars do not work with its tokenizer: {error}") from error
        # Otherwise errors hold what the answer says.
        limits = LLParserLimits(verbose_errors=False)

        def compiled(text: str) -> LLMatcher:
            matcher = LLMatcher(tokenizer, text, log_level=0, limits=limits)
            if matcher.is_error():
                raise ValueError(f"the grammar is wrong: {_one_line(matcher.get_error())}")
            return matcher

        self.compiled = lru_cache(KEPT)(compiled)


_KNOWN: WeakKeyDictionary[TargetInfo, _Grammars] = WeakKeyDictionary()
_LOCK = Lock()


def _grammars(target: TargetInfo) -> _Grammars:
    with _LOCK:
        if target not in _KNOWN:
            _KNOWN[target] = _Grammars(target)
        return _KNOWN[target]


def _one_line(message: str) -> str:
    return " ".join(message.split())

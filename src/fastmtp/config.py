"""Every setting of the long-running commands, with its one default and its meaning.

A value comes from the default here, then from a TOML file, then from a command-line flag; the last one wins.
"""

from __future__ import annotations

import dataclasses
import math
import random
import tomllib
import typing
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from fastmtp.errors import reason

# Sequences that are decoded together where no GPU's memory limits them.
BATCH_SLOTS = 96

_T = TypeVar("_T")

# Draft steps; acceptance falls with each, and nobody uses more than a few.
MOST_STEPS = 64
# Tokens and their ids are 32-bit integers.
_MOST = 2**31 - 1
# Sequences and requests under way, each with memory of its own.
MOST_TOGETHER = 4096
_MOST_SECONDS = 10**6


class _SettingError(ValueError):
    """A value that a setting cannot have."""

    def __init__(self, name: str, wrong: str) -> None:
        super().__init__(f"{name} {wrong}")
        self.name, self.wrong = name, wrong


def setting(default: _T, meaning: str, choices: tuple[str, ...] = (), *, flag: bool = True) -> _T:
    """A dataclass field that carries its one-line meaning, its choices if there are only some, and whether the
    commands have a flag for it."""
    described: _T = field(default=default, metadata={"meaning": meaning, "choices": choices, "flag": flag})
    return described


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a token is drawn from the logits. Temperature 0 is greedy.

    Penalties and bias are defined in decode/penalties.py.
    """

    temperature: float = setting(0.0, "0 is greedy; higher is more varied")
    top_k: int = setting(0, "keep the k likeliest tokens; 0 keeps all")
    top_p: float = setting(1.0, "keep the likeliest tokens that together reach this probability")
    seed: int = setting(0, "seed of every random draw")
    min_p: float = setting(0.0, "keep tokens this many times as likely as the likeliest", flag=False)
    repetition_penalty: float = setting(
        1.0, "divides positive logits of tokens of prompt and answer, multiplies negative ones", flag=False
    )
    frequency_penalty: float = setting(
        0.0, "taken from the logits of the answer's tokens for each time that they came", flag=False
    )
    presence_penalty: float = setting(0.0, "taken from the logits of the answer's tokens once", flag=False)
    logit_bias: tuple[tuple[int, float], ...] = setting(
        (), "pairs of a token id and what is added to its logit", flag=False
    )

    def __post_init__(self) -> None:
        # Hashable, also when it was read from JSON.
        object.__setattr__(self, "logit_bias", tuple((token, bias) for token, bias in self.logit_bias))
        drawn = 1e-4 <= self.temperature <= 1000
        _check(self.temperature == 0 or drawn, "temperature", self.temperature, "0 (greedy), or 0.0001 to 1000")
        _check(0 <= self.top_k <= _MOST, "top_k", self.top_k, f"0 (all tokens), or up to {_MOST}")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _check(0 <= self.seed < 2**64, "seed", self.seed, "from 0 to 2^64 - 1")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 (all tokens) to 1")
        divides = 0.01 <= self.repetition_penalty <= 100
        _check(divides, "repetition_penalty", self.repetition_penalty, "from 0.01 to 100 (1: none)")
        for name in ("frequency_penalty", "presence_penalty"):
            _check(-100 <= getattr(self, name) <= 100, name, getattr(self, name), "from -100 to 100 (0: none)")
        for token, bias in self.logit_bias:
            _check(
                0 <= token <= _MOST and -100 <= bias <= 100,
                "logit_bias",
                {token: bias},
                "of token ids, from -100 to 100",
            )

    def seeded(self, seed: int) -> SamplingConfig:
        """The same with another seed from 0 to 2^64 - 1; nothing else is checked again."""
        own = object.__new__(SamplingConfig)
        vars(own).update(vars(self), seed=seed)
        return own

    @property
    def adjusts(self) -> bool:
        """Whether the logits are changed before a token is drawn: by a penalty or a bias."""
        penalised = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)
        return penalised or bool(self.logit_bias)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Self-distillation: which answers the target gives, and how they are stored."""

    count: int = setting(1000, "exchanges to make when the model writes its own prompts")
    minutes: float = setting(0.0, "begin no exchange that is likely to end after so many minutes; 0 is no limit")
    mix: str = setting("", "kinds of the model's own prompts and weights: code=3,chinese=1; empty is a default mix")
    max_new_tokens: int = setting(512, "an answer that is longer is marked as truncated")
    max_prompt_tokens: int = setting(320, "longest prompt that the model may write for itself")
    greedy_share: float = setting(0.0, "share of the answers that are greedy; the others are sampled")
    temperature: float = setting(0.6, "temperature of the answers; 0 is greedy")
    top_k: int = setting(20, "top-k of the answers; 0 keeps all tokens")
    top_p: float = setting(0.95, "top-p of the answers")
    prompt_temperature: float = setting(1.0, "temperature of the prompts that the model writes")
    prompt_top_k: int = setting(100, "top-k of the prompts that the model writes")
    prompt_top_p: float = setting(0.95, "top-p of the prompts that the model writes")
    seed: int = setting(0, "seed; exchange number i draws from (seed, i)")
    slots: int = setting(
        0, "sequences decoded together; 0: on a GPU as many as its free memory has room for, elsewhere 96"
    )
    shard_rows: int = setting(256, "exchanges in one shard; at most this many are lost by a kill")
    concurrency: int = setting(64, "requests under way at once, over all endpoints")
    timeout: float = setting(600.0, "seconds to wait for an endpoint's reply")
    retries: int = setting(5, "tries after a failed one, each after twice the wait, before an endpoint is given up")

    def __post_init__(self) -> None:
        for name in ("count", "max_new_tokens", "max_prompt_tokens", "shard_rows"):
            _check_count(self, name)
        _check_count(self, "concurrency", most=MOST_TOGETHER)
        allowed = f"0 (by the machine), or up to {MOST_TOGETHER}"
        _check(0 <= self.slots <= MOST_TOGETHER, "slots", self.slots, allowed)
        _check(0 <= self.minutes <= _MOST, "minutes", self.minutes, f"0 (no limit), or up to {_MOST}")
        _check(0 <= self.greedy_share <= 1, "greedy_share", self.greedy_share, "from 0 to 1")
        _check(0 < self.timeout <= _MOST_SECONDS, "timeout", self.timeout, f"above 0 and at most {_MOST_SECONDS}")
        _check(0 <= self.retries <= 100, "retries", self.retries, "from 0 to 100")
        self.mix_weights()
        self.answer_sampling(0)
        try:
            self.prompt_sampling()
        except _SettingError as error:
            raise _SettingError(f"prompt_{error.name}", error.wrong) from error

    def mix_weights(self) -> dict[str, float]:
        """The mix as a table; empty for the default mix."""
        pairs = [part.partition("=") for part in self.mix.split(",") if part.strip()]
        try:
            weights = {kind.strip(): float(weight) for kind, _, weight in pairs}
        except ValueError:
            weights = {"": -1.0}
        right = "like code=3,mathematics=2, with weights above 0"
        _check(all(0 < weight < math.inf for weight in weights.values()), "mix", self.mix, right)
        return weights

    def answer_sampling(self, index: int) -> SamplingConfig:
        """How exchange number `index` is answered: greedily for a share of them, drawn from (seed, index)."""
        if self.greedy_share and random.Random(f"{self.seed}/{index}/greedy").random() < self.greedy_share:
            return SamplingConfig(seed=self.seed)
        return _sampling(self.temperature, self.top_k, self.top_p, self.seed)

    def prompt_sampling(self) -> SamplingConfig:
        return _sampling(self.prompt_temperature, self.prompt_top_k, self.prompt_top_p, self.seed)


@lru_cache
def _sampling(temperature: float, top_k: int, top_p: float, seed: int) -> SamplingConfig:
    """Made and checked once, not for each request."""
    return SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """Which exchanges are left out of a cleaned data set; unfinished ones always are."""

    min_answer_tokens: int = setting(4, "shorter answers are left out; the end token counts")
    max_answer_tokens: int = setting(4096, "longer answers are left out")
    repeat_tokens: int = setting(8, "length of the token sequences whose repetition makes a loop")
    max_repeated: float = setting(0.5, "answers with a larger share of repeated sequences are left out as loops")
    max_similarity: float = setting(
        0.8, "exchanges more alike than this (Jaccard, by MinHash) to an earlier one are left out; 1 keeps all"
    )

    def __post_init__(self) -> None:
        for name in ("min_answer_tokens", "max_answer_tokens", "repeat_tokens"):
            _check_count(self, name)
        least = f"min_answer_tokens ({self.min_answer_tokens}) or more"
        _check(self.max_answer_tokens >= self.min_answer_tokens, "max_answer_tokens", self.max_answer_tokens, least)
        _check(0 <= self.max_repeated <= 1, "max_repeated", self.max_repeated, "from 0 to 1")
        _check(0 < self.max_similarity <= 1, "max_similarity", self.max_similarity, "above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class VocabularyConfig:
    """Which tokens a draft vocabulary's lists hold."""

    size: int | Literal["auto"] = setting(
        8192, "tokens in each list; auto: the size whose predicted speed is highest on this engine"
    )
    coverage: float = setting(
        0.0, "choose each list's size by the share of text kept aside that it covers, as 0.995"
    )

    def __post_init__(self) -> None:
        _check(self.size == "auto" or 1 <= self.size <= _MOST, "size", self.size, f"auto, or from 1 to {_MOST}")
        _check(0 <= self.coverage < 1, "coverage", self.coverage, "above 0 (0: by size) and below 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training of the head (FastMTP, arXiv 2509.18362, section 3)."""

    draft_steps: int = setting(3, "K: recursive draft steps trained together")
    beta: float = setting(0.6, "decay of the step weights: alpha_k is proportional to beta^(k-1)")
    objective: str = setting(
        "kl",
        "kl, tv, lk (their hybrid): match the target's distribution; cross_entropy: the answer's tokens",
        ("kl", "tv", "lk", "cross_entropy"),
    )
    pattern: str = setting(
        "inference",
        "what step k attends to: inference, as when decoding; per_step: keys of step k only, as FastMTP's trainer",
        ("inference", "per_step"),
    )
    draft_vocabulary: int = setting(8192, "tokens the draft step scores, counted on the data; 0 is all")
    optimizer: str = setting("muon", "muon: orthogonalised updates for matrices; adamw", ("muon", "adamw"))
    learning_rate: float = setting(1e-2, "peak learning rate; 3e-4 suits adamw")
    weight_decay: float = setting(0.0, "decoupled weight decay of the matrices")
    warmup: float = setting(0.05, "share of the steps with rising learning rate; cosine afterwards")
    clip: float = setting(1.0, "largest norm of the gradient")
    epochs: float = setting(2.0, "passes over the data; 0.5 is half of it")
    batch_tokens: int | Literal["auto"] = setting(
        "auto", "tokens in one optimiser step; auto: 2048 on a CPU, on a GPU what its memory holds, at most 16384"
    )
    max_length: int = setting(768, "longer exchanges are cut here, and at the end of the context")
    held_out: int = setting(64, "exchanges kept aside to measure acceptance on, at most a tenth of all")
    evaluate_every: int = setting(200, "steps between two measurements on the held-out exchanges")
    checkpoint_every: int = setting(100, "steps between two checkpoints")
    compile: bool = setting(False, "compile the head with torch.compile; worth its minute in long runs")
    seed: int = setting(0, "seed of the order of the data")

    def __post_init__(self) -> None:
        _check_count(self, "draft_steps", most=MOST_STEPS)
        for name in ("max_length", "held_out", "evaluate_every", "checkpoint_every"):
            _check_count(self, name)
        tokens = self.batch_tokens
        _check(tokens == "auto" or 1 <= tokens <= _MOST, "batch_tokens", tokens, f"auto, or from 1 to {_MOST}")
        for name in ("learning_rate", "epochs", "clip"):
            _check(0 < getattr(self, name) <= 1e6, name, getattr(self, name), "above 0 and at most 1000000")
        _check(0 <= self.weight_decay <= 1e6, "weight_decay", self.weight_decay, "from 0 to 1000000")
        _check(0 <= self.seed < 2**64, "seed", self.seed, "from 0 to 2^64 - 1")
        _check(0 < self.beta <= 1, "beta", self.beta, "above 0 and at most 1")
        _check(0 <= self.warmup < 1, "warmup", self.warmup, "0 or more and below 1")
        sized = 0 <= self.draft_vocabulary <= _MOST
        _check(sized, "draft_vocabulary", self.draft_vocabulary, f"0 (all), or up to {_MOST}")
        _check(self.max_length > self.draft_steps + 1, "max_length", self.max_length, "above draft_steps + 1")
        for name in ("objective", "pattern", "optimizer"):
            choices = choices_of(type(self), name)
            _check(getattr(self, name) in choices, name, getattr(self, name), " or ".join(choices))


Config = TypeVar("Config", DistillConfig, CleanConfig, VocabularyConfig, TrainConfig, SamplingConfig)


def kind_of(hint: Any) -> tuple[type[Any], tuple[str, ...]]:
    """The type of a setting's values, and the words that may stand in place of one."""
    parts = typing.get_args(hint)
    return (parts[0], typing.get_args(parts[1])) if parts else (hint, ())


def choices_of(kind: type[Any], name: str) -> tuple[str, ...]:
    """The allowed values of a setting; empty when any value of its type is allowed."""
    metadata = {item.name: item.metadata for item in dataclasses.fields(kind)}[name]
    return cast("tuple[str, ...]", metadata["choices"])


def load_config(kind: type[Config], path: Path | None, overrides: dict[str, Any]) -> Config:
    """Settings from the defaults, a TOML file and overrides, in this order.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is not TOML, or a key or a value does not fit; the message names it.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values |= _read_toml(kind, path)
    given = {key: value for key, value in overrides.items() if value is not None}
    try:
        return kind(**(values | given))
    except _SettingError as error:
        if error.name in given:
            raise ValueError(f"--{error.name.replace('_', '-')} {error.wrong}") from error
        raise ValueError(f"{path}: {error}") from error


def _read_toml(kind: type[Any], path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid TOML: {reason(error)}") from error
    hints = typing.get_type_hints(kind)
    known = {item.name for item in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r}; known keys: {', '.join(sorted(known))}")
        expected, words = kind_of(hints[key])
        if expected is float and type(value) is int:
            values[key] = float(value)
        elif type(value) is not expected and value not in words:
            right = " or ".join([f"of type {expected.__name__}", *words])
            raise ValueError(f"{path}: {key} must be {right}, not {value!r}")
    return values


def _check_count(config: object, name: str, most: int = _MOST) -> None:
    value = getattr(config, name)
    _check(1 <= value <= most, name, value, f"from 1 to {most}")


def _check(holds: bool, name: str, value: object, right: str) -> None:
    if not holds:
        raise _SettingError(name, f"is {value!r}; it must be {right}")

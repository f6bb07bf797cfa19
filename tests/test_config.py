"""Settings: one default each, strict files, and errors that name the key."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from fastmtp.config import CleanConfig, DistillConfig, SamplingConfig, TrainConfig, VocabularyConfig, load_config


def test_later_sources_win(tmp_path: Path) -> None:
    """Default, then file, then flag; a flag that was not given is None and changes nothing."""
    path = tmp_path / "train.toml"
    path.write_text("beta = 0.8\nepochs = 2\n")
    config = load_config(TrainConfig, path, {"epochs": 3.0, "clip": None})
    assert (config.beta, config.epochs, config.clip) == (0.8, 3.0, TrainConfig().clip)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("betta = 0.5", "unknown key 'betta'; known keys: "),
        ("draft_steps = 'three'", "draft_steps must be of type int, not 'three'"),
        ("draft_steps = 2.5", "draft_steps must be of type int"),
        ("beta =", "not valid TOML"),
        ("beta = 2.0", r"beta is 2.0; it must be above 0 and at most 1"),
        ("objective = 'mse'", "objective is 'mse'; it must be kl or tv or lk or cross_entropy"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "train.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(TrainConfig, path, {})


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such configuration file"):
        load_config(TrainConfig, tmp_path / "none.toml", {})


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (SamplingConfig, {"temperature": -1.0}),
        (SamplingConfig, {"temperature": 1e-39}),
        (SamplingConfig, {"temperature": math.nan}),
        (SamplingConfig, {"temperature": math.inf}),
        (SamplingConfig, {"seed": 2**64}),
        (SamplingConfig, {"seed": -1}),
        (SamplingConfig, {"top_p": 0.0}),
        (SamplingConfig, {"top_k": -1}),
        (SamplingConfig, {"top_k": 2**40}),
        (SamplingConfig, {"temperature": 1e20}),
        (SamplingConfig, {"top_p": math.nan}),
        (SamplingConfig, {"min_p": math.nan}),
        (SamplingConfig, {"repetition_penalty": math.nan}),
        (SamplingConfig, {"presence_penalty": math.inf}),
        (SamplingConfig, {"logit_bias": ((2**40, 1.0),)}),
        (SamplingConfig, {"logit_bias": ((1, math.nan),)}),
        (DistillConfig, {"slots": 10**9}),
        (DistillConfig, {"concurrency": 10**9}),
        (DistillConfig, {"count": 2**40}),
        (DistillConfig, {"minutes": math.inf}),
        (DistillConfig, {"timeout": math.inf}),
        (DistillConfig, {"prompt_temperature": math.nan}),
        (DistillConfig, {"seed": 2**64}),
        (DistillConfig, {"slots": -1}),
        (DistillConfig, {"top_p": 1.5}),
        (DistillConfig, {"mix": "code"}),
        (DistillConfig, {"greedy_share": 1.5}),
        (DistillConfig, {"timeout": 0.0}),
        (DistillConfig, {"retries": -1}),
        (CleanConfig, {"max_answer_tokens": 2}),
        (CleanConfig, {"max_similarity": 0.0}),
        (CleanConfig, {"max_repeated": 2.0}),
        (TrainConfig, {"learning_rate": 0.0}),
        (TrainConfig, {"max_length": 3}),
        (TrainConfig, {"learning_rate": math.inf}),
        (TrainConfig, {"epochs": math.inf}),
        (TrainConfig, {"clip": math.nan}),
        (TrainConfig, {"weight_decay": math.nan}),
        (TrainConfig, {"weight_decay": -1.0}),
        (TrainConfig, {"draft_steps": 1000}),
        (TrainConfig, {"batch_tokens": 2**40}),
        (TrainConfig, {"seed": -1}),
    ],
)
def test_values_out_of_range_name_their_setting(kind: type[Any], change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=f"^{name} is "):
        kind(**change)


@pytest.mark.parametrize("kind", [SamplingConfig, DistillConfig, CleanConfig, TrainConfig])
def test_every_setting_has_a_meaning(kind: type[Any]) -> None:
    assert all(item.metadata["meaning"] for item in dataclasses.fields(kind))


def test_a_word_in_place_of_a_number(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    for text, size in {"size = 'auto'": "auto", "size = 9": 9}.items():
        path.write_text(text)
        assert load_config(VocabularyConfig, path, {}).size == size
    path.write_text("size = 'many'")
    with pytest.raises(ValueError, match="size must be of type int or auto, not 'many'"):
        load_config(VocabularyConfig, path, {})


def test_another_seed_changes_nothing_else() -> None:
    """Neither the settings that it is of nor, with the same seed, what they are equal to."""
    own = SamplingConfig(temperature=0.7, top_k=5, top_p=0.9, seed=1, logit_bias=((3, 1.0),))
    assert own.seeded(2) == dataclasses.replace(own, seed=2) != own == own.seeded(2).seeded(1)
    assert hash(own.seeded(1)) == hash(own)

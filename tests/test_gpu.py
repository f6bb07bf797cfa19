"""The same invariants on a CUDA device, in float32, where rounding leaves the choices of a tiny model alone."""

from __future__ import annotations

from copy import deepcopy
from itertools import islice
from pathlib import Path

import pytest

from fastmtp.config import DistillConfig, SamplingConfig, TrainConfig
from fastmtp.decode.drafting.drafter import chains
from fastmtp.decode.generation import Generation
from fastmtp.decode.plain import plain
from fastmtp.distill.answers import distill
from fastmtp.engines.torch.engine import TorchEngine
from fastmtp.engines.torch.target import Target
from fastmtp.method.head import MTPHead
from fastmtp.train.trainer import Trainer
from fastmtp.vocabulary.lists import VocabularyLists
from tests.conftest import FAMILIES, random_ids, tiny_target
from tests.engines import Engine
from tests.train.test_trainer import CONFIG, exchanges, losses

pytestmark = pytest.mark.gpu


def on_gpu(family: str) -> Target:
    source = tiny_target(family)
    return Target(deepcopy(source.model).cuda(), source.tokenizer, source.source)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_speculative_is_plain_is_the_cpus(family: str) -> None:
    target, prompt = on_gpu(family), random_ids(30)
    sequence = Engine().sequence(target, MTPHead(target.model), VocabularyLists.of(range(100)))
    answers = [
        Generation(
            sequence,
            target,
            prompt,
            new_drafter=new_drafter,
            sampling=SamplingConfig(),
            max_new_tokens=40,
        )
        for new_drafter in (None, chains(3))
    ]
    tokens = [answer.run().tokens for answer in answers]
    cpu = plain(Engine().sequence(tiny_target(family)), prompt, SamplingConfig())
    assert tokens[0] == tokens[1] == list(islice(cpu, len(tokens[0])))


def test_distilling_and_training_run(tmp_path: Path) -> None:
    target = on_gpu("llama")
    config = DistillConfig(count=4, max_new_tokens=16, max_prompt_tokens=300, slots=3)
    assert distill(TorchEngine(target), config, tmp_path / "data", None).exchanges == 4
    history = losses(
        Trainer(target, exchanges(tiny_target("llama")), [257, *range(200)], TrainConfig(**vars(CONFIG)), tmp_path)
    )
    assert history[-1][0] < history[0][0]

"""A model with an MTP layer, from the commands' side: its own head, a better one, and back into the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from fastmtp.cli.main import commands
from fastmtp.train.checkpoint import load_checkpoint
from tests.checkpoints import make_checkpoint

TRAIN = ["--held-out", "2", "--batch-tokens", "400", "--draft-vocabulary", "0", "--draft-steps", "2"]


@pytest.fixture(scope="module", params=["mimo", "glm4_moe", "deepseek_v3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(request.param, tmp_path_factory.mktemp(request.param) / "model").directory


@pytest.fixture(scope="module")
def head(model: Path) -> Path:
    run("head", "import", "--target", model, "--out", model.parent / "head")
    return model.parent / "head"


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(commands, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_generate_and_bench(model: Path, head: Path, engine: str) -> None:
    """Drafting with the imported head, several steps deep, the answer is that of plain decoding."""
    common = ["--target", model, "--engine", engine, "--head", head, "--max-new-tokens", 24]
    if engine == "native":
        pytest.importorskip("fastmtp._native")
        if "mimo" not in str(model):
            refused = CliRunner().invoke(commands, ["generate", "hello", *map(str, common)])
            assert "runs in PyTorch only; give --engine torch" in str(refused.exception)
            return
    drafted, plain = (run("generate", "hello", *common, "--draft", draft) for draft in ("chain:3", "plain"))
    assert drafted["tokens"] == plain["tokens"]
    assert len(drafted["acceptance"]) == 3
    (model.parent / "prompts.jsonl").write_text('{"turns": ["one", "two"]}')
    found = run("bench", *common, "--suite", model.parent / "prompts.jsonl")
    assert found["identical"] == {"same": 2, "total": 2}


def test_train_from_it_and_write_back(model: Path, head: Path) -> None:
    """Training starts from the imported weights; what it made takes their place, and comes out again unchanged."""
    work = model.parent
    rows = [{"prompt": f"say {n}", "answer_ids": [n, n + 1, 9, 257]} for n in range(12)]
    # These two are answered, together.
    rows += [{"prompt": "one"}, {"prompt": "the other"}]
    (work / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    torch_engine = ["--target", model, "--engine", "torch"]
    prompts = ["--prompts", work / "prompts.jsonl", "--max-new-tokens", 8]
    assert run("distill", *torch_engine, *prompts, "--out", work / "data")["answer_tokens"] > 48
    training = ["train", "--target", model, "--data", work / "data", "--init", head, *TRAIN]
    # A rate this low leaves bfloat16 weights where they were.
    run(*training, "--out", work / "same", "--learning-rate", 1e-9)
    run(*training, "--out", work / "better")
    before, same = (load_file(work / name / "model.safetensors") for name in ("head", "same"))
    for name, tensor in before.items():
        assert tensor.equal(same[name]), name
    moved = load_checkpoint(work / "better.training" / "checkpoint.pt", torch.device("cpu"), ["head"])["head"]
    better = {name: moved[name].to(tensor.dtype) for name, tensor in before.items()}
    assert not all(tensor.equal(better[name]) for name, tensor in before.items())
    # From so little data it need not be better, and then the head that it began with is kept: take the last one.
    save_file(better, work / "better" / "model.safetensors")
    without = [*training[: training.index("--init")], *TRAIN, "--out", work / "better"]
    assert "from another first head" in str(CliRunner().invoke(commands, [*map(str, without)]).exception)

    written = run("head", "write-back", "--target", model, "--head", work / "better", "--out", work / "overlay")
    assert written["file"] == "mtp.safetensors"
    run("head", "import", "--target", work / "overlay", "--out", work / "again")
    for name, tensor in load_file(work / "again" / "model.safetensors").items():
        assert tensor.equal(better[name]), name
    answer = ["generate", "hello", "--max-new-tokens", 24, "--engine", "torch"]
    first = run(*answer, "--target", model, "--head", head)
    second = run(*answer, "--target", work / "overlay", "--head", work / "again")
    assert first["tokens"] == second["tokens"]

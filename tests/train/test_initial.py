"""An untrained head starts from what is known in closed form."""

from __future__ import annotations

from pathlib import Path

import torch
from fastmtp.engines.torch.forward import TorchForward, text_states

from fastmtp.engines.torch.target import Target
from fastmtp.method.head import MTPHead
from fastmtp.models.layers import causal_masks
from fastmtp.train.initial import RIDGE, fit_input_projection
from fastmtp.train.trainer import Trainer
from tests.conftest import random_ids
from tests.train.test_trainer import CONFIG, exchanges

TEXTS = [random_ids(40, seed=seed) for seed in range(8)]


def inputs_and_wanted(target: Target, head: MTPHead) -> tuple[torch.Tensor, torch.Tensor]:
    """What `input_proj` gets at every position, and what the last layer is given a position later."""
    inputs, wanted = [], []
    for text in TEXTS:
        ids = torch.tensor([text])
        hidden, positions = target.embed(ids), torch.arange(len(text))[None]
        masks = causal_masks(target.config, 0, len(text), torch.device("cpu"))
        rotation = target.rotations(positions, target.kinds)
        for layer, kind in zip(target.model.model.layers[:-1], target.kinds[:-1], strict=True):
            hidden = layer(hidden, position_embeddings=rotation[kind], attention_mask=masks[kind])
        states = text_states(target, ids)[0]
        inputs.append(torch.cat([head.hidden_norm(states[:-1]), head.token_norm(target.embed(ids)[0, 1:])], -1))
        wanted.append(hidden[0, 1:])
    return torch.cat(inputs), torch.cat(wanted)


def test_input_projection_is_the_least_squares_one(target: Target) -> None:
    """For every family: the solution of the weighted problem, computed another way from states made by hand."""
    head = MTPHead(target.model)
    fit_input_projection(head, target, [[5], *TEXTS], TorchForward(target))
    with torch.no_grad():
        inputs, wanted = (part.double() for part in inputs_and_wanted(target, head))
        weights = wanted.pow(2).mean(-1, keepdim=True).rsqrt()
        rows = weights * inputs
        ridge = (RIDGE * rows.pow(2).sum(0).mean()).sqrt() * torch.eye(rows.shape[1], dtype=torch.float64)
        stacked = torch.cat([rows, ridge]), torch.cat([weights * wanted, torch.zeros(len(ridge), wanted.shape[1])])
        expected = torch.linalg.lstsq(*stacked).solution.T
    torch.testing.assert_close(head.input_proj.weight.double(), expected, atol=1e-3, rtol=1e-3)


def test_training_starts_there_and_goes_on_from_a_checkpoint(tmp_path: Path, llama: Target) -> None:
    """The first weights are fitted to the texts trained on; a run that goes on keeps what it has learned."""
    data = exchanges(llama)
    trainer = Trainer(llama, data, None, CONFIG, tmp_path / "a")
    fitted = MTPHead(llama.model)
    fit_input_projection(fitted, llama, trainer._texts, TorchForward(llama))
    assert torch.equal(trainer.head.input_proj.weight, fitted.input_proj.weight)
    for _ in trainer.train():
        pass
    again = Trainer(llama, data, None, CONFIG, tmp_path / "a")
    assert torch.equal(again.head.input_proj.weight, trainer.head.input_proj.weight)

"""The objective's chunks, and how the steps of the chains are lined up with what they are compared with."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div

from fastmtp.engines.torch.target import Target
from fastmtp.method.head import MTPHead
from fastmtp.method.recursion import recursion
from fastmtp.train import objective
from fastmtp.train.batches import make_batch
from fastmtp.train.objective import Objective
from tests.conftest import random_ids
from tests.engines import text_states


@pytest.mark.parametrize("chunk", [7, 128])
@pytest.mark.parametrize("starts", [list(range(14)), [1, 4, 7, 10, 13]])
def test_losses_and_gradients_are_the_formulas(
    chunk: int, starts: list[int], llama: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step's mean KL over the tokens of both texts that it predicts, and autograd's gradients of it."""
    monkeypatch.setattr(objective, "CHUNK", chunk)
    texts = [random_ids(14), random_ids(9, seed=1)]
    batch = make_batch(texts, [[True] * len(text) for text in texts])
    draft_ids = list(range(0, 300, 2))
    states = text_states(llama, batch.ids_BT)
    chains = recursion(MTPHead(llama.model), llama, batch.ids_BT, states, 3, starts_S=torch.tensor(starts))
    outputs = [output.detach().requires_grad_(True) for output in chains]
    rows = llama.lm_head.weight[draft_ids]
    expected = []
    for k, output in enumerate(outputs, 1):
        begins = range(14) if k == 1 else starts
        places = [(b, s, t + k) for b in range(2) for s, t in enumerate(begins) if t + k < len(texts[b])]
        wanted = llama.logits(torch.stack([states[b, seen] for b, _, seen in places]), rows).log_softmax(-1)
        found = llama.logits(torch.stack([output[b, s] for b, s, _ in places]), rows).log_softmax(-1)
        expected.append(kl_div(found, wanted, reduction="batchmean", log_target=True))
    gradients = torch.autograd.grad(sum(expected), outputs)
    losses_K, computed = Objective("kl", llama, draft_ids)(
        outputs, torch.tensor(starts), batch, states, lambda tensors: None
    )
    torch.testing.assert_close(losses_K, torch.stack(expected).detach())
    for one, other in zip(computed, gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)

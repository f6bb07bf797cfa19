"""The order of the training data: a pure function of the settings, so that a resumed run sees the same batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

# The exchanges of so many batches are sorted by length together, so that a batch has little padding.
_SORTED = 64


def batch_order(lengths: Sequence[int], batch_tokens: int, epochs: float, seed: int) -> list[list[int]]:
    """Index lists of all batches of a run; each holds at most `batch_tokens` tokens with padding, or one text."""
    wanted, window = round(epochs * len(lengths)), max(1, _SORTED * batch_tokens * len(lengths) // sum(lengths))
    batches: list[list[int]] = []
    epoch = 0
    while wanted > 0:
        shuffler = random.Random(f"{seed}/{epoch}")
        order = list(range(len(lengths)))
        shuffler.shuffle(order)
        order = order[:wanted]
        wanted -= len(order)
        of_epoch: list[list[int]] = []
        for start in range(0, len(order), window):
            alike = sorted(order[start : start + window], key=lambda index: lengths[index])
            of_epoch += _fill(alike, lengths, batch_tokens)
        shuffler.shuffle(of_epoch)
        batches += of_epoch
        epoch += 1
    return batches


@dataclass(frozen=True)
class Batch:
    """Texts [B, T], padded on the right: `inside` is true on their tokens, `answer` on those of the answer.

    On the host, which so knows without asking the device which positions count.
    """

    ids_BT: Tensor
    inside_BT: Tensor
    answer_BT: Tensor


def make_batch(
    texts: Sequence[Sequence[int]], answer_masks: Sequence[Sequence[bool]], length: int | None = None
) -> Batch:
    """
    Args:
        length: T; None is that of the longest text.
    """
    # numpy reads lists several times faster than PyTorch.
    lengths = np.array([len(text) for text in texts])
    inside_BT = np.arange(length or lengths.max()) < lengths[:, None]
    ids_BT, answer_BT = np.zeros(inside_BT.shape, np.int64), np.zeros(inside_BT.shape, np.bool_)
    ids_BT[inside_BT] = np.fromiter(chain.from_iterable(texts), np.int64)
    answer_BT[inside_BT] = np.fromiter(chain.from_iterable(answer_masks), np.bool_)
    return Batch(torch.from_numpy(ids_BT), torch.from_numpy(inside_BT), torch.from_numpy(answer_BT))


def by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of all texts in groups of similar length, each of at most so many tokens when padded, or one text."""
    return _fill(sorted(range(len(lengths)), key=lambda index: lengths[index]), lengths, batch_tokens)


def _fill(ascending: list[int], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    batches: list[list[int]] = []
    batch: list[int] = []
    for index in ascending:
        # Lengths increase, so the newest text sets the padded length of the batch.
        if batch and lengths[index] * (len(batch) + 1) > batch_tokens:
            batches.append(batch)
            batch = []
        batch.append(index)
    return [*batches, batch] if batch else batches

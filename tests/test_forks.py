"""A process that was forked after a model was loaded works, or says why not; it never sleeps for ever."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable

import pytest
import torch

from fastmtp.engines.torch.target import Target
from fastmtp.method.head import MTPHead
from tests.conftest import random_ids
from tests.engines import NATIVE, Engine, convert, drafted, feed, plain_tokens

WORKED, TOLD, OTHERWISE = 0, 1, 2
IDS = random_ids(12)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def fork(work: Callable[[], object]) -> int:
    """The id of a forked process that does some work."""
    with warnings.catch_warnings():
        # Forking with threads is risky: with PyTorch on one thread it works, which is tested here.
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        signal.alarm(60)
        code = OTHERWISE
        try:
            work()
            code = WORKED
        except RuntimeError as error:
            code = TOLD if "load the model after the fork" in str(error) else OTHERWISE
        finally:
            os._exit(code)
    return child


def end_of(child: int) -> int:
    """How a process ends that was forked."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_a_fork(work: Callable[[], object]) -> int:
    return end_of(fork(work))


@pytest.mark.skipif(not NATIVE, reason="the native engine was not built")
def test_the_native_engine_tells_a_forked_process(llama: Target) -> None:
    """Wherever it is entered: a text, a head, a batch, states, bandwidth, and another model."""
    engine = Engine("int8")
    opened, head = engine.open(llama), MTPHead(llama.model)
    sequence, batch = engine.sequence(llama, head), engine.batch(llama, 1)
    sequence.prefill(IDS)
    entries: list[Callable[[], object]] = [
        lambda: feed(sequence, [1]),
        lambda: drafted(sequence, 1, 1),
        lambda: sequence.prefill([*IDS, 1]),
        lambda: engine.sequence(llama),
        lambda: batch.prefill({0: IDS}),
        lambda: opened.forward([IDS]),
        lambda: opened.forward_with_inputs(IDS),
        opened.floor,
        opened.prepare,
        lambda: convert(llama, "int8"),
    ]
    assert [in_a_fork(entry) for entry in entries] == [TOLD] * len(entries)
    # The first process goes on.
    feed(sequence, [1])


def test_pytorch_works_in_a_forked_process_on_one_thread_only(
    llama: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its threads are lost as well; on one thread there is nobody to wait for."""
    expected, engine = plain_tokens(Engine(), llama, IDS, 4), Engine()

    def answer() -> None:
        sequence = engine.sequence(llama)
        token = int(sequence.prefill(IDS).argmax())
        assert [token, int(feed(sequence, [token])[-1].argmax())] == expected[:2]

    assert torch.get_num_threads() == 1
    assert in_a_fork(answer) == WORKED
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    answer()
    assert in_a_fork(answer) == TOLD

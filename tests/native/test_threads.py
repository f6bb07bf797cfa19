"""Threads that share a forward: none is waited for that is not there, and none is left over."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import psutil
import pytest

from fastmtp import _native
from tests.native.test_kernels import normal, packed

# Products of 300 rows in a process whose other threads never come: a forked one has none of them.
_FORKED = """
import os
import numpy as np
import psutil
from fastmtp import _native
from tests.native.test_kernels import normal, packed

def scores(runtime):
    out = np.empty((len(states), matrix.stride), np.float32)
    _native.scores(runtime, matrix, states, out)
    return out[:, : matrix.outputs]

matrix, states = packed(_native.Type.int8, normal(200, 128)), normal(300, 128, seed=1)
runtime, fresh = _native.Runtime(4), _native.Runtime(4)
expected = scores(runtime)
child = os.fork()
if child == 0:
    equal = all(np.array_equal(scores(runtime), expected) for _ in range(20))
    equal &= psutil.Process().num_threads() == 1
    equal &= np.array_equal(scores(fresh), expected) and psutil.Process().num_threads() == 4
    del runtime, fresh
    os._exit(0 if equal else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_threads_that_are_not_there_are_not_waited_for() -> None:
    """Others do their share, with the same bits; nor does anybody wait for them at the end.

    An engine that had not worked before the fork starts threads of its own.
    """
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _FORKED], timeout=60, check=False)
    assert done.returncode == 0


def test_threads_end_with_their_engine() -> None:
    """One thread more for each but the caller's, from the first work on."""
    matrix, states = packed(_native.Type.int8, normal(64, 64)), normal(3, 64, seed=1)
    out = np.empty((3, matrix.stride), np.float32)
    before = psutil.Process().num_threads()
    runtime = _native.Runtime(4)
    assert psutil.Process().num_threads() == before
    for _ in range(2):
        _native.scores(runtime, matrix, states, out)
        assert psutil.Process().num_threads() == before + 3
    del runtime
    assert psutil.Process().num_threads() == before

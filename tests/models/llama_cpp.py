"""llama.cpp's own reading of a GGUF file, by the C functions that the library of `xllamacpp` exports."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pytest

# Larger than the structures of parameters, whose fields but for the first are not used by name.
_STRUCTURE = ctypes.c_uint32 * 256


class _Parameters(ctypes.Structure):
    _fields_ = [("values", _STRUCTURE)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("count", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("token", "embedding", "position", "sequences", "ids", "wanted")),
    ]


def read(
    path: Path, texts: Sequence[str] = (), ids: Sequence[int] = (), context: int = 512, all_ends: bool = False
) -> dict[str, Any]:
    """What llama.cpp makes of a file.

    Returns:
        `texts`: the ids of each text; `ends`: the ids that end an answer; `logits` [ids, vocabulary].
    """
    pytest.importorskip("xllamacpp")
    child = _child()
    assert child.stdin is not None and child.stdout is not None
    request = {"path": str(path), "texts": list(texts), "ids": list(ids), "context": context, "ends": all_ends}
    child.stdin.write(json.dumps(request) + "\n")
    child.stdin.flush()
    answer = child.stdout.readline()
    if not answer:  # llama.cpp aborts the process where its own checks fail
        _child.cache_clear()
        raise RuntimeError(f"llama.cpp gave up on {path}")
    found = json.loads(answer)
    if "error" in found:
        raise ValueError(found["error"])
    return found


@cache
def _child() -> subprocess.Popen[str]:
    """Ends with this process, whose pipe it reads."""
    command = [sys.executable, __file__]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


class _Library:
    def __init__(self) -> None:
        import xllamacpp.xllamacpp

        self.own = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
        pointers = ("model_load_from_file", "init_from_model", "model_get_vocab", "get_logits")
        for name in pointers:
            self[name].restype = ctypes.c_void_p
        for name in ("model_default_params", "context_default_params"):
            self[name].restype = _Parameters
        self["batch_get_one"].restype = _Batch
        self["vocab_is_eog"].restype = ctypes.c_bool
        self["model_load_from_file"].argtypes = [ctypes.c_char_p, _Parameters]
        self["init_from_model"].argtypes = [ctypes.c_void_p, _Parameters]
        self["decode"].argtypes = [ctypes.c_void_p, _Batch]
        self.own.ggml_backend_load_all()
        self._silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        self["log_set"](self._silent, None)

    def __getitem__(self, name: str) -> Any:
        return getattr(self.own, f"llama_{name}")

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        model = self._model(request["path"], Path(request["path"]).stat().st_mtime_ns)
        if not model:
            return {"error": f"llama.cpp does not load {request['path']}"}
        vocabulary = ctypes.c_void_p(self["model_get_vocab"](model))
        size = self["vocab_n_tokens"](vocabulary)
        found: dict[str, Any] = {"texts": [self._tokens(vocabulary, text) for text in request["texts"]]}
        if request["ends"]:
            found["ends"] = [token for token in range(size) if self["vocab_is_eog"](vocabulary, token)]
        if request["ids"]:
            found["logits"] = self._logits(model, request["ids"], request["context"], size)
        return found

    @lru_cache(64)  # noqa: B019 (there is one library)
    def _model(self, path: str, version: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(self["model_load_from_file"](path.encode(), self["model_default_params"]()))

    def _tokens(self, vocabulary: ctypes.c_void_p, text: str) -> list[int]:
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        count = self["tokenize"](vocabulary, data, len(data), ids, len(ids), True, True)
        return list(ids[:count])

    def _logits(self, model: ctypes.c_void_p, ids: list[int], context: int, size: int) -> list[list[float]]:
        parameters = self["context_default_params"]()
        parameters.values[0] = context
        own = ctypes.c_void_p(self["init_from_model"](model, parameters))
        self["set_n_threads"](own, 1, 1)
        found = []
        for token in ids:
            one = (ctypes.c_int32 * 1)(token)
            assert self["decode"](own, self["batch_get_one"](one, 1)) == 0
            values = ctypes.cast(self["get_logits"](own), ctypes.POINTER(ctypes.c_float))
            found.append(values[:size])
        self["free"](own)
        return found


if __name__ == "__main__":
    # llama.cpp writes remarks to the standard output.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    library = _Library()
    for line in sys.stdin:
        print(json.dumps(library.answer(json.loads(line))), file=answers, flush=True)

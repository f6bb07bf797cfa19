"""Every format that is read: a small valid example, which of its files are mutated, and what readers make of it."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fastmtp.accelerate.state import State
from fastmtp.config import DistillConfig, SamplingConfig, TrainConfig, load_config
from fastmtp.decode.drafting import estimates
from fastmtp.decode.drafting.estimates import Estimates, head_bin, text_bin
from fastmtp.decode.drafting.open import check_drafting, open_drafting
from fastmtp.decode.drafting.options import DraftOptions
from fastmtp.decode.plain import plain
from fastmtp.decode.speculative import speculative
from fastmtp.distill.dataset import DataSet, Exchange, ShardWriter, read_exchanges
from fastmtp.distill.prompts import read_prompts
from fastmtp.engines.costs import read_costs
from fastmtp.engines.native.engine import NativeEngine
from fastmtp.engines.native.load import load_native_target
from fastmtp.engines.protocol import Candidates, Costs
from fastmtp.evaluate import recording
from fastmtp.evaluate.drift import Reading
from fastmtp.evaluate.journal import Journal
from fastmtp.evaluate.prompts import read_conversations
from fastmtp.evaluate.records import Answer, Turn
from fastmtp.files import write_json
from fastmtp.heads.format import save_head
from fastmtp.method.head import MTPHead
from fastmtp.models import gguf_file
from fastmtp.models.source import locate, open_model
from fastmtp.train.checkpoint import checkpointed, load_checkpoint, save_checkpoint
from fastmtp.vocabulary.lists import VocabularyLists
from tests.conftest import tiny_target
from tests.fuzz.mutations import Mutation, Mutations, any_bytes, of_json, of_lines, of_safetensors, of_toml
from tests.models.gguf_files import write_model
from tests.serve.serving import FakeScheduler, service, serving

_PROMPT = [72, 101, 108, 108, 111]
_SETTINGS = {"seed": 0, "limit": 2}


@dataclass(frozen=True)
class Format:
    """
    Attributes:
        make: writes a valid example into an empty directory.
        mutate: the mutations of a file, by its name in the directory.
        read: what the product makes of the directory, or its error; results that are equal decode alike.
        free: labels of mutations that are harmless by rule, as a regular expression.
        named: whether the directory's name is in every error.
    """

    make: Callable[[Path], object]
    mutate: Mapping[str, Callable[[bytes], Mutations]]
    read: Callable[[Path], Any]
    free: str = r"$."
    named: bool = True


@dataclass(frozen=True)
class Case:
    """A mutated file of a format."""

    file: str
    mutation: Mutation


def cases(example: Path, form: Format) -> st.SearchStrategy[Case]:
    """Mutated files of a format whose valid example is in a directory."""

    def of_file(name: str) -> st.SearchStrategy[Case]:
        return form.mutate[name]((example / name).read_bytes()).map(partial(Case, name))

    return st.sampled_from(sorted(form.mutate)).flatmap(of_file)


def judge(form: Format, directory: Path, case: Case, expected: Any) -> tuple[str, str]:
    """The class of what a reader does with a mutated directory, and its words: `clean` is the only good one."""
    try:
        found = form.read(directory)
    except MemoryError as error:
        return "memory", str(error)
    except (ValueError, OSError) as error:
        named = not form.named or str(directory) in str(error)
        return ("clean" if named else "traceback"), f"{type(error).__name__}: {error}"
    except (KeyboardInterrupt, SystemExit):
        raise
    # Panics of libraries in Rust are no `Exception`.
    except BaseException as error:
        return "traceback", f"{type(error).__name__}: {error}"
    harmless = not case.mutation.damaging or re.match(form.free, f"{case.file}: {case.mutation.label}")
    return ("clean", "accepted") if harmless or found == expected else ("accepted", repr(found)[:300])


# Models


def _write_directory(directory: Path) -> None:
    target = tiny_target("llama")
    target.model.save_pretrained(directory)
    target.tokenizer.save_pretrained(directory)


def _write_sharded(directory: Path) -> None:
    _write_directory(directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names, files = sorted(tensors), {}
    for number in range(2):
        files |= dict.fromkeys(names[number::2], f"model-{number + 1:05}-of-00002.safetensors")
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, directory / file)
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})


_NUMBERS = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.scale",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "expert_count",
)
_NO_NUMBERS = (float("nan"), float("inf"), -1.0, -1e30, "x", "", True, [1, 2], [float("nan")])


def _of_gguf(original: bytes) -> Mutations:
    """A key with another value, and mutations of the bytes."""

    def put(drawn: tuple[str, Any]) -> Mutation:
        key, value = drawn
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "model.gguf"
            write_model(path, tiny_target("qwen3"), {key: value})
            # Other numbers may be those of another model.
            damaging = isinstance(value, bool | str | list) or not 0 <= value < float("inf")
            return Mutation(f"{key} = {value!r}", path.read_bytes(), damaging)

    values = st.sampled_from(_NO_NUMBERS) | st.sampled_from([0, 1, 3, 100_000, 2**31, 2**32 - 1, 0.0, 1e38])
    return any_bytes(original) | st.tuples(st.sampled_from(_NUMBERS), values).map(put)


def _decoded(name: Path) -> Any:
    """A model's description, a hash of its weights, and what it writes."""
    gguf_file._read.cache_clear()
    source = locate(str(name))
    target = load_native_target(str(name), threads=1)
    _, weights = open_model(source)
    digest = hashlib.sha256()
    for tensor, shape in sorted(weights.shapes().items()):
        digest.update(f"{tensor} {shape}".encode() + weights.rows(tensor, 0, shape[0]).tobytes())
    written = list(islice(plain(NativeEngine(target).new_sequence(None), _PROMPT, SamplingConfig()), 6))
    chat = target.encode_chat([{"role": "user", "content": "hi"}]) if target.tokenizer.chat_template else []
    return target.config, sorted(target.end_ids), target.identity, digest.hexdigest(), written, chat


# Heads


@cache
def _model(base: Path) -> Path:
    directory = base.parent / "model-of-head"
    if not directory.exists():
        _write_directory(directory)
    return directory


@cache
def _engine(model: Path) -> NativeEngine:
    return NativeEngine(load_native_target(str(model), threads=1))


def _write_head(directory: Path) -> None:
    target = tiny_target("llama")
    lists = VocabularyLists({"all": [257, 5, 6, 7], "code": [257, 9, 8]}, {"all": [4, 3, 2, 1]})
    shutil.rmtree(directory)
    save_head(directory, MTPHead(target.model), target, draft_steps=2, vocabulary=lists, provenance={})
    counts = {head_bin(1, 0.5): [3.0, 4.0], text_bin(2, 4): [1.0, 2.0]}
    estimates.save(Estimates(counts), directory, {})


def _read_head(directory: Path) -> Any:
    model = _model(directory)
    options = DraftOptions(directory, "chain:2")
    check_drafting(options, str(model))
    drafting = open_drafting(_engine(model), options)
    head = drafting.head
    assert head is not None and drafting.new_drafter is not None
    sequence, drafter = drafting.new_sequence(), drafting.new_drafter(_PROMPT, SamplingConfig())
    rounds = speculative(sequence, _PROMPT, drafter, SamplingConfig())
    written = [token for settled in islice(rounds, 6) for token in settled.tokens][:6]
    assert written == list(islice(plain(_engine(model).new_sequence(None), _PROMPT, SamplingConfig()), 6))
    return head.lists, head.draft_steps, estimates.load(directory)


# Data


def _exchanges() -> Iterator[Exchange]:
    for index in range(4):
        yield Exchange(index, "test", f"prompt {index}", "answer", True, [1, 2, 3, 4], [False, False, True, True])


def _write_data(directory: Path) -> None:
    writer = ShardWriter(directory, 3)
    for exchange in _exchanges():
        writer.add(exchange)
    writer.flush()
    write_json(
        directory / "provenance.json",
        {"target": "tiny", "tokenizer_sha256": tiny_target("llama").identity.tokenizer_sha256},
    )


def _read_data(directory: Path) -> Any:
    return read_exchanges(DataSet([directory], strict=True), tiny_target("llama"))


_ROWS: list[dict[str, Any]] = [
    {"prompt": "one", "kind": "code"},
    {"messages": [{"role": "system", "content": "be good"}, {"role": "user", "content": "two"}]},
    {"conversations": [{"from": "human", "value": "three"}], "answer_ids": [1, 2], "finished": True},
]


def _lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _write_rows(directory: Path) -> None:
    (directory / "rows.jsonl").write_bytes(_lines(_ROWS))
    (directory / "rows.jsonl.gz").write_bytes(gzip.compress(_lines(_ROWS), mtime=0))
    pq.write_table(
        pa.Table.from_pylist([{"prompt": f"p{n}", "kind": "x"} for n in range(5)]), directory / "rows.parquet"
    )


def _read_rows(directory: Path) -> Any:
    return [read_prompts(str(path)) for path in sorted(directory.iterdir())]


def _write_suite(directory: Path) -> None:
    rows = [{"turns": ["a", "b"], "id": f"{n}", "benchmark": "x", "answer": "2"} for n in range(3)]
    (directory / "suite.jsonl").write_bytes(_lines(rows))


# Settings and the state of runs


def _toml(config: TrainConfig | DistillConfig) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in asdict(config).items())


def _write_settings(directory: Path) -> None:
    (directory / "train.toml").write_text(_toml(TrainConfig()))
    (directory / "distill.toml").write_text(_toml(DistillConfig()))


def _read_settings(directory: Path) -> Any:
    train = load_config(TrainConfig, directory / "train.toml", {})
    return train, load_config(DistillConfig, directory / "distill.toml", {})


def _write_journal(directory: Path) -> None:
    journal = Journal(directory / "answers.jsonl", _SETTINGS)
    for number in range(3):
        cells = {"plain": Answer([1, 2], "ab", 0.1, 0.2, rounds=[1], verified={1: 2}, seconds={"draft": 0.1})}
        journal.add(Turn(f"k{number}", "x", "1", 0, 0, [5, 6], Reading(1.0, 2.0, 0.5), dict(cells)))


def _read_journal(directory: Path) -> Any:
    return list(Journal(directory / "answers.jsonl", _SETTINGS))


def _write_recording(directory: Path) -> None:
    said = [{(): Candidates([5, 6], [0.5, 0.25]), (5,): Candidates([7], [0.5])}] * 2
    one = recording.Recording("x", "1", SamplingConfig(), [1, 2], [5, 7, 8], said)
    recording.save([one], directory / "recorded.jsonl.gz")


def _read_recording(directory: Path) -> Any:
    return list(recording.load(directory / "recorded.jsonl.gz"))


def _write_checkpoint(directory: Path) -> None:
    head = MTPHead(tiny_target("llama").model)
    save_checkpoint(directory / "checkpoint.pt", {"head": head.state_dict(), "step": 3, "fingerprint": "x"})


def _read_checkpoint(directory: Path) -> Any:
    path, head = directory / "checkpoint.pt", MTPHead(tiny_target("llama").model)
    state = load_checkpoint(path, torch.device("cpu"), ["head", "step", "fingerprint"])
    with checkpointed(path):
        head.load_state_dict(state["head"])
        return (
            state["step"],
            state["fingerprint"],
            {name: value.tolist() for name, value in head.state_dict().items()},
        )


def _write_costs(directory: Path) -> None:
    costs = Costs({128: {1: 5.0, 8: 7.0}, 1024: {1: 6.0}}, {1: 0.2, 2: 0.3}, 0.1)
    write_json(directory / "costs.json", {"print": asdict(costs)})


def _read_costs(directory: Path) -> Any:
    # What cannot be read is measured again.
    return read_costs(directory / "costs.json", "print") or read_costs(_whole_costs(directory.parent), "print")


@cache
def _whole_costs(base: Path) -> Path:
    directory = base / "whole-costs"
    directory.mkdir(exist_ok=True)
    _write_costs(directory)
    return directory / "costs.json"


def _write_state(directory: Path) -> None:
    stages = {"distill": {"command": ["fastmtp", "distill"], "done": True}}
    rates = {"prefill_per_second": 240.0, "answered_few": 60.0, "answered_many": 90.0, "many": 32}
    times = {"plain_ms": 20.0, "verify_ms": 25.0, "head_seconds": 0.01, "step_seconds": 0.2}
    facts = rates | times | {"target_bytes": 1000, "head_parameters": 100, "shipped_head": None}
    write_json(directory / "accelerate.json", {"target": "tiny", "stages": stages, "facts": facts})


def _read_state(directory: Path) -> Any:
    return State(directory, "tiny")._state


# Requests

_BODY = {
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 1,
    "stop": ["x"],
    "logit_bias": {"5": 1.0},
    "response_format": {"type": "text"},
}


@cache
def _client() -> httpx2.Client:
    """Of a server that lives as long as the process."""
    loaded = service(FakeScheduler(reply="ok"), template=False)
    client = httpx2.Client(base_url=_SERVERS.enter_context(serving(lambda: loaded)), timeout=20)
    return _SERVERS.enter_context(client)


_SERVERS = ExitStack()


@contextmanager
def servers() -> Iterator[None]:
    """Ends the servers that readers have started."""
    try:
        yield
    finally:
        _SERVERS.close()
        _client.cache_clear()


def _read_request(directory: Path) -> Any:
    content = (directory / "body.json").read_bytes()
    reply = _client().post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    if reply.status_code == 200:
        return "answered"
    assert 400 <= reply.status_code < 500, reply.text
    raise ValueError(reply.json()["error"]["message"])


_TEXT = {"tokenizer.json": of_json, "tokenizer_config.json": of_json, "config.json": of_json}
# Of a Hugging Face directory: what is read by the tokenizer's own library, and ids that no token has.
_FREE_TEXT = r"tokenizer(_config)?\.json: .*|(config|generation_config)\.json: (bos|eos|pad)_token_id.*"

FORMATS = {
    "directory": Format(
        _write_directory,
        {**_TEXT, "generation_config.json": of_json, "model.safetensors": of_safetensors},
        _decoded,
        _FREE_TEXT,
    ),
    "index": Format(
        _write_sharded,
        {"model.safetensors.index.json": of_json, "model-00001-of-00002.safetensors": of_safetensors},
        _decoded,
        r".*: metadata.*",
    ),
    "gguf": Format(
        lambda directory: write_model(directory / "model.gguf", tiny_target("qwen3")),
        {"model.gguf": _of_gguf},
        lambda directory: _decoded(directory / "model.gguf"),
    ),
    "head": Format(
        _write_head,
        {
            "config.json": of_json,
            "model.safetensors": of_safetensors,
            "vocabulary.json": of_json,
            "estimates.json": of_json,
        },
        _read_head,
        r"(config|vocabulary|estimates)\.json: (provenance).*|vocabulary\.json: lists\.\w+ = \[.*",
    ),
    "data": Format(
        _write_data,
        {"shard-00000.parquet": any_bytes, "shard-00001.parquet": any_bytes, "provenance.json": of_json},
        _read_data,
    ),
    "rows": Format(
        _write_rows,
        {"rows.jsonl": of_lines, "rows.jsonl.gz": any_bytes, "rows.parquet": any_bytes},
        _read_rows,
        # Texts, and keys that have no meaning.
        r"rows\.jsonl: .*(kind|finished|content|value|prompt|role|from|answer_ids).*",
    ),
    "suite": Format(
        _write_suite, {"suite.jsonl": of_lines}, lambda directory: read_conversations(directory / "suite.jsonl"),
        r"suite\.jsonl: (turns|id|benchmark|answer).*",
    ),
    "settings": Format(
        _write_settings, {"train.toml": of_toml, "distill.toml": of_toml}, _read_settings, r".*: (mix|objective) .*"
    ),
    # A first line that was only half written starts a new journal.
    "journal": Format(
        _write_journal, {"answers.jsonl": of_lines}, _read_journal, r".*: (key|id|benchmark|cells|.* instead).*"
    ),
    "recording": Format(_write_recording, {"recorded.jsonl.gz": any_bytes}, _read_recording),
    "checkpoint": Format(_write_checkpoint, {"checkpoint.pt": any_bytes}, _read_checkpoint),
    "costs": Format(_write_costs, {"costs.json": of_json}, _read_costs),
    # Whatever head it names is checked as any other.
    "accelerate": Format(
        _write_state, {"accelerate.json": of_json}, _read_state, r".*: (stages|facts\.shipped_head = ).*"
    ),
    "request": Format(
        lambda directory: write_json(directory / "body.json", _BODY),
        {"body.json": of_json},
        _read_request,
        named=False,
    ),
}  # fmt: skip

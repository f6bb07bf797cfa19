"""Decoding in slots: whatever the number of slots and the order, the data is what decoding one by one makes.

On the CPU the same steps run that a GPU captures as a graph.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import chain, product
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastmtp.config import DistillConfig, SamplingConfig
from fastmtp.decode import sampling as one_by_one
from fastmtp.decode.batch import LOOP_EVERY, Completion, Continuation, Request, decode_batch
from fastmtp.distill import answers
from fastmtp.distill.answers import distill
from fastmtp.distill.dataset import Exchange, finished_indices
from fastmtp.distill.slots import decode
from fastmtp.distill.slots.chunks import chunks_to_read
from fastmtp.distill.slots.decode import decode_slots
from fastmtp.distill.slots.machine import SlotMachine
from fastmtp.distill.slots.memory import MOST_SLOTS, fitting_slots, slot_bytes
from fastmtp.distill.speed import distillation_speed
from fastmtp.engines.torch.draws import Sampling, choose, signed
from fastmtp.engines.torch.engine import TorchEngine
from fastmtp.engines.torch.slot_attention import attend_chunks_by_mask, attend_slots_by_mask
from fastmtp.engines.torch.slot_parts import PLAIN, LayerParts, Norm, add_norm, gate, place_by_index
from fastmtp.engines.torch.slots import CHUNK, SlotModel
from fastmtp.engines.torch.target import Target
from fastmtp.models.families import FAMILIES as SUPPORTED
from tests.conftest import FAMILIES, VOCABULARY, random_ids, tiny_target
from tests.distill.test_distill import CONFIG, rows
from tests.train.test_whole_texts import interpreted

SHORT = DistillConfig(**{**vars(CONFIG), "count": 6, "max_new_tokens": 12, "max_prompt_tokens": 100, "slots": 3})


def talking(family: str, *, letters: bool = False) -> Target:
    """A tiny target that ends its turns now and then; with `letters` it writes what tokenises to itself."""
    source = tiny_target(family)
    model = deepcopy(source.model)
    with torch.no_grad():
        model.lm_head.weight[257] *= 3
        if letters:
            words = source.tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz"))
            others = sorted(set(range(VOCABULARY)) - {*words, 257})
            model.lm_head.weight[others] = 0
    return Target(model, source.tokenizer, source.source)


@pytest.fixture
def in_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distillation goes the way that it goes on a GPU."""
    monkeypatch.setattr(answers, "runs_in_slots", lambda engine: True)


def made(target: Target, out: Path, prompts: Path | None = None, **settings: object) -> dict[int, Exchange]:
    config = DistillConfig(**{**vars(SHORT), **settings})
    distill(TorchEngine(target), config, out, None if prompts is None else str(prompts))
    return rows(out)


def test_draws_are_those_of_decoding_one_by_one() -> None:
    """Every kind of sampling, the same random numbers: the token is a function of logits, seed and position."""
    count, seeds = 240, np.random.default_rng(0).integers(0, 2**64 - 1, 240, np.uint64)
    logits = 3 * torch.randn(count, VOCABULARY, generator=torch.Generator().manual_seed(0))
    kinds = list(product((0.0, 0.6, 1.0, 1.7), (0, 1, 20, 100), (1.0, 0.9, 0.3))) * 5
    settings = [
        SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, seed=int(seed))
        for (temperature, top_k, top_p), seed in zip(kinds, seeds, strict=True)
    ]
    positions = torch.arange(count) + 3
    sampling = Sampling(
        torch.tensor([signed(own.seed) for own in settings]),
        torch.tensor([own.temperature for own in settings]),
        torch.tensor([own.top_k for own in settings]),
        torch.tensor([own.top_p for own in settings]),
    )
    drawn = choose(logits, sampling, positions, VOCABULARY)
    for row, own in enumerate(settings):
        assert drawn[row] == one_by_one.choose(logits[row].numpy(), own, int(positions[row]))


def test_logits_are_the_targets(target: Target) -> None:
    """After prompts that were read in chunks beside others, some of them padded, and after a step."""
    texts = [random_ids(size, size) for size in (100, 64, 3)]
    model = SlotModel(Target(deepcopy(target.model), target.tokenizer, target.source), 4, 128)
    padded = torch.tensor([[*text[:-2], *[0] * (100 - len(text))] for text in texts])
    with torch.inference_mode():
        model.prefill(torch.tensor([2, 0, 3]), padded[:, :60], torch.tensor(0))
        model.prefill(torch.tensor([2, 0, 3]), padded[:, 60:], torch.tensor(60))
        for back in (2, 1):
            tokens = torch.tensor([texts[1][-back], 0, texts[0][-back], texts[2][-back]])
            logits = model.logits(tokens, torch.tensor([64 - back, 0, 100 - back, 3 - back]))
    for text, row in zip(texts, (2, 0, 3), strict=True):
        expected = target.logits(TorchEngine(target).forward([text])[0][-1])
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)


def test_slots_make_what_decoding_one_by_one_makes(target: Target, tmp_path: Path, in_slots: None) -> None:
    """Every family: own prompts and answers, sampled, with windows shorter than the texts."""
    target = talking(target.source.removeprefix("tiny-"))
    got = made(target, tmp_path / "slots", max_new_tokens=40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "runs_in_slots", lambda engine: False)
        assert made(target, tmp_path / "batch", max_new_tokens=40) == got


def test_slots_and_order_do_not_matter(tmp_path: Path, in_slots: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """1, 3 and 16 slots, and requests in another order; greedy ones among sampled ones."""
    target = talking("llama", letters=True)
    first = made(target, tmp_path / "1", slots=1, greedy_share=0.5)
    for slots in (3, 16):
        assert made(target, tmp_path / str(slots), slots=slots, greedy_share=0.5) == first
    forwards = answers._InTime.__iter__
    monkeypatch.setattr(answers._InTime, "__iter__", lambda self: iter(list(forwards(self))[::-1]))
    assert made(target, tmp_path / "backwards", greedy_share=0.5) == first


def test_a_slot_goes_on_from_a_prompt_to_its_answer(
    tmp_path: Path, in_slots: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it foresaw is used where the prompt tokenises to itself; the data is the same as without."""
    target = talking("llama", letters=True)
    foreseen: list[bool] = []
    judge = decode._is_foreseen
    monkeypatch.setattr(decode, "_is_foreseen", lambda *given: foreseen.append(judge(*given)) or foreseen[-1])
    got = made(target, tmp_path / "foreseen")
    assert sum(foreseen) > len(got) // 2
    monkeypatch.setattr(decode, "_is_foreseen", lambda *given: False)
    assert made(target, tmp_path / "asked again") == got


def test_given_prompts_are_read_in_chunks(tmp_path: Path, in_slots: None) -> None:
    """Longer ones than a chunk and shorter, with a common beginning and without; given answers are kept."""
    target = talking("qwen2")
    texts = ["".join(map(chr, 97 + np.array(random_ids(size, size)) % 26)) for size in (1, 150, 64, 20, 90, 3)]
    given = [{"prompt": text} for text in texts] + [{"prompt": "b", "answer_ids": [1, 2, 257]}]
    given.append({"messages": [{"role": "system", "content": "x" * 70}, {"role": "user", "content": "y"}]})
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, given)))
    got = made(target, tmp_path / "slots", path)
    assert len(got) == len(given) and got[6].ids[-3:] == [1, 2, 257]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "runs_in_slots", lambda engine: False)
        assert made(target, tmp_path / "batch", path) == got


def requests(prompts: list[list[int]], **settings: object) -> deque[Request]:
    common = {"max_new_tokens": 100, "sampling": SamplingConfig(), "end_ids": frozenset({257}), **settings}
    return deque(Request(key=key, prompt=prompt, **common) for key, prompt in enumerate(prompts))


Decode = Callable[[deque[Request]], Iterator[Completion]]


def batch(target: Target) -> Decode:
    return lambda queue: decode_batch(TorchEngine(target), queue, 4)


def slots(machine: SlotMachine, target: Target) -> Decode:
    return lambda queue: chain.from_iterable(decode_slots(machine, TorchEngine(target), queue))


def completions(decode: Decode, asked: deque[Request], between: list[int]) -> dict[object, tuple[list[int], bool]]:
    """What comes out, of requests with a second text also that, asked as distillation asks for it."""
    found, queue = {}, deque(asked)
    for done in decode(queue):
        request = done.request
        found[request.key] = done.tokens, done.finished
        if request.then is not None and done.finished:
            prompt = [*request.prompt, *done.tokens[:-1], *between]
            queue.appendleft(Request(key=(request.key, "then"), prompt=prompt, **vars(request.then)))
    return found


def repeating() -> Target:
    """A target whose greedy token depends on the last one only, so that every greedy text loops soon."""
    source = tiny_target("llama")
    model = deepcopy(source.model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    return Target(model, source.tokenizer, source.source)


def test_loops_are_cut_where_decode_batch_cuts_them() -> None:
    """In first and in second texts, which begin at any step."""
    target = repeating()
    prompts = [random_ids(size, size) for size in range(3, 11)]
    (path, _), *_ = completions(batch(target), requests(prompts[:1], max_new_tokens=5), []).values()
    # The places to look at are the same in the second text as they would be in the first.
    between = [path[-1], *random_ids(11)]
    then = Continuation(max_new_tokens=150, sampling=SamplingConfig(), end_ids=frozenset())
    for ends, least in ((frozenset[int](), 6), (frozenset(path[-1:]), 7)):
        asked = requests(prompts, max_new_tokens=150, end_ids=ends, then=then)
        expected = completions(batch(target), asked, between)
        machine = SlotMachine(target, 3, 400, 1, between)
        assert completions(slots(machine, target), asked, between) == expected
        assert sum(64 <= len(tokens) < 150 for tokens, _ in expected.values()) >= least
    assert any(isinstance(key, tuple) for key in expected)


def test_the_context_is_the_limit() -> None:
    """Texts that reach it are cut there, first and second ones, as if each had been asked by itself."""
    target = repeating()
    limit = target.context_limit
    prompts = [random_ids(limit - left) for left in (20, 1)]
    machine = SlotMachine(target, 2, limit, 1, [])
    found = completions(slots(machine, target), requests(prompts, end_ids=frozenset()), [])
    assert [(len(found[key][0]), found[key][1]) for key in (0, 1)] == [(20, False), (1, False)]
    ((end,), _), *_ = completions(batch(target), requests([[65]], max_new_tokens=1), []).values()
    then = Continuation(max_new_tokens=100, sampling=SamplingConfig(), end_ids=frozenset())
    asked = requests([[*random_ids(limit - left), 65] for left in (20, 4)], end_ids=frozenset({end}), then=then)
    machine = SlotMachine(target, 2, limit, 1, [end, 259])
    found = completions(slots(machine, target), asked, [end, 259])
    assert [len(found[key, "then"][0]) for key in (0, 1)] == [17, 1]
    assert machine.drawn() == 2 + 17 + 1


def test_a_common_beginning_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that only begin so, one that is hardly more than it, and one that begins otherwise."""
    target = tiny_target("llama")
    common, read = random_ids(40), []
    alike = [[*common, *random_ids(more, more)] for more in (30, 90, 1, 2)]
    # The slot of the one that begins otherwise is the next one's.
    asked = requests([*alike[:2], random_ids(41, 9), alike[3], alike[2]], max_new_tokens=20, end_ids=frozenset())
    expected = completions(batch(target), asked, [])
    prefill = SlotModel.prefill

    def counted(self: SlotModel, slots_R: Tensor, ids_RC: Tensor, start: Tensor) -> Tensor:
        read.append((int(start), ids_RC.shape[1]))
        return prefill(self, slots_R, ids_RC, start)

    monkeypatch.setattr(SlotModel, "prefill", counted)
    # The first two are begun together.
    assert completions(slots(SlotMachine(target, 2, 192, 1, []), target), asked, []) == expected
    assert read == [(0, 40), (40, CHUNK), (104, CHUNK), (0, CHUNK), (40, CHUNK)]


@given(
    prompts=st.lists(st.tuples(st.sampled_from([0, 40]), st.integers(41, 448))),
    together=st.integers(1, 5),
    least=st.integers(1, 160),
)
def test_chunks_are_read_ahead_where_they_have_many_tokens(
    prompts: list[tuple[int, int]], together: int, least: int
) -> None:
    """Each goes on where its prompts were read before, within the room, and leaves the last token of each."""
    prompts.sort(key=itemgetter(1))
    begins, lengths = (np.array([prompt[part] for prompt in prompts], np.int64) for part in (0, 1))
    chunks, read = chunks_to_read(begins, lengths, together, least, 448)
    at = begins.copy()
    for found, start in chunks:
        ends, own = np.minimum(lengths - 1, start + CHUNK), np.unique(found)
        assert len(found) == together and start <= at[own].min() == at[own].max() < ends[own].min()
        assert start + CHUNK <= 448 and (ends - at)[own].sum() >= least
        at[own] = ends[own]
    assert (at == read).all() and (read < lengths).all()
    for begin, start in product({*begins.tolist()}, {*read.tolist()}):
        left = (lengths - 1 - read)[(begins == begin) & (read == start)]
        assert np.minimum(left, CHUNK)[-together:].sum() < least
        assert (np.diff(read[begins == begin]) >= 0).all()


def test_chunks_of_several_prompts_are_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beginnings that are alike and not, in slots that are filled again and again; nothing else comes out."""
    for module in ("machine", "chunks"):
        monkeypatch.setattr(f"fastmtp.distill.slots.{module}.CHUNK", 8)
    target, shapes = tiny_target("gemma3"), []
    prefill = SlotModel.prefill

    def counted(self: SlotModel, slots_R: Tensor, ids_RC: Tensor, start: Tensor) -> Tensor:
        shapes.append(tuple(ids_RC.shape))
        return prefill(self, slots_R, ids_RC, start)

    monkeypatch.setattr(SlotModel, "prefill", counted)
    lengths = np.random.default_rng(0).integers(14, 60, 60).tolist()
    alike = [[*random_ids(12), *random_ids(size, size)][:size] for size in lengths]
    prompts = [random_ids(len(own), 7) if number % 5 == 4 else own for number, own in enumerate(alike)]
    asked = requests([*alike[:16], *prompts[16:]], max_new_tokens=6, end_ids=frozenset())
    expected = completions(batch(target), asked, [])
    shapes.clear()
    assert completions(slots(SlotMachine(target, 16, 128, 1, []), target), asked, []) == expected
    assert {*shapes} == {(1, 8), (1, 4), (4, 8)} and shapes.count((4, 8)) > 40


def test_what_fits_no_slot_is_decoded_without(llama: Target) -> None:
    """A prompt that is too long for the slots, and a top-k beyond the step's."""
    asked = requests([random_ids(100), random_ids(5)], max_new_tokens=20)
    asked.append(Request(**{**vars(asked[1]), "key": 2, "sampling": SamplingConfig(temperature=1.0, top_k=50)}))
    expected = completions(batch(llama), asked, [])
    machine = SlotMachine(llama, 2, 64, 20, [])
    assert [machine.fits(request) for request in asked] == [False, True, False]
    assert completions(slots(machine, llama), asked, []) == expected


def test_stopped_and_resumed_equals_uninterrupted(
    tmp_path: Path, in_slots: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C at any moment keeps what was made; the next run, with other slots, makes the rest."""
    target = talking("llama", letters=True)
    whole = made(target, tmp_path / "whole", count=10)

    def stopped_after(steps: int) -> None:
        advance = SlotMachine.advance

        def stops(self: SlotMachine) -> None:
            if self.steps >= steps:
                raise KeyboardInterrupt
            advance(self)

        with monkeypatch.context() as patch:
            patch.setattr(SlotMachine, "advance", stops)
            with pytest.raises(KeyboardInterrupt):
                made(target, tmp_path / "parts", count=10)

    stopped_after(64)
    some = finished_indices(tmp_path / "parts")
    assert 0 < len(some) < 10
    stopped_after(16)
    assert finished_indices(tmp_path / "parts") == some
    assert made(target, tmp_path / "parts", count=10, slots=16) == whole


def test_weights_are_shared_with_the_target(llama: Target) -> None:
    """A slot model takes no second copy of them, and leaves the target as it was."""
    target = Target(deepcopy(llama.model), llama.tokenizer, llama.source)
    before = TorchEngine(target).forward([random_ids(9)])[0]
    machine = SlotMachine(target, 1, 64, 1, [])
    assert torch.equal(TorchEngine(target).forward([random_ids(9)])[0], before)
    joint = machine._model._layers[0].query_key_value[0]
    assert target.model.model.layers[0].self_attn.k_proj.weight.untyped_storage() is not None
    assert target.model.model.layers[0].self_attn.k_proj.weight.data_ptr() > joint.data_ptr()
    held = {own.untyped_storage().data_ptr() for own in target.model.model.layers[0].self_attn.parameters()}
    assert joint.untyped_storage().data_ptr() in held and len(held) == 2


def test_slots_from_free_memory(llama: Target) -> None:
    """The formula holds what a machine has, and its slots fit; the embedded model's are as many as were run."""
    machine, config = SlotMachine(llama, 8, 128, 20, []), llama.config
    held = sum(part.nbytes for pair in machine._model._caches for part in pair) + machine._tokens.nbytes
    assert held <= 8 * slot_bytes(config, 128, 20, 4) <= 10 * held
    each = slot_bytes(config, 128, 20, 4)
    free = 300 * each + (1 << 30)
    assert fitting_slots(int(free / 0.95) + 1, config, 128, 20, 4) == 256
    with pytest.raises(ValueError, match="a smaller --max-new-tokens"):
        fitting_slots(1 << 30, config, 128, 20, 4)
    smollm2 = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    # An H200's and an H100's memory, with the weights loaded.
    assert fitting_slots(139 * 10**9, smollm2, 880, 100, 2) == MOST_SLOTS
    assert 2304 <= fitting_slots(79 * 10**9, smollm2, 880, 100, 2) < MOST_SLOTS


def test_others_are_distilled_without_slots(
    tmp_path: Path, in_slots: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family that the slots do not compute goes the usual way, after one line that says so."""
    target, said = talking("llama"), []
    monkeypatch.setattr("fastmtp.engines.torch.fused_layers.FAMILIES", {"qwen2": SUPPORTED["qwen2"]})
    monkeypatch.setattr("fastmtp.progress._Quiet.say", lambda self, line: said.append(line))
    assert len(made(target, tmp_path / "data")) == 6
    (line,) = said
    assert "without slots" in line and line.endswith("not llama")


def test_speed_is_measured_over_the_whole_path(in_slots: None) -> None:
    """With slots and without: what was made in the seconds given, as numbers that JSON holds."""
    engine = TorchEngine(talking("llama", letters=True))
    found = distillation_speed(engine, 0.2, SHORT)
    assert json.loads(json.dumps(found)) == found
    assert found["slots"] == 3 and found["seconds"] >= 0.2 and found["exchanges"] > 0
    assert found["drawn_tokens_per_second"] > found["answer_tokens_per_second"] > 0 < found["step_ms"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "runs_in_slots", lambda engine: False)
        usual = distillation_speed(engine, 0.2, SHORT)
    assert usual["drawn_tokens_per_second"] is None and usual["tokens_per_second"] > 0


@interpreted
@pytest.mark.parametrize(
    ("heads", "key_heads", "size", "room", "window"),
    [(4, 2, 8, 128, None), (9, 3, 64, 128, None), (4, 4, 24, 192, 70), (8, 1, 16, 64, 1)],
)
def test_the_kernel_attends_as_pytorch_does(
    heads: int, key_heads: int, size: int, room: int, window: int | None
) -> None:
    """Groups, sizes that are no power of 2, and windows; what lies beyond a slot's length is never read."""
    from fastmtp.engines.torch.slot_kernels import attend_slots

    generator = torch.Generator().manual_seed(0)
    positions = torch.tensor([0, room - 1, 63, 17])
    queries = torch.randn(4, heads + key_heads, size, generator=generator)[:, :heads]
    keys, values = (torch.randn(4, key_heads, room, size, generator=generator) for _ in "kv")
    expected = attend_slots_by_mask(queries, keys, values, positions, size**-0.5, window)
    for slot, position in enumerate(positions.tolist()):
        keys[slot, :, position + 1 :] = values[slot, :, position + 1 :] = torch.nan
    found = attend_slots(queries, keys, values, positions, size**-0.5, window)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize(
    ("heads", "key_heads", "size", "tokens", "start", "window"),
    [(4, 2, 8, 64, 0, None), (9, 3, 64, 64, 40, None), (4, 4, 24, 70, 58, 70), (2, 1, 136, 33, 90, 1)],
)
def test_the_kernel_attends_of_chunks_as_pytorch_does(
    heads: int, key_heads: int, size: int, tokens: int, start: int, window: int | None
) -> None:
    """In tiles that are not full and over windows; what lies behind a chunk is never read, nor other slots."""
    from fastmtp.engines.torch.chunk_kernels import attend_chunks

    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2 * tokens, heads + key_heads, size, generator=generator)[:, :heads]
    held = [torch.randn(4, key_heads, 128, size, generator=generator) for _ in "kv"]
    given = torch.tensor([3, 1]), torch.tensor(start), size**-0.5, window
    expected = attend_chunks_by_mask(queries, *held, *given)
    for part in held:
        part[[0, 2]] = part[:, :, start + tokens :] = torch.nan
    torch.testing.assert_close(attend_chunks(queries, *held, *given), expected, rtol=1e-5, atol=1e-5)


def norm(kind: Any, size: int, generator: torch.Generator) -> Norm:
    module = kind(size, eps=1e-5)
    torch.nn.init.normal_(module.weight, generator=generator)
    return Norm(module.requires_grad_(False))


@interpreted
@pytest.mark.parametrize(("heads", "key_heads", "size", "room"), [(4, 2, 8, 128), (9, 3, 64, 128), (4, 4, 24, 64)])
def test_the_kernel_places_as_pytorch_does(heads: int, key_heads: int, size: int, room: int) -> None:
    """Rotated queries, and keys and values in their slots; nothing else is written."""
    from fastmtp.engines.torch.slot_kernels import place_slots

    generator = torch.Generator().manual_seed(0)
    positions = torch.tensor([0, room - 1, 63, 17])
    joint = torch.randn(4, heads + 2 * key_heads, size, generator=generator)
    cosines, sines = (torch.randn(room, size, generator=generator) for _ in "cs")
    held = [torch.full((4, key_heads, room, size), torch.nan) for _ in "kv"]
    expected = [part.clone() for part in held]
    norms = None if size == 8 else (norm(LlamaRMSNorm, size, generator), norm(LlamaRMSNorm, size, generator))
    found = place_slots(joint, norms, cosines, sines, positions, *held)
    torch.testing.assert_close(found, place_by_index(joint, norms, cosines, sines, positions, *expected))
    torch.testing.assert_close(held, expected, equal_nan=True)


@interpreted
def test_the_kernels_normalize_and_gate_as_pytorch_does() -> None:
    from fastmtp.engines.torch.slot_kernels import add_norm_slots, gate_slots

    generator = torch.Generator().manual_seed(0)
    hidden, added = torch.randn(2, 3, 40, generator=generator)
    for outer in (None, norm(Gemma3RMSNorm, 40, generator)):
        for last in (norm(Gemma3RMSNorm, 40, generator), norm(LlamaRMSNorm, 40, generator)):
            given = hidden, added, outer, last
            torch.testing.assert_close(add_norm_slots(*given), add_norm(*given), rtol=1e-4, atol=1e-5)
    joint = 3 * torch.randn(3, 2 * 1100, generator=generator)
    for gelu in (False, True):
        torch.testing.assert_close(gate_slots(joint, gelu), gate(joint, gelu), rtol=1e-4, atol=1e-5)


VIEWS = (
    *("view", "split", "chunk", "slice", "select", "expand", "t", "transpose", "detach", "alias", "unsqueeze"),
    "unbind",
)


class Counted(TorchDispatchMode):
    """Counts what is launched on a GPU."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.split("::")[1].lstrip("_")
        self.count += not name.startswith((*VIEWS, "empty"))
        return function(*args, **(kwargs or {}))


def test_the_device_is_never_without_work(llama: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the host waits for what has ended, the next steps are begun already, while texts run."""
    finished, begun = SlotMachine.finished, []
    monkeypatch.setattr(SlotMachine, "finished", lambda self: begun.append(self.begun) or finished(self))
    asked = requests([random_ids(size, size) for size in range(3, 9)], max_new_tokens=30, end_ids=frozenset())
    assert len(completions(slots(SlotMachine(llama, 2, 64, 1, []), llama), asked, [])) == 6
    assert len(begun) > 6 and set(begun[:-1]) == {2}


def test_the_host_launches_as_little_for_many_layers_and_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the graph of each step a few operations, and two for each chunk of prompts."""
    counted, ran = Counted(), Counter[str]()

    def graph(step: Callable[[], None], device: torch.device, memory: None) -> Callable[[], None]:
        def replay() -> None:
            before = counted.count
            step()
            counted.count = before + 1
            ran[step.__name__] += 1

        return replay

    monkeypatch.setattr("fastmtp.distill.slots.machine.captured", graph)
    target, common = tiny_target("llama"), random_ids(30)
    machine = SlotMachine(target, 128, 192, 1, [])
    asked = requests([[*common, *random_ids(size, size)] for size in range(20, 84)], max_new_tokens=20)
    # In the first run the common beginning is read, and given to all slots, which keep it.
    for _ in range(2):
        counted.count, machine.steps = 0, 0
        ran.clear()
        with counted:
            assert len(completions(slots(machine, target), asked, [])) == len(asked)
        monkeypatch.delattr(SlotModel, "begin_alike", raising=False)
    advances = machine.steps // LOOP_EVERY
    assert ran == {"_step": machine.steps, "_end_loops": advances, "_read_chunk": 17}
    assert counted.count <= machine.steps + 10 * advances + 2 * 17


@interpreted
@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=() if one in ("qwen3", "gemma3") else pytest.mark.slow) for one in FAMILIES]
)
def test_a_step_by_the_kernels(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model: the same logits by less than half of the operations, after a prefill by two thirds of them."""
    from fastmtp.engines.torch.chunk_kernels import attend_chunks
    from fastmtp.engines.torch.slot_kernels import add_norm_slots, attend_slots, gate_slots, place_slots
    from fastmtp.engines.torch.text_kernels import rotate_texts

    counted = Counted()

    def counting(kernel: Any) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            # The interpreter's own work is on the host.
            before = counted.count
            found = kernel(*arguments, **named)
            counted.count = before + 1
            return found

        return run

    all_kernels = rotate_texts, place_slots, attend_slots, attend_chunks, add_norm_slots, gate_slots
    kernels = LayerParts(*map(counting, all_kernels))
    own, found, counts = tiny_target(family), [], []
    for parts in (PLAIN, kernels):
        monkeypatch.setattr("fastmtp.engines.torch.slots.layer_parts", lambda device, parts=parts: parts)
        model = SlotModel(Target(deepcopy(own.model), own.tokenizer, own.source), 3, 64)
        with torch.inference_mode():
            with Counted() as counted:
                model.prefill(torch.arange(3), torch.arange(30).view(3, 10), torch.tensor(0))
            counts.append([counted.count])
            for step in range(3):
                with Counted() as counted:
                    logits = model.logits(torch.tensor([5, 6, 7]) + step, torch.tensor([10, 4, 7]) + step)
        found.append(logits)
        counts[-1].append(counted.count)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    (plain_prefill, plain_step), (prefill, step) = counts
    assert step < plain_step / 2 and prefill < plain_prefill * 2 / 3

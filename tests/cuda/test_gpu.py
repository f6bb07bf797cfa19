"""The CUDA engine on a GPU: the kernels as they are compiled, in captured graphs, over many tokens."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.adaptive import Adaptive
from fastmtp.decode.drafting.drafter import NewDrafter, chains
from fastmtp.decode.drafting.learned import Learned
from fastmtp.decode.plain import plain
from fastmtp.decode.sampling import choose
from fastmtp.decode.speculative import speculative
from fastmtp.engines.cuda.kernels.attention import attend
from fastmtp.engines.cuda.kernels.products import product
from fastmtp.engines.cuda.kernels.prompts import attend_in_order
from fastmtp.engines.cuda.kernels.rows import NEVER, Pages, Rows
from fastmtp.engines.cuda.kernels.shapes import PAGE, SPAN
from fastmtp.engines.cuda.load import load_cuda_engine
from fastmtp.engines.cuda.matrices import QUANTISED, Matrix, Quantised, quantise
from fastmtp.engines.protocol import Costs
from fastmtp.heads.shipped import shipped_head
from fastmtp.method.head import MTPHead
from tests.conftest import FAMILIES, random_ids, tiny_target
from tests.cuda.engine import Cuda
from tests.cuda.test_draws import SETTINGS, codes_of, logits, on_the_host
from tests.cuda.test_quantised import check_every_value, check_gated, check_scores, dequantised

pytestmark = pytest.mark.gpu

GREEDY = SamplingConfig()
COSTS = Costs({128: {1: 5.0, 16: 5.001}}, {1: 0.01})
TOKENS, PROMPTS = 20_000, 10


def adaptive(prompt: list[int], sampling: SamplingConfig, grammar: object = None) -> Adaptive:
    return Adaptive(Learned(COSTS), prompt, sampling)


DRAFTERS = pytest.mark.parametrize("new_drafter", [chains(3), adaptive], ids=["chain", "trees"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(2048, 1536), (1536, 8960), (6144, 4096)])
def test_rows_of_large_products_keep_their_bits(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    """In any place of any tile, beside any others, at the shapes of real models."""
    draw = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=draw, device="cuda").to(dtype)
    row, memory = torch.randn(inputs, generator=draw, device="cuda").to(dtype), torch.empty(1 << 24, device="cuda")
    found = []
    for place in range(48):
        x = torch.randn(48, inputs, generator=draw, device="cuda").to(dtype)
        x[place] = row
        found.append(product(x, Matrix(weight), memory, len(x))[:, place].clone())
    # Some tiles at once, as of a prompt.
    for count, places in ((64, range(0, 64, 9)), (256, range(0, 256, 31))):
        x = torch.randn(count, inputs, generator=draw, device="cuda").to(dtype)
        x[list(places)] = row
        found += product(x, Matrix(weight), memory, count)[:, list(places)].clone().unbind(1)
    assert all(torch.equal(one, found[0]) for one in found)
    torch.testing.assert_close(found[0].sum(0), row.float() @ weight.float().T, rtol=1e-2, atol=1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(12, 2, 128), (9, 3, 64), (32, 8, 128), (8, 4, 256)])
@pytest.mark.parametrize("window", [None, 500])
def test_rows_of_a_prompt_attend_as_each_by_itself(
    window: int | None, heads: int, key_heads: int, size: int, dtype: torch.dtype
) -> None:
    """To the bit, at the shapes of real models."""
    draw, device, begin, length = torch.Generator("cuda").manual_seed(0), torch.device("cuda"), 1200, 2224
    spans = length // SPAN + 1

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, device=device).to(dtype)

    keys, values, queries = (
        drawn(spans * PAGE, key_heads, size),
        drawn(spans * PAGE, key_heads, size),
        drawn(1024, heads, size),
    )
    tables = torch.randperm(spans, generator=draw, device=device).int()[None]
    for count in (64, 256, 1024):
        rows = Rows.empty(count, device)
        rows.facts[1:3], rows.facts[3] = torch.arange(begin, begin + count, device=device), NEVER
        how = Pages(keys, values, tables), torch.empty(count, heads * size, dtype=dtype, device=device)
        memory = [torch.empty(count * heads * spans * one, device=device) for one in (size, 2)]
        attend(queries[:count], rows, *how, (memory[0], memory[1]), size**-0.5, window, spans)
        expected = how[1].clone()
        attend_in_order(queries[:count], rows, *how, size**-0.5, window)
        assert torch.equal(how[1], expected)


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize(("outputs", "inputs"), [(2048, 1536), (1536, 8960), (6144, 4096), (576, 576)])
def test_rows_of_large_quantised_products(outputs: int, inputs: int, kind: Quantised) -> None:
    """Those of the weights that are stored, and a row's bits its own, however many rows are wanted."""
    draw = torch.Generator("cuda").manual_seed(0)
    matrix = quantise(torch.randn(outputs, inputs, generator=draw, device="cuda").to(torch.bfloat16), kind)
    x = torch.randn(48, inputs, generator=draw, device="cuda").bfloat16()
    memory = torch.empty(1 << 24, device="cuda")
    whole = product(x, matrix, memory, 48).clone()
    expected = x.double() @ dequantised(matrix, inputs).double().T
    torch.testing.assert_close(whole.sum(0).double(), expected, rtol=1e-3, atol=1e-3 * inputs**0.5)
    for rows, wanted in ((48, 1), (48, 2), (48, 8), (48, 17), (64, 48), (256, 48)):
        part = torch.randn(rows, inputs, generator=draw, device="cuda").bfloat16()
        part[:wanted] = x[-wanted:]
        assert torch.equal(product(part, matrix, memory, wanted)[:, :wanted], whole[:, -wanted:])


@pytest.mark.parametrize("kind", QUANTISED)
def test_every_quantised_value_is_converted_exactly(kind: Quantised) -> None:
    check_every_value(kind)


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("inputs", [64, 1536])
def test_scores_and_gated_products_of_quantised_weights(kind: Quantised, inputs: int) -> None:
    check_scores(kind, 2000, inputs)
    check_gated(kind, 200, inputs)


@DRAFTERS
@pytest.mark.parametrize("kind", QUANTISED)
def test_speculation_with_quantised_weights_changes_no_token(kind: Quantised, new_drafter: NewDrafter) -> None:
    target, prompt, engine = tiny_target("llama"), random_ids(300), Cuda(dtype=torch.bfloat16, quantised=kind)
    sequence = engine.sequence(target, MTPHead(target.model), list(range(100)))
    rounds = speculative(sequence, prompt, new_drafter(prompt, GREEDY), GREEDY)
    tokens = [token for one in islice(rounds, 60) for token in one.tokens]
    assert tokens == list(islice(plain(engine.sequence(target), prompt, GREEDY), len(tokens)))


@DRAFTERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_speculation_changes_no_token(family: str, dtype: torch.dtype, new_drafter: NewDrafter) -> None:
    target, prompt, engine = tiny_target(family), random_ids(300), Cuda(dtype=dtype)
    sequence = engine.sequence(target, MTPHead(target.model), list(range(100)))
    rounds = speculative(sequence, prompt, new_drafter(prompt, GREEDY), GREEDY)
    tokens = [token for one in islice(rounds, 60) for token in one.tokens]
    assert tokens == list(islice(plain(engine.sequence(target), prompt, GREEDY), len(tokens)))


@DRAFTERS
@pytest.mark.slow
def test_twenty_thousand_tokens_of_the_embedded_model(new_drafter: NewDrafter) -> None:
    """With the head that ships with it, whose drafts are accepted."""
    engine, directory = load_cuda_engine("smollm2", device=torch.device("cuda")), shipped_head("smollm2")
    assert directory is not None
    head, accepted = engine.load_head(directory), 0
    for seed in range(PROMPTS):
        prompt, tokens = random_ids(20, seed=seed), []
        rounds = speculative(engine.new_sequence(head), prompt, new_drafter(prompt, GREEDY), GREEDY)
        while len(tokens) < TOKENS // PROMPTS:
            settled = next(rounds)
            accepted += settled.accepted
            tokens += settled.tokens
        assert tokens == list(islice(plain(engine.new_sequence(), prompt, GREEDY), len(tokens)))
    assert accepted > TOKENS // 10


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_draws_from_a_real_vocabulary_are_the_host_s(sampling: SamplingConfig) -> None:
    """By the compiled arithmetic; few are left open."""
    left_open = 0
    for seed in range(10):
        rows, first = logits(16, 151_936, 3.0, seed), 100 * seed + 1
        for place, (row, code) in enumerate(zip(rows, codes_of(rows, sampling, first), strict=True), first):
            left_open += code < 0
            assert code < 0 or code == choose(row, sampling, place)
    assert left_open <= 5


@DRAFTERS
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_drawn_texts_are_the_host_s(sampling: SamplingConfig, new_drafter: NewDrafter) -> None:
    """Which has all logits."""
    target, prompt, engine = tiny_target("llama"), random_ids(30), Cuda(dtype=torch.bfloat16)
    rounds = speculative(
        engine.sequence(target, MTPHead(target.model)), prompt, new_drafter(prompt, sampling), sampling
    )
    tokens = [token for one in islice(rounds, 60) for token in one.tokens]
    for sequence in (engine.sequence(target), on_the_host(engine.sequence(target))):
        assert tokens == list(islice(plain(sequence, prompt, sampling), len(tokens)))


@pytest.mark.parametrize("sampling", [GREEDY, SETTINGS[-1]], ids=["greedy", "drawn"])
def test_launches_and_copies_of_a_round(sampling: SamplingConfig) -> None:
    """In real graphs too: of a chain or a token one launch and one copy, the launch being the next one's.

    Of a tree two and one, and one each where it asks on.
    """
    target, prompt, engine = tiny_target("llama"), random_ids(30), Cuda(dtype=torch.bfloat16)
    graphs = engine.open(target).machine.graphs
    sequence = engine.sequence(target, MTPHead(target.model))
    chain = speculative(sequence, prompt, chains(3)(prompt, sampling), sampling)
    for rounds in (chain, plain(engine.sequence(target), prompt, sampling)):
        list(islice(rounds, 3))
        graphs.launched = graphs.copied = 0
        next(rounds)
        assert (graphs.launched, graphs.copied) == (1, 1)
    trees = speculative(
        engine.sequence(target, MTPHead(target.model)), prompt, adaptive(prompt, sampling), sampling
    )
    list(islice(trees, 4))
    graphs.launched = graphs.copied = 0
    next(trees)
    assert graphs.launched == graphs.copied + 1

"""Draws on the device are the host's draws of the same logits: where rounding could decide, the device says so."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.adaptive import Adaptive
from fastmtp.decode.drafting.drafter import Chain, Drafter
from fastmtp.decode.drafting.learned import Learned
from fastmtp.decode.plain import plain
from fastmtp.decode.random_numbers import key, uniforms
from fastmtp.decode.sampling import choose, race
from fastmtp.decode.speculative import speculative
from fastmtp.engines.cuda.engine import CudaEngine
from fastmtp.engines.cuda.kernels.draws import DrawMemory, draw, expect
from fastmtp.engines.cuda.kernels.race import sampling_numbers
from fastmtp.engines.cuda.kernels.shapes import TILE
from fastmtp.engines.cuda.matrices import Matrix
from fastmtp.engines.protocol import Costs, TokenSequence, Values
from fastmtp.engines.torch.target import Target
from fastmtp.engines.tree import Tree
from fastmtp.method.acceptance import follow
from tests.conftest import random_ids
from tests.cuda.conftest import DEVICE, shallow
from tests.cuda.engine import POOL, Cuda, convert, cuda_engine, hopeful_head
from tests.cuda.test_greedy import counts
from tests.cuda.test_rounds import likely_head

CUDA = Cuda()
PROMPT = random_ids(3, seed=7)
# Forwards that cost the same up to 16 tokens, so that trees are large.
COSTS = Costs({128: {1: 5.0, 16: 5.001}}, {1: 0.01})
ALL = SamplingConfig(temperature=1.0, seed=2**64 - 3)
SETTINGS = [
    ALL,
    SamplingConfig(temperature=0.05, seed=1),
    SamplingConfig(temperature=1.7, top_k=1, seed=2),
    SamplingConfig(temperature=1.0, top_k=40, seed=3),
    SamplingConfig(temperature=1.0, top_p=0.3, seed=4),
    SamplingConfig(temperature=2.0, top_p=0.97, seed=5),
    SamplingConfig(temperature=1.0, min_p=0.05, seed=6),
    SamplingConfig(temperature=0.7, top_k=20, top_p=0.8, seed=7),
    SamplingConfig(temperature=1.5, top_k=30, top_p=0.9, min_p=0.02, seed=8),
    SamplingConfig(temperature=1.5, top_p=0.9, min_p=0.02, seed=9),
    SamplingConfig(temperature=1.0, top_k=2**31 - 1, seed=10),
]


@pytest.fixture
def llama() -> Target:
    return shallow("llama", 1)


def codes_of(
    rows_MN: np.ndarray, sampling: SamplingConfig, position: int, ids_N: np.ndarray | None = None
) -> list[int]:
    """What is told of the draw of each row, at this position and those after it."""
    count, tokens = rows_MN.shape
    weight_VH = torch.zeros(tokens if ids_N is None else int(ids_N.max()) + 1, TILE)
    weight_VH[range(tokens) if ids_N is None else np.maximum(ids_N, 0), :count] = torch.from_numpy(rows_MN.T.copy())
    ids = None if ids_N is None else torch.from_numpy(ids_N.astype(np.int32)).to(DEVICE)
    how = torch.from_numpy(np.stack([sampling_numbers(sampling)] * count)).to(DEVICE)
    positions = torch.arange(position - 1, position - 1 + count, dtype=torch.int32, device=DEVICE)
    found, codes = torch.zeros(2, count, dtype=torch.int32, device=DEVICE)
    memory = DrawMemory.empty(TILE, tokens, DEVICE)
    draw(torch.eye(TILE, device=DEVICE), Matrix(weight_VH.to(DEVICE)), ids, memory, how, positions, 1, found, codes)
    guessed = [code if code >= 0 else -1 - code for code in codes.tolist()]
    assert found.tolist() == guessed and all(0 <= token < len(weight_VH) for token in guessed)
    return codes.tolist()


def logits(count: int, tokens: int, spread: float, seed: int = 0) -> np.ndarray:
    return (spread * np.random.default_rng(seed).standard_normal((count, tokens))).astype(np.float32)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize(("tokens", "spread"), [(300, 2.0), (5000, 0.3), (5000, 3.0)])
def test_the_host_s_tokens(sampling: SamplingConfig, tokens: int, spread: float) -> None:
    """From peaked and flat distributions, of one chunk of tokens and of several."""
    rows = logits(8, tokens, spread)
    assert codes_of(rows, sampling, 300) == [choose(row, sampling, place) for place, row in enumerate(rows, 300)]


def test_tokens_of_a_list_have_their_own_numbers() -> None:
    """Whatever their order is; what is no token is never drawn."""
    row, ids = logits(1, 120, 2.0), np.random.default_rng(1).permutation(300)[:120]
    ids[7] = -1
    for sampling in SETTINGS:
        only = np.full(300, -np.inf, np.float32)
        only[ids[ids >= 0]] = row[0, ids >= 0]
        assert codes_of(row, sampling, 5, ids) == [choose(only, sampling, 5)]


def test_at_temperature_0_the_likeliest() -> None:
    rows = logits(4, 300, 2.0)
    assert codes_of(rows, SamplingConfig(seed=3), 1) == rows.argmax(-1).tolist()
    rows[:, 20] = rows[:, 200] = 9
    assert all(code < 0 for code in codes_of(rows, SamplingConfig(seed=3), 1))


def drawn_apart(closeness: float) -> np.ndarray:
    """Logits of two tokens whose times are this close in proportion, of which 5 wins; the others have no weight."""
    row, numbers = np.full((1, 300), -1000, np.float32), uniforms(key(ALL.seed, 9), np.array([5, 250]))
    times = -np.log1p(-numbers)
    row[0, 5], row[0, 250] = 0, np.log(times[1] / times[0]) - closeness
    return row


@pytest.mark.parametrize(("closeness", "is_open"), [(2e-5, True), (-2e-5, True), (1e-3, False), (-1e-3, False)])
def test_times_that_rounding_could_change_are_left_open(closeness: float, is_open: bool) -> None:
    (code,) = codes_of(drawn_apart(closeness), ALL, 9)
    assert (code < 0) == is_open
    assert code < 0 or code == choose(drawn_apart(closeness)[0], ALL, 9) == (5 if closeness > 0 else 250)


@pytest.mark.parametrize("closeness", [2e-5, 1e-3])
@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("way", ["top_p", "min_p"])
def test_limits_that_rounding_could_cross_are_left_open(way: str, side: int, closeness: float) -> None:
    """Where the token that wins is just inside or outside of what is kept."""
    row, winner = np.full((1, 300), -1000, np.float32), 17
    row[0, [3, winner]] = np.log(np.float32([0.6, 0.4]))
    if way == "top_p":
        sampling = replace(ALL, top_p=0.6 * (1 + side * closeness))
    else:
        sampling = replace(ALL, min_p=0.4 / 0.6 * (1 - side * closeness))
    position = next(place for place in range(1, 99) if choose(row[0], ALL, place) == winner)
    (code,) = codes_of(row, sampling, position)
    assert (code < 0) == (closeness < 1e-4)
    assert code < 0 or code == choose(row[0], sampling, position) == (winner if side > 0 else 3)


def test_weights_that_the_host_rounds_to_equal_ones_are_left_open() -> None:
    """It keeps the first of these, where the likelier one wins."""
    row, sampling = np.full((1, 300), -1e6, np.float32), SamplingConfig(temperature=1000.0, top_p=0.3)
    row[0, [3, 170]] = -1e-5, 0
    position = next(place for place in range(1, 99) if choose(row[0], replace(sampling, top_p=1.0), place) == 170)
    assert choose(row[0], sampling, position) == 3
    assert codes_of(row, sampling, position)[0] < 0


@pytest.mark.parametrize(("top_p", "is_open"), [(1.0, False), (0.9, False), (0.5, True)])
def test_tokens_close_to_a_limit_count_only_where_they_decide(top_p: float, is_open: bool) -> None:
    """Here none wins, and whether they are kept matters where top-p has half of the weights."""
    row, sampling = np.full((1, 300), -1000, np.float32), replace(ALL, min_p=0.01, top_p=top_p)
    row[0, 3], row[0, 17], row[0, 100:200] = 0, np.log(0.99), np.log(0.01) + 2e-5
    position = next(place for place in range(1, 99) if choose(row[0], replace(sampling, top_p=0.8), place) == 17)
    (code,) = codes_of(row, sampling, position)
    assert (code < 0) == is_open and (is_open or code == choose(row[0], sampling, position))


def test_equal_logits_at_the_end_of_top_k_are_left_open() -> None:
    """Which of them stays is nobody's promise."""
    row = logits(1, 300, 2.0)
    order = np.argsort(-row[0])
    row[0, order[5]] = row[0, order[4]]
    assert codes_of(row, replace(ALL, top_k=5), 3)[0] < 0
    assert codes_of(row, replace(ALL, top_k=6), 3) == [choose(row[0], replace(ALL, top_k=6), 3)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_what_is_no_number_is_left_open(sampling: SamplingConfig) -> None:
    rows = np.full((2, 300), np.nan, np.float32)
    rows[1, 5] = 1
    assert all(code < 0 for code in codes_of(rows[:1], sampling, 1))
    codes_of(rows, sampling, 1)


@pytest.mark.parametrize("sampling", [SamplingConfig(), *SETTINGS], ids=str)
@pytest.mark.parametrize("width", [4, 32])
def test_the_expected_candidate_is_the_first_of_the_race(sampling: SamplingConfig, width: int) -> None:
    """After nodes along the path that the device drafts."""
    how = torch.from_numpy(np.stack([sampling_numbers(sampling)])).to(DEVICE)
    for seed in range(5):
        draws = np.random.default_rng(seed)
        chances = -np.sort(-draws.dirichlet(np.ones(width))).astype(np.float32)
        tokens = draws.permutation(300)[:width]
        likely = torch.from_numpy(np.concatenate([tokens, chances]).astype(np.float32)).to(DEVICE)
        following, token = torch.zeros(1, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
        state = torch.tensor([10, 3, 0], dtype=torch.int32, device=DEVICE)
        expect(likely, how, state, 2, following, token)
        wanted = race(tokens.tolist(), chances.tolist(), sampling, 10 + 3 + 1 + 2)[0][0]
        assert (following.item(), token.item()) == (wanted, wanted)


def on_the_host(sequence: TokenSequence) -> TokenSequence:
    """One whose tokens are drawn from its logits."""
    sequence.verify_drawn = sequence.verify_chain = lambda *_: None  # type: ignore[method-assign]
    return sequence


def drafter_of(name: str, sampling: SamplingConfig) -> Drafter:
    return Chain(2, sampling) if name == "chain" else Adaptive(Learned(COSTS), PROMPT, sampling)


WAYS = pytest.mark.parametrize("way", ["plain", "chain", "trees"])
TEXTS = [SETTINGS[3], SETTINGS[7], SETTINGS[5]]


def tokens_of(sequence: TokenSequence, way: str, sampling: SamplingConfig, rounds: int) -> list[int]:
    if way == "plain":
        return list(islice(plain(sequence, PROMPT, sampling), rounds))
    found = speculative(sequence, PROMPT, drafter_of(way, sampling), sampling)
    return [token for one in islice(found, rounds) for token in one.tokens]


@WAYS
@pytest.mark.parametrize(
    "sampling", [TEXTS[0], *(pytest.param(one, marks=pytest.mark.slow) for one in TEXTS[1:])], ids=str
)
def test_a_text_is_the_host_s(llama: Target, way: str, sampling: SamplingConfig) -> None:
    """Drawn on the device, drafted or not, and drawn from the logits of a forward a token."""
    found = tokens_of(CUDA.sequence(llama, hopeful_head(llama), list(range(280)), 4), way, sampling, 5)
    assert found == tokens_of(on_the_host(CUDA.sequence(llama)), "plain", sampling, len(found))


@WAYS
def test_the_host_s_token_counts_where_the_device_s_is_another(
    llama: Target, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every draw is left open, and the device goes on with the wrong ones: ahead, with acceptance and drafts."""
    wanted = tokens_of(on_the_host(CUDA.sequence(llama)), "plain", TEXTS[0], 20)
    monkeypatch.setattr("fastmtp.engines.cuda.sequence.known", lambda code: None)
    for seed in (TEXTS[0].seed, 77):
        monkeypatch.setattr(
            "fastmtp.engines.cuda.scoring.sampling_numbers",
            lambda sampling, seed=seed: sampling_numbers(replace(sampling, seed=seed)),
        )
        engine = CudaEngine(convert(llama, torch.float32), POOL)
        head = CUDA.head(llama, likely_head(llama))
        found = tokens_of(engine.new_sequence(head), way, TEXTS[0], 3)
        assert found == wanted[: len(found)]


@pytest.mark.parametrize("steps", [0, 2])
def test_a_text_goes_on_with_another_sampling(llama: Target, steps: int) -> None:
    """What was launched ahead was drawn in the old way, and is dropped."""
    sequence, token = CUDA.sequence(llama, likely_head(llama)), 4
    sequence.prefill(PROMPT)
    for sampling in [one for one in (TEXTS[0], SamplingConfig(), TEXTS[1]) for _ in range(3)]:
        if steps:
            found = sequence.verify_chain(token, steps, sampling)
            assert found is not None
            tree, tokens = found
        else:
            tree = Tree(token)
            tokens = sequence.verify_drawn(tree, sampling) if sampling.temperature else sequence.verify_greedy(tree)
        length = len(sequence.tokens) + 1
        wanted = [choose(sequence.logits(node), sampling, length + node) for node in range(steps + 1)]
        assert tokens == wanted
        path, token = follow(wanted.__getitem__, tree.child)
        sequence.commit(path)


def test_trees_of_more_than_a_tile(llama: Target) -> None:
    """Each row by its own place in the text."""
    sequence, alone, tree = CUDA.sequence(llama), CUDA.sequence(llama), Tree(4)
    for node in range(20):
        tree.add(max(0, node - 2), node + 5)
    tree.select(range(len(tree.nodes)))
    for one in (sequence, alone):
        one.prefill(PROMPT)
    logits_MV = alone.verify(tree)
    places = [len(PROMPT) + 1 + tree.nodes[node].depth for node in tree.verified]
    wanted = [choose(row, ALL, place) for row, place in zip(logits_MV, places, strict=True)]
    assert sequence.verify_drawn(tree, ALL) == wanted


@pytest.mark.parametrize(("rows", "wanted"), [([[0], [], [2]], (1, 1)), ([[0], [3, 1], [2, 16]], (4, 2))])
def test_sequences_are_drawn_together(llama: Target, rows: list[list[int]], wanted: tuple[int, int]) -> None:
    """Each by its own settings, greedy ones among them, at its own places; in one launch up to a tile of rows."""
    engine, many = cuda_engine(llama), max(map(max, filter(None, rows))) + 1
    trees = [Tree(1), Tree.chain([1, 2, 3, 4]), Tree.chain(random_ids(many, seed=4))]
    sequences, samplings = [engine.new_sequence() for _ in trees], [TEXTS[0], SamplingConfig(), TEXTS[1]]
    for count, sequence in enumerate(sequences, 2):
        sequence.prefill(random_ids(count, seed=count))
    expected = [
        [choose(logits_MV[row], sampling, len(sequence.tokens) + 1 + row) for row in own]
        for sequence, tree, own, sampling in zip(sequences, trees, rows, samplings, strict=True)
        for logits_MV in [sequence.verify(tree)]
    ]
    found: list[Values] = []
    run = lambda: found.extend(engine.verify_together(sequences, trees, rows, samplings))  # noqa: E731
    launched = counts(engine.machine.graphs, run)
    assert (found, launched) == (expected, wanted)


@pytest.mark.parametrize(("way", "wanted"), [("plain", (1, 1)), ("chain", (1, 1)), ("trees", (2, 1))])
def test_launches_and_copies_of_a_round(llama: Target, way: str, wanted: tuple[int, int]) -> None:
    """As of a greedy one: what is copied are tokens, and the next round of a chain or token runs ahead."""
    graphs, sampling = cuda_engine(llama).machine.graphs, TEXTS[0]
    sequence, found = CUDA.sequence(llama, likely_head(llama)), list[tuple[int, int]]()
    if way == "plain":
        rounds = plain(sequence, PROMPT, sampling)
    else:
        rounds = speculative(sequence, PROMPT, drafter_of(way, sampling), sampling)
    list(islice(rounds, 3))
    found = [counts(graphs, lambda: next(rounds)) for _ in range(3)]
    assert found.count(wanted) >= 2

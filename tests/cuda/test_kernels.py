"""Each kernel computes what PyTorch does, and a row's bits depend on nothing but the row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, rms_norm, scaled_dot_product_attention, silu

from fastmtp.engines.cuda.kernels import attention, prompts
from fastmtp.engines.cuda.kernels.attention import attend
from fastmtp.engines.cuda.kernels.chains import accept, begin, follow, hand_on
from fastmtp.engines.cuda.kernels.likeliest import likeliest
from fastmtp.engines.cuda.kernels.norms import add_norm, embed, join
from fastmtp.engines.cuda.kernels.products import gated, product
from fastmtp.engines.cuda.kernels.rotation import rotate
from fastmtp.engines.cuda.kernels.rows import NEVER, Pages, Rows
from fastmtp.engines.cuda.kernels.scores import BlockScores, argmax, block_scores, scores
from fastmtp.engines.cuda.kernels.shapes import PAGE, PATH, SPAN, TILE, block, division
from fastmtp.engines.cuda.matrices import QUANTISED, Matrix, Quantised, quantise
from tests.cuda.conftest import DEVICE

TYPES = [torch.float32, torch.float16, torch.bfloat16]
EPSILON = 1e-6


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def memory(numbers: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((numbers,), -7, dtype=dtype, device=DEVICE)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    rough = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found.float(), expected.float(), rtol=rough, atol=rough)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(40, 24), (33, 700)])
def test_products(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    """Of shapes that no block divides, in several parts where the inputs are many."""
    x, weight = drawn(2 * TILE, inputs, dtype=dtype), drawn(outputs, inputs, seed=1, dtype=dtype) / inputs**0.5
    parts = product(x, Matrix(weight), memory(1 << 14), len(x))
    assert len(parts) == division(outputs, inputs, 16).parts == (2 if inputs > 512 else 1)
    close(parts.sum(0), x.float() @ weight.float().T)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_rows_product_depends_on_the_row_alone(dtype: torch.dtype) -> None:
    """In any place of any tile, whatever else is in it."""
    weight, row = drawn(33, 600, dtype=dtype, seed=1), drawn(600, seed=2, dtype=dtype)
    found = []
    for place in (0, 1, 7, 15, 16, 31):
        x = (
            drawn(2 * TILE, 600, seed=place, dtype=dtype)
            if place
            else torch.zeros(TILE, 600, device=DEVICE).to(dtype)
        )
        x[place] = row
        found.append(product(x, Matrix(weight), memory(1 << 14), len(x))[:, place].clone())
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize(("kind", "tiles"), [(None, 4), (None, 16), *((kind, 4) for kind in QUANTISED)])
def test_tiles_of_rows_together_are_those_alone(kind: Quantised | None, tiles: int) -> None:
    """To the bit, of products and gated ones; the last tile has fewer rows than are wanted of the others."""
    rows, wanted, inputs, outputs = tiles * TILE, (tiles - 1) * TILE + 5, 300, 150
    x = drawn(rows, inputs, dtype=torch.bfloat16)
    first, second = (drawn(outputs, inputs, seed=seed).bfloat16() / inputs**0.5 for seed in (1, 2))
    matrix, other = (Matrix(one) if kind is None else quantise(one.float(), kind) for one in (first, second))
    assert block(rows, matrix.bits).tiles > block(TILE, matrix.bits).tiles == 1
    whole, out = product(x, matrix, memory(1 << 16), wanted), torch.empty(rows, outputs, device=DEVICE)
    gated(x, (matrix, other), None, out, wanted, gelu=False)
    for start in range(0, wanted, TILE):
        own, end = x[start : start + TILE], min(start + TILE, wanted)
        alone, out_alone = product(own, matrix, memory(1 << 14), end - start), torch.empty_like(out[:TILE])
        gated(own, (matrix, other), None, out_alone, end - start, gelu=False)
        assert torch.equal(whole[:, start:end], alone[:, : end - start])
        assert torch.equal(out[start:end], out_alone[: end - start])


@pytest.mark.parametrize("is_gelu", [False, True])
def test_gated_products(is_gelu: bool) -> None:
    x, gate, up = drawn(TILE, 24), drawn(40, 24, seed=1), drawn(40, 24, seed=2)
    biases = drawn(40, seed=3), drawn(40, seed=4)
    out = torch.empty(TILE, 40, device=DEVICE)
    for own in (biases, None):
        gated(x, (Matrix(gate), Matrix(up)), own, out, TILE, gelu=is_gelu)
        left, right = (
            x @ weight.T + (0 if own is None else bias) for weight, bias in zip((gate, up), biases, strict=True)
        )
        close(out, (gelu(left, approximate="tanh") if is_gelu else silu(left)) * right)


def test_norms_and_the_residual_stream() -> None:
    """A product's parts and bias, a norm around them, and the sum; only the rows wanted are written."""
    hidden, wanted = 24, 3
    parts, residual = drawn(2, TILE, hidden), drawn(TILE, hidden, seed=1)
    gains, bias, outer = (drawn(hidden, seed=seed) for seed in (2, 3, 4))
    out = torch.full((TILE, hidden), -7.0, device=DEVICE)
    for own_bias, own_outer, adds in ((None, None, True), (bias, outer, True), (bias, None, False)):
        stream = residual.clone()
        add_norm(parts, stream, gains, out, EPSILON, wanted, bias_H=own_bias, outer_H=own_outer, adds=adds)
        new = parts.sum(0) + (0 if own_bias is None else bias)
        new = new if own_outer is None else rms_norm(new, (hidden,), outer, EPSILON)
        expected = residual + new if adds else new
        close(stream[:wanted], expected[:wanted])
        close(out[:wanted], rms_norm(expected, (hidden,), gains, EPSILON)[:wanted])
        assert torch.equal(stream[wanted:], residual[wanted:]) and (out[wanted:] == -7).all()
    add_norm(None, residual, gains, out, EPSILON, wanted)
    close(out[:wanted], rms_norm(residual, (hidden,), gains, EPSILON)[:wanted])


def test_embeddings_and_the_heads_input() -> None:
    table, states = drawn(50, 24), drawn(TILE, 24, seed=1)
    tokens = torch.tensor([7, 0, 49], dtype=torch.int32, device=DEVICE)
    out, joined = torch.zeros(TILE, 24, device=DEVICE), torch.zeros(TILE, 48, device=DEVICE)
    embed(tokens, table, 2.5, out)
    close(out[:3], 2.5 * table[tokens.long()])
    gains = drawn(24, seed=2), drawn(24, seed=3)
    join(states, tokens, table, gains, joined, 2.5, EPSILON)
    halves = states[:3], 2.5 * table[tokens.long()]
    expected = [rms_norm(half, (24,), gain, EPSILON) for half, gain in zip(halves, gains, strict=True)]
    close(joined[:3], torch.cat(expected, -1))


HEADS, KEY_HEADS, SIZE = 6, 2, 12


class Text:
    """Keys and values of texts in pages that are out of order, and attention to them."""

    def __init__(self, rows: int, positions: int) -> None:
        pages = -(-positions // PAGE)
        slots = (2 * pages + 1) * PAGE
        self.keys, self.values = (torch.full((slots, KEY_HEADS, SIZE), torch.nan, device=DEVICE) for _ in "kv")
        tables = torch.zeros(2, pages, dtype=torch.int32, device=DEVICE)
        tables[1] = torch.arange(2 * pages, 0, -2)
        self.pages, self.rows = Pages(self.keys, self.values, tables), Rows.empty(rows, DEVICE)
        self.rows.facts[3], self.rows.facts[4] = NEVER, 1

    def slot(self, place: int) -> int:
        return int(self.pages.tables[1, place // PAGE]) * PAGE + place % PAGE

    def put(self, keys: Tensor, values: Tensor, places: list[int]) -> None:
        for place, key, value in zip(places, keys, values, strict=True):
            self.keys[self.slot(place)], self.values[self.slot(place)] = key, value

    def attend(self, queries: Tensor, window: int | None = None) -> Tensor:
        count = len(self.rows)
        spans = int(self.rows.facts[1].max()) // SPAN + 1
        sums = memory(count * HEADS * spans * SIZE), memory(count * HEADS * spans * 2)
        out = torch.zeros(count, HEADS * SIZE, device=DEVICE)
        attend(queries, self.rows, self.pages, out, sums, SIZE**-0.5, window, spans)
        return out


def expected_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Of one position to all keys."""
    group = HEADS // KEY_HEADS
    heads = [part.repeat_interleave(group, 1).transpose(0, 1) for part in (keys, values)]
    return scaled_dot_product_attention(queries[:, None], *heads)[:, 0].flatten()


@pytest.mark.parametrize("together", [16, 2])
@pytest.mark.parametrize("window", [None, 5, 70, 200])
def test_attention(window: int | None, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the ends of pages, in one group of spans and in several; what is not attended to may be no number."""
    monkeypatch.setattr(attention, "_TOGETHER", together)
    positions = [0, 3, PAGE - 1, PAGE, 2 * PAGE + 5, 4 * PAGE + 2]
    length = positions[-1] + 1
    keys, values = drawn(length, KEY_HEADS, SIZE, seed=1), drawn(length, KEY_HEADS, SIZE, seed=2)
    queries, found = drawn(len(positions), HEADS, SIZE), []
    for row, position in enumerate(positions):
        text = Text(1, length)
        text.put(keys[: position + 1], values[: position + 1], list(range(position + 1)))
        text.rows.facts[1:3, 0] = position
        found.append(text.attend(queries[row : row + 1], window)[0])
        first = 0 if window is None else max(0, position - window + 1)
        close(found[-1], expected_attention(queries[row], keys[first : position + 1], values[first : position + 1]))
    text = Text(len(positions), length)
    text.put(keys, values, list(range(length)))
    text.rows.facts[1] = text.rows.facts[2] = torch.tensor(positions)
    assert torch.equal(text.attend(queries, window), torch.stack(found))


@pytest.mark.parametrize("window", [None, 5, PAGE + 3])
@pytest.mark.parametrize("begin", [0, PAGE - 20])
def test_rows_of_a_prompt_attend_as_each_by_itself(
    begin: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, several tiles in a program or one, with rows left over in the last."""
    count, whole = 5 * TILE - 5, 5 * TILE
    keys, values = (drawn(begin + count, KEY_HEADS, SIZE, seed=seed) for seed in (1, 2))
    queries = drawn(whole, HEADS, SIZE)
    text = Text(whole, begin + count)
    text.put(keys, values, list(range(begin + count)))
    text.rows.facts[1, :count] = torch.arange(begin, begin + count)
    text.rows.facts[1, count:] = text.rows.facts[4, count:] = 0
    expected = text.attend(queries, window)
    for enough in (1, 2, 5):
        monkeypatch.setattr(prompts, "_ENOUGH", enough)
        out = memory(whole * HEADS * SIZE).view(whole, -1)
        prompts.attend_in_order(queries, text.rows, text.pages, out, SIZE**-0.5, window)
        assert torch.equal(out[:count], expected[:count])


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("start", [3, PAGE - 2])
def test_a_row_of_a_tree_is_the_row_of_its_own_text(start: int, window: int | None) -> None:
    """Bit for bit: the same keys in the same order, wherever they are."""
    parents = [-1, 0, 0, 1, 2, 4, 1]
    keys, values = (drawn(start + len(parents), KEY_HEADS, SIZE, seed=seed) for seed in (1, 2))
    queries, paths = drawn(len(parents), HEADS, SIZE), []
    tree = Text(len(parents), 2 * PAGE)
    tree.put(keys, values, list(range(start + len(parents))))
    for row, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), row])
        tree.rows.facts[1:4, row] = torch.tensor([start + len(paths[row]) - 1, start + row, start])
        tree.rows.paths[row, : len(paths[row])] = torch.tensor(paths[row])
    found = tree.attend(queries, window)
    for row, path in enumerate(paths):
        alone, chosen = Text(1, 2 * PAGE), [*range(start), *(start + node for node in path)]
        alone.put(keys[chosen], values[chosen], list(range(len(chosen))))
        alone.rows.facts[1:3] = len(chosen) - 1
        assert torch.equal(alone.attend(queries[row : row + 1], window)[0], found[row])


@pytest.mark.parametrize("normed", [False, True])
def test_rotation_and_writing_to_the_caches(normed: bool) -> None:
    """Queries stay with their rows, keys and values go to the rows' places; values are not rotated."""
    width, rows = (HEADS + 2 * KEY_HEADS) * SIZE, 3
    parts, bias, gains = drawn(2, TILE, width), drawn(width, seed=1), drawn(2, SIZE, seed=2)
    angles = torch.rand(9, SIZE // 2, device=DEVICE)
    text = Text(rows, PAGE)
    text.rows.facts[1] = torch.tensor([4, 5, 5])
    text.rows.facts[2] = torch.tensor([4, 5, 6])
    queries = torch.zeros(TILE, HEADS, SIZE, device=DEVICE)
    rope = angles.cos(), angles.sin()
    rotate(parts, bias, gains if normed else None, rope, text.rows, text.pages, queries, EPSILON)
    for row in range(rows):
        heads = (parts.sum(0)[row] + bias).view(-1, SIZE)
        q, k, v = heads.split([HEADS, KEY_HEADS, KEY_HEADS])
        if normed:
            q, k = (rms_norm(one, (SIZE,), gain, EPSILON) for one, gain in zip((q, k), gains, strict=True))
        turn = angles[text.rows.facts[1, row]]
        cos, sin = (torch.cat([one, one]) for one in (turn.cos(), turn.sin()))
        q, k = (one * cos + torch.cat([-one[:, SIZE // 2 :], one[:, : SIZE // 2]], -1) * sin for one in (q, k))
        slot = text.slot(int(text.rows.facts[2, row]))
        close(queries[row], q)
        close(text.keys[slot], k)
        close(text.values[slot], v)
    assert not queries[rows:].any() and int(text.keys[:, 0, 0].isfinite().sum()) == rows


@pytest.mark.parametrize("listed", [False, True])
def test_scores_and_their_argmax(listed: bool) -> None:
    """The first of equal scores, in the order of a list; what is no token of a list is never chosen."""
    states, weight = drawn(TILE, 24), drawn(200, 24, seed=1)
    weight[150] = weight[20]
    states[3] = weight[20]
    ids = torch.tensor([150, 3, -1, 20, 9, *range(60, 140)], dtype=torch.int32, device=DEVICE) if listed else None
    count = len(ids) if listed else 200
    out, tokens = torch.zeros(TILE, count, device=DEVICE), memory(5, torch.int32)
    scores(states, Matrix(weight), ids, out)
    expected = states @ weight.T
    if ids is not None:
        expected = expected[:, ids.long().clamp(min=0)].masked_fill(ids < 0, -torch.inf)
    close(out, expected)
    codes = memory(5, torch.int32)
    argmax(states, Matrix(weight), ids, (memory(TILE * 8), memory(TILE * 8, torch.int32)), tokens, codes)
    found = out[:5].argmax(-1)
    assert tokens.tolist() == (found if ids is None else ids[found]).tolist()
    assert tokens[3] == (150 if listed else 20)
    assert torch.equal(codes, tokens)


def test_each_tile_may_score_tokens_of_its_own() -> None:
    states, weight = drawn(2 * TILE, 24), drawn(200, 24, seed=1)
    ids = torch.tensor([[*range(70)], [*range(69, 0, -1), -1]], dtype=torch.int32, device=DEVICE)
    out = torch.zeros(2 * TILE, 70, device=DEVICE)
    scores(states, Matrix(weight), ids, out)
    for tile, own in enumerate(ids):
        alone = torch.zeros(TILE, 70, device=DEVICE)
        scores(states[tile * TILE :][:TILE], Matrix(weight), own, alone)
        assert torch.equal(out[tile * TILE :][:TILE], alone)


@pytest.mark.parametrize("width", [4, 32])
def test_the_likeliest_tokens_of_rows(width: int) -> None:
    """In order, of equal ones the first in the list, each once; where a list has no more there is none."""
    states, weight = drawn(2 * TILE, 24), drawn(200, 24, seed=1)
    weight[150] = weight[20]
    states[:3], states[TILE : TILE + 3] = weight[20], states[:3]
    lists = torch.full((2, 140), -1, dtype=torch.int32, device=DEVICE)
    lists[0] = torch.arange(140).flip(0) + 20
    lists[0, 100], lists[1, :8] = 20, torch.tensor([3, 150, 20, 5, 20, 6, 7, 8])
    for ids, count in ((None, 200), (lists, 140)):
        found, answer = BlockScores.empty(2 * TILE, count, DEVICE), torch.zeros(6, 2 * width, device=DEVICE)
        block_scores(states, Matrix(weight), ids, found, 3)
        assert not found.logits_RN[3:TILE].any(), "rows that nobody asks for cost bandwidth"
        logits_RN = found.logits_RN.clone()
        likeliest(found, ids, answer)
        for place, own in enumerate(answer.tolist()):
            tile, row = divmod(place, 3)
            logits_N, tokens = logits_RN[tile * TILE + row], list(range(200)) if ids is None else ids[tile].tolist()
            order = logits_N.sort(descending=True, stable=True).indices.tolist()
            wanted = [*dict.fromkeys(tokens[column] for column in order if tokens[column] >= 0)][:width]
            assert own[:width] == wanted + [-1] * (width - len(wanted))
            chances = logits_N.softmax(-1)[[tokens.index(token) for token in wanted]]
            close(torch.tensor(own[width : width + len(wanted)]), chances.cpu())


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_scores_that_are_no_numbers_give_a_token() -> None:
    tokens = memory(TILE, torch.int32)
    weight = torch.full((70, 24), torch.nan, device=DEVICE)
    best = memory(TILE * 8), memory(TILE * 8, torch.int32)
    argmax(drawn(TILE, 24), Matrix(weight), None, best, tokens, tokens)
    assert ((tokens >= 0) & (tokens < 70)).all()


@pytest.mark.parametrize(
    ("found", "accepted"), [([5, 6, 7, 8], 3), ([5, 6, 1, 7], 2), ([5, 1, 7, 8], 1), ([1] * 4, 0)]
)
def test_acceptance(found: list[int], accepted: int) -> None:
    """Drafts count up to the first one that is not the target's token."""
    verified, state = Rows.empty(4, DEVICE), torch.zeros(3, dtype=torch.int32, device=DEVICE)
    verified.facts[0] = torch.tensor([9, 5, 6, 7])
    verified.facts[1] = torch.arange(20, 24)
    answer = memory(7, torch.int32)
    tokens = torch.tensor(found, dtype=torch.int32, device=DEVICE)
    accept(state, tokens, -1 - tokens, verified, answer)
    assert answer.tolist() == [5, 6, 7, *(-1 - token for token in found)]
    assert state.tolist() == [20, accepted + 1, 0]


@pytest.mark.parametrize(
    ("found", "taken"),
    [([5, 6, 7, 1, 8], [0, 1, 2]), ([6, 5, 1, 4, 8], [0, 3]), ([5, 9, 1, 1, 1], [0, 1, 4]), ([1] * 5, [0])],
)
@pytest.mark.parametrize("rows", [5, 8])
def test_the_path_that_is_accepted(found: list[int], taken: list[int], rows: int) -> None:
    """Through the tree 0 - (1 - (2, 4), 3), by the target's tokens; rows that fill the graph are on no path."""
    verified, state = Rows.empty(rows, DEVICE), torch.zeros(3, dtype=torch.int32, device=DEVICE)
    verified.facts[:, 5:] = torch.tensor([1, 0, 0, NEVER, 0], dtype=torch.int32)[:, None]
    verified.facts[0, :5] = torch.tensor([3, 5, 6, 6, 9])
    verified.facts[1, :5] = torch.tensor([20, 21, 22, 21, 22])
    verified.facts[3:, :5] = torch.tensor([[20], [7]])
    for row, path in enumerate(([0], [0, 1], [0, 1, 2], [0, 3], [0, 1, 4])):
        verified.paths[row, : len(path)] = torch.tensor(path)
    given = torch.tensor([*found, 1, 1, 1], dtype=torch.int32, device=DEVICE)
    rows_taken, after = memory(TILE, torch.int32), memory(TILE, torch.int32)
    follow(verified, given, state, rows_taken, after)
    assert state.tolist() == [20, len(taken), 7]
    assert rows_taken[: len(taken)].tolist() == taken
    assert after[: len(taken)].tolist() == [found[row] for row in taken]


def test_a_chain_is_accepted_up_to_its_first_other_token() -> None:
    """Or to its end: what fills the graph is no part of it, whatever its token."""
    verified, state = Rows.empty(8, DEVICE), torch.zeros(3, dtype=torch.int32, device=DEVICE)
    verified.facts[0, :4] = torch.tensor([9, 5, 6, 7])
    verified.facts[1, :4], verified.facts[3] = torch.arange(20, 24), NEVER
    taken, after = memory(TILE, torch.int32), memory(TILE, torch.int32)
    for found, count in (([5, 6, 1, 7, 0, 0, 0, 0], 3), ([5, 6, 7, 0, 0, 0, 0, 0], 4)):
        follow(verified, torch.tensor(found, dtype=torch.int32, device=DEVICE), state, taken, after)
        assert (state.tolist(), taken[:count].tolist()) == ([20, count, 0], list(range(count)))
        assert after[:count].tolist() == found[:count]


def test_rows_of_a_round() -> None:
    """Those that wait for the head, the draft steps that follow them, and those to verify."""
    state = torch.tensor([10, 2, 5], dtype=torch.int32, device=DEVICE)
    found = torch.tensor([31, 32, 33, 34], dtype=torch.int32, device=DEVICE)
    waiting, verified = Rows.empty(4, DEVICE), Rows.empty(4, DEVICE)
    steps = torch.zeros(2, 5, dtype=torch.int32, device=DEVICE)
    begin(state, found, waiting, steps, verified)
    assert waiting.facts.tolist() == [[31, 32, 33, 34], [10, 11, 12, 13], [10, 11, 12, 13], [NEVER] * 4, [5] * 4]
    assert verified.facts[1:].tolist() == [[12, 13, 14, 15], [12, 13, 14, 15], [NEVER] * 4, [5] * 4]
    assert verified.tokens[0] == 32
    assert steps.tolist() == [[0, 12, 12, NEVER, 5], [0, 13, 13, NEVER, 5]]
    states, given, tokens = drawn(TILE, 24), torch.zeros(TILE, 24, device=DEVICE), found + 10
    step = Rows(steps[0].view(5, 1), torch.zeros(1, PATH, dtype=torch.int32, device=DEVICE))
    hand_on(state, states, tokens, given, step, verified, 0)
    assert torch.equal(given[0], states[1]) and verified.tokens[1] == steps[0, 0] == 42
    hand_on(state, states, tokens, given, None, verified, 2)
    assert torch.equal(given[0], states[1]) and verified.tokens[3] == 41

"""What calibration is fitted to is what decoding would see."""

from __future__ import annotations

import pytest
import torch

from fastmtp.config import SamplingConfig
from fastmtp.decode.policy import LEAST, WIDTH
from fastmtp.evaluate.calibrate import Observed, calibrate, observe
from fastmtp.evaluate.reliability import Statements
from fastmtp.models.calibration import AS_SAID
from fastmtp.models.target import Target
from fastmtp.sampling import guess_law, probabilities
from fastmtp.train.forward import text_states
from fastmtp.vocabulary.lists import VocabularyLists
from tests.conftest import reference
from tests.engines import Engine
from tests.evaluate.test_reliability import statements
from tests.train.test_recursion import GREEDY, greedy_text, tuned_head

DRAWN = SamplingConfig(temperature=0.8, top_k=40, top_p=0.95)
START = 8


@pytest.mark.parametrize("lists", [VocabularyLists({}), VocabularyLists.of(range(0, 300, 3))])
def test_greedy_statements_are_the_candidates(llama: Target, lists: VocabularyLists) -> None:
    """Of every tree along the target's greedy answer: the candidates that an engine names, step by step."""
    head, text = tuned_head(llama), greedy_text(llama, 1)
    found = observe(head, llama, reference(llama, text), START, lists, 3, GREEDY)
    expected: list[list[tuple[float, bool]]] = [[], [], []]
    backend = Engine().backend(llama, head, lists if lists.lists else None)
    backend.prefill(text[:START])
    for root in range(START, len(text) - 1):
        candidates, node, reached = backend.start_tree(text[root], WIDTH), 0, 1.0
        for step, token in enumerate(text[root + 1 : root + 4]):
            pairs = list(zip(candidates.tokens, candidates.confidences, strict=True))
            named = {one: said for one, said in pairs if reached * said >= LEAST}
            expected[step] += [(said, one == token) for one, said in named.items()]
            if token not in named or step == 2:
                break
            reached *= named[token]
            candidates, node = backend.extend_tree([node], [token], WIDTH)[0], node + 1
        backend.verify([text[root]])
    for statements_of, pairs in zip(found["greedy"], expected, strict=True):
        said = sorted(zip(statements_of.said_N.tolist(), statements_of.came_N.tolist(), strict=True))
        assert [one for one, _ in said] == pytest.approx([one for one, _ in sorted(pairs)], abs=1e-4)
        assert statements_of.came_N.sum() == sum(right for _, right in pairs)
        assert statements_of.weight == len(pairs)
    assert found["greedy"][1].came_N.sum() > 0
    assert all(one.weight == 0 for one in found["drawn"])


def test_drawn_statements_by_hand(llama: Target) -> None:
    """The likeliest token's share against sum min(p, q), by the functions that decoding draws and accepts with."""
    head, text = tuned_head(llama), greedy_text(llama, 0)
    found = observe(head, llama, reference(llama, text), START, VocabularyLists({}), 2, DRAWN)["drawn"]
    backend = Engine().backend(llama, head)
    backend.prefill(text[:START])
    first, second = [], []
    p_TV = probabilities(llama.logits(text_states(llama, torch.tensor([text]))[0]), DRAWN)
    for root in range(START, len(text) - 1):
        named = backend.start_tree(text[root], 32)
        law, p_V, token = guess_law(named.tokens, named.confidences, DRAWN), p_TV[root], text[root + 1]
        first.append((max(law.values()), sum(min(q, float(p_V[one])) for one, q in law.items()), 1.0))
        if root + 1 < len(text) - 1:
            reached = min(1.0, law.get(token, 0.0) / float(p_V[token]))
            named = backend.extend_tree([0], [token], 32)[0]
            law, p_V = guess_law(named.tokens, named.confidences, DRAWN), p_TV[root + 1]
            second.append((max(law.values()), sum(min(q, float(p_V[one])) for one, q in law.items()), reached))
        backend.verify([text[root]])
    for one, rows in zip(found, (first, second), strict=True):
        columns = torch.stack([one.said_N, one.came_N, one.weight_N], 1)
        torch.testing.assert_close(columns, torch.tensor(rows, dtype=torch.float64), atol=1e-4, rtol=1e-3)
    assert 0 < found[1].weight < len(second)


def observed(*steps: Statements) -> Observed:
    return {"greedy": list(steps), "drawn": [Statements.joined([]) for _ in steps]}


def test_a_line_that_does_not_help_is_not_kept() -> None:
    """What was fitted on some exchanges and is worse on others stays as said; so does what nothing was seen of."""
    wrong, right = statements((0.5, -1.0)), statements(AS_SAID)
    unlike = statements((1.5, 1.0))
    found, reports = calibrate([observed(wrong, wrong, right)], [observed(wrong, unlike, right)])
    assert found.greedy[0] == pytest.approx((0.5, -1.0), abs=0.04)
    assert found.greedy[1] == AS_SAID
    assert found.drawn == [AS_SAID] * 3
    assert [(one.law, one.step) for one in reports] == [("greedy", 1), ("greedy", 2), ("greedy", 3)]
    for one in reports:
        assert one.log_loss[1] <= one.log_loss[0]
    assert reports[0].error[1] < 0.01 < 0.1 < reports[0].error[0]
    assert reports[1].curves[0] == reports[1].curves[1]

"""Random trees of tokens."""

from __future__ import annotations

import random

from tests.conftest import random_ids


def random_tree(nodes: int, seed: int) -> tuple[list[int], list[int]]:
    """Parents and tokens: bushes, near-chains and anything between, with more than one root at times."""
    dice = random.Random(seed)
    reach = dice.choice([1, 2, 3, nodes])
    late = dice.random() < 0.7
    parents = []
    for index in range(nodes):
        near = range(max(-1, index - reach), index) if late else range(-1, min(index, reach))
        parents.append(dice.choice(near))
    # A chain would not be attended to as a tree.
    parents[-1] = -1
    return parents, random_ids(nodes, seed=seed)

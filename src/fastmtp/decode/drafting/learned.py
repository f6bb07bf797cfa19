"""What drafting learns of an engine and a head. All texts share it, from several threads too."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.estimates import Estimates
from fastmtp.engines.protocol import Costs

# The largest tree, and its depth.
MAX_NODES, MAX_DEPTH = 16, 8
# After so many rounds without the head it is tried again; after twice as many if that did not pay, and so on.
PROBE, RAREST_PROBE = 32, 1024
# Least share of the newest round in the running means: of the rate, and of the worth of asking the head.
NEWEST_RATE, NEWEST_WORTH = 0.02, 0.04
# Duration of planning for each time that the head is asked, measured once (docs/experiments.md).
PLANNING_MS = 0.1
# Costs are those of the nearest multiple of so many tokens of context.
CONTEXT_STEP = 64
# The same for the tokens of other sequences beyond MAX_NODES.
BESIDE_STEP = 8
# Ways to sample, times numbers of sequences, that are remembered; the first one is forgotten for a new one.
MOST_EXPERIENCES = 256


@dataclass
class Mean:
    """A running mean that starts as if it had seen `count` values; later ones have at least the share `newest`."""

    value: float
    count: float
    newest: float

    def learn(self, value: float) -> None:
        self.count += 1
        self.value += max(self.newest, 1 / self.count) * (value - self.value)


@dataclass
class Experience:
    """What is learned of one way to sample."""

    estimates: Estimates
    rate: Mean  # tokens a millisecond
    # By depth of the candidates asked for: what asking the head gains, less the cost of verifying them, for a unit
    # of probability that it is needed.
    worth: list[Mean] = field(default_factory=lambda: [Mean(0.5, 10, NEWEST_WORTH) for _ in range(MAX_DEPTH + 1)])
    rounds_without_head: int = 0
    probe_after: int = PROBE


class Learned:
    """Costs, and experience by way to sample."""

    def __init__(self, costs: Costs, estimates: Estimates | None = None) -> None:
        """
        Args:
            estimates: those that came with the head.
        """
        self._costs = costs
        # Of a node that the head only follows. Other sequences seldom do so in the same call, so nobody shares it.
        self.follow_ms = costs.follow_ms
        self._known = estimates or Estimates()
        self.experiences: dict[tuple[SamplingConfig, int], Experience] = {}
        self._forward_ms: dict[tuple[int, int], list[float]] = {}
        self._ask_ms: dict[int, float] = {}

    def experience(self, sampling: SamplingConfig, sequences: int = 1) -> Experience:
        """Of a way to sample, by the number of sequences that decode together, which share the estimates."""
        way = _way(sampling)
        if (way, sequences) not in self.experiences:
            alike = [one.estimates for (other, _), one in list(self.experiences.items()) if other == way]
            # The estimates of a head are of greedy answers; for drawn ones they would be too high.
            fresh = self._known.copy() if sampling.temperature == 0 else Estimates()
            # A head that is worth having makes decoding half as fast again, or more.
            rate = Mean(1.5 * sequences / self._costs.forward(sequences), 4, NEWEST_RATE)
            self.experiences.setdefault((way, sequences), Experience(alike[0] if alike else fresh, rate))
            while len(self.experiences) > MOST_EXPERIENCES:
                self.experiences.pop(next(iter(self.experiences)), None)
        return self.experiences[way, sequences]

    def ask_ms(self, sequences: int) -> float:
        """Milliseconds that asking the head for a node takes, of each of so many sequences that ask together."""
        if sequences not in self._ask_ms:
            self._ask_ms[sequences] = self._costs.ask(sequences) + PLANNING_MS
        return self._ask_ms[sequences]

    def forward_ms(self, context: int, beside: int = 0) -> list[float]:
        """Milliseconds of a forward, by its tokens from 0 on besides so many of other sequences."""
        step = round(context / CONTEXT_STEP)
        beside = beside if beside <= MAX_NODES else round(beside / BESIDE_STEP) * BESIDE_STEP
        found = self._forward_ms.get((step, beside))
        if found is None:
            counts = range(beside, beside + MAX_NODES + 1)
            found = [self._costs.forward(count, step * CONTEXT_STEP) if count else 0.0 for count in counts]
            self._forward_ms[step, beside] = found
        return found


@lru_cache(MOST_EXPERIENCES)
def _way(sampling: SamplingConfig) -> SamplingConfig:
    """What of it changes which drafts are accepted."""
    return replace(sampling, seed=0, logit_bias=())

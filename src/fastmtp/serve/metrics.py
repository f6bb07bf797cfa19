"""Prometheus metrics, under the names that dashboards know from vLLM but for the prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fastmtp.serve.requests import Finish, Stats

PREFIX = "fastmtp:"
# Upper bounds of the histograms' buckets in seconds: from a small model on a GPU to a large one on a CPU.
_TO_FIRST = tuple(0.005 * 2**step for step in range(15))
_PER_TOKEN = tuple(0.0005 * 2**step for step in range(12))
_WHOLE = tuple(0.1 * 2**step for step in range(13))


class Metrics(Collector):
    """Counts of the scheduler, read when they are asked for, and durations of requests."""

    def __init__(self, model: str, stats: Callable[[], Stats]) -> None:
        self._model, self._stats = model, stats
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._first = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _TO_FIRST
        )
        self._token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time of a request's tokens after the first.", _PER_TOKEN
        )
        self._whole = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.", _WHOLE)
        self._finished = Counter(
            PREFIX + "request_success",
            "Finished requests by reason.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )

    def began(self, seconds: float) -> None:
        """Take note of a request's first token, so long after it came; from any thread."""
        self._first.labels(self._model).observe(seconds)

    def finished(self, finish: Finish) -> None:
        """Take note of a request that ended, for whatever reason; from any thread."""
        usage = finish.usage
        self._finished.labels(self._model, finish.reason).inc()
        if finish.reason not in ("stop", "length") or usage.first_token_seconds is None:
            return
        self._whole.labels(self._model).observe(usage.seconds)
        if usage.completion_tokens > 1:
            mean = (usage.seconds - usage.first_token_seconds) / (usage.completion_tokens - 1)
            self._token.labels(self._model).observe(mean)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        gauges = {
            "num_requests_running": ("Requests that are decoded.", stats.running),
            "num_requests_waiting": ("Requests that wait for a slot.", stats.waiting),
            "prefix_cache_bytes": ("Memory of finished requests' caches that prompts may share.", stats.kept_bytes),
        }
        counters = {
            "prompt_tokens": ("Tokens of prompts.", stats.prompt_tokens),
            "generation_tokens": ("Tokens of answers.", stats.generated_tokens),
            "prefix_cache_queries": ("Tokens looked for in the prefix cache.", stats.prompt_tokens),
            "prefix_cache_hits": ("Tokens of prompts that the prefix cache held.", stats.cached_tokens),
            "spec_decode_num_drafts": ("Rounds in which tokens were drafted.", stats.drafts),
            "spec_decode_num_draft_tokens": ("Drafted tokens.", stats.drafted_tokens),
            "spec_decode_num_accepted_tokens": ("Drafted tokens that were accepted.", stats.accepted_tokens),
            "grammar_forced_tokens": ("Accepted tokens that a grammar forced.", stats.forced_tokens),
        }
        for name, (meaning, value) in gauges.items():
            gauge = GaugeMetricFamily(PREFIX + name, meaning, labels=("model_name",))
            gauge.add_metric((self._model,), value)
            yield gauge
        for name, (meaning, value) in counters.items():
            counter = CounterMetricFamily(PREFIX + name, meaning, labels=("model_name",))
            counter.add_metric((self._model,), value)
            yield counter
        by_position = CounterMetricFamily(
            PREFIX + "spec_decode_num_accepted_tokens_per_pos",
            "Accepted tokens by how many were drafted before them.",
            labels=("model_name", "position"),
        )
        for position, value in enumerate(stats.accepted_by_position):
            by_position.add_metric((self._model, str(position)), value)
        yield by_position

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, meaning, ("model_name",), registry=self._registry, buckets=buckets)

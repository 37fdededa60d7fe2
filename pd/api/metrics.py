"""Prometheus metrics of one API process: its requests, and its replicas' last load reports.

Histograms and counters are updated as requests end; per-replica series are read from the router
when scraped, so a replica that is gone has none. Everything is in a registry of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pd.messages import FinishReason, ReplicaLoad, RequestStats
from pd.router import ReplicaState

_SECONDS = (
    0.005,
    0.01,
    0.02,
    0.04,
    0.08,
    0.15,
    0.3,
    0.6,
    1.2,
    2.5,
    5,
    10,
    20,
    40,
    80,
    160,
    320,
    640,
)
_TOKEN_SECONDS = (0.001, 0.002, 0.004, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class ApiMetrics:
    def __init__(
        self, replicas: Callable[[], list[ReplicaState]], in_flight: Callable[[], int]
    ) -> None:
        self.registry = registry = CollectorRegistry()
        self._ttft = Histogram(
            "pagerelay_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._tpot = Histogram(
            "pagerelay_time_per_output_token_seconds",
            "Mean time between tokens after the first, one observation per request.",
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self._end_to_end = Histogram(
            "pagerelay_request_seconds",
            "From a request's arrival to its end.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._requests = Counter(
            "pagerelay_requests",
            "Ended requests (each choice is one) by finish reason.",
            ["finish_reason"],
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "pagerelay_prompt_tokens", "Prompt tokens of ended requests.", registry=registry
        )
        self._generated_tokens = Counter(
            "pagerelay_generated_tokens", "Tokens sampled for ended requests.", registry=registry
        )
        self._cached_tokens = Counter(
            "pagerelay_cached_tokens",
            "Prompt tokens found in a cache, by the side that had them.",
            ["side"],
            registry=registry,
        )
        self._http_errors = Counter(
            "pagerelay_http_errors",
            "Answers with a 4xx or 5xx status.",
            ["code"],
            registry=registry,
        )
        registry.register(_ReplicaCollector(replicas, in_flight))

    def observe_request(
        self,
        finish_reason: FinishReason,
        *,
        num_prompt_tokens: int,
        num_tokens: int,
        ttft_s: float | None,
        total_s: float,
        stats: RequestStats | None,
    ) -> None:
        """One choice has ended. `ttft_s` is None where no token came."""
        self._requests.labels(finish_reason).inc()
        self._prompt_tokens.inc(num_prompt_tokens)
        self._generated_tokens.inc(num_tokens)
        self._end_to_end.observe(total_s)
        if ttft_s is not None:
            self._ttft.observe(ttft_s)
            if num_tokens > 1:
                self._tpot.observe((total_s - ttft_s) / (num_tokens - 1))
        if stats is not None:
            self._cached_tokens.labels("decode").inc(stats.cached_tokens_decode)
            self._cached_tokens.labels("prefill").inc(stats.cached_tokens_prefill)

    def observe_http_error(self, status: int) -> None:
        self._http_errors.labels(str(status)).inc()

    def render(self) -> bytes:
        """The text format that Prometheus scrapes."""
        return generate_latest(self.registry)


_GAUGES: dict[str, tuple[str, Callable[[ReplicaLoad], float]]] = {
    "waiting_requests": ("Requests waiting for a place or for pages.", lambda load: load.waiting),
    "waiting_tokens": ("Prompt tokens not prefilled yet.", lambda load: load.waiting_tokens),
    "running_requests": ("Requests in the running batch.", lambda load: load.running),
    "handovers_in": ("Handovers being received.", lambda load: load.handovers_in),
    "handovers_out": ("Handovers being sent.", lambda load: load.handovers_out),
    "pages_in_quarantine": (
        "Pages of no request any more that a peer may still write to.",
        lambda load: sum(load.pages_quarantined),
    ),
}
_COUNTERS: dict[str, tuple[str, Callable[[ReplicaLoad], float]]] = {
    "steps": ("Engine steps.", lambda load: load.steps),
    "prefill_tokens": ("Prompt tokens computed.", lambda load: load.prefill_tokens),
    "decode_tokens": ("Tokens decoded.", lambda load: load.decode_tokens),
    "cached_prompt_tokens": ("Prompt tokens found in the cache.", lambda load: load.cached_tokens),
    "preemptions": ("Requests put back because pages ran out.", lambda load: load.preemptions),
    "kv_transfer_bytes": ("KV bytes moved.", lambda load: load.kv_bytes),
    "kv_transfer_pages": ("KV pages moved.", lambda load: load.kv_pages),
    "kv_transfer_descriptors": ("Descriptors of KV writes.", lambda load: load.kv_descriptors),
    "kv_transfer_seconds": ("Sum of the durations of KV writes.", lambda load: load.kv_seconds),
    "handovers_failed": (
        "Handovers received that ended early.",
        lambda load: load.handovers_failed,
    ),
    "handovers_overdue": (
        "Handovers whose pages were in quarantine for longer than transfer.timeout.",
        lambda load: load.handovers_overdue,
    ),
    "digest_mismatches": (
        "Pages that differed from their source (transfer.verify).",
        lambda load: load.digest_mismatches,
    ),
    "finished_requests": ("Requests that finished.", lambda load: load.finished),
    "aborted_requests": ("Requests that were aborted.", lambda load: load.aborted),
    "failed_requests": ("Requests that failed.", lambda load: load.failed),
    "dropped_messages": (
        "Messages that were stray or malformed.",
        lambda load: load.dropped_messages,
    ),
}


class _ReplicaCollector(Collector):
    def __init__(
        self, replicas: Callable[[], list[ReplicaState]], in_flight: Callable[[], int]
    ) -> None:
        self._replicas = replicas
        self._in_flight = in_flight

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily(
            "pagerelay_requests_in_flight",
            "Requests admitted and not ended, of this API process.",
            value=self._in_flight(),
        )
        replicas = self._replicas()
        labels = ["replica", "role"]
        for name, (text, read) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"pagerelay_{name}", text, labels=labels)
            for replica in replicas:
                gauge.add_metric([replica.name, replica.role], read(replica.load))
            yield gauge
        for name, (text, read) in _COUNTERS.items():
            counter = CounterMetricFamily(f"pagerelay_{name}", text, labels=labels)
            for replica in replicas:
                counter.add_metric([replica.name, replica.role], read(replica.load))
            yield counter
        pages = GaugeMetricFamily(
            "pagerelay_pages",
            "Device pages by layer group and state; the states add up to the pool.",
            labels=[*labels, "group", "state"],
        )
        for replica in replicas:
            for group, states in enumerate(pages_by_group(replica.load)):
                for state, value in states.items():
                    pages.add_metric([replica.name, replica.role, str(group), state], value)
        yield pages


def pages_by_group(load: ReplicaLoad) -> list[dict[str, int]]:
    """By layer group: pages free, cached (evictable) and used (referenced by requests)."""
    groups = zip(load.pages_free, load.pages_cached, load.pages_used, strict=False)
    return [{"free": free, "cached": cached, "used": used} for free, cached, used in groups]

"""Prometheus metrics of an API process: its requests, its replicas' last load reports, and the
keepers' last figures.

Histograms and counters are updated as requests end; per-replica series are read from the router
when scraped, so a replica that is gone has none. Of several API processes each has series of its
own, with the label `api`, and any of them renders those of all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from pd.api.client import ClientCounters
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
        self,
        replicas: Callable[[], list[ReplicaState]],
        in_flight: Callable[[], int],
        keepers: Mapping[str, Mapping[str, float]],
        counters: ClientCounters | None = None,
    ) -> None:
        """`keepers`: their figures by name. All are read when scraped."""
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
        self._cached_tokens_by_tier = Counter(
            "pagerelay_cached_tokens_by_tier",
            "Prompt tokens that were not computed, by the tier that had them; each counts once.",
            ["tier"],
            registry=registry,
        )
        self._http_errors = Counter(
            "pagerelay_http_errors",
            "Answers with a 4xx or 5xx status.",
            ["code"],
            registry=registry,
        )
        registry.register(_RequestCollector(in_flight, counters or ClientCounters()))
        self._seen = CollectorRegistry()
        """What all API processes see alike."""
        self._seen.register(_ReplicaCollector(replicas))
        self._seen.register(_KeeperCollector(keepers))

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
            for tier, tokens in stats.cached_by_tier().items():
                self._cached_tokens_by_tier.labels(tier).inc(tokens)

    def observe_http_error(self, status: int) -> None:
        self._http_errors.labels(str(status)).inc()

    def render_own(self) -> str:
        """Without what all API processes see."""
        return generate_latest(self.registry).decode()

    def render(self, of_all: Mapping[str, str] | None = None) -> bytes:
        """The text format that Prometheus scrapes. `of_all`: what API processes rendered, by their
        names, where there are several."""
        registry = self.registry
        if of_all is not None:
            registry = CollectorRegistry()
            registry.register(_ApiCollector(of_all))
        return generate_latest(registry) + generate_latest(self._seen)


_GAUGES: dict[str, tuple[str, Callable[[ReplicaLoad], float]]] = {
    "waiting_requests": ("Requests waiting for a place or for pages.", lambda load: load.waiting),
    "waiting_tokens": (
        "Prompt tokens neither prefilled nor cached yet.",
        lambda load: load.waiting_tokens,
    ),
    "running_requests": ("Requests in the running batch.", lambda load: load.running),
    "handovers_in": ("Handovers being received.", lambda load: load.handovers_in),
    "handovers_out": ("Handovers being sent.", lambda load: load.handovers_out),
    "pages_in_quarantine": (
        "Pages of no request any more that a peer may still write to.",
        lambda load: sum(load.pages_quarantined),
    ),
    "fetching_requests": (
        "Requests that wait for pages from the host tier or from storage.",
        lambda load: load.fetching,
    ),
}
_COUNTERS: dict[str, tuple[str, Callable[[ReplicaLoad], float]]] = {
    "steps": ("Engine steps.", lambda load: load.steps),
    "prefill_tokens": ("Prompt tokens computed.", lambda load: load.prefill_tokens),
    "decode_tokens": ("Tokens decoded.", lambda load: load.decode_tokens),
    "cached_prompt_tokens": ("Prompt tokens found in the cache.", lambda load: load.cached_tokens),
    "evicted_pages": (
        "Device pages that made room, over all layer groups.",
        lambda load: load.pages_evicted,
    ),
    "from_host_pages": ("Pages copied from the host tier.", lambda load: load.host_pages_in),
    "from_host_bytes": ("Bytes copied from the host tier.", lambda load: load.host_bytes_in),
    "from_host_seconds": (
        "Sum of the durations of copies from the host tier.",
        lambda load: load.host_seconds_in,
    ),
    "to_host_pages": ("Pages copied to the host tier.", lambda load: load.host_pages_out),
    "to_host_bytes": ("Bytes copied to the host tier.", lambda load: load.host_bytes_out),
    "to_host_seconds": (
        "Sum of the durations of copies to the host tier.",
        lambda load: load.host_seconds_out,
    ),
    "to_host_skipped_pages": (
        "Pages not offered to the host tier, as too many were waiting to be copied.",
        lambda load: load.host_pages_not_offered,
    ),
    "event_overruns": (
        "Times that a subscriber of KV events fell behind and missed some.",
        lambda load: load.event_overruns,
    ),
    "events_asked_too_late": (
        "Batches of KV events asked for again when they were kept no longer.",
        lambda load: load.events_asked_too_late,
    ),
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


_NO_REPORT = ReplicaLoad()


class _ApiCollector(Collector):
    """What API processes rendered, by their names."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def collect(self) -> Iterable[Metric]:
        found: dict[str, Metric] = {}
        for api, text in sorted(self._texts.items()):
            for each in text_string_to_metric_families(text):
                new = Metric(each.name, each.documentation, each.type)
                samples = found.setdefault(each.name, new).samples
                samples += [s._replace(labels={**s.labels, "api": api}) for s in each.samples]
        return found.values()


class _RequestCollector(Collector):
    def __init__(self, in_flight: Callable[[], int], counters: ClientCounters) -> None:
        self._in_flight = in_flight
        self._counters = counters

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily(
            "pagerelay_requests_in_flight",
            "Requests admitted and not ended, of this API process.",
            value=self._in_flight(),
        )
        for name, text, count in (
            ("replayed", "that went on elsewhere after a decode replica's end", "replays"),
            ("moved", "that went on elsewhere with their pages, as a replica was drained", "moves"),
            ("refused", "not let in, or for which there was no replica", "refused"),
        ):
            value = getattr(self._counters, count)
            yield CounterMetricFamily(
                f"pagerelay_requests_{name}", f"Requests {text}.", value=value
            )


class _ReplicaCollector(Collector):
    def __init__(self, replicas: Callable[[], list[ReplicaState]]) -> None:
        self._replicas = replicas

    def collect(self) -> Iterable[Metric]:
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
                if replica.load == _NO_REPORT:  # a counter that starts at 0 seems to jump
                    continue
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


_KEEPER_GAUGES = {
    "open_exchanges": ("host_open_exchanges", "Replicas' searches and offers under way."),
    "storage_queued_pages": ("storage_queued_pages", "Pages waiting to be written to storage."),
    "storage_prefetches": ("storage_prefetches", "Reads ahead from storage under way."),
    "storage_operations_in_flight": (
        "storage_operations_in_flight",
        "Operations that the storage has been given.",
    ),
    "storage_operations_hanging": (
        "storage_operations_hanging",
        "Operations past their deadline whose pages are still in use.",
    ),
    "storage_latency_s": ("storage_latency_seconds", "Of recent reads; 0: not known."),
    "storage_read_bytes_per_s": ("storage_read_bytes_per_second", "Of recent reads."),
    "storage_write_bytes_per_s": ("storage_write_bytes_per_second", "Of recent writes."),
    "storage_breaker_open": (
        "storage_breaker_open",
        "1 while a storage that fails is left alone, or on trial.",
    ),
}
_KEEPER_COUNTERS = {
    "found_pages": ("host_found_pages", "Pages that replicas found in the host tier."),
    "read_pages": ("host_read_pages", "Of those found, the ones that storage brought."),
    "offered_pages": ("host_offered_pages", "Pages that replicas offered to the host tier."),
    "copied_pages": ("host_copied_pages", "Pages that replicas copied to the host tier."),
    "refused_pages": ("host_refused_pages", "Pages offered that there was no room for."),
    "evicted_pages": (
        "host_evicted_pages",
        "Host pages that made room, over all layer groups.",
    ),
    "event_overruns": (
        "host_event_overruns",
        "Times that a subscriber of the host tier's KV events fell behind and missed some.",
    ),
    "events_asked_too_late": (
        "host_events_asked_too_late",
        "Batches of these events asked for again when they were kept no longer.",
    ),
    "storage_pages_written": ("storage_written_pages", "Pages written to storage."),
    "storage_bytes_written": ("storage_written_bytes", "Bytes written to storage."),
    "storage_bytes_read": ("storage_read_bytes", "Bytes read from storage."),
    "storage_pages_restored": (
        "storage_prefetched_pages",
        "Pages read from storage into the host tier.",
    ),
    "storage_pages_used": ("storage_prefetched_used_pages", "Of those, used by a request."),
    "storage_pages_wasted": ("storage_prefetched_wasted_pages", "Of those, gone unused."),
    "storage_hit_objects": ("storage_hit_objects", "Objects that storage had."),
    "storage_missed_objects": ("storage_missed_objects", "Objects that storage did not have."),
    "storage_corrupt_objects": ("storage_corrupt_objects", "Objects whose bytes were wrong."),
    "storage_failed_objects": (
        "storage_failed_objects",
        "Objects that could not be written, read or looked for.",
    ),
    "storage_operations_given_up": (
        "storage_given_up_operations",
        "Operations that passed their deadline.",
    ),
    "storage_overflowed_pages": (
        "storage_overflowed_pages",
        "Pages not written, as too many were waiting.",
    ),
    "storage_abandoned_pages": (
        "storage_abandoned_pages",
        "Pages not written, as their storage failed or was detached.",
    ),
    "storage_prefetches_missed": ("storage_prefetches_missed", "Reads ahead that gained nothing."),
    "storage_prefetches_judged_slow": (
        "storage_prefetches_judged_slow",
        "Reads ahead left out, as prefill was predicted to be faster.",
    ),
    "storage_breaker_times_opened": (
        "storage_breaker_opened",
        "Times that a storage that failed was left alone.",
    ),
}
"""By the figure in a keeper's report: name and help."""


class _KeeperCollector(Collector):
    def __init__(self, keepers: Mapping[str, Mapping[str, float]]) -> None:
        self._keepers = keepers

    def collect(self) -> Iterable[Metric]:
        keepers = list(self._keepers.items())
        for kind, table in (
            (GaugeMetricFamily, _KEEPER_GAUGES),
            (CounterMetricFamily, _KEEPER_COUNTERS),
        ):
            for figure, (name, text) in table.items():
                metric = kind(f"pagerelay_{name}", text, labels=["keeper"])
                for keeper, figures in keepers:
                    if figure in figures:  # those of a storage are missing where there is none
                        metric.add_metric([keeper], figures[figure])
                yield metric
        pages = GaugeMetricFamily(
            "pagerelay_host_pages",
            "Pages of the host tier by layer group and state; the states add up to the tier.",
            labels=["keeper", "group", "state"],
        )
        page_bytes = GaugeMetricFamily(
            "pagerelay_host_page_bytes", "Of one page.", labels=["keeper", "group"]
        )
        for keeper, figures in keepers:
            for group in itertools.count():
                if f"group_{group}_page_bytes" not in figures:
                    break
                for state in ("free", "cached", "used"):
                    value = figures[f"group_{group}_{state}_pages"]
                    pages.add_metric([keeper, str(group), state], value)
                page_bytes.add_metric([keeper, str(group)], figures[f"group_{group}_page_bytes"])
        yield pages
        yield page_bytes
        for figure, name, text in (
            ("tenant_pages:", "host_tenant_pages", "Host pages of a tenant with a quota."),
            ("tenant_quota:", "host_tenant_quota_pages", "The most that it may have."),
        ):
            metric = GaugeMetricFamily(f"pagerelay_{name}", text, labels=["keeper", "tenant"])
            for keeper, figures in keepers:
                for key, value in figures.items():
                    if key.startswith(figure):
                        metric.add_metric([keeper, key.removeprefix(figure)], value)
            yield metric


def pages_by_group(load: ReplicaLoad) -> list[dict[str, int]]:
    """By layer group: pages free, cached (evictable) and used (referenced by requests)."""
    groups = zip(load.pages_free, load.pages_cached, load.pages_used, strict=False)
    return [{"free": free, "cached": cached, "used": used} for free, cached, used in groups]

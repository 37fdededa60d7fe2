"""Pure statistics of a load run: latencies to percentiles, and one run against another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True, slots=True)
class RequestResult:
    """One request as the client saw it; times in seconds of one clock."""

    start_s: float
    """When it was sent; in open loop, when it should have been."""
    end_s: float
    token_times_s: tuple[float, ...]
    """When each event with text came; the first is the first token's."""
    num_prompt: int
    num_output: int
    """As the server counted them, or else the number of events."""
    error: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Distribution:
    """Seconds; `None` where there is no value."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None
    max: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    duration_s: float
    """From the first request's start to the last one's end."""
    num_ok: int
    errors: dict[str, int]
    """Message -> how often."""
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    ttft: Distribution
    """Start to first token."""
    tpot: Distribution
    """Of each request: (last token - first token) / (tokens - 1)."""
    itl: Distribution
    """Between events, of all requests; an event may carry several tokens."""
    e2e: Distribution
    """Start to last token."""


def ttft_s(result: RequestResult) -> float:
    return result.token_times_s[0] - result.start_s


def tpot_s(result: RequestResult) -> float | None:
    if result.num_output < 2:
        return None
    return (result.token_times_s[-1] - result.token_times_s[0]) / (result.num_output - 1)


def summarize(results: Sequence[RequestResult]) -> Summary:
    """Requests with an error count only in `errors` and in the duration."""
    good = [result for result in results if not result.error and result.token_times_s]
    errors: dict[str, int] = {}
    for result in results:
        if result.error or not result.token_times_s:
            message = result.error or "no token came"
            errors[message] = errors.get(message, 0) + 1
    duration = 0.0
    if results:
        duration = max(r.end_s for r in results) - min(r.start_s for r in results)
    per_second = 1 / duration if duration > 0 else 0.0
    prompt_tokens = sum(result.num_prompt for result in good)
    output_tokens = sum(result.num_output for result in good)
    gaps = [
        later - earlier
        for result in good
        for earlier, later in zip(result.token_times_s, result.token_times_s[1:], strict=False)
    ]
    return Summary(
        duration_s=duration,
        num_ok=len(good),
        errors=errors,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        requests_per_s=len(good) * per_second,
        prompt_tokens_per_s=prompt_tokens * per_second,
        output_tokens_per_s=output_tokens * per_second,
        ttft=distribution([ttft_s(result) for result in good]),
        tpot=distribution([tpot for result in good if (tpot := tpot_s(result)) is not None]),
        itl=distribution(gaps),
        e2e=distribution([result.token_times_s[-1] - result.start_s for result in good]),
    )


def distribution(values: Sequence[float]) -> Distribution:
    if not values:
        return Distribution(None, None, None, None, None)
    ordered = sorted(values)
    p50, p90, p99 = (percentile(ordered, percent) for percent in PERCENTILES)
    return Distribution(sum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of ascending values, with linear interpolation between neighbours (numpy's default)."""
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def ratios(ours: Summary, theirs: Summary) -> dict[str, float | None]:
    """ours / theirs, of the figures that are usually compared."""

    def ratio(a: float | None, b: float | None) -> float | None:
        return a / b if a is not None and b else None

    return {
        "output_tokens_per_s": ratio(ours.output_tokens_per_s, theirs.output_tokens_per_s),
        "requests_per_s": ratio(ours.requests_per_s, theirs.requests_per_s),
        **{
            f"{metric}_{name}": ratio(
                getattr(getattr(ours, metric), name), getattr(getattr(theirs, metric), name)
            )
            for metric in ("ttft", "tpot", "itl", "e2e")
            for name in ("p50", "p99")
        },
    }


def to_json(summary: Summary) -> dict[str, Any]:
    return dataclasses.asdict(summary)

"""What earlier loads say of the next one."""

from __future__ import annotations

import pytest

from hicache.load_cost import LoadCost, Rate, Verdict


def test_bytes_trips_and_tokens_are_judged_and_loading_has_to_be_faster_by_a_quarter() -> None:
    cost = LoadCost(probe_s=10.0)
    cost.add_trip(0.1)
    cost.add_read(1000, 0.0, 1.1, latency_s=0.1)
    assert cost.reads.bytes_per_s == pytest.approx(1000)
    assert cost.seconds(500, 2) == pytest.approx(0.7)
    assert cost.judge(500, 2, 88, 100.0, 0.0) is Verdict.LOAD
    assert cost.judge(500, 2, 87, 100.0, 0.0) is Verdict.PROBE
    assert cost.judge(500, 2, 87, 100.0, 9.9) is Verdict.RECOMPUTE
    assert cost.judge(500, 2, 87, 100.0, 10.0) is Verdict.PROBE
    assert cost.judge(500, 2, 87, 0.0, 10.0) is Verdict.LOAD


def test_what_is_not_known_is_probed_until_it_is() -> None:
    cost = LoadCost(probe_s=10.0)
    for _ in range(2):
        assert cost.judge(1, 1, 1000, 1.0, 0.0) is Verdict.PROBE
    assert cost.judge(1, 1, 1000, 1.0, 0.0, queued_bytes=5, queued_since=0.0) is Verdict.RECOMPUTE
    cost.add_read(1000, 0.0, 1.0)
    assert cost.judge(1, 1, 1000, 1.0, 0.0) is Verdict.LOAD
    assert cost.judge(10**9, 1, 1, 1.0, 0.0) is Verdict.PROBE


def test_what_is_under_way_for_long_makes_the_tier_slow_at_once() -> None:
    cost = LoadCost(probe_s=10.0)
    cost.add_read(1000, 0.0, 1.0)
    # 1,000 bytes queued and as many more: 2 s, or twice what the first have taken already.
    assert cost.judge(1000, 1, 300, 100.0, 10.0, 1000, 9.0) is Verdict.LOAD
    assert cost.judge(1000, 1, 300, 100.0, 10.0, 1000, 8.7) is Verdict.RECOMPUTE
    assert cost.judge(1000, 1, 300, 100.0, 10.0) is Verdict.LOAD


def test_a_probe_counts_alone() -> None:
    cost = LoadCost(probe_s=10.0)
    cost.add_read(1000, 0.0, 100.0)
    assert cost.judge(1000, 1, 1, 1.0, 0.0) is Verdict.PROBE
    cost.add_read(1000, 200.0, 201.0)
    assert cost.reads.bytes_per_s == pytest.approx(1000)
    cost.add_read(1000, 300.0, 302.0)
    assert cost.reads.bytes_per_s == pytest.approx(1000 / 1.3)


def test_a_failure_counts_where_it_took_longer_than_reading() -> None:
    cost = LoadCost(probe_s=10.0)
    cost.add_failed_read(1000, 0.0, 1.0)
    assert not cost.reads.bytes_per_s
    cost.add_read(1000, 0.0, 1.0)
    cost.add_failed_read(1000, 2.0, 2.1)
    assert cost.reads.bytes_per_s == pytest.approx(1000)
    cost.add_failed_read(1000, 3.0, 13.0)
    assert cost.reads.bytes_per_s == pytest.approx(1000 / 3.7)


def test_operations_that_overlap_share_the_time() -> None:
    rate = Rate()
    for start in range(60):  # pairs, begun together, that take a second
        rate.add(500, start, start + 1.0)
        rate.add(500, start, start + 1.0)
    assert rate.bytes_per_s == pytest.approx(1000, rel=0.01)

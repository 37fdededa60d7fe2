"""What another request costs a step, from times that lie around a line."""

from __future__ import annotations

import random

import pytest

from pd.speed import DecodeSpeed, PrefillSpeed, StepTotals


def test_the_slope_is_found() -> None:
    speed, rng = DecodeSpeed(), random.Random(0)
    for _ in range(3000):
        size = rng.randrange(1, 40)
        speed.measured(size, 0.01 + 0.0005 * size + rng.gauss(0, 0.0005))
    assert speed.s_per_request == pytest.approx(0.0005, rel=0.05)


def test_batches_of_one_size_say_nothing() -> None:
    speed = DecodeSpeed()
    assert speed.s_per_request == 0.0
    for _ in range(100):
        speed.measured(4, 0.02)
    assert speed.s_per_request == 0.0


def test_it_is_neither_negative_nor_more_than_the_step() -> None:
    speed = DecodeSpeed()
    for size, seconds in ((1, 0.03), (5, 0.02), (9, 0.01)):
        speed.measured(size, seconds)
    assert speed.s_per_request == 0.0
    speed = DecodeSpeed()
    for size, seconds in ((1, 0.01), (5, 0.5), (9, 1.9)):
        speed.measured(size, seconds)
    assert speed.s_per_request == pytest.approx((0.01 + 0.5 + 1.9) / 15, rel=0.01)


def test_what_a_step_takes_in_any_case_is_not_saved_by_loading_tokens() -> None:
    speed, rng = PrefillSpeed(), random.Random(0)
    assert speed.tokens_per_s == 0.0
    for _ in range(100):
        size = rng.randrange(20, 400)
        speed.measured(size, 0.005 + size / 30_000 + rng.gauss(0, 0.0002))
    assert speed.tokens_per_s == pytest.approx(30_000, rel=0.1)


def test_steps_of_one_size_give_the_mean_and_a_flat_line_four_times_that() -> None:
    speed = PrefillSpeed()
    for _ in range(50):
        speed.measured(100, 0.01)
    assert speed.tokens_per_s == pytest.approx(10_000)
    for _ in range(50):
        speed.measured(200, 0.01)
        speed.measured(100, 0.01)
    assert speed.tokens_per_s == pytest.approx(4 * 150 / 0.01, rel=0.05)


def test_steps_with_prompts_are_counted_apart() -> None:
    totals = StepTotals()
    for num_prefilling, num_sampled, seconds in ((100, 3, 0.5), (0, 4, 0.01), (0, 2, 0.03)):
        totals.measured(num_prefilling, num_sampled, seconds)
    assert (totals.prompt_tokens, totals.prompt_s) == (100, 0.5)
    assert (totals.decode_steps, totals.decode_tokens, totals.decode_s) == (2, 6, 0.04)

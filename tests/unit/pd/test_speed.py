"""What another request costs a step, from times that lie around a line."""

from __future__ import annotations

import random

import pytest

from pd.speed import DecodeSpeed


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

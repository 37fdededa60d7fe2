"""Who is let in, who is refused, and for how long."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pd.admission import Admission, Overloaded


def refusal(admission: Admission, tenant: str = "", priority: int = 0) -> Overloaded | None:
    try:
        admission.check_room(1, tenant, priority, 0.0)
    except Overloaded as error:
        return error
    return None


def fill(admission: Admission, tenant: str, priority: int = 0, most: int = 1000) -> int:
    """As many as are let in."""
    for number in range(most):
        try:
            admission.admit(1, tenant, priority, 0.0)
        except Overloaded:
            return number
    return most


def test_nobodys_requests_alone_fill_the_queue() -> None:
    admission = Admission(64)
    assert fill(admission, "") == 64
    refused = refusal(admission)
    assert str(refused) == "64 requests are queued or running, of at most 64; try again in 1 s"


def test_a_flood_leaves_room_for_others_and_is_refused_alone() -> None:
    admission = Admission(64)
    assert fill(admission, "flood") == 56
    assert "56 of the 56 requests that are queued or running are of tenant flood" in str(
        refusal(admission, "flood")
    )
    for tenant in ("", "a", "b"):
        assert refusal(admission, tenant) is None
        admission.admit(1, tenant, 0, 0.0)
    assert refusal(admission, "flood") is not None


def test_two_floods_get_equal_parts() -> None:
    admission = Admission(150)
    fill(admission, "a")
    fill(admission, "b")
    flying = {"a": 132, "b": 16}
    for _ in range(2000):  # each that ends is followed by one of whoever is let in
        tenant = max(flying, key=lambda name: flying[name])
        admission.release(tenant, 0.0)
        flying[tenant] -= 1
        for other in ("a", "b"):
            if refusal(admission, other) is None:
                admission.admit(1, other, 0, 0.0)
                flying[other] += 1
    assert abs(flying["a"] - flying["b"]) <= 2
    assert sum(flying.values()) >= 138


def test_lower_classes_are_refused_first() -> None:
    admission = Admission(90, (1.0, 2 / 3, 1 / 3))
    assert fill(admission, "", 2) == 30
    assert "of at most 30 of 90 for its class" in str(refusal(admission, "", 2))
    assert fill(admission, "", 1) == 30
    assert fill(admission, "", 0) == 30
    assert [admission.most(priority) for priority in range(3)] == [90, 60, 30]


def test_all_or_none() -> None:
    admission = Admission(4)
    admission.admit(3, "", 0, 0.0)
    with pytest.raises(Overloaded):
        admission.admit(2, "", 0, 0.0)
    assert admission.in_flight == 3


def test_retry_after_is_how_long_it_takes_until_there_is_room() -> None:
    admission = Admission(100)
    for _ in range(100):
        admission.admit(1, "", 0, 50.0)
    for number in range(1, 21):
        admission.release("", 50.0 + 0.5 * number)
        admission.admit(1, "", 0, 50.0 + 0.5 * number)
    with pytest.raises(Overloaded) as caught:
        admission.check_room(30, "", 0, 60.0)
    assert caught.value.retry_after_s == 15  # one ends every half second
    with pytest.raises(Overloaded) as caught:
        admission.check_room(1, "", 0, 3000.0)  # none has ended for long
    assert caught.value.retry_after_s == 60
    with pytest.raises(Overloaded) as caught:
        admission.check_room(1, "", 0, 60.0)
    assert caught.value.retry_after_s == 1


@given(
    st.integers(1, 40),
    st.lists(
        st.tuples(st.sampled_from(["", "a", "b", "c"]), st.integers(0, 1), st.integers(0, 5)),
        max_size=120,
    ),
)
def test_bounds_hold_and_who_has_nothing_finds_room(
    max_queue: int, events: list[tuple[str, int, int]]
) -> None:
    """0: one ends, else so many come."""
    admission = Admission(max_queue, (1.0, 0.5))
    flying: dict[str, int] = {}
    for tenant, priority, count in events:
        if count == 0:
            if flying.get(tenant):
                admission.release(tenant, 0.0)
                flying[tenant] -= 1
            continue
        before = admission.in_flight
        with contextlib.suppress(Overloaded):
            admission.admit(count, tenant, priority, 0.0)
            flying[tenant] = flying.get(tenant, 0) + count
        if admission.in_flight == before:  # only for lack of room where it has nothing
            assert flying.get(tenant) or before + count > admission.most(priority)
        assert admission.in_flight == sum(flying.values()) <= max_queue

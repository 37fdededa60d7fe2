"""Whose turn it is."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pd.engine.turns import _MOST_TENANTS, PATIENCE_S, Turns, WaitingQueue


@dataclasses.dataclass(eq=False)
class Request:
    tenant: str = ""
    priority: int = 0
    arrived_at: float = 0.0
    size: int = 10


class Server:
    """Serves one request at a time."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.queue: WaitingQueue[Request] = WaitingQueue(self.turns)

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.queue.add(request)

    def serve(self, now: float = 0.0) -> Request:
        request = self.queue.first(now)
        assert request is not None
        assert next(self.queue.in_turn(now)) is request
        self.queue.remove(request)
        self.turns.serve(request, request.size, now)
        return request


def test_classes_then_arrival() -> None:
    server = Server()
    late, low, early = Request(arrived_at=2), Request(priority=1), Request(arrived_at=1)
    server.add(late, low, early)
    assert [server.serve() for _ in range(3)] == [early, late, low]
    assert len(server.queue) == 0
    assert server.queue.first(0.0) is None


def test_a_flood_delays_another_tenants_request_by_one() -> None:
    server = Server()
    server.add(*(Request("flood", arrived_at=0) for _ in range(50)))
    for _ in range(5):
        server.serve()
    single = Request("single", arrived_at=1)
    server.add(single)
    assert single in [server.serve() for _ in range(2)]


def test_tenants_get_equal_tokens_whatever_their_requests_sizes() -> None:
    server = Server()
    server.add(*(Request("long", size=90) for _ in range(100)))
    server.add(*(Request("short", size=10) for _ in range(900)))
    served = {"long": 0, "short": 0}
    for _ in range(500):
        request = server.serve()
        served[request.tenant] += request.size
    assert abs(served["long"] - served["short"]) <= 90


def test_tokens_that_are_generated_count() -> None:
    server = Server()
    server.add(*(Request("a") for _ in range(9)), *(Request("b") for _ in range(9)))
    server.turns.charge("a", 30)
    assert [server.serve().tenant for _ in range(5)] == ["b", "b", "b", "a", "b"]


def test_idle_time_is_no_credit() -> None:
    server = Server()
    server.add(*(Request("busy") for _ in range(200)))
    for _ in range(100):
        server.serve()
    server.add(*(Request("back") for _ in range(20)))
    order = [server.serve().tenant for _ in range(20)]
    assert order.count("back") in (10, 11)


def test_the_longest_waiting_goes_first_once_in_a_while() -> None:
    server = Server()
    lower = [Request(priority=1, arrived_at=number) for number in range(3)]
    server.add(*lower)
    served = []
    now = 5.0
    while lower:
        server.add(Request(arrived_at=now))
        request = server.serve(now)
        if request.priority:
            served.append((now, lower.index(request)))
            lower.remove(request)
        now += 1.0
        assert now < 100
    times = [when for when, _ in served]
    assert [place for _, place in served] == [0, 0, 0]  # in order of arrival
    assert times[0] == PATIENCE_S
    assert [b - a for a, b in itertools.pairwise(times)] == [PATIENCE_S] * 2


def test_lower_classes_are_served_while_higher_ones_wait_for_long() -> None:
    server = Server()
    batch = Request(priority=1, arrived_at=1.0)
    server.add(*(Request(arrived_at=number / 2) for number in range(400)), batch)
    served = [server.serve(now) for now in range(200, 240)]
    assert batch in served


def test_a_turn_lasts_until_it_is_served() -> None:
    server = Server()
    old = Request("a", priority=3)
    server.add(old)
    for now in range(int(PATIENCE_S), 60):
        server.add(Request("b", arrived_at=now))
        assert server.queue.first(now) is old


def test_who_comes_back_is_before_others_of_that_moment() -> None:
    server = Server()
    first, second = Request(), Request()
    server.add(second)
    server.queue.add(first, is_back=True)
    assert [server.serve(), server.serve()] == [first, second]


def test_names_that_are_not_used_again_are_forgotten() -> None:
    server = Server()
    for number in range(5 * _MOST_TENANTS):
        server.add(Request(f"tenant-{number}", arrived_at=number))
        server.serve()
    assert len(server.turns._served) <= 2 * _MOST_TENANTS + 2


def test_those_that_wait_are_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pd.engine.turns._MOST_TENANTS", 0)
    server = Server()
    for number in range(300):
        server.add(*(Request(f"{name}-{number}", arrived_at=number) for name in "abc"))
        for _ in range(2):
            server.serve()
        assert {request.tenant for request in server.queue} <= server.turns._served.keys()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "serve"]),
            st.sampled_from("abc"),
            st.integers(0, 2),
            st.integers(1, 50),
            st.floats(0, 4),
        ),
        max_size=150,
    )
)
@pytest.mark.filterwarnings("error")
def test_the_order_holds_and_everybody_is_served(
    events: list[tuple[str, str, int, int, float]],
) -> None:
    server = Server()
    waiting: list[Request] = []
    now = 0.0
    for what, tenant, priority, size, seconds in events:
        now += seconds
        if what == "add":
            waiting.append(Request(tenant, priority, now, size))
            server.add(waiting[-1])
        elif waiting:
            request = server.serve(now)
            waiting.remove(request)
            has_waited = now >= request.arrived_at + PATIENCE_S
            assert has_waited or request.priority == min(
                each.priority for each in (*waiting, request)
            )
            # Of a tenant and a class, in order of arrival.
            assert not any(
                each.arrived_at < request.arrived_at
                for each in waiting
                if (each.tenant, each.priority) == (request.tenant, request.priority)
            )
        assert len(server.queue) == len(waiting)
        assert {*server.queue} == {*waiting}
        in_turn = [*server.queue.in_turn(now)]
        assert in_turn == sorted(in_turn, key=lambda each: server.turns.of(each, now))
    while waiting:
        waiting.remove(server.serve(now))
    assert not server.turns._num_waiting

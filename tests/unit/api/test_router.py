"""Placement and admission: pure, so every case is a few lines."""

from __future__ import annotations

import pytest

from pd.messages import ReplicaLoad
from pd.router import NoReplica, Overloaded, Placement, Router


def make_router(**roles: str) -> Router:
    router = Router(max_queue=4)
    for name, role in roles.items():
        router.update(name, role, None)  # type: ignore[arg-type]
    return router


def test_prefill_and_decode_are_chosen_separately() -> None:
    router = make_router(d0="decode", d1="decode", p0="prefill", p1="prefill")
    router.update("d0", "decode", ReplicaLoad(running=3))
    router.update("d1", "decode", ReplicaLoad(running=2))
    router.update("p0", "prefill", ReplicaLoad(waiting_tokens=100))
    router.update("p1", "prefill", ReplicaLoad(waiting=9, waiting_tokens=90))
    assert router.place(10) == Placement("d1", "p1")


def test_own_placements_count_until_the_next_report() -> None:
    router = make_router(d0="decode", d1="decode", p0="prefill", p1="prefill")
    first = [router.place(10), router.place(10)]
    assert first == [Placement("d0", "p0"), Placement("d1", "p1")]
    router.update("d0", "decode", ReplicaLoad())
    router.update("p0", "prefill", ReplicaLoad(waiting_tokens=11))
    assert router.place(10) == Placement("d0", "p1")


def test_an_update_without_load_keeps_what_is_known() -> None:
    router = make_router(d0="decode", d1="decode")
    router.update("d0", "decode", ReplicaLoad(running=5))
    router.update("d0", "decode", None)
    assert router.place(1).decode == "d1"


def test_role_both_prefills_for_itself() -> None:
    router = make_router(b0="both", p0="prefill")
    assert router.place(5) == Placement("b0", "")


def test_decode_prefills_where_no_prefill_replica_is_up() -> None:
    router = make_router(d0="decode", p0="prefill")
    router.remove("p0")
    assert router.place(5) == Placement("d0", "")


def test_no_decode_replica() -> None:
    router = make_router(p0="prefill")
    with pytest.raises(NoReplica, match="no decode replica") as caught:
        router.place(5)
    assert caught.value.role == "decode"
    router.remove("never seen")


def test_beside_keeps_a_placement_while_its_replicas_are_up() -> None:
    router = make_router(d0="decode", d1="decode", p0="prefill", p1="prefill")
    first = router.place(10)
    assert router.place(10, beside=first) == first
    assert router.place(10) == Placement("d1", "p1")
    router.remove(first.prefill)
    assert router.place(10, beside=first).prefill == "p1"


def test_admission_is_all_or_nothing() -> None:
    router = make_router(d0="decode")
    router.admit(3)
    with pytest.raises(Overloaded) as caught:
        router.admit(2)
    assert caught.value.retry_after_s >= 1
    assert router.in_flight == 3
    router.release()
    router.admit(2)
    assert router.in_flight == 4

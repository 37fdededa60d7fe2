"""Rolling replacement: it ends, and meanwhile as many serve as can."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pd.rollout import Drain, Replica, Start, Turn, plan_rollout, version_of
from pd.spec import ClusterSpec


def replica(name: str, version: str = "1", **more: object) -> Replica:
    fields = {"is_running": True, **more}
    return Replica(name, name.partition("-")[0], version, **fields)  # type: ignore[arg-type]


def test_missing_ones_are_started_under_free_names() -> None:
    there = [replica("decode-1"), replica("decode-2", is_draining=True)]
    assert plan_rollout(there, {"decode": 3}, {"decode": "1"}) == [
        Start("decode", "decode-0"),
        Start("decode", "decode-3"),
    ]


def test_of_too_many_the_one_with_the_fewest_requests_goes_and_starting_ones_first() -> None:
    there = [replica("decode-0", num_requests=1), replica("decode-1", num_requests=2)]
    assert plan_rollout(there, {"decode": 1}, {"decode": "1"}) == [
        Drain("decode-0", "fewer are wanted")
    ]
    there.append(replica("decode-2", is_running=False))
    assert plan_rollout(there, {"decode": 2}, {"decode": "1"}) == [
        Drain("decode-2", "fewer are wanted")
    ]


def test_roles_that_the_spec_has_no_longer_are_drained() -> None:
    assert plan_rollout([replica("both-0")], {}, {}) == [Drain("both-0", "fewer are wanted")]


def test_the_only_decode_replica_waits_for_room_for_its_successor() -> None:
    stuck = replica("decode-1", "2", is_running=False, finds_no_room=True)
    there = [replica("decode-0"), stuck]
    assert plan_rollout(there, {"decode": 1}, {"decode": "2"}) == []
    there = [replica("prefill-0"), dataclasses.replace(stuck, name="prefill-1", role="prefill")]
    (action,) = plan_rollout(there, {"prefill": 1}, {"prefill": "2"})
    assert action == Drain("prefill-0", "its spec has changed")


def test_roles_change_when_all_that_is_wanted_runs() -> None:
    old = [replica("prefill-0"), replica("decode-0")]
    desired, versions = {"both": 2}, {"both": "2"}
    starting = plan_rollout(old, desired, versions)
    assert starting == [Start("both", "both-0"), Start("both", "both-1")]
    new = [replica(action.name, "2", is_running=False) for action in starting]
    assert plan_rollout([*old, *new], desired, versions) == []
    new[0] = dataclasses.replace(new[0], is_running=True)
    leaving = plan_rollout([*old, *new], desired, versions)
    assert {action.name for action in leaving} == {"prefill-0", "decode-0"}
    stuck = [dataclasses.replace(each, is_running=False, finds_no_room=True) for each in new]
    assert len(plan_rollout([*old, *stuck], desired, versions)) == 2


def test_all_that_wait_with_an_old_version_end_at_once() -> None:
    there = [replica(f"decode-{n}", is_running=False) for n in range(3)]
    actions = plan_rollout(there, {"decode": 3}, {"decode": "2"})
    assert [action.name for action in actions] == ["decode-0", "decode-1", "decode-2"]


def test_what_one_role_can_spare_serves_in_the_other() -> None:
    there = [replica("prefill-0"), replica("prefill-1"), replica("decode-0")]
    desired, same = {"prefill": 1, "decode": 2}, {"prefill": "1", "decode": "1"}
    assert plan_rollout(there, desired, same) == [Turn("prefill-1", "decode")]
    there[1] = dataclasses.replace(there[1], is_draining=True)
    assert plan_rollout(there, desired, same) == [Turn("prefill-1", "decode")]
    there[1] = dataclasses.replace(there[1], becomes="decode")
    assert plan_rollout(there, desired, same) == []
    fewer = {"prefill": 1, "decode": 1}
    assert plan_rollout(there, fewer, same) == [Drain("prefill-1", "fewer are wanted")]


def test_roles_of_other_specs_do_not_change_places() -> None:
    there = [replica("prefill-0"), replica("prefill-1"), replica("decode-0", "2")]
    assert plan_rollout(there, {"prefill": 1, "decode": 2}, {"prefill": "1", "decode": "2"}) == [
        Start("decode", "decode-1"),
        Drain("prefill-1", "fewer are wanted"),
    ]


def test_a_name_that_a_turned_replica_has_is_taken() -> None:
    there = [dataclasses.replace(replica("prefill-0"), role="decode")]
    assert plan_rollout(there, {"prefill": 1}, {"prefill": "1", "decode": "2"}) == [
        Start("prefill", "prefill-1")
    ]


@settings(deadline=None, max_examples=300)
@given(
    counts=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=6),
    choices=st.lists(st.integers(0, 10), max_size=40),
)
@example(counts=[(0, 0), (4, 4), (0, 0), (0, 2), (0, 0)], choices=[])
def test_replicas_turn_until_the_roles_have_what_they_want(
    counts: list[tuple[int, int]], choices: list[int]
) -> None:
    """The roles want these numbers, one pair after the other; nothing starts while something that
    is draining could serve."""
    versions = {"prefill": "1", "decode": "1"}
    (first, *later), there = counts, {}
    for role, count in zip(("prefill", "decode"), first, strict=True):
        there |= {f"{role}-{n}": replica(f"{role}-{n}") for n in range(count)}
    moves = choices + list(range(60))
    for number, choice in enumerate(moves):
        at = min(number * (len(later) + 4) // len(moves), len(later) - 1)
        desired = dict(zip(("prefill", "decode"), later[at], strict=True))
        actions = plan_rollout(list(there.values()), desired, versions)
        for action in actions:
            one = there.get(action.name)
            match action:
                case Start(role, name):
                    assert one is None
                    fields = {"is_running": False, "role": role}
                    there[name] = dataclasses.replace(replica(name), **fields)
                case Turn(name, role):
                    assert one is not None
                    assert one.role != role
                    assert one.is_running
                    there[name] = dataclasses.replace(one, is_draining=True, becomes=role)
                case Drain(name) if one is not None and one.is_running:
                    there[name] = dataclasses.replace(one, is_draining=True, becomes=None)
                case Drain(name):
                    del there[name]
        for role in {action.role for action in actions if isinstance(action, Start)}:
            assert all(r.becomes for r in there.values() if r.is_draining and r.role != role)
        moving = [r for r in there.values() if r.is_draining or not r.is_running]
        if moving:
            one = moving[choice % len(moving)]
            if one.is_draining and one.becomes is None:
                del there[one.name]
            else:
                done = {"is_running": True, "is_draining": False, "becomes": None}
                role = one.becomes or one.role
                there[one.name] = dataclasses.replace(one, role=role, **done)
    roles = [r.role for r in there.values() if r.is_running and not r.is_draining]
    assert {role: roles.count(role) for role in desired} == desired
    assert len(roles) == len(there)


class World:
    """Replicas that start and drain when told, in a cluster with room for so many."""

    def __init__(self, running: int, room: int) -> None:
        self.replicas = {f"decode-{n}": replica(f"decode-{n}") for n in range(running)}
        self.room = room

    @property
    def num_serving(self) -> int:
        return sum(r.is_running and not r.is_draining for r in self.replicas.values())

    def apply(self, action: Start | Drain, version: str) -> None:
        if isinstance(action, Start):
            assert action.name not in self.replicas
            self.replicas[action.name] = replica(action.name, version, is_running=False)
        else:
            one = self.replicas[action.name]
            assert not one.is_draining
            if one.is_running:
                self.replicas[action.name] = dataclasses.replace(one, is_draining=True)
            else:
                del self.replicas[action.name]

    def advance(self, choice: int) -> None:
        """One replica that can gets further."""
        placed = sum(r.is_running for r in self.replicas.values())
        moving = [r for r in self.replicas.values() if r.is_draining or not r.is_running]
        if not moving:
            return
        one = moving[choice % len(moving)]
        if one.is_draining:
            del self.replicas[one.name]
        elif placed < self.room:
            self.replicas[one.name] = dataclasses.replace(one, is_running=True)
        else:
            self.replicas[one.name] = dataclasses.replace(one, finds_no_room=True)


@settings(deadline=None, max_examples=300)
@given(
    running=st.integers(0, 5),
    wanted=st.integers(0, 5),
    spare=st.integers(0, 2),
    choices=st.lists(st.integers(0, 10), max_size=30),
)
def test_it_ends_with_what_is_wanted_and_serves_meanwhile(
    running: int, wanted: int, spare: int, choices: list[int]
) -> None:
    world = World(running, max(running, wanted) + spare)
    least = min(running, wanted)
    if not spare:
        least -= least > 1
    for choice in choices + list(range(200)):
        actions = plan_rollout(list(world.replicas.values()), {"decode": wanted}, {"decode": "2"})
        for action in actions:
            world.apply(action, "2")
        assert world.num_serving >= least
        assert sum(not r.is_draining for r in world.replicas.values()) <= max(running, wanted + 1)
        world.advance(choice)
    left = list(world.replicas.values())
    is_stuck = running == wanted == 1 and not spare
    if not is_stuck:
        assert len(left) == wanted
        assert all(r.version == "2" and r.is_running and not r.is_draining for r in left)


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"roles": {"decode": {"replicas": 3}}}, []),
        ({"api": {"max_n": 2}}, []),
        ({"router": {"policy": "prefix"}}, []),
        ({"router": {"policy": "round_robin"}}, ["prefill", "decode"]),
        ({"roles": {"decode": {"max_running": 3}}}, ["decode"]),
        ({"transfer": {"verify": True}}, ["prefill", "decode", None]),
    ],
)
def test_a_version_changes_with_what_its_processes_were_started_with(
    change: dict[str, dict[str, dict[str, int]]], changed: list[str | None]
) -> None:
    base = {"model": {"path": "m"}, "roles": {"prefill": {}, "decode": {}}}
    roles = {**base["roles"], **change.get("roles", {})}
    before = ClusterSpec.model_validate(base)
    after = ClusterSpec.model_validate({**base, **change, "roles": roles})
    for role in ("prefill", "decode", None):
        assert (version_of(before, role) != version_of(after, role)) == (role in changed), role

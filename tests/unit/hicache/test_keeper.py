"""The keeper's promises: no slot is used for something else while somebody may copy from or to it,
and what its index has is what was copied."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest

from hicache.index import PageIndex
from hicache.keeper import MAX_OPEN, Keeper
from hicache.keys import page_hashes, root_hash
from hicache.messages import Close, Copied, Find, Found, FromKeeper, Offer, Room, Take, ToKeeper
from hicache.storage_prefetch import Prefetch
from hicache.storage_tier import StorageTier
from transfer.layout import LayerGroup

PAGE = 4
ROOT = root_hash("keeper")
FULL = LayerGroup("full", (0,), 1, 1)
SLIDING = LayerGroup("sliding", (1,), 1, 1, window=10)
LATENT = LayerGroup("latent", (2,), 1, 1)


def chain(number: int, num_pages: int, branch: int = 0, at: int = 0) -> list[bytes]:
    """Page hashes; chains of one number and different branches part at page `at`."""
    tokens = [number * 100 + page + (branch * 10_000 if page >= at else 0)
              for page in range(num_pages) for _ in range(PAGE)]  # fmt: skip
    return page_hashes(tokens, PAGE, ROOT)


def unpack(slots: Sequence[bytes]) -> list[list[int]]:
    return [np.frombuffer(each, "<i4").tolist() for each in slots]


class FakeTier:
    """A storage tier that is told what to have read."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        """(what, pages)."""
        self.prefetches: list[Prefetch] = []
        self.has_more = True
        self.is_probe = False

    def pages_hit(self, hashes: Sequence[bytes], now: float) -> None:
        self.calls.append(("hit", len(hashes)))

    def pages_stored(self, hashes: Sequence[bytes], first: int, now: float) -> None:
        self.calls.append(("stored", len(hashes) - first))

    def prefetch(
        self,
        hashes: Sequence[bytes],
        begin: int,
        now: float,
        tokens_per_s: float = 0.0,
        have: int = 0,
    ) -> Prefetch | None:
        if not self.has_more:
            return None
        prefetch = Prefetch(list(hashes), begin, have, self.is_probe, tokens_per_s, 60.0, 1)
        self.prefetches.append(prefetch)
        return prefetch

    def cancel_prefetch(self, prefetch: Prefetch, now: float) -> None:
        self.calls.append(("cancel", prefetch.num_pages))

    def detach(self, now: float) -> None:
        self.calls.append(("detach", 0))


class Rig:
    def __init__(
        self,
        pages: int = 20,
        groups: tuple[LayerGroup, ...] = (FULL,),
        tier: FakeTier | None = None,
        quotas: dict[str | None, int] | None = None,
    ) -> None:
        self.groups = groups
        self.tier = tier
        self.index = PageIndex(groups, [pages] * len(groups), PAGE)
        self.sent: list[tuple[str, FromKeeper]] = []
        storage = cast(StorageTier, tier) if tier is not None else None
        send = lambda to, message: self.sent.append((to, message))  # noqa: E731
        self.keeper = Keeper(self.index, groups, storage, send, quotas or {})
        for name in ("a", "b", "c"):
            self.keeper.client_up(name)

    def say(self, client: str, message: ToKeeper) -> list[FromKeeper]:
        """What it is answered."""
        del self.sent[:]
        self.keeper.receive(client, message, 0.0)
        self.keeper.check_integrity()
        assert all(to == client for to, _ in self.sent)
        return [message for _, message in self.sent]

    def find(self, client: str, serial: int, hashes: list[bytes], floor: int = 0) -> Found:
        (answer,) = self.say(client, Find(serial, floor or serial, b"".join(hashes)))
        assert isinstance(answer, Found)
        assert answer.serial == serial
        return answer

    def offer(
        self,
        client: str,
        serial: int,
        hashes: list[bytes],
        first: int = 0,
        have: tuple[int, ...] | None = None,
        floor: int = 0,
        tenant: str = "",
    ) -> Room:
        have = have or (0,) * len(self.groups)
        message = Offer(serial, floor or serial, first, b"".join(hashes), have, tenant)
        (answer,) = self.say(client, message)
        assert isinstance(answer, Room)
        assert answer.serial == serial
        return answer

    def store(self, client: str, serial: int, hashes: list[bytes], tenant: str = "") -> None:
        room = self.offer(client, serial, hashes, tenant=tenant)
        assert not self.say(client, Copied(serial, serial, len(unpack(room.slots)[0])))

    def resident(self, hashes: list[bytes]) -> int:
        return len(self.index.resident(hashes)[0])

    @property
    def is_idle(self) -> bool:
        used = any(self.index.num_used(group) for group in range(len(self.groups)))
        return not used and not self.keeper.num_open


# -------------------------------------------------------------------------------------- round trips


def test_what_was_copied_is_found_where_it_was_copied_to() -> None:
    rig, hashes = Rig(), chain(1, 4)
    room = rig.offer("a", 1, hashes)
    assert room.first == 0
    assert rig.find("b", 1, hashes).num_pages == 0
    rig.say("a", Copied(1, 1, 4))
    found = rig.find("b", 2, [*hashes, *chain(2, 1)])
    assert (found.num_pages, found.is_last, found.slots) == (4, True, room.slots)
    assert not rig.is_idle
    rig.say("b", Close(2, 2))
    assert rig.is_idle


def test_of_a_copy_that_ended_early_only_the_first_pages_count() -> None:
    rig, hashes = Rig(), chain(1, 4)
    rig.offer("a", 1, hashes)
    rig.say("a", Copied(1, 1, 2))
    assert rig.find("a", 2, hashes).num_pages == 2


@pytest.mark.parametrize("num_pages", [-3, 0, 99])
def test_a_count_that_cannot_be_is_cut_to_one_that_can(num_pages: int) -> None:
    rig, hashes = Rig(), chain(1, 4)
    rig.offer("a", 1, hashes)
    rig.say("a", Copied(1, 1, num_pages))
    assert rig.resident(hashes) == (4 if num_pages > 4 else 0)
    assert rig.is_idle


def test_an_offer_gets_room_for_what_is_not_there_yet() -> None:
    rig, hashes = Rig(), chain(1, 6)
    rig.store("a", 1, hashes[:2])
    room = rig.offer("b", 1, hashes, first=5)
    assert (room.first, len(unpack(room.slots)[0])) == (2, 4)


def test_closing_an_offer_leaves_nothing() -> None:
    rig, hashes = Rig(), chain(1, 4)
    rig.offer("a", 1, hashes)
    rig.say("a", Close(1, 1))
    assert rig.is_idle
    assert rig.index.num_cached(0) == 0
    rig.say("a", Copied(1, 1, 4))
    assert rig.index.num_cached(0) == 0


def test_sliding_pages_are_found_in_the_last_window_only_and_copied_where_the_replica_has_them(
) -> None:  # fmt: skip
    rig, hashes = Rig(groups=(FULL, SLIDING)), chain(1, 6)
    room = rig.offer("a", 1, hashes, have=(0, 3))
    full, sliding = unpack(room.slots)
    assert min(full) > 0
    assert sliding[:3] == [-1, -1, -1]
    assert min(sliding[3:]) > 0
    rig.say("a", Copied(1, 1, 6))
    found = rig.find("a", 2, hashes)
    assert found.num_pages == 6
    assert unpack(found.slots) == [full, [-1, -1, -1, *sliding[3:]]]
    rig.say("a", Close(2, 2))
    # Of a shorter prefix the window is not there.
    assert rig.find("a", 3, hashes[:4]).num_pages == 0


def test_with_sliding_groups_only_the_pages_before_need_not_be_there() -> None:
    rig, hashes = Rig(groups=(SLIDING,)), chain(1, 6)
    room = rig.offer("a", 1, hashes, first=3)
    assert (room.first, len(unpack(room.slots)[0])) == (3, 3)
    rig.say("a", Copied(1, 1, 3))
    assert rig.find("a", 2, hashes).num_pages == 6


def test_no_room_for_what_lacks_a_page_in_a_full_group() -> None:
    rig, hashes = Rig(), chain(1, 6)
    assert unpack(rig.offer("a", 1, hashes, first=3, have=(3,)).slots) == [[]]
    assert rig.keeper.stats.refused_pages == 6


# ------------------------------------------------------------------------------------------ tenants


def test_a_tenant_at_its_quota_makes_room_by_its_own_pages() -> None:
    rig = Rig(pages=11, quotas={"a": 4, None: 6})
    rig.store("a", 1, chain(1, 6), tenant="other")
    for number in range(2, 9):
        rig.store("a", number, chain(number, 3), tenant="a")
        assert rig.index.tenant_pages()["a"] <= 4
        assert rig.resident(chain(number, 3)) == 3
    assert rig.resident(chain(1, 6)) == 6
    rig.store("a", 9, chain(9, 2), tenant="other")
    assert rig.index.tenant_pages()["other"] == 6
    assert rig.resident(chain(9, 2)) == 2
    assert rig.is_idle


def test_of_a_sequence_longer_than_the_quota_the_first_pages_stay() -> None:
    rig = Rig(pages=11, quotas={"a": 4})
    rig.store("a", 1, chain(1, 3), tenant="a")
    room = rig.offer("a", 2, chain(1, 9), tenant="a")
    assert (room.first, len(unpack(room.slots)[0])) == (3, 1)
    rig.say("a", Copied(2, 2, 1))
    rig.store("a", 3, chain(1, 9), tenant="a")
    assert rig.resident(chain(1, 9)) == 4
    # What another tenant brought does not count.
    rig.store("a", 4, chain(2, 4), tenant="b")
    rig.store("a", 5, chain(2, 6), tenant="a")
    assert rig.resident(chain(2, 6)) == 6
    assert rig.index.tenant_pages() == {"a": 4, "b": 4}
    assert rig.is_idle


def test_a_tenant_without_quota_takes_what_there_is_and_one_of_none_nothing() -> None:
    rig = Rig(pages=11, quotas={"none": 0})
    rig.store("a", 1, chain(1, 10), tenant="a")
    assert unpack(rig.offer("a", 2, chain(2, 3), tenant="none").slots) == [[]]
    rig.say("a", Close(2, 2))
    assert rig.resident(chain(1, 10)) == 10
    assert rig.is_idle


def test_what_makes_room_for_pages_is_not_what_they_continue() -> None:
    rig = Rig(pages=6)
    rig.store("a", 1, chain(1, 2))
    rig.store("a", 2, chain(2, 3))
    rig.store("a", 3, chain(1, 4))  # pages 0 and 1 are those used longest ago
    assert rig.resident(chain(1, 4)) == 4
    assert rig.resident(chain(2, 3)) == 1


def test_there_are_no_quotas_where_the_index_knows_no_tenants() -> None:
    with pytest.raises(ValueError, match="full-attention"):
        Rig(groups=(SLIDING,), quotas={"a": 1})


# --------------------------------------------------------------------------- what is held, and when


def test_what_was_found_is_not_evicted_until_it_is_closed() -> None:
    rig = Rig(pages=5)
    rig.store("a", 1, chain(1, 4))
    rig.find("b", 1, chain(1, 4))
    assert unpack(rig.offer("a", 2, chain(2, 4)).slots) == [[]]
    rig.say("b", Close(1, 1))
    assert len(unpack(rig.offer("a", 3, chain(2, 4)).slots)[0]) == 4


def test_each_time_that_pages_are_found_counts() -> None:
    rig = Rig(pages=5)
    rig.store("a", 1, chain(1, 4))
    rig.find("a", 2, chain(1, 4))
    rig.find("b", 1, chain(1, 4))
    rig.say("a", Close(2, 2))
    assert unpack(rig.offer("a", 3, chain(2, 4)).slots) == [[]]


def test_room_is_given_to_one_only_until_it_has_been_copied() -> None:
    rig = Rig(pages=5)
    rig.offer("a", 1, chain(1, 4))
    assert unpack(rig.offer("b", 1, chain(2, 4)).slots) == [[]]
    rig.say("a", Copied(1, 1, 4))
    assert len(unpack(rig.offer("b", 2, chain(2, 4)).slots)[0]) == 4


def test_where_not_all_fits_the_first_pages_are_taken() -> None:
    rig, hashes = Rig(pages=5), chain(1, 9)
    room = rig.offer("a", 1, hashes)
    assert (room.first, len(unpack(room.slots)[0])) == (0, 4)
    rig.say("a", Copied(1, 1, 4))
    assert rig.resident(hashes) == 4
    stats = rig.keeper.stats
    assert (stats.offered_pages, stats.copied_pages, stats.refused_pages) == (9, 4, 5)


@pytest.mark.parametrize("how", ["copied", "closed", "gone", "cleared"])
def test_what_an_offer_continues_stays_until_it_has_ended(how: str) -> None:
    rig = Rig(pages=6)
    rig.store("a", 1, chain(1, 2))
    assert rig.offer("a", 2, chain(1, 4)).first == 2
    room = rig.offer("b", 1, chain(2, 3))
    assert len(unpack(room.slots)[0]) == 1
    rig.say("b", Close(1, 2))
    match how:
        case "copied":
            rig.say("a", Copied(2, 2, 2))
        case "closed":
            rig.say("a", Close(2, 3))
        case "gone":
            rig.keeper.client_down("a", 0.0)
        case _:
            rig.index.clear()
            rig.say("a", Copied(2, 2, 2))  # never pages without those before
    assert rig.resident(chain(1, 4)) == {"copied": 4, "cleared": 0}.get(how, 2)
    assert rig.is_idle
    assert len(unpack(rig.offer("b", 2, chain(2, 5)).slots)[0]) == 5


# --------------------------------------------------------------------- repeated, lost and overtaken


def test_a_repeated_message_changes_nothing() -> None:
    rig, hashes = Rig(), chain(1, 4)
    rig.offer("a", 1, hashes)
    assert not rig.say("a", Offer(1, 1, 0, b"".join(hashes), (0,)))
    rig.say("a", Copied(1, 1, 4))
    assert not rig.say("a", Copied(1, 1, 4))
    rig.find("a", 2, hashes)
    assert not rig.say("a", Find(2, 2, b"".join(hashes)))
    rig.say("a", Close(2, 3))
    assert not rig.say("a", Close(2, 3))
    assert rig.is_idle
    # Also after it was closed, once the floor has passed it.
    assert not rig.say("a", Find(2, 2, b"".join(hashes)))
    assert rig.is_idle


@pytest.mark.parametrize("end", [Copied(2, 1, 4), Close(2, 1)], ids=["copied", "closed"])
def test_what_has_ended_is_not_opened_again_while_what_came_before_is_open(
    end: Copied | Close,
) -> None:
    """A late `Copied` would speak of the slots that it had at first."""
    rig, hashes = Rig(), chain(1, 4)
    rig.find("a", 1, chain(2, 1))
    rig.offer("a", 2, hashes, floor=1)
    rig.say("a", end)
    num_open = rig.keeper.num_open
    assert not rig.say("a", Offer(2, 1, 0, b"".join(hashes), (0,)))
    assert rig.keeper.num_open == num_open
    rig.say("a", Close(1, 3))
    assert rig.is_idle


def test_the_floor_closes_what_is_below_it() -> None:
    rig, hashes = Rig(), chain(1, 4)
    rig.store("a", 1, hashes)
    rig.find("a", 2, hashes)
    rig.offer("a", 3, chain(2, 3), floor=2)
    rig.find("a", 4, hashes, floor=2)
    assert rig.keeper.num_open == 3
    rig.find("a", 5, chain(3, 1), floor=4)
    assert rig.keeper.num_open == 2
    rig.say("a", Close(5, 6))
    assert rig.is_idle


def test_what_was_overtaken_by_its_end_is_not_begun() -> None:
    rig, hashes = Rig(), chain(1, 4)
    rig.say("a", Close(1, 2))
    assert not rig.say("a", Offer(1, 1, 0, b"".join(hashes), (0,)))
    assert not rig.say("a", Find(1, 1, b"".join(hashes)))
    assert rig.is_idle


def test_a_message_of_the_wrong_kind_for_its_exchange_changes_nothing() -> None:
    rig, hashes = Rig(), chain(1, 4)
    rig.find("a", 1, hashes)
    assert not rig.say("a", Copied(1, 1, 4))
    rig.offer("a", 2, hashes, floor=1)
    assert not rig.say("a", Take(2, 1))
    assert not rig.say("a", Take(1, 1))  # its last `Found` has been sent
    assert not rig.say("a", Take(9, 1))
    assert rig.keeper.num_open == 2


def test_strangers_are_not_heard() -> None:
    rig = Rig()
    assert not rig.say("nobody", Find(1, 1, b"".join(chain(1, 4))))
    assert rig.is_idle


@pytest.mark.parametrize(
    "message",
    [
        Offer(1, 1, 0, b"".join(chain(1, 4)), ()),
        Offer(1, 1, 0, b"".join(chain(1, 4)), (0, 0)),
        Offer(1, 1, 9, b"".join(chain(1, 4)), (0,)),
        Offer(1, 1, -1, b"".join(chain(1, 4)), (-5,)),
        Offer(1, 1, 0, b"x" * 33, (0,)),
        Offer(1, 1, 0, b"", (0,)),
        Find(1, 1, b"x" * 33),
        Find(1, 1, b""),
    ],
)
@pytest.mark.parametrize("group", [FULL, SLIDING])
def test_an_unsound_message_does_no_harm(message: Find | Offer, group: LayerGroup) -> None:
    rig = Rig(groups=(group,))
    rig.say("a", message)
    rig.say("a", Copied(1, 1, 4))
    rig.say("a", Close(1, 2))
    assert rig.is_idle


def test_one_replica_cannot_open_any_number_of_exchanges() -> None:
    rig = Rig()
    for serial in range(1, MAX_OPEN + 1):
        rig.keeper.receive("a", Find(serial, 1, b""), 0.0)
    last, pages = MAX_OPEN + 1, b"".join(chain(1, 3))
    # They are answered, for somebody waits.
    assert rig.say("a", Find(last, 1, pages)) == [Found(last, 0, (b"",), True)]
    assert rig.say("a", Offer(last, 1, 0, pages, (0,))) == [Room(last, 0, (b"",))]
    assert rig.keeper.num_open == MAX_OPEN
    rig.find("b", 1, [])


# ------------------------------------------------------------------------ two that offer, and death


def test_of_two_that_offer_the_same_pages_the_second_gets_room_for_the_rest_only() -> None:
    rig, hashes = Rig(), chain(1, 6)
    rig.offer("a", 1, hashes[:4])
    room = rig.offer("b", 1, hashes)
    assert (room.first, len(unpack(room.slots)[0])) == (4, 2)
    assert unpack(rig.offer("c", 1, hashes[:3]).slots) == [[]]


def test_pages_that_come_before_those_that_precede_them_wait() -> None:
    rig, hashes = Rig(), chain(1, 6)
    rig.offer("a", 1, hashes[:2])
    rig.offer("b", 1, hashes[:4])
    rig.offer("c", 1, hashes)
    rig.say("c", Copied(1, 1, 2))
    rig.say("b", Copied(1, 1, 2))
    assert rig.resident(hashes) == 0
    rig.say("a", Copied(1, 1, 2))
    assert rig.resident(hashes) == 6
    assert rig.is_idle


def test_pages_that_wait_are_kept_when_their_replica_ends() -> None:
    rig, hashes = Rig(), chain(1, 6)
    rig.offer("a", 1, hashes[:2])
    rig.offer("b", 1, hashes)
    rig.say("b", Copied(1, 1, 4))
    rig.keeper.client_down("b", 0.0)
    rig.say("a", Copied(1, 1, 2))
    assert rig.resident(hashes) == 6
    assert rig.is_idle


@pytest.mark.parametrize("how", ["closed", "floor", "short", "gone"])
def test_pages_whose_predecessors_do_not_come_are_given_back(how: str) -> None:
    rig, hashes = Rig(), chain(1, 6)
    rig.offer("a", 1, hashes[:2])
    rig.offer("b", 1, hashes)
    rig.say("b", Copied(1, 1, 4))
    assert rig.index.num_used(0) == 6
    match how:
        case "closed":
            rig.say("a", Close(1, 1))
        case "floor":
            rig.say("a", Close(7, 8))
        case "short":
            rig.say("a", Copied(1, 1, 1))
        case _:
            rig.keeper.client_down("a", 0.0)
    assert rig.resident(hashes) == (how == "short")
    assert rig.is_idle


def test_a_replica_that_is_gone_gives_back_all() -> None:
    rig, hashes = Rig(), chain(1, 4)
    rig.store("a", 1, hashes)
    rig.find("b", 1, hashes)
    rig.offer("b", 2, chain(2, 4), floor=1)
    rig.keeper.client_down("b", 0.0)
    rig.keeper.check_integrity()
    assert rig.is_idle
    assert rig.resident(chain(2, 4)) == 0
    assert len(unpack(rig.offer("a", 2, chain(2, 4)).slots)[0]) == 4
    # A new one under its name begins at the first serial.
    rig.keeper.client_up("b")
    assert rig.find("b", 1, hashes).num_pages == 4


# ------------------------------------------------------------------------------------------ storage


def bring(rig: Rig, prefetch: Prefetch, hashes: list[bytes]) -> None:
    """What storage had enters the host tier."""
    slots = [rig.index.allocate(group, len(hashes)) or [] for group in range(len(rig.groups))]
    rig.index.insert(b"", hashes, slots, 0)
    for group, pages in enumerate(slots):
        rig.index.release(group, pages)
    prefetch.is_done = True


def test_what_storage_brings_is_told_in_a_second_answer() -> None:
    tier = FakeTier()
    rig, hashes = Rig(tier=tier), chain(1, 4)
    found = rig.find("a", 1, hashes)
    assert (found.num_pages, found.is_last) == (0, False)
    rig.keeper.tick(0.0)
    assert len(rig.sent) == 1
    bring(rig, tier.prefetches[0], hashes[:3])
    rig.keeper.tick(0.0)
    rig.keeper.tick(0.0)
    (_, last) = rig.sent.pop()
    assert isinstance(last, Found)
    assert (last.num_pages, last.is_last, last.num_read) == (3, True, 3)
    assert len(rig.sent) == 1
    assert (rig.keeper.stats.found_pages, rig.keeper.stats.read_pages) == (3, 3)
    rig.say("a", Close(1, 2))
    assert rig.is_idle


def test_storage_is_told_what_the_replica_has() -> None:
    tier = FakeTier()
    rig = Rig(tier=tier)
    rig.say("a", Find(1, 1, b"".join(chain(1, 4)), 0.0, have=3))
    assert tier.prefetches[0]._have == 3


def test_pages_count_as_found_once() -> None:
    tier = FakeTier()
    rig, hashes = Rig(tier=tier), chain(1, 4)
    rig.store("a", 1, hashes[:2])
    rig.find("a", 2, hashes)
    tier.prefetches[0].is_done = True
    rig.keeper.tick(0.0)
    assert (rig.keeper.stats.found_pages, rig.keeper.stats.read_pages) == (2, 0)


def test_what_storage_has_not_is_not_waited_for() -> None:
    tier = FakeTier()
    tier.has_more = False
    rig = Rig(tier=tier)
    assert rig.find("a", 1, chain(1, 4)).is_last


def test_a_read_that_only_measures_is_not_waited_for() -> None:
    tier = FakeTier()
    tier.is_probe = True
    rig = Rig(tier=tier)
    assert rig.find("a", 1, chain(1, 4)).is_last
    rig.say("a", Close(1, 2))
    assert ("cancel", 0) not in tier.calls
    # Nor is one that has become such.
    tier.is_probe = False
    assert not rig.find("a", 2, chain(1, 4)).is_last
    tier.prefetches[-1].is_probe = True
    rig.keeper.tick(0.0)
    (_, last) = rig.sent.pop()
    assert isinstance(last, Found)
    assert last.is_last


def test_a_replica_need_not_wait_for_storage() -> None:
    tier = FakeTier()
    rig, hashes = Rig(tier=tier), chain(1, 4)
    rig.find("a", 1, hashes)
    bring(rig, tier.prefetches[0], hashes[:2])
    tier.prefetches[0].is_done = False  # more is under way
    (last,) = rig.say("a", Take(1, 1))
    assert isinstance(last, Found)
    assert (last.num_pages, last.is_last) == (2, True)
    assert ("cancel", 0) in tier.calls
    assert not rig.say("a", Take(1, 1))
    rig.keeper.tick(0.0)
    assert len(rig.sent) == 0


@pytest.mark.parametrize("how", ["closed", "gone", "floor"])
def test_a_search_that_is_over_reads_no_more(how: str) -> None:
    tier = FakeTier()
    rig = Rig(tier=tier)
    rig.find("a", 1, chain(1, 4))
    match how:
        case "closed":
            rig.say("a", Close(1, 1))
        case "floor":
            rig.say("a", Close(1, 2))
        case _:
            rig.keeper.client_down("a", 0.0)
    assert tier.calls[-1] == ("cancel", 0)
    tier.prefetches[0].is_done = True
    del rig.sent[:]
    rig.keeper.tick(0.0)
    assert not rig.sent


def test_storage_hears_of_what_was_inserted_and_of_what_was_found() -> None:
    tier = FakeTier()
    tier.has_more = False
    rig, hashes = Rig(tier=tier), chain(1, 6)
    rig.offer("a", 1, hashes[:2])
    rig.offer("b", 1, hashes)
    rig.say("b", Copied(1, 1, 4))
    assert not tier.calls
    rig.say("a", Copied(1, 1, 2))
    assert tier.calls == [("stored", 2), ("stored", 4)]
    rig.find("a", 2, hashes[:5])
    assert tier.calls[-1] == ("hit", 5)


def test_when_storage_is_detached_nobody_waits_for_it() -> None:
    tier = FakeTier()
    rig, hashes = Rig(tier=tier), chain(1, 4)
    rig.store("c", 1, hashes[:1])
    for client in ("a", "b"):
        assert not rig.find(client, 1, hashes).is_last
    del rig.sent[:]
    rig.keeper.detach(0.0)
    assert sorted(to for to, _ in rig.sent) == ["a", "b"]
    for _, message in rig.sent:
        assert isinstance(message, Found)
        assert (message.num_pages, message.is_last) == (1, True)
    assert tier.calls[-1] == ("detach", 0)
    assert rig.find("a", 2, hashes, floor=1).is_last
    for client in ("a", "b"):
        rig.say(client, Close(9, 10))
    assert rig.is_idle
    rig.keeper.detach(0.0)  # without one it is nothing


# -------------------------------------------------------------------------------------- exploration


@dataclasses.dataclass(eq=False)
class Exchange:
    serial: int
    kind: str
    hashes: list[bytes]
    have: tuple[int, ...] = ()
    pages: list[tuple[int, int, bytes]] | None = None
    """While copying: (group, slot, hash)."""
    places: list[int] = dataclasses.field(default_factory=list)
    """Of each of `pages`, its place among those that room was given for."""
    count: int = 0


class Client:
    """A replica that believes what it is told, and keeps to the protocol."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.last_serial = 0
        self.open: dict[int, Exchange] = {}

    def tell(self, serial: int, make: type[Close] | type[Take]) -> None:
        self.world.post(self, make(serial, self.floor))

    @property
    def floor(self) -> int:
        return next(iter(self.open), self.last_serial + 1)

    def begin(self) -> None:
        world = self.world
        hashes = world.random.choice(world.chains)
        hashes = hashes[: world.random.randint(1, len(hashes))]
        self.last_serial += 1
        exchange = Exchange(self.last_serial, world.random.choice(("find", "offer")), hashes)
        self.open[exchange.serial] = exchange
        text = b"".join(hashes)
        if exchange.kind == "find":
            world.post(self, Find(exchange.serial, self.floor, text))
            return
        first = world.random.randrange(len(hashes))
        exchange.have = tuple(
            world.random.choice((0, 0, first)) if group.kind == "sliding" else 0
            for group in world.groups
        )
        world.post(self, Offer(exchange.serial, self.floor, first, text, exchange.have))

    def receive(self, message: FromKeeper) -> None:
        exchange = self.open.get(message.serial)
        if exchange is None or exchange.pages is not None:
            return
        slots = unpack(message.slots)
        if isinstance(message, Found):
            assert exchange.kind == "find"
            assert all(len(each) == message.num_pages for each in slots)
            if not message.is_last and self.world.random.random() < 0.5:
                return  # wait for more
            first = 0
        else:
            assert exchange.kind == "offer"
            first, exchange.count = message.first, len(slots[0])
            for have, each in zip(exchange.have, slots, strict=True):
                assert all(slot < 0 for slot in each[: max(0, have - first)])
        exchange.pages = [
            (group, slot, exchange.hashes[first + i])
            for group, each in enumerate(slots)
            for i, slot in enumerate(each)
            if slot >= 0
        ]
        exchange.places = [i for each in slots for i, slot in enumerate(each) if slot >= 0]
        self.world.begin_copy(exchange)

    def end_copy(self, exchange: Exchange) -> None:
        """Of a copy to the host tier perhaps only a part was done."""
        assert exchange.pages is not None
        if exchange.kind == "find":
            self.world.check_pages(exchange)
        elif self.world.random.random() < 0.8:
            done = self.world.random.choice((exchange.count, exchange.count, exchange.count // 2))
            for (group, slot, page_hash), place in zip(
                exchange.pages, exchange.places, strict=True
            ):
                if place < done:
                    self.world.content[group][slot] = page_hash
            self.world.post(self, Copied(exchange.serial, self.floor, done))
        self.close(exchange)

    def close(self, exchange: Exchange) -> None:
        self.world.copying.discard(exchange)
        del self.open[exchange.serial]
        self.tell(exchange.serial, Close)

    def act(self) -> None:
        choice = self.world.random.random()
        if not self.open or (choice < 0.35 and len(self.open) < 4):
            self.begin()
            return
        exchange = self.world.random.choice([*self.open.values()])
        if exchange.pages is not None:
            self.end_copy(exchange)
        elif choice < 0.6:
            self.close(exchange)  # it is not waited for any longer
        elif exchange.kind == "find" and choice < 0.8:
            self.tell(exchange.serial, Take)


class World:
    """Clients and a keeper, with messages that are lost, repeated and overtake each other, and the
    content of every slot."""

    def __init__(self, seed: int) -> None:
        self.random = rng = random.Random(seed)
        self.groups = rng.choice(((FULL,), (FULL, SLIDING), (SLIDING,), (LATENT, SLIDING)))
        pages = [rng.choice((4, 7, 12)) for _ in self.groups]
        self.index = PageIndex(self.groups, pages, PAGE)
        self.content: list[list[bytes | None]] = [[None] * count for count in pages]
        self.chains = [chain(1, 6), chain(1, 7, 1, at=2), chain(1, 5, 2, at=4), chain(2, 4)]
        self.tier = RestoringTier(self) if rng.random() < 0.5 else None
        self.keeper = Keeper(self.index, self.groups, cast(StorageTier, self.tier), self.send)
        self.loss, self.repeats = rng.choice((0.0, 0.2)), rng.choice((0.0, 0.2))
        self.clients: dict[str, Client] = {}
        self.copying: set[Exchange] = set()
        self.network: list[tuple[Client, ToKeeper | FromKeeper]] = []
        self.ends: list[Client] = []
        """Dead, and the keeper does not know yet."""
        self.num_found = 0
        for name in ("a", "b", "c"):
            self.start(name)

    def start(self, name: str) -> None:
        self.clients[name] = Client(self, name)
        self.keeper.client_up(name)

    def post(self, client: Client, message: ToKeeper | FromKeeper) -> None:
        if self.random.random() < self.loss:
            return
        for _ in range(2 if self.random.random() < self.repeats else 1):
            self.network.append((client, message))

    def send(self, to: str, message: FromKeeper) -> None:
        slots = unpack(message.slots)
        if isinstance(message, Found):
            self.num_found += message.num_pages
        for group, each in enumerate(slots):
            given = [slot for slot in each if slot >= 0]
            assert 0 not in given
            assert len(set(given)) == len(given)
            if isinstance(message, Room):
                references = self.index.references(group)
                assert all(references[slot] == 1 for slot in given), "a slot is given twice"
        if to in self.clients:
            self.post(self.clients[to], message)

    # ------------------------------------------------------------------------------------- contents

    def begin_copy(self, exchange: Exchange) -> None:
        assert exchange.pages is not None
        ours = {(group, slot) for group, slot, _ in exchange.pages}
        for other in self.copying:
            assert other.pages is not None
            theirs = {(group, slot) for group, slot, _ in other.pages}
            if "offer" in (exchange.kind, other.kind):
                assert not ours & theirs, "copies get into each other's way"
        self.copying.add(exchange)
        if exchange.kind == "find":
            self.check_pages(exchange)
            return
        for group, slot in ours:
            self.content[group][slot] = None

    def check_pages(self, exchange: Exchange) -> None:
        for group, slot, page_hash in exchange.pages or ():
            assert self.content[group][slot] == page_hash, "a page found is not what it should be"

    def check(self) -> None:
        self.keeper.check_integrity()
        held = [*self.keeper.held(), *(self.tier.held if self.tier is not None else ())]
        for group in range(len(self.groups)):
            expected: dict[int, int] = {}
            for number, slots in held:
                for slot in slots if number == group else ():
                    if slot >= 0:
                        expected[slot] = expected.get(slot, 0) + 1
            assert self.index.references(group) == expected
        for hashes in self.chains:
            for slots, content in zip(self.index.resident(hashes), self.content, strict=True):
                for slot, page_hash in zip(slots, hashes, strict=False):
                    assert slot < 0 or content[slot] == page_hash, "the index has what is not there"

    # ---------------------------------------------------------------------------------------- steps

    def step(self) -> None:
        choice = self.random.random()
        if choice < 0.55 and self.network:
            client, message = self.network.pop(self.random.randrange(len(self.network)))
            if client is not self.clients.get(client.name):
                return  # of an incarnation that has ended
            if isinstance(message, Found | Room):
                client.receive(message)
            else:
                self.keeper.receive(client.name, message, 0.0)
        elif choice < 0.9 or not self.clients:
            if self.clients:
                self.random.choice([*self.clients.values()]).act()
        elif choice < 0.92:
            self.die(self.random.choice([*self.clients]))
        elif choice < 0.94 and self.ends:
            self.bury(self.ends.pop())
        elif self.tier is not None:
            self.tier.act()
            self.keeper.tick(0.0)
            if self.random.random() < 0.02:
                self.tier.finish()
                self.keeper.detach(0.0)
                self.tier.finish()

    def die(self, name: str) -> None:
        """Its copies end with it."""
        dead = self.clients.pop(name)
        for exchange in dead.open.values():
            self.copying.discard(exchange)
        self.ends.append(dead)

    def bury(self, dead: Client) -> None:
        self.keeper.client_down(dead.name, 0.0)
        self.start(dead.name)

    def settle(self) -> None:
        """Everybody ends what he began, and the last message arrives."""
        while self.ends:
            self.bury(self.ends.pop())
        for client in self.clients.values():
            for exchange in list(client.open.values()):
                if exchange.pages is not None:
                    client.end_copy(exchange)
                else:
                    client.close(exchange)
        self.loss = 0.0
        self.random.shuffle(self.network)
        late, self.network = self.network, []
        for client, message in late:
            if client is self.clients.get(client.name) and not isinstance(message, Found | Room):
                self.keeper.receive(client.name, message, 0.0)
        for client in self.clients.values():
            self.keeper.receive(client.name, Close(client.last_serial, client.last_serial + 1), 0.0)
        if self.tier is not None:
            self.tier.finish()
        self.check()
        assert not self.keeper.num_open
        assert not any(self.index.num_used(group) for group in range(len(self.groups)))


class RestoringTier(FakeTier):
    """Has every page, and reads them at any time, as far as there is room; what it writes stays
    the same while it does."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.held: list[tuple[int, list[int]]] = []
        self.writes: list[tuple[int, int, bytes]] = []

    def pages_stored(self, hashes: Sequence[bytes], first: int, now: float) -> None:
        index = self.world.index
        slots = index.resident(hashes)
        assert len(slots[0]) == len(hashes), "pages were stored that are not there"
        for group, each in enumerate(slots):
            for slot, page_hash in zip(each[first:], hashes[first:], strict=True):
                if slot >= 0:
                    index.retain(group, [slot])
                    self.held.append((group, [slot]))
                    self.writes.append((group, slot, page_hash))

    def prefetch(
        self,
        hashes: Sequence[bytes],
        begin: int,
        now: float,
        tokens_per_s: float = 0.0,
        have: int = 0,
    ) -> Prefetch | None:
        self.has_more = self.world.random.random() < 0.7
        return super().prefetch(hashes, begin, now, tokens_per_s, have)

    def cancel_prefetch(self, prefetch: Prefetch, now: float) -> None:
        prefetch.is_done = True

    def act(self) -> None:
        if self.world.random.random() < 0.5:
            self.end_writes()
        waiting = [prefetch for prefetch in self.prefetches if not prefetch.is_done]
        if waiting:
            self.read(self.world.random.choice(waiting))

    def end_writes(self) -> None:
        for group, slot, page_hash in self.writes:
            assert self.world.content[group][slot] == page_hash, "a page changed while written"
        for group, slots in self.held:
            self.world.index.release(group, slots)
        del self.held[:], self.writes[:]

    def read(self, prefetch: Prefetch) -> None:
        prefetch.is_done = True
        index, hashes = self.world.index, prefetch._hashes
        begin = len(index.resident(hashes)[0])
        count = self.world.random.randint(0, len(hashes) - begin)
        groups = range(len(self.world.groups))
        if not count or not index.can_allocate([count for _ in groups]):
            return
        slots = [index.allocate(group, count) or [] for group in groups]
        wanted = hashes[begin : begin + count]
        for group in groups:
            for slot, page_hash in zip(slots[group], wanted, strict=True):
                self.world.content[group][slot] = page_hash
        index.insert(hashes[begin - 1] if begin else b"", wanted, slots, begin)
        for group in groups:
            index.release(group, slots[group])

    def finish(self) -> None:
        for prefetch in self.prefetches:
            prefetch.is_done = True
        self.end_writes()

    def detach(self, now: float) -> None:
        self.finish()


def test_whatever_happens_pages_are_what_they_should_be_and_all_is_given_back() -> None:
    num_found = num_read = 0
    for seed in range(2000):
        world = World(seed)
        try:
            for number in range(world.random.choice((20, 60, 120))):
                world.step()
                if number % 4 == 0:  # a check takes longer than a step
                    world.check()
            world.settle()
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        num_found += world.num_found
        num_read += world.keeper.stats.read_pages
    assert num_found > 2000
    assert num_read > 100

"""What leaders tell of their pages, over channels that lose, repeat and reorder, against a plain
model of who holds what."""

from __future__ import annotations

import hashlib
import random

import pytest

from hicache.index import Cleared, Removed, Stored
from pd import page_feed, page_map
from pd.messages import PAGE_KEY_BYTES, PagesChanged, PagesHeld, PagesWanted
from pd.page_feed import EVERY_S, PageFeed
from pd.page_map import PageMap

ROOT = bytes(32)


def child(parent: bytes, number: int) -> bytes:
    return hashlib.sha256(parent + bytes([number])).digest()


def chain(length: int, seed: int = 0) -> list[bytes]:
    rng = random.Random(seed)
    pages, last = [], ROOT
    for _ in range(length):
        last = child(last, rng.randrange(256))
        pages.append(last)
    return pages


class Replica:
    """A leader's device tier: pages are there while those before them are."""

    def __init__(self, name: str, row: int) -> None:
        self.name = name
        self.row = row
        self.feed = PageFeed()
        self.pages: dict[bytes, bytes] = {}
        """Hash -> parent's."""

    def add(self, prompt: list[bytes]) -> None:
        known = 0
        while known < len(prompt) and prompt[known] in self.pages:
            known += 1
        new = prompt[known:]
        if new:
            parent = prompt[known - 1] if known else ROOT
            self.pages |= dict(zip(new, [parent, *new], strict=False))
            self.feed.note([Stored(parent, tuple(new), known)])

    def evict(self, count: int, rng: random.Random) -> None:
        gone = []
        for _ in range(min(count, len(self.pages))):
            leaf = rng.choice(sorted(self.pages.keys() - set(self.pages.values())))
            del self.pages[leaf]
            gone.append(leaf)
        if gone:
            self.feed.note([Removed(tuple(gone))])

    def clear(self) -> None:
        self.pages.clear()
        self.feed.note([Cleared()])


class World:
    """Several replicas, one map, and what is on its way between them."""

    def __init__(self, seed: int, trouble: float) -> None:
        self.rng = random.Random(seed)
        self.trouble = trouble
        self.now = 0.0
        self.map = PageMap()
        self.replicas = [Replica(f"r{row}", row) for row in range(4)]
        self.asks: list[tuple[str, PagesWanted]] = []
        self.coming: list[tuple[str, PagesChanged | PagesHeld | int]] = []
        """A number is a heartbeat's."""
        self.prompts = [chain(self.rng.randrange(1, 30), self.rng.randrange(3)) for _ in range(6)]
        for replica in self.replicas:
            self.ask(replica.name, self.map.join(replica.name, replica.row, self.now))

    def ask(self, name: str, wanted: PagesWanted | None) -> None:
        if wanted is not None:
            self.asks.append((name, wanted))

    def step(self) -> None:
        rng = self.rng
        self.now += rng.choice((0.01, 0.06, 0.3))
        replica = rng.choice(self.replicas)
        match rng.randrange(12):
            case 0:
                self.restart(replica)
            case 1:
                replica.clear()
            case 2 | 3 | 4:
                replica.evict(rng.randrange(8), rng)
            case _:
                tail = [child(ROOT, rng.randrange(4))]
                replica.add(rng.choice((*self.prompts, tail)))
        self.exchange()

    def restart(self, replica: Replica) -> None:
        """Under the same name; what the old one sent is not let through (pd/node.py)."""
        self.coming = [each for each in self.coming if each[0] != replica.name]
        self.asks = [each for each in self.asks if each[0] != replica.name]
        replica.__init__(replica.name, replica.row)  # type: ignore[misc]
        self.map.leave(replica.name)
        self.ask(replica.name, self.map.join(replica.name, replica.row, self.now))

    def exchange(self) -> None:
        rng, by_name = self.rng, {replica.name: replica for replica in self.replicas}
        asks, self.asks = self.asks, []
        for name, wanted in asks:
            if rng.random() >= self.trouble:
                by_name[name].feed.wanted("api", wanted.serial)
        for replica in self.replicas:
            sent = [message for _, message in replica.feed.take_messages(self.now)]
            replica.feed.check_integrity()
            for message in (*sent, replica.feed.sequence):
                if not isinstance(message, int):
                    pages = (
                        message.stored + message.removed
                        if isinstance(message, PagesChanged)
                        else message.pages
                    )
                    assert len(pages) <= page_feed.PART_PAGES * PAGE_KEY_BYTES
                for _ in range(1 + (rng.random() < self.trouble)):
                    if rng.random() >= self.trouble:
                        self.coming.append((replica.name, message))
        late = [each for each in self.coming if rng.random() < self.trouble]
        arriving = [each for each in self.coming if each not in late]
        self.coming = late
        if rng.random() < self.trouble:
            rng.shuffle(arriving)
        for name, message in arriving:
            if isinstance(message, int):
                self.ask(name, self.map.reported(name, message, self.now))
            else:
                self.ask(name, self.map.receive(name, message, self.now))
        self.map.check_integrity()

    def check(self) -> None:
        """The map is what the replicas have."""
        everything = {page for replica in self.replicas for page in replica.pages}
        everything |= {page for prompt in self.prompts for page in prompt}
        for page in everything:
            holders = {replica.row for replica in self.replicas if page in replica.pages}
            assert self.map.holders(page) == holders
        for prompt in self.prompts:
            expected = [matched(prompt, replica) for replica in self.replicas]
            assert list(self.map.match(b"".join(prompt), len(prompt), 4)) == expected


def matched(prompt: list[bytes], replica: Replica) -> int:
    return next((n for n, page in enumerate(prompt) if page not in replica.pages), len(prompt))


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_feed, "PART_PAGES", 7)
    monkeypatch.setattr(page_feed, "_MAX_WAITING", 60)


@pytest.mark.parametrize("seed", range(30))
def test_without_trouble_the_map_follows(seed: int) -> None:
    world = World(seed, 0.0)
    for _ in range(60):
        world.step()
    for _ in range(30):
        world.now += EVERY_S
        world.exchange()
    world.check()


@pytest.mark.parametrize("seed", range(60))
def test_the_map_does_not_drift(seed: int) -> None:
    """After any trouble, a while without it makes the map exact, though nothing changes."""
    world = World(seed, 0.25)
    for _ in range(80):
        world.step()
    assert world.map.num_resyncs
    world.trouble = 0.0
    for _ in range(80):
        world.now += EVERY_S
        world.exchange()
    world.check()


def fill(pages: PageMap, name: str, row: int, held: list[bytes]) -> None:
    wanted = pages.join(name, row, 0.0)
    keys = b"".join(page[:PAGE_KEY_BYTES] for page in held)
    assert pages.receive(name, PagesHeld(wanted.serial, 1, 0, True, keys), 0.0) is None


@pytest.mark.parametrize("length", [1, 2, 3, 64, 300])
@pytest.mark.parametrize("replicas", [1, 3, 40, 200])
def test_matches_are_those_of_a_look_at_every_page(length: int, replicas: int) -> None:
    rng = random.Random(length * replicas)
    pages, prompt = PageMap(), chain(length)
    held = [rng.choice((0, 1, length, rng.randrange(length + 1))) for _ in range(replicas)]
    for row, count in enumerate(held):
        fill(pages, f"r{row}", row, prompt[:count])
    found = list(pages.match(b"".join(prompt), length, replicas))
    if len(set(held)) <= 3 or length <= 3:
        assert found == held
    # With many levels, less may be found where others have more, but never more than there is.
    assert all(at_least <= exact for at_least, exact in zip(found, held, strict=True))
    assert max(found) == max(held)
    assert {row for row, n in enumerate(found) if n} == {row for row, n in enumerate(held) if n}
    assert max(pages.match(b"".join(prompt), length // 2, replicas)) == min(max(held), length // 2)
    pages.check_integrity()


def test_slots_are_used_again() -> None:
    pages, prompt = PageMap(), chain(50)
    for number in range(2000):
        fill(pages, "r0", 0, prompt[number % 50 :])
    assert len(pages._bits) <= 4 * page_map._SHARDS
    pages.leave("r0")
    for _ in range(3 * page_map._SHARDS):
        assert pages.reported("r0", 5, 0.0) is None
    assert len(pages) == 0
    assert sorted(pages._free) == list(range(len(pages._bits)))
    pages.check_integrity()


def test_what_waits_is_bounded() -> None:
    feed = PageFeed()
    feed.note([Stored(ROOT, tuple(chain(30)), 0)])
    assert feed.take_messages(0.0) == []  # nobody has asked
    feed.wanted("api", 1)
    (_, first), *_ = feed.take_messages(1.0)
    assert isinstance(first, PagesHeld)
    assert not first.is_last
    before = feed.sequence
    for seed in range(9):
        feed.note([Stored(ROOT, tuple(chain(30, seed + 1)), 0)])
        feed.check_integrity()
    assert feed.sequence > before  # some changes will never be told
    pages = PageMap()
    pages.join("r", 0, 0.0)
    assert feed.take_messages(1.01) == []  # too early
    feed.leave("api")
    assert feed.take_messages(9.0) == []


def test_a_silent_replica_is_asked_again_but_not_one_that_tells_nothing() -> None:
    pages = PageMap()
    pages.join("r", 0, 0.0)
    assert pages.reported("r", 0, 100.0) is None
    assert pages.reported("r", 1, 0.5) is None
    again = pages.reported("r", 1, 1.5)
    assert again is not None
    assert (
        pages.receive("r", PagesHeld(again.serial - 1, 1, 0, True, b"x" * 8), 1.6) is None
    )  # the first
    assert len(pages) == 0
    assert pages.receive("r", PagesHeld(again.serial, 4, 0, True, b"x" * 8), 1.6) is None
    assert pages.reported("r", 4, 1.7) is None
    assert pages.receive("r", PagesChanged(4, b"y" * 8, b""), 1.7) is None  # repeated
    assert len(pages) == 1
    assert pages.reported("r", 5, 1.8) == PagesWanted(again.serial + 1)
    assert pages.receive("nobody", PagesChanged(1, b"", b""), 2.0) is None

"""Orders by hand, then each against a slow model that keeps lists and looks for everything."""

import random

import pytest

from hicache.policy import Run, make_order, order_names, prefix_cost

PAGE_TOKENS = 512


class FakeRun(Run):
    """A run in a tree that the test keeps."""

    __slots__ = ("children", "first", "hashes", "is_held", "parent")

    def __init__(
        self,
        level: int,
        first: int,
        hashes: list[bytes],
        parent: "FakeRun | None",
        owner: str | None = None,
    ) -> None:
        super().__init__(level, owner)
        self.first = first
        self.hashes = hashes
        self.parent = parent
        self.children = 0
        self.is_held = True

    @property
    def num_pages(self) -> int:
        return len(self.hashes)

    @property
    def end(self) -> int:
        return self.first + len(self.hashes)

    @property
    def is_evictable(self) -> bool:
        return not self.children and not self.is_held


# ----------------------------------------------------------------------------------- slow models


class Model:
    """`best` narrows the evictable runs to those that the order may take next."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages

    def is_main(self, page_hash: bytes) -> bool:
        return False

    def add(self, run: FakeRun, hashes: list[bytes]) -> None: ...
    def hit(self, run: FakeRun, now: int) -> None: ...
    def release(self, run: FakeRun, now: int) -> None: ...
    def split(self, head: FakeRun, tail: FakeRun) -> None: ...
    def remove(self, run: FakeRun, hashes: list[bytes]) -> None: ...

    def best(self, evictable: list[FakeRun]) -> list[FakeRun]:
        least = min(self.key(run) for run in evictable)
        return [run for run in evictable if self.key(run) == least]

    def key(self, run: FakeRun) -> tuple[int, ...]:
        raise NotImplementedError


class Lru(Model):
    def __init__(self, num_pages: int) -> None:
        super().__init__(num_pages)
        self.used: dict[FakeRun, int] = {}

    def release(self, run: FakeRun, now: int) -> None:
        self.used[run] = now

    def split(self, head: FakeRun, tail: FakeRun) -> None:
        self.used[head] = self.used.get(tail, 0)

    def key(self, run: FakeRun) -> tuple[int, ...]:
        return (self.used[run],)


class Lfu(Lru):
    def __init__(self, num_pages: int) -> None:
        super().__init__(num_pages)
        self.hits: list[FakeRun] = []

    def hit(self, run: FakeRun, now: int) -> None:
        self.hits.append(run)

    def split(self, head: FakeRun, tail: FakeRun) -> None:
        super().split(head, tail)
        self.hits += [head] * self.hits.count(tail)

    def key(self, run: FakeRun) -> tuple[int, ...]:
        return (self.hits.count(run), self.used[run])


class Slru(Lru):
    def __init__(self, num_pages: int) -> None:
        super().__init__(num_pages)
        self.protected: list[FakeRun] = []

    def hit(self, run: FakeRun, now: int) -> None:
        if run in self.protected:
            self.protected.remove(run)
        self.protected.append(run)
        while sum(len(each.hashes) for each in self.protected) > int(0.8 * self.num_pages):
            self.used[self.protected.pop(0)] = now

    def split(self, head: FakeRun, tail: FakeRun) -> None:
        super().split(head, tail)
        if tail in self.protected:
            self.protected.append(head)

    def remove(self, run: FakeRun, hashes: list[bytes]) -> None:
        if not run.hashes and run in self.protected:
            self.protected.remove(run)

    def key(self, run: FakeRun) -> tuple[int, ...]:
        return (run in self.protected, self.used[run])


class Cost(Lru):
    def __init__(self, num_pages: int) -> None:
        super().__init__(num_pages)
        self.highest = 0

    def release(self, run: FakeRun, now: int) -> None:
        self.used[run] = self.highest

    def key(self, run: FakeRun) -> tuple[int, ...]:
        last = prefix_cost(run.end, PAGE_TOKENS) - prefix_cost(run.end - 1, PAGE_TOKENS)
        return (self.used[run] + last,)

    def best(self, evictable: list[FakeRun]) -> list[FakeRun]:
        found = super().best(evictable)
        self.highest = max(self.highest, self.key(found[0])[0])
        return found


class S3Fifo(Model):
    def __init__(self, num_pages: int) -> None:
        super().__init__(num_pages)
        self.small: list[FakeRun] = []
        self.main: list[FakeRun] = []
        self.hits: dict[FakeRun, int] = {}
        self.ghosts: set[bytes] = set()
        self.batches: list[list[bytes]] = []

    def is_main(self, page_hash: bytes) -> bool:
        return page_hash in self.ghosts

    def add(self, run: FakeRun, hashes: list[bytes]) -> None:
        if any(page_hash in self.ghosts for page_hash in hashes):
            self.ghosts -= set(hashes)
            self.main.append(run)
        else:
            self.small.append(run)
        self.hits[run] = 0

    def hit(self, run: FakeRun, now: int) -> None:
        self.hits[run] = min(3, self.hits[run] + 1)

    def split(self, head: FakeRun, tail: FakeRun) -> None:
        queue = self.small if tail in self.small else self.main
        queue.insert(queue.index(tail), head)
        self.hits[head] = self.hits[tail]

    def remove(self, run: FakeRun, hashes: list[bytes]) -> None:
        if run in self.small:
            self.ghosts |= set(hashes)
            self.batches.append(hashes)
            while sum(map(len, self.batches)) > self.num_pages - int(0.1 * self.num_pages):
                self.ghosts -= set(self.batches.pop(0))
        if not run.hashes:
            (self.small if run in self.small else self.main).remove(run)

    def best(self, evictable: list[FakeRun]) -> list[FakeRun]:
        while True:
            small = [run for run in self.small if run in evictable]
            main = [run for run in self.main if run in evictable]
            is_over = sum(len(run.hashes) for run in self.small) > int(0.1 * self.num_pages)
            if small and (is_over or not main):
                if self.hits[small[0]] <= 1:
                    return small[:1]
                self.small.remove(small[0])
                self.main.append(small[0])
                self.hits[small[0]] = 0
            else:
                if not self.hits[main[0]]:
                    return main[:1]
                self.hits[main[0]] -= 1
                self.main.remove(main[0])
                self.main.append(main[0])


MODELS: dict[str, type[Model]] = {
    "lru": Lru,
    "lfu": Lfu,
    "slru": Slru,
    "s3fifo": S3Fifo,
    "cost": Cost,
}


class World:
    """A tree of runs, an order, and its model."""

    def __init__(self, name: str, num_pages: int) -> None:
        self.order = make_order(name, num_pages, PAGE_TOKENS)
        self.model = MODELS[name](num_pages)
        self.runs: list[FakeRun] = []
        self.now = 0

    def add(self, parent: FakeRun | None, hashes: list[bytes], owner: str | None = None) -> FakeRun:
        level, count = self.order.admit(hashes, 0)
        expected = [self.model.is_main(page_hash) for page_hash in hashes]
        assert level == expected[0]
        assert expected[:count] == [bool(level)] * count
        assert expected[count : count + 1] != [bool(level)]
        run = FakeRun(level, parent.end if parent else 0, hashes[:count], parent, owner)
        if parent is not None:
            parent.children += 1
        self.runs.append(run)
        self.order.add(run, run.hashes, self.now)
        self.model.add(run, run.hashes)
        return run

    def hit(self, run: FakeRun) -> None:
        self.now += 1
        run.is_held = True
        self.order.hit(run, self.now)
        self.model.hit(run, self.now)

    def release(self, run: FakeRun) -> None:
        self.now += 1
        run.is_held = False
        self.order.release(run, self.now)
        self.model.release(run, self.now)
        self.offer(run)

    def offer(self, run: FakeRun) -> None:
        if run.is_evictable and not run.ticket:
            self.order.offer(run)

    def split(self, run: FakeRun, count: int) -> FakeRun:
        head = FakeRun(run.level, run.first, run.hashes[:count], run.parent, run.owner)
        head.is_held = run.is_held
        head.children = 1
        run.hashes, run.first, run.parent = run.hashes[count:], run.first + count, head
        self.runs.append(head)
        self.order.split(head, run)
        self.model.split(head, run)
        return head

    def evict(self, count: int, owner: str | None = None) -> FakeRun | None:
        evictable = [run for run in self.runs if run.is_evictable and owner in (None, run.owner)]
        if not evictable:
            assert self.order.take(owner) is None
            return None
        best = self.model.best(evictable)
        run = self.order.take(owner)
        assert isinstance(run, FakeRun)
        assert run in best
        gone = run.hashes[-count:]
        del run.hashes[-count:]
        self.order.remove(run, gone)
        self.model.remove(run, gone)
        if run.hashes:
            self.offer(run)
        else:
            self.runs.remove(run)
            if run.parent is not None:
                run.parent.children -= 1
                self.offer(run.parent)
        return run

    def check(self) -> None:
        self.order.check_integrity(self.runs)
        for run in self.runs:
            assert run.ticket or not run.is_evictable


@pytest.mark.parametrize("name", order_names())
@pytest.mark.parametrize("seed", range(12))
def test_an_order_takes_what_its_model_takes(name: str, seed: int) -> None:
    rng = random.Random(seed)
    world = World(name, rng.choice([5, 20, 60]))
    evicted: list[bytes] = []
    made = 0
    for _ in range(400):
        runs = world.runs
        action = rng.choice(["add", "add", "hit", "hit", "release", "release", "split", "evict"])
        if action == "add" or not runs:
            hashes = []
            for _ in range(rng.randint(1, 5)):
                if evicted and rng.random() < 0.4:  # it comes again
                    hashes.append(evicted.pop(rng.randrange(len(evicted))))
                else:
                    made += 1
                    hashes.append(b"%d" % made)
            parent = rng.choice(runs) if runs and rng.random() < 0.6 else None
            run = world.add(parent, hashes, rng.choice([None, None, "x", "y"]))
            if rng.random() < 0.7:
                world.release(run)
            evicted += hashes[run.num_pages :]
        elif action == "hit":
            run = rng.choice(runs)
            world.hit(run)
            if rng.random() < 0.8:
                world.release(run)
        elif action == "release":
            world.release(rng.choice(runs))
        elif action == "split":
            run = rng.choice(runs)
            if run.num_pages > 1:
                world.split(run, rng.randint(1, run.num_pages - 1))
        else:
            before = {page_hash for run in runs for page_hash in run.hashes}
            if rng.random() < 0.5:
                world.evict(rng.randint(1, 3), rng.choice(["x", "y", "nobody"]))
            while sum(run.num_pages for run in runs) > world.order.num_pages:
                if world.evict(rng.randint(1, 3)) is None:
                    break
            evicted += sorted(before - {page_hash for run in runs for page_hash in run.hashes})
        world.check()


# --------------------------------------------------------------------------------------- by hand


def cached(world: World, name: bytes, parent: FakeRun | None = None, pages: int = 1) -> FakeRun:
    run = world.add(parent, [b"%s%d" % (name, page) for page in range(pages)])
    world.release(run)
    return run


def use(world: World, run: FakeRun) -> None:
    world.hit(run)
    world.release(run)


def take_all(world: World) -> list[FakeRun]:
    taken = []
    while (run := world.evict(1000)) is not None:
        taken.append(run)
    return taken


def test_lru_and_lfu_by_hand() -> None:
    for name, expected in (("lru", "cab"), ("lfu", "cba")):
        world = World(name, 10)
        runs = {letter: cached(world, letter.encode()) for letter in "abc"}
        for letter in "aaab":
            use(world, runs[letter])
        assert take_all(world) == [runs[letter] for letter in expected]


def test_slru_protects_what_was_matched_up_to_its_share() -> None:
    world = World("slru", 5)  # protects 4
    runs = {letter: cached(world, letter.encode(), pages=2) for letter in "abc"}
    new = cached(world, b"n")
    use(world, runs["a"])
    use(world, runs["b"])
    use(world, runs["c"])  # a counts as new again, from now
    assert take_all(world) == [new, runs["a"], runs["b"], runs["c"]]


def test_s3fifo_lets_a_scan_pass() -> None:
    world = World("s3fifo", 20)
    good = cached(world, b"good", pages=2)
    use(world, good)
    use(world, good)
    scan = [cached(world, b"scan%d" % number, pages=2) for number in range(20)]
    assert [world.evict(2) for _ in range(18)] == scan[:18]
    assert good.level == 1


def test_s3fifo_takes_a_returning_page_for_a_known_one() -> None:
    world = World("s3fifo", 10)
    first = cached(world, b"x", pages=2)
    assert world.evict(1) is first
    assert world.evict(1) is first
    assert cached(world, b"x", pages=2).level == 1


def test_cost_keeps_the_deep_longer_but_not_for_ever() -> None:
    world = World("cost", 1000)
    root = cached(world, b"root", pages=96)
    deep = cached(world, b"deep", root)
    # 24,576 / 512 = 48: a page at depth 97 is worth (48 + 97) / (48 + 1), just under three times a
    # first one. When some first pages have gone, what comes then is worth as much.
    early = [cached(world, b"e%d" % number) for number in range(3)]
    assert [world.evict(1) for _ in early] == early
    later = cached(world, b"later")  # worth 49 + 49 < 145
    assert world.evict(1) is later
    last = cached(world, b"last")  # 98 + 49 > 145
    assert world.evict(1) is deep
    assert last in world.runs


def test_a_withdrawn_run_is_not_taken() -> None:
    for name in order_names():
        world = World(name, 10)
        gone, stays = world.add(None, [b"g"], "x"), world.add(None, [b"s"], "x")
        world.release(gone)
        world.release(stays)
        world.order.withdraw(gone)
        assert world.order.take("x") is stays
        assert world.order.take("x") is world.order.take() is None
        world.order.check_integrity(world.runs)


def test_the_heap_stays_small_when_keys_fall() -> None:
    world = World("slru", 50)
    runs = [cached(world, b"%d-" % number) for number in range(50)]
    for _ in range(200):
        for run in runs:
            use(world, run)
    assert len(world.order.leaves) <= 2 * len(runs) + 16
    world.check()


def test_the_cost_of_a_prefix() -> None:
    # 16 tokens a page: 24,576 / 16 = 1,536 pages down, a page costs twice the first one, nearly.
    assert prefix_cost(0, 16) == 0
    assert prefix_cost(1, 16) == 1537
    assert prefix_cost(3, 16) == 1537 + 1538 + 1539
    assert prefix_cost(2, 100_000) == 2 + 3


def test_an_unknown_order_is_refused_with_the_choices() -> None:
    with pytest.raises(
        ValueError, match="found 'mru', expected one of lru, lfu, slru, s3fifo, cost"
    ):
        make_order("mru", 10, 16)

"""The scheduler's promises: its budget, its order, whose pages are whose, and who is preempted."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import pytest

from hicache.index import PageIndex
from hicache.keys import page_hashes, root_hash
from pd.engine.batch import LAST_SAMPLED, StepCommand, StepResult
from pd.engine.scheduler import Scheduler, Tracked
from pd.engine.turns import PATIENCE_S
from pd.messages import SamplingParams
from transfer.layout import LayerGroup

PAGE = 4
ROOT = root_hash("test")
FULL = LayerGroup("full", (0,), 1, 1)
SLIDING = LayerGroup("sliding", (1,), 1, 1, window=10)


class Rig:
    def __init__(
        self,
        pages: int = 100,
        max_batch_tokens: int = 16,
        max_running: int = 8,
        groups: tuple[LayerGroup, ...] = (FULL, SLIDING),
        cp: int = 1,
        max_in_flight: int = 1,
        looks_ahead: bool = False,
    ) -> None:
        """`pages`: of each rank."""
        self.groups = groups
        self.max_batch_tokens = max_batch_tokens
        self.max_in_flight = max_in_flight + looks_ahead
        self.looks_ahead = looks_ahead
        self.index = PageIndex(groups, [cp * pages] * len(groups), PAGE, cp=cp)
        self.scheduler = Scheduler(
            self.index,
            groups,
            PAGE,
            max_batch_tokens,
            max_running,
            max_in_flight=max_in_flight,
            looks_ahead=looks_ahead,
        )
        self.alive: list[Tracked] = []

    def track(
        self,
        prompt: Any,
        max_tokens: int = 20,
        priority: int = 0,
        tenant: str = "",
        arrived_at: float = 0.0,
    ) -> Tracked:
        prompt = np.asarray(prompt, np.int32)
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        hashes = page_hashes(prompt, PAGE, ROOT)
        groups = len(self.groups)
        sequence = Tracked(
            prompt, params, ROOT, hashes, groups, arrived_at, tenant, priority=priority
        )
        self.alive.append(sequence)
        return sequence

    def add(self, prompt: Any, max_tokens: int = 20, **whose: Any) -> Tracked:
        sequence = self.track(prompt, max_tokens, **whose)
        self.scheduler.add(sequence)
        return sequence

    def land(
        self, prompt: Any, max_tokens: int = 20, token: int = 0, **whose: Any
    ) -> Tracked | None:
        """A sequence whose prompt came by a handover, first token included; None without room."""
        sequence = self.track(prompt, max_tokens, **whose)
        self.scheduler.match_prefix(sequence)
        if self.scheduler.reserve_prompt(sequence) is None:
            self.scheduler.release_pages(sequence)
            self.alive.remove(sequence)
            return None
        sequence.append(token)
        sequence.num_computed = sequence.prompt_len
        self.scheduler.publish(sequence)
        self.scheduler.add_landed(sequence)
        return sequence

    def drop(self, sequence: Tracked) -> None:
        self.alive.remove(sequence)
        self.scheduler.drop(sequence)

    def result(self, command: StepCommand, token: int = 1) -> StepResult:
        count = int(command.sample.sum())
        return StepResult([token] * count, [None] * count, 0.0)

    def step(self) -> StepCommand | None:
        """Plan and commit; sequences that have all their tokens leave."""
        command = self.scheduler.plan(0.0)
        if command is not None:
            for progress in self.scheduler.commit(self.result(command)):
                sequence = progress.sequence
                if sequence.num_output >= sequence.params.max_tokens:
                    self.drop(sequence)
        return command

    def used(self) -> list[int]:
        return [self.index.num_used(group) for group in range(len(self.groups))]

    def by_row(self) -> dict[int, Tracked]:
        return {sequence.row: sequence for sequence in self.scheduler.running}


# --------------------------------------------------------------------------------------- properties


def check_command(rig: Rig, command: StepCommand) -> None:
    counts = command.counts.tolist()
    assert sum(counts) == len(command.tokens) <= rig.max_batch_tokens
    assert min(counts) >= 1
    assert counts == sorted(counts, key=lambda count: count > 1)  # single tokens first
    rows = command.rows.tolist()
    assert len({*rows}) == len(rows)
    by_row = rig.by_row()
    # Nobody who needs one token is left out while another is prefilled.
    decoding = [s for s in by_row.values() if s.remaining == 1]
    if any(count > 1 for count in counts) and rig.max_in_flight == 1:
        assert {s.row for s in decoding} <= {*rows}
    offset = 0
    for row, position, count, sample in zip(
        rows, command.positions.tolist(), counts, command.sample.tolist(), strict=True
    ):
        sequence = by_row[row]
        assert position >= sequence.num_computed
        assert position + count == sequence.num_planned  # nothing of it was planned since
        chunk = command.tokens[offset : offset + count]
        if rig.looks_ahead and position == sequence.length:
            assert chunk.tolist() == [LAST_SAMPLED]
            assert sequence.num_output + 1 < sequence.params.max_tokens
        else:
            assert chunk.tolist() == sequence.buffer[position : position + count].tolist()
        assert sample == (position + count >= sequence.length)
        offset += count
    check_writes(rig, command)


def check_writes(rig: Rig, command: StepCommand) -> None:
    """A page that the step writes has one owner: no other sequence has it, and no other may match
    it."""
    for number, group in enumerate(rig.groups):
        holders: dict[int, list[Tracked]] = {}
        for sequence in {*rig.alive, *rig.scheduler.dropped}:
            for slot in sequence.tables[number]:
                if slot >= 0:
                    holders.setdefault(slot, []).append(sequence)
        references = rig.index.references(number)
        assert references == {slot: len(held) for slot, held in holders.items()}
        by_row = rig.by_row()
        items = zip(command.rows, command.positions, command.counts, strict=True)
        for row, position, count in items:
            sequence = by_row[int(row)]
            for page in range(position // PAGE, (position + count - 1) // PAGE + 1):
                slot = sequence.tables[number][page]
                assert slot >= rig.index.cp
                assert slot % rig.index.cp == page % rig.index.cp
                assert holders[slot] == [sequence]
            # What the queries read is there.
            for page in range(group.first_needed_page(int(position), PAGE), position // PAGE):
                assert sequence.tables[number][page] > 0


def prefix_key(tokens: Any) -> int:
    return hash(tuple(int(token) for token in tokens))


def next_token(tokens: Any) -> int:
    return prefix_key(tokens) % 9


class Ranks:
    """The page tables as ranks have them, and pages whose content is a hash of the prefix. A step
    in flight may run at any time until its commit; here it does so last, and a peer's writes land
    at once: what is given back too early is overwritten."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.tables: list[dict[tuple[int, int], int]] = [{} for _ in rig.groups]
        self.history: dict[int, list[int]] = {}
        self.last_sampled: dict[int, int] = {}
        self.pools: list[dict[tuple[int, int], int]] = [{} for _ in rig.groups]
        self.in_flight: deque[tuple[StepCommand, list[tuple[Tracked, int, int, int]]]] = deque()
        """Commands, and what each reads and writes: (sequence, layer group, page, slot)."""

    def land(self, sequence: Tracked) -> None:
        tokens = sequence.buffer[: sequence.prompt_len].tolist()
        for pool, table in zip(self.pools, sequence.tables, strict=True):
            for position in range(sequence.prompt_len):
                slot = table[position // PAGE]
                if slot >= 0:
                    pool[slot, position % PAGE] = prefix_key(tokens[: position + 1])

    def submit(self, command: StepCommand) -> None:
        by_row = self.rig.by_row()
        touched = []
        for row, position, count in zip(
            command.rows.tolist(), command.positions.tolist(), command.counts.tolist(), strict=True
        ):
            for number, group in enumerate(self.rig.groups):
                first = group.first_needed_page(position, PAGE)
                for page in range(first, (position + count - 1) // PAGE + 1):
                    slot = by_row[row].tables[number][page]
                    touched.append((by_row[row], number, page, slot))
        self.in_flight.append((command, touched))

    def check(self) -> None:
        """What steps in flight read and write is still theirs."""
        for _, touched in self.in_flight:
            for sequence, number, page, slot in touched:
                assert sequence.tables[number][page] == slot

    def run(self) -> StepResult:
        """The oldest step."""
        command, _ = self.in_flight.popleft()
        for start in command.starts:
            self.history[start.row] = start.tokens.tolist()
        for table, update in zip(self.tables, command.pages, strict=True):
            for row, page, slot in update.tolist():
                table[row, page] = slot
        chunks = np.split(command.tokens, np.cumsum(command.counts)[:-1])
        sampled = []
        for row, position, chunk, sample in zip(
            command.rows.tolist(), command.positions.tolist(), chunks, command.sample, strict=True
        ):
            tokens, end = self.history[row], position + len(chunk)
            chunk = np.where(chunk == LAST_SAMPLED, self.last_sampled.get(row, 0), chunk)
            if position == len(tokens):
                tokens += chunk.tolist()
            assert tokens[position:end] == chunk.tolist()
            keys = [prefix_key(tokens[: at + 1]) for at in range(end)]
            for group, pool, table in zip(self.rig.groups, self.pools, self.tables, strict=True):
                for at in range(position, end):
                    pool[table[row, at // PAGE], at % PAGE] = keys[at]
                first = 0 if group.kind == "full" else max(0, position - group.window + 1)
                for at in range(first, end):
                    assert pool[table[row, at // PAGE], at % PAGE] == keys[at]
            if sample:
                self.last_sampled[row] = next_token(tokens[:end])
                sampled.append(self.last_sampled[row])
        return StepResult(sampled, [None] * len(sampled), 0.0)


@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize("groups", [(FULL,), (FULL, SLIDING), (SLIDING,)], ids=len)
@pytest.mark.parametrize(
    ("cp", "max_in_flight", "looks_ahead"),
    [(1, 1, False), (1, 1, True), (2, 1, False), (1, 2, False), (3, 3, False)],
)
def test_random_histories(
    seed: int, groups: tuple[LayerGroup, ...], cp: int, max_in_flight: int, looks_ahead: bool
) -> None:
    """Arrivals, handovers and drops, also during steps, in small pools. Every sequence gets the
    tokens that it would get alone."""
    rng = random.Random(seed)
    max_running = rng.choice((1, 3, 8))
    rig = Rig(
        pages=1 + -(-rng.choice((19, 29, 59)) // cp),
        max_batch_tokens=rng.choice((1, 3, 8, 64)),
        max_running=max_running,
        groups=groups,
        cp=cp,
        max_in_flight=max_in_flight,
        looks_ahead=looks_ahead,
    )
    max_in_flight = rig.max_in_flight
    ranks = Ranks(rig)
    prompts = [[rng.randrange(9) for _ in range(rng.randint(1, 30))] for _ in range(4)]
    arrivals = 40
    most_in_flight = 0
    several = rng.random() < 0.5
    for now in range(4000):
        if arrivals and rng.random() < 0.3:
            arrivals -= 1
            base = rng.choice(prompts)
            prompt = base[: rng.randint(1, len(base))] + [rng.randrange(9) for _ in range(4)]
            whose = {"arrived_at": float(now)}
            if several:
                whose |= {"priority": rng.randrange(3), "tenant": rng.choice("ab")}
            if rng.random() < 0.5:
                rig.add(prompt, rng.randint(2, 20), **whose)
            else:
                landed = rig.land(prompt, rng.randint(2, 20), next_token(prompt), **whose)
                if landed is not None:
                    ranks.land(landed)
        command = rig.scheduler.plan(now) if max_in_flight == 1 or rng.random() < 0.7 else None
        if command is not None:
            check_command(rig, command)
            ranks.submit(command)
            assert len(ranks.in_flight) <= max_in_flight
            most_in_flight = max(most_in_flight, len(ranks.in_flight))
        if len(ranks.in_flight) == max_in_flight:
            assert rig.scheduler.plan(now) is None
        if rig.alive and rng.random() < 0.1:
            rig.drop(rng.choice(rig.alive))
        rig.index.check_integrity()
        ranks.check()
        if ranks.in_flight and (max_in_flight == 1 or rng.random() < 0.5):
            for progress in rig.scheduler.commit(ranks.run()):
                sequence = progress.sequence
                assert sequence in rig.alive
                if sequence.num_output >= sequence.params.max_tokens:
                    for end in range(sequence.prompt_len, sequence.length):
                        assert sequence.buffer[end] == next_token(sequence.buffer[:end])
                    rig.drop(sequence)
        elif not arrivals and not rig.alive and not ranks.in_flight:
            break
        rig.index.check_integrity()
        ranks.check()
    assert not rig.alive, "somebody starves"
    assert most_in_flight >= min(max_in_flight, max_running)
    assert rig.used() == [0] * len(groups)
    assert not rig.scheduler.dropped
    assert not rig.scheduler._leaving
    assert sorted(rig.scheduler._free_rows) == list(range(len(rig.scheduler._free_rows)))


# -------------------------------------------------------------------------------------------- order


def test_landed_sequences_join_before_waiting_ones() -> None:
    rig = Rig(max_running=2, max_batch_tokens=8)
    first, second = rig.add([1] * 6), rig.add([2] * 6)
    landed = rig.land([3] * 6)
    command = rig.scheduler.plan(0.0)
    assert command is not None
    assert landed is not None
    assert rig.scheduler.running == [landed, first]
    assert [*rig.scheduler.waiting] == [second]
    assert command.counts.tolist() == [1, 6]


def test_decodes_come_before_prefill_and_prefill_takes_what_is_left() -> None:
    rig = Rig(max_batch_tokens=5)
    old = [rig.add([n]) for n in range(3)]
    rig.step()
    long = rig.add([7] * 30)
    for expected in (2, 2, 2):
        command = rig.step()
        assert command is not None
        assert command.counts.tolist() == [1, 1, 1, expected]
    assert long.num_computed == 6
    assert all(sequence.num_output == 4 for sequence in old)


def test_chunks_by_age() -> None:
    rig = Rig(max_batch_tokens=8)
    first, second = rig.add([1] * 12), rig.add([2] * 12)
    done = []
    for _ in range(3):
        rig.step()
        done.append((first.num_computed, second.num_computed))
    assert done == [(8, 0), (12, 4), (13, 11)]


def test_a_waiting_sequence_is_not_overtaken() -> None:
    """The head of the queue does not fit: a smaller one behind it waits too."""
    rig = Rig(pages=10, groups=(FULL,))
    running = rig.add([1] * 16)
    rig.step()
    large, small = rig.add([2] * 24), rig.add([3] * 2)
    rig.step()
    assert rig.scheduler.running == [running]
    assert [*rig.scheduler.waiting] == [large, small]
    rig.drop(running)
    rig.step()
    assert large in rig.scheduler.running


# ------------------------------------------------------------------------------ classes and tenants


def test_higher_classes_are_admitted_first() -> None:
    rig = Rig(max_running=1, max_batch_tokens=8)
    batch = rig.add([1] * 6, 2, priority=1)
    first, second = (rig.add([n] * 6, 2, arrived_at=n) for n in (2, 3))
    order = []
    while rig.alive:
        (running,) = rig.scheduler.running or [None]
        if running is not None and running not in order:
            order.append(running)
        rig.step()
    assert order == [first, second, batch]


def test_a_higher_class_does_not_wait_for_a_lower_ones_prompt() -> None:
    rig = Rig(max_batch_tokens=8)
    batch = rig.add([1] * 60, priority=1)
    decoding = rig.add([2], priority=1)
    for _ in range(2):
        rig.step()
    rig.drop(decoding)
    assert batch.num_computed == 16
    urgent, same = rig.add([3] * 10), rig.add([4] * 10, priority=1)
    rig.step()
    assert (urgent.num_computed, batch.num_computed) == (8, 16)
    rig.step()
    assert (urgent.num_output, batch.num_computed) == (1, 22)
    assert same.row == -1  # it waits for its class's budget


def test_landed_ones_join_by_class() -> None:
    rig = Rig(max_running=1, max_batch_tokens=8)
    batch, urgent = rig.land([1] * 6, 3, priority=1), rig.land([2] * 6, 3, arrived_at=1.0)
    rig.step()
    assert rig.scheduler.running == [urgent]
    assert [*rig.scheduler.landed] == [batch]


def test_the_lowest_class_is_preempted_first_and_of_it_the_youngest() -> None:
    rig = Rig(pages=13, max_batch_tokens=64, groups=(FULL,))  # twelve pages
    batch = [rig.add([n] * 8, 13, priority=1) for n in range(2)]
    urgent = [rig.add([n] * 8, 13) for n in (2, 3)]
    preempted = []
    while rig.alive:
        rig.step()
        rig.index.check_integrity()
        preempted += [s for s in (*batch, *urgent) if s.preemptions and s not in preempted]
    assert preempted == [batch[1], batch[0]][: len(preempted)] != []
    assert all(s.preemptions == 0 and s.num_output == 13 for s in urgent)


def test_a_flood_delays_another_tenant_by_a_prompt() -> None:
    rig = Rig(max_batch_tokens=8, max_running=4)
    flood = [rig.add([1, n] * 4, 2, tenant="flood") for n in range(30)]
    for _ in range(3):
        rig.step()
    served = sum(s.num_computed >= 8 for s in flood)
    single = rig.add([9] * 8, 2, tenant="single", arrived_at=1.0)
    while not single.num_output:
        rig.step()
    assert sum(s.num_computed >= 8 for s in flood) - served <= 2


def test_tenants_share_tokens() -> None:
    rig = Rig(pages=500, max_batch_tokens=16, max_running=4)
    long = [rig.add([1, n % 97, n] * 10, 1, tenant="long") for n in range(40)]
    short = [rig.add([2, n % 97, n] * 2, 1, tenant="short", arrived_at=1.0) for n in range(200)]
    for _ in range(40):
        rig.step()
    tokens = [sum(s.num_computed for s in some) for some in (long, short)]
    assert abs(tokens[0] - tokens[1]) <= 2 * 30


def test_lower_classes_are_served_in_the_end() -> None:
    rig = Rig(max_running=1, max_batch_tokens=8)
    batch = rig.add([1] * 6, 1, priority=1)
    now = 0.0
    while batch in rig.alive:
        rig.add([2] * 6, 1, arrived_at=now)
        command = rig.scheduler.plan(now)
        assert command is not None
        for progress in rig.scheduler.commit(rig.result(command)):
            if progress.token is not None:
                rig.drop(progress.sequence)
        now += 1.0
        assert now < 3 * PATIENCE_S
    assert now > PATIENCE_S


# --------------------------------------------------------------------------------------- preemption


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
    rig = Rig(pages=10, max_batch_tokens=64, groups=(FULL,))  # nine pages
    old, middle, young = (rig.add([n] * 8, max_tokens=13) for n in range(3))
    rig.step()
    assert rig.scheduler.running == [old, middle, young]
    late = rig.add([9] * 8)
    preempted: list[Tracked] = []
    while rig.alive:
        rig.step()
        rig.index.check_integrity()
        for sequence in (old, middle, young):
            if sequence.preemptions and sequence not in preempted:
                preempted.append(sequence)
                assert sequence.row == -1
                assert [*rig.scheduler.waiting][:1] == [sequence]
                assert sequence.num_computed == 0
    assert preempted[0] is young
    assert old not in preempted
    assert rig.scheduler.preemptions == sum(s.preemptions for s in (old, middle, young, late))
    assert all(s.num_output == s.params.max_tokens for s in (old, middle, young, late))


def test_what_was_planned_in_this_step_is_not_preempted_in_it() -> None:
    """The oldest takes its page from the youngest, never from one whose token is on its way."""
    rig = Rig(pages=7, max_batch_tokens=64, groups=(FULL,))  # six pages
    first, second = rig.add([1] * 4, 50), rig.add([2] * 4, 50)
    while first.preemptions + second.preemptions == 0:
        command = rig.scheduler.plan(0.0)
        assert command is not None
        check_command(rig, command)
        assert {s.row for s in rig.scheduler.running} == {*command.rows.tolist()}
        rig.scheduler.commit(rig.result(command))
    assert (first.preemptions, second.preemptions) == (0, 1)


def test_a_preempted_sequence_goes_on_with_all_its_tokens() -> None:
    rig = Rig(pages=8, max_batch_tokens=64, groups=(FULL,))
    first, second = rig.add([1] * 8, 14), rig.add([2] * 8, 14)
    starts: list[int] = []
    while rig.alive:
        command = rig.scheduler.plan(0.0)
        assert command is not None
        starts += [len(start.tokens) for start in command.starts if start.tokens[0] == 2]
        rig.scheduler.commit(rig.result(command))
        for sequence in list(rig.alive):
            if sequence.num_output >= 14:
                rig.drop(sequence)
    assert second.preemptions >= 1
    assert starts[0] == 8
    assert len(starts) == 1 + second.preemptions
    assert all(later > 8 for later in starts[1:])
    assert first.buffer.tolist() == [1] * 22
    assert second.buffer.tolist() == [2] * 8 + [1] * 14


# ---------------------------------------------------------------------------------------- in flight


def test_a_sequence_dropped_in_flight_keeps_its_pages_until_the_commit() -> None:
    rig = Rig(pages=8, max_batch_tokens=64)
    sequence = rig.add([1] * 20)
    command = rig.scheduler.plan(0.0)
    assert command is not None
    slots = [list(table) for table in sequence.tables]
    rig.drop(sequence)
    assert rig.used() == [5, 5]
    assert [list(table) for table in sequence.tables] == slots
    # Another one of the same size cannot get them now.
    other = rig.add([2] * 20)
    assert rig.land([3] * 20) is None
    assert rig.scheduler.plan(0.0) is None
    assert rig.scheduler.commit(rig.result(command)) == []
    assert rig.used() == [0, 0]
    assert not rig.scheduler.dropped
    rig.step()
    assert other in rig.scheduler.running
    rig.index.check_integrity()


def test_pages_of_a_step_whose_request_was_dropped_are_cache_all_the_same() -> None:
    rig = Rig(max_batch_tokens=64)
    sequence = rig.add([1] * 20)
    command = rig.scheduler.plan(0.0)
    assert command is not None
    rig.drop(sequence)
    rig.scheduler.commit(rig.result(command))
    again = rig.add([1] * 20)
    rig.step()
    assert again.cached_tokens == 16


def test_drop_is_for_every_state_and_idempotent() -> None:
    rig = Rig(max_running=1, max_batch_tokens=64)
    running, waiting, landed = rig.add([1] * 9), rig.add([2] * 9), rig.land([3] * 9)
    assert landed is not None
    rig.step()
    for sequence in (waiting, running, landed):
        rig.drop(sequence)
        rig.scheduler.drop(sequence)
    assert rig.used() == [0, 0]
    assert rig.scheduler.plan(0.0) is None
    rig.index.check_integrity()


# ------------------------------------------------------------------------------------ several steps


def test_chunks_of_one_prompt_follow_each_other_in_flight() -> None:
    rig = Rig(max_batch_tokens=8, max_in_flight=3)
    sequence = rig.add([1] * 20)
    commands = [rig.scheduler.plan(0.0) for _ in range(4)]
    assert commands.pop() is None
    planned = [(c.positions.tolist(), c.counts.tolist()) for c in commands if c is not None]
    assert planned == [([0], [8]), ([8], [8]), ([16], [4])]
    assert (sequence.num_computed, sequence.num_planned) == (0, 20)
    assert rig.index.match(sequence.hashes) == 0
    for command, computed in zip(commands, (8, 16, 20), strict=True):
        assert command is not None
        # Its next token is to be sampled: nothing of it can be planned.
        assert rig.scheduler.plan(0.0) is None
        assert rig.scheduler.num_prefilling == command.counts.sum()
        rig.scheduler.commit(rig.result(command))
        assert sequence.num_computed == computed
        assert rig.index.match(sequence.hashes) == computed // PAGE
    again = rig.scheduler.plan(0.0)
    assert again is not None
    assert (again.positions.tolist(), again.tokens.tolist()) == ([20], [1])


def test_steps_in_flight_share_those_that_need_one_token() -> None:
    rig = Rig(max_in_flight=2, max_batch_tokens=64)
    for token in range(5):
        rig.add([token] * 3)
    command = rig.scheduler.plan(0.0)
    assert command is not None
    rig.scheduler.commit(rig.result(command))
    one, other = rig.scheduler.plan(0.0), rig.scheduler.plan(0.0)
    assert one is not None
    assert other is not None
    assert (len(one.rows), len(other.rows)) == (3, 2)
    assert not {*one.rows.tolist()} & {*other.rows.tolist()}


def test_a_sequence_dropped_between_its_chunks_is_released_with_the_last_one() -> None:
    rig = Rig(max_batch_tokens=8, max_in_flight=2)
    sequence = rig.add([1] * 40)
    one, other = rig.scheduler.plan(0.0), rig.scheduler.plan(0.0)
    assert one is not None
    assert other is not None
    rig.drop(sequence)
    assert rig.scheduler.commit(rig.result(one)) == []
    assert rig.used()[0] == 4
    assert rig.scheduler.plan(0.0) is None  # no more chunks of it
    assert rig.scheduler.commit(rig.result(other)) == []
    assert rig.used() == [0, 0]


def test_a_sequence_in_flight_is_preempted_when_its_step_has_ended() -> None:
    rig = Rig(pages=10, max_batch_tokens=64, groups=(FULL,), max_in_flight=2)
    old, young = rig.add([1] * 16), rig.add([2] * 15)
    rig.step()
    rig.index.allocate(0, 1)  # the last one
    rig.scheduler.running.reverse()
    first = rig.scheduler.plan(0.0)
    rig.scheduler.running.reverse()
    assert first is not None
    assert first.rows.tolist() == [young.row]
    assert rig.scheduler.plan(0.0) is None  # the old one needs a page, and waits for the other's
    assert (young.preemptions, young.num_pages) == (0, 4)
    (progress,) = rig.scheduler.commit(rig.result(first, token=7))
    assert (progress.sequence, progress.token) == (young, 7)
    second = rig.scheduler.plan(0.0)
    assert second is not None
    assert second.rows.tolist() == [old.row]
    assert (young.row, young.preemptions, young.num_output) == (-1, 1, 2)


# ---------------------------------------------------------------------------------- looking ahead


def test_a_decode_step_begins_with_what_is_being_sampled() -> None:
    rig = Rig(max_batch_tokens=64, looks_ahead=True)
    sequence = rig.add([1] * 5, max_tokens=3)
    prefill = rig.scheduler.plan(0.0)
    assert prefill is not None
    assert rig.scheduler.plan(0.0) is None  # what comes during a prefill is not to wait for two
    rig.scheduler.commit(rig.result(prefill, 7))
    one, other = rig.scheduler.plan(0.0), rig.scheduler.plan(0.0)
    assert one is not None
    assert other is not None
    assert rig.scheduler.plan(0.0) is None
    for command, position, token in ((one, 5, 7), (other, 6, LAST_SAMPLED)):
        assert (command.positions.tolist(), command.tokens.tolist()) == ([position], [token])
        assert command.sample.tolist() == [True]
    rig.scheduler.commit(rig.result(one, 8))
    assert rig.scheduler.plan(0.0) is None  # the last token is on its way
    rig.scheduler.commit(rig.result(other, 3))
    assert sequence.buffer[5 : sequence.length].tolist() == [7, 8, 3]


def test_looking_ahead_ends_with_the_only_token_that_is_wanted_here() -> None:
    """A prompt of which one token is left to compute, for a replica that hands it over."""
    rig = Rig(looks_ahead=True)
    rig.add([1])
    assert rig.scheduler.plan(0.0) is not None
    assert rig.scheduler.plan(0.0) is None


@pytest.mark.parametrize("num_committed", [0, 1])
def test_what_ends_while_a_step_is_ahead_leaves_with_that_step(num_committed: int) -> None:
    """Dropped before its token is known, or because of it: its pages are cached by their tokens."""
    rig = Rig(groups=(FULL,), looks_ahead=True)
    landed = rig.land([1, 2, 3, 4, 5, 6], token=7)
    other = rig.land([9], token=9)
    assert landed is not None
    assert other is not None
    commands = [rig.scheduler.plan(0.0), rig.scheduler.plan(0.0)]
    for number, command in enumerate(commands):
        assert command is not None
        if number == num_committed:
            rig.drop(landed)
        rig.scheduler.commit(rig.result(command, 8))
        assert (landed.row >= 0) == (number == 0)
    full = page_hashes(np.array([1, 2, 3, 4, 5, 6, 7, 8], np.int32), PAGE, ROOT)
    assert rig.index.match(full) == 2
    assert rig.used() == [1]
    assert other.num_output == 3


def test_a_prompt_joins_after_the_step_that_is_ahead() -> None:
    rig = Rig(max_batch_tokens=64, looks_ahead=True)
    landed = rig.land([1] * 6)
    assert landed is not None
    one, _ = rig.scheduler.plan(0.0), rig.scheduler.plan(0.0)
    assert one is not None
    rig.add([2] * 9)
    assert rig.scheduler.plan(0.0) is None
    rig.scheduler.commit(rig.result(one))
    mixed = rig.scheduler.plan(0.0)
    assert mixed is not None
    assert mixed.counts.tolist() == [1, 9]
    assert mixed.tokens[0] == LAST_SAMPLED


# ------------------------------------------------------------------------------------------ stripes


def test_room_is_counted_by_stripe() -> None:
    """Each rank has three pages; a page to grow is kept on the rank where it will be."""
    rig = Rig(pages=4, max_batch_tokens=64, groups=(FULL,), cp=2)
    first = rig.add([1] * 10)  # pages 0 to 2
    rig.step()
    refused = rig.track([2] * 10)  # pages 0 to 2 as well: four on rank 0
    rig.scheduler.match_prefix(refused)
    assert rig.scheduler.reserve_prompt(refused) is None
    fits = rig.track([2] * 8)
    rig.scheduler.match_prefix(fits)
    assert rig.scheduler.reserve_prompt(fits) == [0]
    assert [slot % 2 for slot in (*first.tables[0], *fits.tables[0])] == [0, 1, 0, 0, 1]
    # One page is left, of rank 1, where the running sequence grows.
    other = rig.track([3] * 4)
    rig.scheduler.match_prefix(other)
    assert rig.scheduler.reserve_prompt(other) is None


def test_a_context_takes_all_pages_of_all_ranks() -> None:
    rig = Rig(pages=4, max_batch_tokens=5, groups=(FULL,), cp=3)
    sequence = rig.add([1] * 30, max_tokens=7)  # 36 computed tokens, nine pages
    while rig.alive:
        assert rig.step() is not None
    assert sequence.preemptions == 0
    assert sequence.num_output == 7


# -------------------------------------------------------------------------------------- reservation


def test_a_reservation_is_all_or_nothing_and_leaves_room_to_grow() -> None:
    rig = Rig(pages=10, max_batch_tokens=64, groups=(FULL,))
    running = rig.add([1] * 8)
    rig.step()
    held = rig.used()[0]
    refused = rig.track([2] * 28)  # seven pages of six free ones
    rig.scheduler.match_prefix(refused)
    assert rig.scheduler.reserve_prompt(refused) is None
    assert rig.used() == [held]
    free = rig.index.num_free(0)
    fits = rig.track([3] * (PAGE * (free - 1)))
    rig.scheduler.match_prefix(fits)
    assert rig.scheduler.reserve_prompt(fits) == [0]
    assert rig.index.num_free(0) == 1  # for the one that runs
    rig.step()
    assert running.preemptions == 0


def test_a_reservation_outside_the_window_has_no_pages() -> None:
    rig = Rig(max_batch_tokens=64)
    sequence = rig.track([1] * 39)
    rig.scheduler.match_prefix(sequence)
    firsts = rig.scheduler.reserve_prompt(sequence)
    assert firsts is not None
    assert firsts[0] == 0
    # Position 39 sees 30 to 38, in page 7 and later; the same prompt again sees one page more.
    assert firsts[1] in (6, 7)
    assert sequence.tables[1][: firsts[1]] == [-1] * firsts[1]
    assert [len(table) for table in sequence.tables] == [10, 10]
    assert min(sequence.tables[1][firsts[1] :]) > 0


def test_a_prompt_that_came_by_a_handover_is_found_when_it_comes_again() -> None:
    """Whatever its length is, beside pages and window."""
    missed = []
    for length in range(5, 60):
        rig = Rig()
        first = rig.land([1] * length, max_tokens=2)
        assert first is not None
        while rig.alive:
            rig.step()
        again = rig.track([1] * length)
        rig.scheduler.match_prefix(again)
        if again.num_computed != (length - 1) // PAGE * PAGE:
            missed.append(length)
    assert missed == []

"""The scheduler's promises: its budget, its order, whose pages are whose, and who is preempted."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from hicache.index import PageIndex
from hicache.keys import page_hashes, root_hash
from pd.engine.batch import StepCommand, StepResult
from pd.engine.scheduler import Scheduler, Tracked
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
    ) -> None:
        self.groups = groups
        self.max_batch_tokens = max_batch_tokens
        self.index = PageIndex(groups, [pages] * len(groups), PAGE)
        self.scheduler = Scheduler(self.index, groups, PAGE, max_batch_tokens, max_running)
        self.alive: list[Tracked] = []

    def track(self, prompt: Any, max_tokens: int = 20) -> Tracked:
        prompt = np.asarray(prompt, np.int32)
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        hashes = page_hashes(prompt, PAGE, ROOT)
        sequence = Tracked(prompt, params, ROOT, hashes, len(self.groups), 0.0)
        self.alive.append(sequence)
        return sequence

    def add(self, prompt: Any, max_tokens: int = 20) -> Tracked:
        sequence = self.track(prompt, max_tokens)
        self.scheduler.add(sequence)
        return sequence

    def land(self, prompt: Any, max_tokens: int = 20) -> Tracked | None:
        """A sequence whose prompt came by a handover, first token included; None without room."""
        sequence = self.track(prompt, max_tokens)
        self.scheduler.match_prefix(sequence)
        if self.scheduler.reserve_prompt(sequence) is None:
            self.scheduler.release_pages(sequence)
            self.alive.remove(sequence)
            return None
        sequence.append(0)
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
    if any(count > 1 for count in counts):
        assert {s.row for s in decoding} <= {*rows}
    offset = 0
    for row, position, count, sample in zip(
        rows, command.positions.tolist(), counts, command.sample.tolist(), strict=True
    ):
        sequence = by_row[row]
        assert position == sequence.num_computed
        chunk = command.tokens[offset : offset + count]
        assert chunk.tolist() == sequence.buffer[position : position + count].tolist()
        assert sample == (position + count == sequence.length)
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
                assert slot > 0
                assert holders[slot] == [sequence]
            # What the queries read is there.
            for page in range(group.first_needed_page(int(position), PAGE), position // PAGE):
                assert sequence.tables[number][page] > 0


class Mirror:
    """The page tables as a rank has them: they must be the sequences' own."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.tables: list[dict[tuple[int, int], int]] = [{} for _ in rig.groups]

    def apply(self, command: StepCommand) -> None:
        for table, update in zip(self.tables, command.pages, strict=True):
            for row, page, slot in update.tolist():
                table[row, page] = slot
        by_row = self.rig.by_row()
        items = zip(command.rows.tolist(), command.positions, command.counts, strict=True)
        for row, position, count in items:
            for number, group in enumerate(self.rig.groups):
                first = group.first_needed_page(int(position), PAGE)
                for page in range(first, (position + count - 1) // PAGE + 1):
                    assert self.tables[number][row, page] == by_row[row].tables[number][page]


@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize("groups", [(FULL,), (FULL, SLIDING), (SLIDING,)], ids=len)
def test_random_histories(seed: int, groups: tuple[LayerGroup, ...]) -> None:
    """Arrivals, handovers and drops, also during a step, in small pools."""
    rng = random.Random(seed)
    rig = Rig(
        pages=rng.choice((20, 30, 60)),
        max_batch_tokens=rng.choice((1, 3, 8, 64)),
        max_running=rng.choice((1, 3, 8)),
        groups=groups,
    )
    mirror = Mirror(rig)
    prompts = [[rng.randrange(9) for _ in range(rng.randint(1, 30))] for _ in range(4)]
    arrivals = 40
    for _ in range(3000):
        if arrivals and rng.random() < 0.3:
            arrivals -= 1
            base = rng.choice(prompts)
            prompt = base[: rng.randint(1, len(base))] + [rng.randrange(9) for _ in range(4)]
            rng.choice((rig.add, rig.land))(prompt, rng.randint(2, 20))
        command = rig.scheduler.plan(0.0)
        if command is not None:
            check_command(rig, command)
            mirror.apply(command)
            assert rig.scheduler.plan(0.0) is None  # one step at a time
        if rig.alive and rng.random() < 0.1:
            rig.drop(rng.choice(rig.alive))
        rig.index.check_integrity()
        if command is not None:
            for progress in rig.scheduler.commit(rig.result(command, rng.randrange(9))):
                assert progress.sequence in rig.alive
                if progress.sequence.num_output >= progress.sequence.params.max_tokens:
                    rig.drop(progress.sequence)
        elif not arrivals and not rig.alive:
            break
        rig.index.check_integrity()
    assert not rig.alive, "somebody starves"
    assert rig.used() == [0] * len(groups)
    assert not rig.scheduler.dropped
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

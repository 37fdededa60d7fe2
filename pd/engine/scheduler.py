"""Which tokens are computed in the next step, and in which pages: continuous batching with chunked
prefill.

Pure. A sequence waits, runs (it has a row), and leaves. Each step takes the running sequences' next
tokens under a token budget: those that need one token first, then prefill chunks, by class and age.
A sequence is admitted in its turn (pd/engine/turns.py), before prefills of lower classes go on, and
when all its pages for the tokens known so far fit; if a running one cannot grow, the youngest
running sequence of the lowest class is preempted: its pages are released (the index may keep them)
and its tokens recomputed later.

Up to `max_in_flight` steps are in flight, one for each stage of a pipeline: `plan` ... -> `commit`,
the oldest first. Each stage runs them in order. While a sequence's chunk is in flight the next
chunk of its prompt may be planned, but nothing after a position whose token is to be sampled; where
several steps may be in flight, each takes its share of the sequences that need one token. A
scheduler that looks ahead has one step more in flight while the last one only decodes: it begins
with the tokens that are being sampled, whatever they turn out to be, so that the device does not
wait for the leader. A sequence that ends with such a token is computed once in vain. What is
offered to the index, given back or reused has been committed: a sequence that is dropped or is to
be preempted keeps its pages until the last step that has it is committed, because steps write to
them, and pages that leave a window stay while steps in flight may read them.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from hicache.index import PageIndex
from hicache.keys import page_hashes
from pd.engine.batch import LAST_SAMPLED, RowStart, StepCommand, StepResult
from pd.engine.turns import NEVER, Turn, Turns, WaitingQueue
from pd.messages import Int32Array, SamplingParams, TokenLogprob
from transfer.layout import LayerGroup

_by_class = operator.attrgetter("priority")


class Tracked:
    """One sequence: its tokens, and the pages that hold the KV of the first `num_computed` of
    them, and will hold that of those in flight."""

    __slots__ = (
        "admitted_at",
        "arrived_at",
        "buffer",
        "cached_tokens",
        "hashes",
        "host_tokens",
        "is_fetched",
        "length",
        "num_computed",
        "num_delivered",
        "num_in_flight",
        "num_indexed",
        "params",
        "preemptions",
        "priority",
        "prompt_len",
        "root",
        "row",
        "slid",
        "storage_tokens",
        "tables",
        "tenant",
    )

    def __init__(
        self,
        prompt: Int32Array,
        params: SamplingParams,
        root: bytes,
        hashes: list[bytes],
        num_groups: int,
        now: float,
        tenant: str = "",
        num_delivered: int = 0,
        priority: int = 0,
    ) -> None:
        self.buffer = np.empty(len(prompt) + params.max_tokens, np.int32)
        self.buffer[: len(prompt)] = prompt
        self.length = self.prompt_len = len(prompt)
        self.params = params
        self.root = root
        self.tenant = tenant
        """Whose request it is; empty: nobody's."""
        self.num_delivered = num_delivered
        """So many of the prompt's last tokens were generated elsewhere: penalties count them as
        output."""
        self.priority = priority
        """Its class: 0 is the first."""
        self.hashes = hashes
        """Of the full pages of the tokens known; grows as pages fill."""
        self.num_computed = 0
        """Tokens whose steps have been committed, or whose KV came from elsewhere."""
        self.num_in_flight = 0
        """The next so many are being computed."""
        self.num_indexed = 0
        """Pages offered to the index so far."""
        self.tables: list[list[int]] = [[] for _ in range(num_groups)]
        """By group: slot of page i, -1 where it has none (left the window)."""
        self.slid = [0] * num_groups
        """By group: pages before this one were given back."""
        self.row = -1
        self.cached_tokens = 0
        self.host_tokens = 0
        """Copied from the host tier for it..."""
        self.storage_tokens = 0
        """... and of these, brought there from storage."""
        self.is_fetched = False
        """What other tiers have of it is here, or was not worth waiting for."""
        self.preemptions = 0
        self.arrived_at = now
        self.admitted_at = -1.0

    @property
    def num_output(self) -> int:
        return self.length - self.prompt_len

    @property
    def remaining(self) -> int:
        return self.length - self.num_computed

    @property
    def num_planned(self) -> int:
        """Tokens computed or in flight."""
        return self.num_computed + self.num_in_flight

    @property
    def num_pages(self) -> int:
        """That its tables cover."""
        return len(self.tables[0])

    def append(self, token: int) -> None:
        self.buffer[self.length] = token
        self.length += 1


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """What a step did for one sequence."""

    sequence: Tracked
    token: int | None
    """Sampled, and already appended to the sequence."""
    logprob: TokenLogprob | None


class Scheduler:
    def __init__(
        self,
        index: PageIndex,
        groups: Sequence[LayerGroup],
        page_tokens: int,
        max_batch_tokens: int,
        max_running: int,
        on_published: Callable[[Tracked, int, int], None] = lambda sequence, begin, end: None,
        on_reused: Callable[[Tracked, int], None] = lambda sequence, num_pages: None,
        fetch: Callable[[Tracked, float], bool] = lambda sequence, now: False,
        max_in_flight: int = 1,
        looks_ahead: bool = False,
    ) -> None:
        """`on_published`: these pages of a sequence are complete and in the index. `on_reused`: so
        many leading pages were found there. `fetch`: whether to wait for pages from other tiers;
        the sequence is then `add`ed again. `max_in_flight`: steps. `looks_ahead`: the rank
        puts in what it sampled; for a replica of one, whose steps take nothing of the interpreter.
        """
        self.index = index
        self.turns = Turns()
        self.landed: WaitingQueue[Tracked] = WaitingQueue(self.turns)
        """Their pages came by a handover; they only need a row."""
        self.waiting: WaitingQueue[Tracked] = WaitingQueue(self.turns)
        """They hold no pages."""
        self.running: list[Tracked] = []
        self.preemptions = 0
        self.cached_tokens = 0
        self._groups = groups
        self._page_tokens = page_tokens
        self._max_batch_tokens = max_batch_tokens
        self._free_rows = list(range(max_running - 1, -1, -1))
        self._max_in_flight = max_in_flight
        self._looks_ahead = looks_ahead
        self._in_flight: deque[list[tuple[Tracked, int, bool]]] = deque()
        """Steps, the oldest first: (sequence, tokens, whether one is sampled)."""
        self.dropped: set[Tracked] = set()
        """Left while in flight; their pages are released at the commit of their last step."""
        self._leaving: dict[Tracked, None] = {}
        """To be preempted after the commit of their last step."""
        # Not told to the ranks yet.
        self._starts: list[RowStart] = []
        self._new_pages: list[list[tuple[int, int, int]]] = [[] for _ in groups]
        self._on_published = on_published
        self._on_reused = on_reused
        self._fetch = fetch

    # ----------------------------------------------------------------------------------- membership

    def add(self, sequence: Tracked) -> None:
        self.waiting.add(sequence)

    def add_landed(self, sequence: Tracked) -> None:
        self.landed.add(sequence)

    def drop(self, sequence: Tracked) -> None:
        """Forget a sequence and release its pages, at once or when the last step that has it ends.
        Idempotent for a sequence that is in no queue: only its pages are released."""
        self._leaving.pop(sequence, None)
        if sequence.num_in_flight:
            self.dropped.add(sequence)
        else:
            self._forget(sequence)
            self.release_pages(sequence)

    def _forget(self, sequence: Tracked) -> None:
        row = sequence.row
        if row >= 0:
            self.running.remove(sequence)
            self._free_rows.append(row)
            sequence.row = -1
            self._starts = [start for start in self._starts if start.row != row]
            self._new_pages = [[page for page in new if page[0] != row] for new in self._new_pages]
        for queue in (self.landed, self.waiting):
            if sequence in queue:
                queue.remove(sequence)

    @property
    def has_step_in_flight(self) -> bool:
        return bool(self._in_flight)

    @property
    def can_look_ahead(self) -> bool:
        """The last step in flight only decodes; else what comes meanwhile would wait for two."""
        if not self._looks_ahead or len(self._in_flight) != self._max_in_flight:
            return False
        return all(count == 1 for _, count, _ in self._in_flight[-1])

    @property
    def num_prefilling(self) -> int:
        """Tokens of prompts in the oldest step in flight."""
        return sum(count for _, count, _ in self._in_flight[0] if count > 1)

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    def num_waiting_before(self, turn: Turn, most: int, now: float) -> int:
        """Counted up to `most`."""
        num_waiting = 0
        for sequence in self.waiting.in_turn(now):
            if num_waiting >= most or self.turns.of(sequence, now) >= turn:
                break
            num_waiting += 1
        return num_waiting

    # ---------------------------------------------------------------------------------------- pages

    def match_prefix(self, sequence: Tracked) -> None:
        """Take the longest cached prefix, short of the last token, which must be computed to
        sample."""
        num_pages = self.index.match(sequence.hashes[: (sequence.length - 1) // self._page_tokens])
        sequence.tables = self.index.acquire(sequence.hashes[:num_pages])
        sequence.num_computed = num_pages * self._page_tokens
        sequence.num_indexed = num_pages
        sequence.slid = [
            group.first_needed_page(sequence.num_computed, self._page_tokens)
            for group in self._groups
        ]

    def release_pages(self, sequence: Tracked) -> None:
        for group, table in enumerate(sequence.tables):
            self.index.release(group, table)
        sequence.tables = [[] for _ in self._groups]
        sequence.slid = [0] * len(self._groups)
        sequence.num_computed = sequence.num_indexed = 0

    def reserve_prompt(self, sequence: Tracked) -> list[int] | None:
        """Allocate the pages that the first decode step needs beyond the matched prefix; None when
        they do not fit. Returns, by group, the first page allocated; earlier ones are cached or out
        of the window."""
        total = self._pages_for(sequence.prompt_len)
        repeat = self._repeat_position(sequence)
        firsts = []
        for group, table in zip(self._groups, sequence.tables, strict=True):
            needed = group.first_needed_page(repeat, self._page_tokens)
            firsts.append(min(total, max(len(table), needed)))
        counts = [total - first for first in firsts]
        self._slide(sequence, repeat)
        # Room to grow, so that a landed one is not preempted at once.
        if not self.index.can_allocate(counts, firsts, self._next_pages()):
            return None
        for number, first in enumerate(firsts):
            table = sequence.tables[number]
            slots = self.index.allocate(number, counts[number], first)
            assert slots is not None
            table += [-1] * (first - len(table)) + slots
        return firsts

    def _next_pages(self) -> list[int]:
        """A page to grow for each running sequence."""
        return [sequence.num_pages for sequence in self.running]

    def _repeat_position(self, sequence: Tracked) -> int:
        """Where the same prompt, sent again, could start to compute."""
        return (sequence.prompt_len - 1) // self._page_tokens * self._page_tokens

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_tokens)

    def _slide(self, sequence: Tracked, position: int) -> None:
        """Give back pages that no query at or after `position` attends to. Those that a repeated
        prompt would attend to stay cached as long as others, the rest are evicted first."""
        for number, group in enumerate(self._groups):
            if group.kind == "full":
                continue
            table = sequence.tables[number]
            first = min(group.first_needed_page(position, self._page_tokens), len(table))
            begin = sequence.slid[number]
            if first > begin:
                repeat = self._repeat_position(sequence)
                warm = min(first, max(begin, group.first_needed_page(repeat, self._page_tokens)))
                self.index.release(number, table[begin:warm], cold=True)
                self.index.release(number, table[warm:first])
                table[begin:first] = [-1] * (first - begin)
                sequence.slid[number] = first

    def _grow(self, sequence: Tracked, num_tokens: int) -> bool:
        """Make the tables cover the first `num_tokens` tokens; False (nothing changed) without
        room."""
        first = sequence.num_pages
        count = self._pages_for(num_tokens) - first
        if count <= 0:
            return True
        groups = range(len(self._groups))
        if not self.index.can_allocate([count for _ in groups], [first for _ in groups]):
            return False
        for number, table in enumerate(sequence.tables):
            slots = self.index.allocate(number, count, first)
            assert slots is not None
            self._announce(sequence.row, number, first, slots)
            table += slots
        return True

    def _announce(self, row: int, group: int, first: int, slots: list[int]) -> None:
        self._new_pages[group] += [
            (row, first + i, slot) for i, slot in enumerate(slots) if slot >= 0
        ]

    # ---------------------------------------------------------------------------------------- steps

    def plan(
        self, now: float, lacks_pages_since: Turn = NEVER, look_ahead: bool = True
    ) -> StepCommand | None:
        """The next step, or None when there is nothing to do, or enough is in flight. A waiting
        request is not admitted after the turn `lacks_pages_since`: that of one elsewhere that waits
        for pages, and would never find them while later ones do. `look_ahead`: if it can."""
        if len(self._in_flight) >= self._max_in_flight and not (look_ahead and self.can_look_ahead):
            return None
        for victim in [sequence for sequence in self._leaving if not sequence.num_in_flight]:
            self._preempt(victim)
        budget = self._max_batch_tokens
        items: list[tuple[Tracked, int]] = []
        planned: set[Tracked] = set()

        def take(sequence: Tracked) -> None:
            nonlocal budget
            self._slide(sequence, sequence.num_computed)
            count = min(self._left(sequence), budget)
            while not self._grow(sequence, sequence.num_planned + count):
                if self._leaving or self.dropped or sequence.num_in_flight:
                    return  # with the next commits pages come back, of its own window perhaps
                rest = (s for s in reversed(self.running) if s not in planned)
                victim = max(rest, key=_by_class)
                if victim.num_in_flight:
                    self._leaving[victim] = None
                    return
                self._preempt(victim)
                if victim is sequence:
                    return
            items.append((sequence, count))
            planned.add(sequence)
            budget -= count

        def admit(below: float) -> None:
            """Those that wait, of classes before `below`."""
            while self._free_rows and budget:
                first, landed = self._next_waiting(now, lacks_pages_since)
                if first is not None and first.priority >= below:
                    first = None
                if landed is not None and landed.priority >= below:
                    landed = None
                if first is not None and not first.is_fetched and self._fetch(first, now):
                    self.waiting.remove(first)
                    continue
                if first is not None and self._claim_pages(first):
                    sequence = first
                    self.waiting.remove(sequence)
                elif landed is not None:
                    sequence = landed
                    self.landed.remove(sequence)
                else:
                    break
                self._start(sequence, now)
                take(sequence)
                if sequence not in planned:
                    break

        singles, prefills = self._plannable()
        for sequence in singles[: -(-len(self.running) // self._max_in_flight)]:
            if budget and sequence.row >= 0 and sequence not in self._leaving:
                take(sequence)
        for sequence in prefills:
            admit(below=sequence.priority)
            if budget and sequence.row >= 0 and sequence not in self._leaving:
                take(sequence)
        admit(below=math.inf)
        if not items:
            return None
        return self._command(items)

    def _left(self, sequence: Tracked) -> int:
        """Tokens that could be planned. Looking ahead, also the one that is being sampled, unless
        it is the last one, or the first (of a prompt that is handed over, no more is wanted)."""
        left = sequence.length - sequence.num_planned
        if left or not self._looks_ahead or not sequence.num_in_flight:
            return max(0, left)
        return int(0 < sequence.num_output < sequence.params.max_tokens - 1)

    def _plannable(self) -> tuple[list[Tracked], list[Tracked]]:
        """Running sequences that need one token, and those that need more."""
        singles: list[Tracked] = []
        prefills: list[Tracked] = []
        for sequence in self.running:
            left = self._left(sequence)
            if left and sequence not in self.dropped:
                (singles if left == 1 else prefills).append(sequence)
        return sorted(singles, key=_by_class), sorted(prefills, key=_by_class)

    def _next_waiting(
        self, now: float, lacks_pages_since: Turn
    ) -> tuple[Tracked | None, Tracked | None]:
        """(of those without pages the first one, if it goes before the other; of those that have
        landed the first)"""
        waiting, landed = self.waiting.first(now), self.landed.first(now)
        if waiting is not None:
            turn = self.turns.of(waiting, now)
            is_later = landed is not None and turn >= self.turns.of(landed, now)
            if is_later or turn > lacks_pages_since:
                waiting = None
        return waiting, landed

    def lacks_pages_before(self, turn: Turn, now: float) -> bool:
        """Whether a request with an earlier turn has a row and waits for pages."""
        first = self.waiting.first(now) if self._free_rows else None
        return first is not None and self.turns.of(first, now) < turn

    def _claim_pages(self, sequence: Tracked) -> bool:
        """Match the prefix if all pages that the tokens known so far need will fit at once, and one
        to grow for each running sequence."""
        self.match_prefix(sequence)
        first, cp = sequence.num_pages, self.index.cp
        counts = []
        for group, table in zip(self._groups, sequence.tables, strict=True):
            need = self._pages_for(sequence.length) - first
            if group.kind == "sliding":
                held = sum(slot >= 0 for slot in table)
                most = self._pages_for(group.window + self._max_batch_tokens) + 1
                # Of consecutive pages, wherever they begin, a rank holds at most so many.
                need = min(need, -(-most // cp) * cp - held)
            counts.append(need)
        if not self.index.can_allocate(counts, [first for _ in counts], self._next_pages()):
            self.release_pages(sequence)
            return False
        if sequence.admitted_at < 0:
            sequence.cached_tokens = sequence.num_computed
            sequence.host_tokens = min(sequence.host_tokens, sequence.num_computed)
            sequence.storage_tokens = min(sequence.storage_tokens, sequence.host_tokens)
        self.cached_tokens += sequence.num_computed
        if sequence.num_indexed:
            self._on_reused(sequence, sequence.num_indexed)
        return True

    def _start(self, sequence: Tracked, now: float) -> None:
        self.turns.serve(sequence, 0 if sequence.preemptions else sequence.remaining, now)
        sequence.row = self._free_rows.pop()
        if sequence.admitted_at < 0:
            sequence.admitted_at = now
        self.running.append(sequence)
        self._starts.append(
            RowStart(
                sequence.row,
                sequence.params,
                sequence.buffer[: sequence.length].copy(),
                sequence.prompt_len - sequence.num_delivered,
            )
        )
        for number, table in enumerate(sequence.tables):
            self._announce(sequence.row, number, 0, table)

    def _preempt(self, victim: Tracked) -> None:
        self._leaving.pop(victim, None)
        self._forget(victim)
        self.release_pages(victim)
        victim.is_fetched = False  # its pages are cache now, and may be gone when it resumes
        victim.preemptions += 1
        self.preemptions += 1
        self.waiting.add(victim, is_back=True)

    def _command(self, items: list[tuple[Tracked, int]]) -> StepCommand:
        items.sort(key=lambda item: (item[1] > 1, item[0].num_planned))
        step = [(s, n, s.num_planned + n >= s.length) for s, n in items]
        command = StepCommand(
            starts=self._starts,
            rows=np.array([s.row for s, _ in items], np.int32),
            positions=np.array([s.num_planned for s, _ in items], np.int32),
            counts=np.array([n for _, n in items], np.int32),
            sample=np.array([sample for _, _, sample in step], np.bool_),
            tokens=np.concatenate([_tokens(s, n) for s, n in items]),
            pages=[np.array(pages, np.int32).reshape(-1, 3) for pages in self._new_pages],
        )
        for sequence, count in items:
            sequence.num_in_flight += count
        self._in_flight.append(step)
        self._starts = []
        self._new_pages = [[] for _ in self._groups]
        return command

    def commit(self, result: StepResult) -> list[Progress]:
        """Apply the result of the oldest step in flight; sequences that were dropped since it was
        planned are left out, and released with their last step."""
        progress = []
        sampled = iter(zip(result.tokens, result.logprobs, strict=True))
        for sequence, count, sample in self._in_flight.popleft():
            sequence.num_computed += count
            sequence.num_in_flight -= count
            token, logprob = next(sampled) if sample else (None, None)
            self.publish(sequence)
            if token is not None:
                sequence.append(token)  # the next step in flight may have begun with it
            if sequence in self.dropped:
                if not sequence.num_in_flight:
                    self.dropped.remove(sequence)
                    self.drop(sequence)
                continue
            if token is not None:
                self.turns.charge(sequence.tenant, 1)
            progress.append(Progress(sequence, token, logprob))
        return progress

    def publish(self, sequence: Tracked) -> None:
        """Offer the sequence's newly computed full pages to the index."""
        page_tokens = self._page_tokens
        end, begin = sequence.num_computed // page_tokens, sequence.num_indexed
        if end <= begin:
            return
        known = len(sequence.hashes)
        if end > known:
            parent = sequence.hashes[-1] if known else sequence.root
            tokens = sequence.buffer[known * page_tokens : end * page_tokens]
            sequence.hashes += page_hashes(tokens, page_tokens, parent)
        parent = sequence.hashes[begin - 1] if begin else sequence.root
        slots = [table[begin:end] for table in sequence.tables]
        tenant = sequence.tenant or None
        self.index.insert(parent, sequence.hashes[begin:end], slots, begin, tenant)
        sequence.num_indexed = end
        self._on_published(sequence, begin, end)


def _tokens(sequence: Tracked, count: int) -> Int32Array:
    """The next ones to compute."""
    begin = sequence.num_planned
    if begin == sequence.length:
        return np.array([LAST_SAMPLED], np.int32)
    return sequence.buffer[begin : begin + count]

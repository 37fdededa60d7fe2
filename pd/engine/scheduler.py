"""Which tokens are computed in the next step, and in which pages: continuous batching with chunked
prefill.

Pure. A sequence waits, runs (it has a row), and leaves. Each step takes the running sequences' next
tokens under a token budget: those that need one token first, then prefill chunks, by age. A
sequence is admitted when all its pages for the tokens known so far fit; if a running one cannot
grow, the youngest running sequence is preempted: its pages are released (the index may keep them)
and its tokens recomputed later.

One step is in flight at a time: `plan` -> `commit`. A sequence dropped meanwhile keeps its pages
until the commit, because the step writes to them.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from hicache.index import PageIndex
from hicache.keys import page_hashes
from pd.engine.batch import RowStart, StepCommand, StepResult
from pd.messages import Int32Array, SamplingParams, TokenLogprob
from transfer.layout import LayerGroup


class Tracked:
    """One sequence: its tokens, and the pages that hold the KV of the first `num_computed` of
    them."""

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
        "num_indexed",
        "params",
        "preemptions",
        "prompt_len",
        "root",
        "row",
        "slid",
        "storage_tokens",
        "tables",
    )

    def __init__(
        self,
        prompt: Int32Array,
        params: SamplingParams,
        root: bytes,
        hashes: list[bytes],
        num_groups: int,
        now: float,
    ) -> None:
        self.buffer = np.empty(len(prompt) + params.max_tokens, np.int32)
        self.buffer[: len(prompt)] = prompt
        self.length = self.prompt_len = len(prompt)
        self.params = params
        self.root = root
        self.hashes = hashes
        """Of the full pages of the tokens known; grows as pages fill."""
        self.num_computed = 0
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
    ) -> None:
        """`on_published`: these pages of a sequence are complete and in the index. `on_reused`: so
        many leading pages were found there. `fetch`: whether to wait for pages from other tiers;
        the sequence is then `add`ed again."""
        self.index = index
        self.landed: deque[Tracked] = deque()
        """Their pages came by a handover; they only need a row, and get it before those below."""
        self.waiting: deque[Tracked] = deque()
        """They hold no pages."""
        self.running: list[Tracked] = []
        self.preemptions = 0
        self.cached_tokens = 0
        self._groups = groups
        self._page_tokens = page_tokens
        self._max_batch_tokens = max_batch_tokens
        self._free_rows = list(range(max_running - 1, -1, -1))
        self._in_flight: list[tuple[Tracked, int, bool]] = []
        self.dropped: set[Tracked] = set()
        """Left during the step in flight; their pages are released at its commit."""
        self._new_pages: list[list[tuple[int, int, int]]] = [[] for _ in groups]
        self._on_published = on_published
        self._on_reused = on_reused
        self._fetch = fetch

    # ----------------------------------------------------------------------------------- membership

    def add(self, sequence: Tracked) -> None:
        """In order of arrival, whenever it is called."""
        place = len(self.waiting)
        while place and self.waiting[place - 1].arrived_at > sequence.arrived_at:
            place -= 1
        self.waiting.insert(place, sequence)

    def add_landed(self, sequence: Tracked) -> None:
        self.landed.append(sequence)

    def drop(self, sequence: Tracked) -> None:
        """Forget a sequence and release its pages, at once or when the step in flight ends.
        Idempotent for a sequence that is in no queue: only its pages are released."""
        if any(sequence is item[0] for item in self._in_flight):
            self.dropped.add(sequence)
        else:
            self._forget(sequence)
            self.release_pages(sequence)

    def _forget(self, sequence: Tracked) -> None:
        if sequence.row >= 0:
            self.running.remove(sequence)
            self._free_rows.append(sequence.row)
            sequence.row = -1
        for queue in (self.landed, self.waiting):
            if sequence in queue:
                queue.remove(sequence)

    @property
    def has_step_in_flight(self) -> bool:
        return bool(self._in_flight)

    @property
    def num_prefilling(self) -> int:
        """Tokens of prompts in the step in flight."""
        return sum(count for _, count, _ in self._in_flight if count > 1)

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    def num_waiting_before(self, arrived_at: float) -> int:
        return sum(sequence.arrived_at < arrived_at for sequence in self.waiting)

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
        # A page to grow for each running sequence, so that a landed one is not preempted at once.
        if not self.index.can_allocate([count + len(self.running) for count in counts]):
            return None
        for number, first in enumerate(firsts):
            table = sequence.tables[number]
            slots = self.index.allocate(number, counts[number])
            assert slots is not None
            table += [-1] * (first - len(table)) + slots
        return firsts

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
        total = self._pages_for(num_tokens)
        counts = [max(0, total - len(table)) for table in sequence.tables]
        if not any(counts):
            return True
        if not self.index.can_allocate(counts):
            return False
        for number, count in enumerate(counts):
            slots = self.index.allocate(number, count)
            assert slots is not None
            table = sequence.tables[number]
            self._announce(sequence.row, number, len(table), slots)
            table += slots
        return True

    def _announce(self, row: int, group: int, first: int, slots: list[int]) -> None:
        self._new_pages[group] += [
            (row, first + i, slot) for i, slot in enumerate(slots) if slot >= 0
        ]

    # ---------------------------------------------------------------------------------------- steps

    def plan(self, now: float, lacks_pages_since: float = math.inf) -> StepCommand | None:
        """The next step, or None when there is nothing to do (or one is in flight). A waiting
        request that came after `lacks_pages_since` is not admitted: one elsewhere that came then
        waits for pages, and would never find them while later ones do."""
        if self._in_flight:
            return None
        budget = self._max_batch_tokens
        items: list[tuple[Tracked, int]] = []
        starts: list[RowStart] = []
        planned: set[Tracked] = set()

        def take(sequence: Tracked) -> None:
            nonlocal budget
            self._slide(sequence, sequence.num_computed)
            count = min(sequence.remaining, budget)
            while not self._grow(sequence, sequence.num_computed + count):
                victim = next(s for s in reversed(self.running) if s not in planned)
                self._preempt(victim, starts)
                if victim is sequence:
                    return
            items.append((sequence, count))
            planned.add(sequence)
            budget -= count

        for single in (True, False):
            for sequence in list(self.running):
                if budget and sequence.row >= 0 and (sequence.remaining == 1) is single:
                    take(sequence)
        while (self.landed or self.waiting) and self._free_rows and budget:
            is_first = self._is_waiting_first(lacks_pages_since)
            if is_first and not self.waiting[0].is_fetched and self._fetch(self.waiting[0], now):
                self.waiting.popleft()
                continue
            if is_first and self._claim_pages(self.waiting[0]):
                sequence = self.waiting.popleft()
            elif self.landed:
                sequence = self.landed.popleft()
            else:
                break
            self._start(sequence, now, starts)
            take(sequence)
            if sequence.row < 0:
                break
        if not items:
            return None
        return self._command(items, starts)

    def _is_waiting_first(self, lacks_pages_since: float) -> bool:
        if not self.waiting or self.waiting[0].arrived_at > lacks_pages_since:
            return False
        return not self.landed or self.waiting[0].arrived_at < self.landed[0].arrived_at

    def lacks_pages_before(self, arrived_at: float) -> bool:
        """Whether a request that came earlier has a row and waits for pages."""
        return bool(self.waiting and self._free_rows and self.waiting[0].arrived_at < arrived_at)

    def _claim_pages(self, sequence: Tracked) -> bool:
        """Match the prefix if all pages that the tokens known so far need will fit at once, and one
        to grow for each running sequence."""
        self.match_prefix(sequence)
        counts = []
        for group, table in zip(self._groups, sequence.tables, strict=True):
            need = self._pages_for(sequence.length) - len(table)
            if group.kind == "sliding":
                held = sum(slot >= 0 for slot in table)
                most = self._pages_for(group.window + self._max_batch_tokens) + 1
                need = min(need, most - held)
            counts.append(need + len(self.running))
        if not self.index.can_allocate(counts):
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

    def _start(self, sequence: Tracked, now: float, starts: list[RowStart]) -> None:
        sequence.row = self._free_rows.pop()
        if sequence.admitted_at < 0:
            sequence.admitted_at = now
        self.running.append(sequence)
        starts.append(
            RowStart(
                sequence.row,
                sequence.params,
                sequence.buffer[: sequence.length].copy(),
                sequence.prompt_len,
            )
        )
        for number, table in enumerate(sequence.tables):
            self._announce(sequence.row, number, 0, table)

    def _preempt(self, victim: Tracked, starts: list[RowStart]) -> None:
        starts[:] = [start for start in starts if start.row != victim.row]
        for number, pages in enumerate(self._new_pages):
            self._new_pages[number] = [page for page in pages if page[0] != victim.row]
        self._forget(victim)
        self.release_pages(victim)
        victim.is_fetched = False  # its pages are cache now, and may be gone when it resumes
        victim.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(victim)

    def _command(self, items: list[tuple[Tracked, int]], starts: list[RowStart]) -> StepCommand:
        items.sort(key=lambda item: (item[1] > 1, item[0].num_computed))
        self._in_flight = [(s, n, s.num_computed + n == s.length) for s, n in items]
        command = StepCommand(
            starts=starts,
            rows=np.array([s.row for s, _ in items], np.int32),
            positions=np.array([s.num_computed for s, _ in items], np.int32),
            counts=np.array([n for _, n in items], np.int32),
            sample=np.array([sample for _, _, sample in self._in_flight], np.bool_),
            tokens=np.concatenate(
                [s.buffer[s.num_computed : s.num_computed + n] for s, n in items]
            ),
            pages=[np.array(pages, np.int32).reshape(-1, 3) for pages in self._new_pages],
        )
        self._new_pages = [[] for _ in self._groups]
        return command

    def commit(self, result: StepResult) -> list[Progress]:
        """Apply a step's result; sequences dropped during the step are released and left out."""
        progress = []
        sampled = iter(zip(result.tokens, result.logprobs, strict=True))
        in_flight, self._in_flight = self._in_flight, []
        for sequence, count, sample in in_flight:
            sequence.num_computed += count
            token, logprob = next(sampled) if sample else (None, None)
            self.publish(sequence)
            if sequence in self.dropped:
                self.dropped.remove(sequence)
                self.drop(sequence)
                continue
            if token is not None:
                sequence.append(token)
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
        self.index.insert(parent, sequence.hashes[begin:end], slots, begin)
        sequence.num_indexed = end
        self._on_published(sequence, begin, end)

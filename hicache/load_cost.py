"""Load or recompute: whether pages are sooner had from a tier, or by computing their tokens.

Pure: times come in as arguments. What is not known, and what was slow when it was last measured, is
probed: a little is loaded beside the computation, which does not wait for it, so that learning
costs no request time. A load has to be predicted to be faster by a margin, for neither time is
known exactly. Loads under way that take longer than they should count at once, not only when they
have ended.
"""

from __future__ import annotations

import enum

_WEIGHT = 0.3
"""Of the latest sample in a running average."""
_MARGIN = 1.25
"""Computing has to take so many times as long as loading."""


class Rate:
    """Bytes per second, from a running average of the time that a byte takes: one slow operation
    counts more than one fast one. Operations that overlap share the time."""

    def __init__(self) -> None:
        self.bytes_per_s = 0.0
        """0: not known."""
        self._bytes = 0
        self._seconds = 0.0
        self._last_end = float("-inf")

    def add(
        self,
        num_bytes: int,
        started: float,
        ended: float,
        latency_s: float = 0.0,
        is_alone: bool = False,
    ) -> None:
        """An operation. Its latency counts for half of its time at most, and only where nothing
        else was under way meanwhile. `is_alone`: forget what was measured before."""
        seconds = max(0.0, ended - max(started, self._last_end))
        if started >= self._last_end:
            seconds -= min(latency_s, seconds / 2)
        self._last_end = max(self._last_end, ended)
        self._bytes += num_bytes
        self._seconds += seconds
        if self._bytes and self._seconds > 0:
            sample, known = self._seconds / self._bytes, self.bytes_per_s
            if known and not is_alone:
                sample = _WEIGHT * sample + (1 - _WEIGHT) / known
            self.bytes_per_s = 1 / sample
            self._bytes, self._seconds = 0, 0.0


class Verdict(enum.Enum):
    LOAD = "load"
    RECOMPUTE = "recompute"
    PROBE = "probe"
    """Recompute, and meanwhile load a little to learn whether that is right."""


class LoadCost:
    """Of one tier, from what earlier loads took."""

    def __init__(self, probe_s: float) -> None:
        """`probe_s`: the time from one probe of a tier that is slow to the next."""
        self.reads = Rate()
        self.latency_s = 0.0
        """Of an operation, beside what it takes to move its bytes."""
        self._probe_s = probe_s
        self._next_probe = float("-inf")
        self._is_trip_probe = self._is_read_probe = False

    def add_trip(self, seconds: float) -> None:
        """A probe's counts alone: there is no other for a while, and what it is to show is whether
        the earlier ones still tell anything."""
        weight = _WEIGHT if self.latency_s and not self._is_trip_probe else 1.0
        self._is_trip_probe = False
        self.latency_s += weight * (seconds - self.latency_s)

    def add_read(
        self, num_bytes: int, started: float, ended: float, latency_s: float = 0.0
    ) -> None:
        """As `Rate.add`; a probe's counts alone, here as well."""
        self.reads.add(num_bytes, started, ended, latency_s, self._is_read_probe)
        self._is_read_probe = self._is_read_probe and not num_bytes

    def add_failed_read(self, num_bytes: int, started: float, ended: float) -> None:
        """So many bytes did not come. Counts if that took longer than to read them."""
        if num_bytes < self.reads.bytes_per_s * (ended - started):
            self.add_read(num_bytes, started, ended)

    def seconds(self, num_bytes: int, trips: int) -> float:
        """To load so many bytes, those before them in the queue included, with so many operations
        one after the other; 0.0: not known."""
        if not self.reads.bytes_per_s:
            return 0.0
        return trips * self.latency_s + num_bytes / self.reads.bytes_per_s

    def judge(
        self,
        num_bytes: int,
        trips: int,
        num_tokens: int,
        tokens_per_s: float,
        now: float,
        queued_bytes: int = 0,
        queued_since: float = 0.0,
    ) -> Verdict:
        """Of so many bytes, behind those queued, the first of which has been under way for some
        time. Where the speed of computing is not known, they are loaded. Remembers when it last
        said PROBE."""
        if not tokens_per_s:
            return Verdict.LOAD
        computing_s = num_tokens / tokens_per_s
        seconds = self.seconds(queued_bytes + num_bytes, trips)
        if seconds and queued_bytes:
            # They have not ended yet, so it is not faster than that.
            seconds = max(seconds, (now - queued_since) * (queued_bytes + num_bytes) / queued_bytes)
        if seconds and _MARGIN * seconds < computing_s:
            return Verdict.LOAD
        if queued_bytes or now < self._next_probe:
            return Verdict.RECOMPUTE
        if seconds:
            self._next_probe = now + self._probe_s
            self._is_trip_probe = self._is_read_probe = True
        return Verdict.PROBE

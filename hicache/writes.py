"""Write policies: which device pages are offered to the host tier.

Pure. Pages are offered with all that come before them in their sequence; the keeper takes what the
host tier lacks.

  write_through            when they are complete
  write_through_selective  when requests have used them so many times, computing them included
  write_back               when they are next to be evicted

Only the second has anything to remember.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

WRITE_POLICIES = ("write_through", "write_through_selective", "write_back")

_KEPT = 2
"""Pages whose uses are known, in device pools."""


class SelectiveWrites:
    def __init__(self, pool_pages: int, hits: int) -> None:
        """`hits`: uses after which a page is offered."""
        self._hits = hits
        self._limit = _KEPT * pool_pages
        self._uses: OrderedDict[bytes, int] = OrderedDict()
        """Those used last at the end."""

    def used(self, hashes: Sequence[bytes], begin: int = 0) -> tuple[int, int]:
        """A request uses pages hashes[begin:]. (first, end) of those to be offered: `first` is the
        first that has just had enough uses, or `end` where none has, and the page before `end` is
        the last that ever had; (0, 0): none."""
        uses, hits = self._uses, self._hits
        first, end = len(hashes), 0
        for page in range(begin, len(hashes)):
            count = uses.pop(hashes[page], 0) + 1
            uses[hashes[page]] = count
            if count == hits:
                first = min(first, page)
            if count >= hits:
                end = page + 1
        while len(uses) > self._limit:
            uses.popitem(last=False)
        return min(first, end), end

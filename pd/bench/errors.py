"""What benchmarks raise for a person to read."""

from __future__ import annotations


class BenchError(ValueError):
    """It cannot be measured as asked, or went wrong; one line."""

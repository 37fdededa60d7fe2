"""What a leader measures of the steps of its batch, for routers. Pure."""

from __future__ import annotations

_FORGET = 0.999
"""Steps come in thousands, and different ones are needed."""
_MIN_SPREAD = 0.25
"""Of batch sizes, their variance: below it there is no line through the times."""


class DecodeSpeed:
    """How much longer a step without prompts takes for another request in it: the slope of the line
    of least squares through batch sizes and times."""

    def __init__(self) -> None:
        self._weight = self._size = self._time = self._size_size = self._size_time = 0.0

    @property
    def s_per_request(self) -> float:
        """0: unknown, as it is while all batches have one size; at most a step's time, shared
        out."""
        if not self._size:
            return 0.0
        size, time = self._size / self._weight, self._time / self._weight
        spread = self._size_size / self._weight - size * size
        if spread < _MIN_SPREAD:
            return 0.0
        share = self._time / self._size
        return min(max((self._size_time / self._weight - size * time) / spread, 0.0), share)

    def measured(self, batch_size: int, seconds: float) -> None:
        keep = _FORGET
        self._weight = self._weight * keep + 1
        self._size = self._size * keep + batch_size
        self._time = self._time * keep + seconds
        self._size_size = self._size_size * keep + batch_size * batch_size
        self._size_time = self._size_time * keep + batch_size * seconds

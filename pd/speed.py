"""What a leader measures of the steps of its batch, for routers and the planner. Pure."""

from __future__ import annotations

_FORGET = 0.999
"""Steps come in thousands, and different ones are needed."""
_MIN_SPREAD = 0.25
"""Of batch sizes, their variance: below it there is no line through the times."""
_FORGET_PREFILL = 0.95
_MIN_PREFILL_SPREAD = 0.1
"""Of tokens in a step, their standard deviation over their mean."""
_MOST_TIMES_FASTER = 4.0
"""Than the mean: a line through few steps may be nearly flat by chance."""


class _Line:
    """Of least squares, through sizes of steps and their times; recent ones weigh more."""

    def __init__(self, forget: float) -> None:
        """`forget`: what each step weighs against the next one."""
        self._forget = forget
        self._weight = self._size = self._time = self._size_size = self._size_time = 0.0

    @property
    def share(self) -> float:
        """Of a step's time, for one of its size; 0: there was no step."""
        return self._time / self._size if self._size else 0.0

    @property
    def mean_size(self) -> float:
        return self._size / self._weight if self._weight else 0.0

    @property
    def spread(self) -> float:
        """Of sizes: their variance."""
        return self._size_size / self._weight - self.mean_size**2 if self._weight else 0.0

    def slope(self) -> float:
        """What one more makes a step longer, of sizes that differ: at most `share`."""
        covariance = (self._size_time - self.mean_size * self._time) / self._weight
        return min(max(covariance / self.spread, 0.0), self.share)

    def measured(self, size: int, seconds: float) -> None:
        keep = self._forget
        self._weight = self._weight * keep + 1
        self._size = self._size * keep + size
        self._time = self._time * keep + seconds
        self._size_size = self._size_size * keep + size * size
        self._size_time = self._size_time * keep + size * seconds


class DecodeSpeed:
    """How much longer a step without prompts takes for another request in it."""

    def __init__(self) -> None:
        self._line = _Line(_FORGET)

    @property
    def s_per_request(self) -> float:
        """0: unknown, as it is while all batches have one size; at most a step's time, shared
        out."""
        return self._line.slope() if self._line.spread >= _MIN_SPREAD else 0.0

    def measured(self, batch_size: int, seconds: float) -> None:
        self._line.measured(batch_size, seconds)


class PrefillSpeed:
    """How many tokens of prompts fewer make a step a second shorter. A step without them takes
    time as well, so that these are more than are computed in a second."""

    def __init__(self) -> None:
        self._line = _Line(_FORGET_PREFILL)

    @property
    def tokens_per_s(self) -> float:
        """0: unknown. While all steps have about one size, what is computed in a second."""
        line = self._line
        if not line.share:
            return 0.0
        if line.spread < (_MIN_PREFILL_SPREAD * line.mean_size) ** 2:
            return 1 / line.share
        return 1 / max(line.slope(), line.share / _MOST_TIMES_FASTER)

    def measured(self, num_tokens: int, seconds: float) -> None:
        self._line.measured(num_tokens, seconds)


class StepTotals:
    """Of all steps so far, those that computed prompts apart from the others."""

    def __init__(self) -> None:
        self.prompt_tokens = self.decode_steps = self.decode_tokens = 0
        self.prompt_s = self.decode_s = 0.0

    def measured(self, num_prefilling: int, num_sampled: int, seconds: float) -> None:
        if num_prefilling:
            self.prompt_tokens += num_prefilling
            self.prompt_s += seconds
        else:
            self.decode_steps += 1
            self.decode_tokens += num_sampled
            self.decode_s += seconds

"""How long a machine takes for what a leader asks of it: the cost model of simulations. Pure.

A step of a replica takes

    fixed + max(weights, tokens x token + rows x row) + pairs x pair + context x context

where `weights` is the time in which the weights are read, tokens are those of prompts' chunks,
pairs those of a query in them and a key, rows the sequences that compute one token, and context the
keys that these attend to. A write of pages takes `write_s` and its bytes over `bytes_per_s`; a
message `message_s`; the API `request_s` for a request, all that is neither in a step nor in a
message included.

A profile is fitted to measurements (`pd bench profile`), or made from a model's shape and what a
device does in a second (`analytic_profile`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pd.engine.batch import StepCommand
from pd.spec import ClusterSpec, Role
from transfer.layout import LayerGroup


class ProfileError(ValueError):
    """The file is no profile; one line that names the field."""


class StepCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds."""

    fixed_s: float = 0.0
    weights_s: float = 0.0
    token_s: float = 0.0
    pair_s: float = 0.0
    row_s: float = 0.0
    context_s: float = 0.0

    def seconds(self, command: StepCommand) -> float:
        counts, positions = command.counts, command.positions
        rows = len(counts)
        tokens, pairs = 0, 0.0
        if len(command.tokens) > rows:
            rows = int(np.searchsorted(counts, 2))  # those of one token come first
            tokens = len(command.tokens) - rows
            chunks = counts[rows:].astype(np.float64)
            pairs = float(chunks @ (positions[rows:] + chunks / 2))
        return self.of(tokens, pairs, rows, float(positions[:rows].sum()))

    def of(self, tokens: int, pairs: float, rows: int, context: float) -> float:
        return (
            self.fixed_s
            + max(self.weights_s, tokens * self.token_s + rows * self.row_s)
            + pairs * self.pair_s
            + context * self.context_s
        )


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    steps: dict[Role, StepCost]
    bytes_per_s: float
    """Of a rank's link, each way; writes over it take turns."""
    write_s: float = 0.0
    message_s: float = 0.0
    request_s: float = 0.0
    request_token_s: float = 0.0
    """For each token of its prompt."""
    source: str = ""
    """Where and how it was made."""


def load_profile(path: Path) -> Profile:
    """Raises ProfileError, naming the field."""
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=Profile)
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ProfileError(f"{path}: not a profile: {error}") from error
    for role, step in profile.steps.items():
        _check_seconds(path, f"steps.{role}.", msgspec.structs.asdict(step))
        total = step.of(1, 0.0, 1, 0.0)
        _check(path, f"steps.{role}", total, total > 0, "a step of one token above 0 seconds")
    _check(path, "bytes_per_s", profile.bytes_per_s, profile.bytes_per_s > 0, "a number above 0")
    values = msgspec.structs.asdict(profile)
    _check_seconds(path, "", {name: values[name] for name in values if name.endswith("_s")})
    return profile


def _check_seconds(path: Path, prefix: str, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        if name != "bytes_per_s":
            _check(path, prefix + name, value, value >= 0, "0 or more seconds")


def _check(path: Path, field: str, found: float, is_good: bool, expected: str) -> None:
    if not is_good:
        raise ProfileError(f"{path}: {field}: found {found}, expected {expected}")


# ----------------------------------------------------------------------------------------- analytic


class Device(msgspec.Struct, frozen=True):
    """What one rank's device does in a second, as measured, not as on its data sheet."""

    flops: float
    bytes_per_s: float
    """Of its memory."""
    link_bytes_per_s: float
    fixed_s: float = 0.0
    """Of a step: launches, sampling, the leader."""
    write_s: float = 0.0
    message_s: float = 0.0
    request_s: float = 0.0


DEVICES: dict[str, Device] = {
    "h200": Device(595e12, 4.3e12, 300e9, 1.3e-3, 1e-4, 2e-4, 5e-3),
}
"""h200: what vLLM 0.26 reaches with an 8B model in bfloat16 (prefill 595 TFLOP/s; 5.06 ms a token,
of which weights at 4.3 TB/s take 3.5), pages of 1 MiB and more over NVLink; the time of messages
and requests is a guess."""


def analytic_profile(
    spec: ClusterSpec,
    device: Device,
    groups: Sequence[LayerGroup],
    heads: int,
    weight_bytes: float,
    active_parameters: float,
    element_bytes: int,
    source: str = "",
) -> Profile:
    """`heads`: of queries. `active_parameters`: that a token passes through. Ranks of a replica
    share all work evenly, and what they say to each other takes no time. Keys outside a sliding
    window count, which is too much."""
    pair_flops = sum(4.0 * len(g.layers) * heads * g.head_dim for g in groups)
    key_bytes = sum(g.planes * len(g.layers) * g.kv_heads * g.head_dim for g in groups)
    token_s = 2 * active_parameters / device.flops
    steps: dict[Role, StepCost] = {}
    for role, shape in spec.roles.items():
        ranks = shape.topology.num_ranks
        steps[role] = StepCost(
            fixed_s=device.fixed_s,
            weights_s=weight_bytes / device.bytes_per_s / ranks,
            token_s=token_s / ranks,
            row_s=token_s / ranks,
            pair_s=pair_flops / device.flops / ranks,
            context_s=key_bytes * element_bytes / device.bytes_per_s / ranks,
        )
    return Profile(
        steps,
        device.link_bytes_per_s,
        device.write_s,
        device.message_s,
        device.request_s,
        source=source,
    )


# ---------------------------------------------------------------------------------------------- fit


def fit(columns: Mapping[str, Sequence[float]], seconds: Sequence[float]) -> dict[str, float]:
    """Coefficients, none below 0, of seconds as a sum of columns; relative errors count, so that
    short times are fitted as well as long ones. Raises ValueError for fewer times than columns, and
    for a time of 0."""
    if len(seconds) < len(columns):
        raise ValueError(f"{len(seconds)} times for {len(columns)} coefficients")
    if min(seconds) <= 0:
        raise ValueError("a time is 0")
    times = np.array(seconds, np.float64)
    matrix = np.array(list(columns.values()), np.float64).T / times[:, None]
    active = list(range(len(columns)))
    found = np.zeros(len(columns))
    # Those that come out negative are left out, the worst first.
    while active:
        scale = np.abs(matrix[:, active]).max(axis=0)
        scale[scale == 0] = 1.0
        values = np.linalg.lstsq(matrix[:, active] / scale, np.ones(len(times)), rcond=None)[0]
        if values.min() >= 0:
            found[active] = values / scale
            break
        del active[int(values.argmin())]
    return dict(zip(columns, found.tolist(), strict=True))


def to_json(profile: Profile) -> Any:
    return msgspec.to_builtins(profile)

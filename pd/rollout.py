"""Which replicas to start and which to drain, given those that are there. Pure.

`plan_rollout` is asked again and again, and says what to do now. Replicas of another version than
the wanted one (a changed spec) are replaced one after the other in each role: a successor is
started beside them, and one of them is drained when it runs. Where there is no room for one more,
the predecessor goes first, as long as another one serves.

Where one role wants fewer and another one more, and their specs differ in nothing but the numbers,
their versions are the same: replicas change their role, with weights, pools and caches, instead of
being ended and started.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import pd
from pd.spec import ClusterSpec, Role


@dataclasses.dataclass(frozen=True, slots=True)
class Replica:
    name: str
    role: Role
    version: str
    is_running: bool
    is_draining: bool = False
    finds_no_room: bool = False
    """Has been waiting for resources for so long that there seem to be none."""
    num_requests: int = 0
    becomes: Role | None = None
    """What it serves as when it is drained, instead of ending."""


@dataclasses.dataclass(frozen=True, slots=True)
class Start:
    role: Role
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Drain:
    """For one that does not run yet: end it."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """Drain it, unless it does, and let it serve in another role then."""

    name: str
    role: Role


Action: TypeAlias = Start | Drain | Turn
_CHANGED, _FEWER = "its spec has changed", "fewer are wanted"


def version_of(spec: ClusterSpec, role: Role | None) -> str:
    """Changes with whatever the processes of a role were started with; None: of keepers."""
    parts = spec.model_dump(
        mode="json", include={"model", "page_tokens", "network", "transfer", "cache", "timeouts"}
    )
    parts["build"] = pd.__version__
    if role is not None:
        router = spec.router
        parts["role"] = dict(spec.roles.items())[role].model_dump(mode="json", exclude={"replicas"})
        parts["router"] = [router.local_prefill_tokens, router.needs_pages]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def plan_rollout(
    replicas: Sequence[Replica],
    desired: Mapping[Role, int],
    versions: Mapping[Role, str],
) -> list[Action]:
    """`desired` and `versions`: by role, of the spec's roles; replicas of other roles are drained,
    once one of each role that is wanted runs."""
    actions: list[Action] = []
    replicas = [
        each
        if each.becomes is None
        else dataclasses.replace(each, role=each.becomes, is_running=False, is_draining=False)
        for each in replicas
    ]
    names = {replica.name for replica in replicas}
    roles = {*desired, *(replica.role for replica in replicas)}
    if not all(_serves(role, replicas) for role, wanted in desired.items() if wanted):
        roles -= {replica.role for replica in replicas} - desired.keys()
    for role in sorted(roles):
        of_role = [r for r in replicas if r.role == role]
        wanted = desired.get(role, 0)
        actions += _plan_role(role, of_role, wanted, versions.get(role, ""), names)
    return _with_turns(actions, replicas, versions)


def _with_turns(
    actions: list[Action], replicas: Sequence[Replica], versions: Mapping[Role, str]
) -> list[Action]:
    """Those that leave serve as those that are to be started, where they can."""
    drained = {action.name for action in actions if isinstance(action, Drain)}
    leaving = [r for r in replicas if r.is_running and (r.is_draining or r.name in drained)]
    leaving.sort(key=lambda replica: replica.num_requests)
    planned, turns = list(actions), []
    for start in (action for action in actions if isinstance(action, Start)):
        fits = (r for r in leaving if r.version == versions[start.role] and r.role != start.role)
        if (one := next(fits, None)) is not None:
            leaving.remove(one)
            planned.remove(start)
            turns.append(Turn(one.name, start.role))
    turned = {turn.name for turn in turns}
    return [*(a for a in planned if not (isinstance(a, Drain) and a.name in turned)), *turns]


def _serves(role: Role, replicas: Sequence[Replica]) -> bool:
    """Or would, if there were room."""
    return any(
        (r.is_running and not r.is_draining) or r.finds_no_room for r in replicas if r.role == role
    )


def _plan_role(
    role: Role, replicas: Sequence[Replica], wanted: int, version: str, names: set[str]
) -> list[Action]:
    kept = [r for r in replicas if not r.is_draining]
    stale = [r for r in kept if r.version != version]
    current = [r for r in kept if r.version == version]
    if absent := [replica for replica in stale if not replica.is_running]:
        return [Drain(replica.name, _CHANGED) for replica in absent]
    coming = [r for r in current if not r.is_running]
    num_running = len(kept) - len(coming)
    limit = wanted + (1 if stale and wanted else 0)
    if len(kept) < wanted:
        return [Start(role, name) for name in _free_names(role, names, wanted - len(kept))]
    if len(kept) > limit:
        if coming:
            return [Drain(coming[-1].name, _FEWER)]
        return [Drain(_least_useful(stale or current), _CHANGED if stale and wanted else _FEWER)]
    if not stale:
        return []
    # Decode replicas compute prompts themselves where there is no prefill replica.
    can_spare = num_running > 1 or role == "prefill"
    if len(kept) > wanted:
        if num_running > wanted or (can_spare and any(r.finds_no_room for r in coming)):
            return [Drain(_least_useful(stale), _CHANGED)]
        return []
    if coming or len(kept) < len(replicas):
        return []
    return [Start(role, name) for name in _free_names(role, names, 1)]


def _least_useful(replicas: Sequence[Replica]) -> str:
    """With the fewest requests to move; of those the one that came last."""
    return min(reversed(replicas), key=lambda replica: replica.num_requests).name


def _free_names(role: Role, taken: set[str], count: int) -> list[str]:
    """Replicas of another role may have such a name."""
    names = (f"{role}-{number}" for number in itertools.count())
    return list(itertools.islice((name for name in names if name not in taken), count))

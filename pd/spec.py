"""The cluster spec: one YAML file, read into frozen models.

Reading never touches a device or a network. Every error names the key's path, the value found and
what was expected (`SpecError`). What the model itself decides (layers, heads, context) is joined in
`pd/cost.py`.
"""

from __future__ import annotations

import difflib
import os
import re
import reprlib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from hicache.policy import order_names
from hicache.storage.backends import backend_names as storage_names
from transfer.backends import backend_names

Role = Literal["prefill", "decode", "both"]
MemberRole = Role | Literal["cache", "rank"]
"""Of a process other than an API server; `cache`: the keeper of a node's host tier; `rank`: any but
the first of a replica, known to its leader alone."""

TENANT_PATTERN = "[A-Za-z0-9][A-Za-z0-9._:@/+-]{0,127}"
TENANT_FORM = "up to 128 of A-Z a-z 0-9 . _ : @ / + -, a letter or digit first"
EVERY_OTHER_TENANT = "*"
MAX_PRIORITIES = 16


def replica_role(role: MemberRole | None) -> Role:
    """For what is known to be a replica."""
    assert role == "prefill" or role == "decode" or role == "both"
    return role


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class SpecError(ValueError):
    """The spec cannot be used; the message has a line per problem."""


def parse_bytes(value: Any) -> Any:
    """2GiB, 512MB, 1048576 -> bytes; anything else is returned for the type check to refuse."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", value.strip().lower())
        if not match:
            raise ValueError("expected a size such as 512MiB or 2GB")
        return int(float(match[1]) * _UNITS[match[2] or ""])
    return value


def _replica_range(value: Any) -> Any:
    """`replicas: 2` is short for {min: 2, max: 2}."""
    if isinstance(value, int) and not isinstance(value, bool):
        return {"min": value, "max": value}
    if not isinstance(value, dict | ReplicaRange):
        raise ValueError("expected a whole number, or a mapping of min and max")
    return value


def _known_backend(name: str) -> str:
    known = backend_names()
    if name not in known:
        raise ValueError(f"expected one of {', '.join(known)}")
    return name


def _known_storage(name: str) -> str:
    known = storage_names()
    if name not in known:
        raise ValueError(f"expected one of {', '.join(known)}")
    return name


def _known_order(name: str) -> str:
    if name not in order_names():
        raise ValueError(f"expected one of {', '.join(order_names())}")
    return name


def _endpoint(value: str) -> str:
    match = re.fullmatch(r"tcp://(\*|[\w.-]+|\[[0-9a-fA-F:.]+\]):(\*|\d{1,5})", value)
    if value and not (match and (match[2] == "*" or int(match[2]) < 2**16)):
        raise ValueError("expected tcp://HOST:PORT, with * or 0 for any free port, or nothing")
    return value


def _quota(value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (value >= 0 if isinstance(value, int) else 0 < value < 1):
        raise ValueError(
            "expected a whole number of pages, or a share of the host tier between 0 and 1"
        )
    return value


def _tenant(name: str) -> str:
    if not re.fullmatch(TENANT_PATTERN, name):
        raise ValueError(f"expected a tenant, {TENANT_FORM}")
    return name


def _tenant_or_rest(name: str) -> str:
    if name != EVERY_OTHER_TENANT and not re.fullmatch(TENANT_PATTERN, name):
        raise ValueError(f"expected {EVERY_OTHER_TENANT!r} or a tenant, {TENANT_FORM}")
    return name


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
Endpoint = Annotated[str, AfterValidator(_endpoint)]
Key = Annotated[str, Field(min_length=1)]
Tenant = Annotated[str, AfterValidator(_tenant)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")]


class SpecModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelSpec(SpecModel):
    path: str = Field(min_length=1)
    """A folder (config.json, safetensors, tokenizer), a .gguf file, a hub id, or `package:NAME` for
    a Python package whose `assemble()` returns such a path. Relative to the spec's folder."""
    name: str = ""
    """What clients call the model; empty: the path's last part."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of weights and KV pages."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the arithmetic. auto: `dtype`, but float32 on a CPU without 16-bit float instructions."""
    max_context: int | None = Field(default=None, ge=1)
    """Prompt and output tokens of one request; None: what the model and the pools allow."""
    chat_template: str = ""
    """Path of a Jinja file, for models that bring none."""
    load: Literal["weights", "random"] = "weights"
    """random: initialise from config.json alone, for tests and benchmarks."""


class TopologySpec(SpecModel):
    tp: int = Field(default=1, ge=1)
    pp: int = Field(default=1, ge=1)
    cp: int = Field(default=1, ge=1)

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp * self.cp


class ReplicaRange(SpecModel):
    min: int = Field(ge=0)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> ReplicaRange:
        if self.min > self.max:
            raise ValueError(f"expected min ({self.min}) no greater than max ({self.max})")
        return self


class PoolSpec(SpecModel):
    """Size of a rank's device tier: one of the three."""

    pages: int | None = Field(default=None, ge=2)
    """Pages of the full-attention group (of every group, where there is none)."""
    memory: Bytes | None = None
    memory_fraction: float | None = Field(default=None, gt=0, le=0.95)
    """Of the device's memory that is free once the weights are loaded."""

    @model_validator(mode="after")
    def _one(self) -> PoolSpec:
        given = [k for k in ("pages", "memory", "memory_fraction") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(
                "expected one of pages, memory, memory_fraction; "
                f"got {' and '.join(given) or 'none'}"
            )
        return self


class RoleSpec(SpecModel):
    replicas: Annotated[ReplicaRange, BeforeValidator(_replica_range)] = ReplicaRange(min=1, max=1)
    topology: TopologySpec = TopologySpec()
    device: Literal["cpu", "cuda"] = "cpu"
    resources: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Ray resources of one rank, such as {CPU: 1, GPU: 1}; by default one CPU, and one GPU where
    device is cuda."""
    labels: dict[str, str] = {}
    """Ray node labels that a rank's node must have."""
    threads: int = Field(default=1, ge=1)
    """Compute threads of a rank on the CPU."""
    pool: PoolSpec = PoolSpec(memory_fraction=0.3)
    max_batch_tokens: int = Field(default=2048, ge=1)
    """Token budget of one step; longer prompts are prefilled in chunks."""
    max_running: int = Field(default=64, ge=1, le=4096)
    """Requests in one batch."""

    @model_validator(mode="after")
    def _device_fits(self) -> RoleSpec:
        if self.device == "cuda" and self.resources.get("GPU") == 0:
            raise ValueError("expected resources.GPU above 0 where device is cuda")
        return self

    def rank_resources(self) -> dict[str, float]:
        return {"CPU": 1.0, **({"GPU": 1.0} if self.device == "cuda" else {}), **self.resources}


class RolesSpec(SpecModel):
    prefill: RoleSpec | None = None
    decode: RoleSpec | None = None
    both: RoleSpec | None = None

    def items(self) -> list[tuple[Role, RoleSpec]]:
        pairs: list[tuple[Role, RoleSpec | None]] = [
            ("prefill", self.prefill),
            ("decode", self.decode),
            ("both", self.both),
        ]
        return [(role, spec) for role, spec in pairs if spec is not None]

    @model_validator(mode="after")
    def _serves(self) -> RolesSpec:
        if self.prefill and not (self.decode or self.both):
            raise ValueError("prefill alone cannot serve: expected decode beside it")
        if self.decode and not (self.prefill or self.both):
            raise ValueError(
                "decode alone has nothing to take over: expected prefill beside it, or use both"
            )
        if not self.items():
            raise ValueError("expected prefill and decode, or both")
        return self


class TransferSpec(SpecModel):
    backend: Annotated[str, AfterValidator(_known_backend)] = "nixl"
    """nixl and mooncake reach other hosts; shm (host memory) and ipc (GPU memory) stay on one."""
    options: dict[str, str] = {}
    """Parameters of the backend, such as {device_list: mlx5_0} for NIXL's UCX."""
    max_bytes_in_flight: Bytes | None = None
    """To one peer; None: four writes of the size that the backend likes best."""
    timeout: float = Field(default=30.0, gt=0)
    """Seconds without a sign of life from the sender, or without the end of a write, after which a
    handover is given up and its request goes on elsewhere."""
    verify: bool = False
    """Compare a digest of every page with its source's after each handover."""


class HostCacheSpec(SpecModel):
    memory: Bytes
    """Of the host tier on each node that has replicas."""
    write: Literal["write_through", "write_through_selective", "write_back"] = "write_through"
    """When device pages are copied to the host tier: when they are complete, when they have been
    used `write_hits` times, or when they are about to be evicted."""
    write_hits: int = Field(default=2, ge=1)
    quotas: dict[
        Annotated[str, AfterValidator(_tenant_or_rest)],
        Annotated[int | float, BeforeValidator(_quota)],
    ] = {}
    """The most pages of the host tier that a tenant may have, or a share of it, such as 0.25; `*`
    is for each tenant that is not named. Requests without a tenant have no quota."""

    def quota_pages(self, num_pages: int) -> dict[str, int]:
        """`quotas` of a host tier of so many pages."""
        return {
            tenant: quota if isinstance(quota, int) else int(quota * num_pages)
            for tenant, quota in self.quotas.items()
        }


class StorageCacheSpec(SpecModel):
    backend: Annotated[str, AfterValidator(_known_storage)]
    """file, nixl (files by NIXL's POSIX plug-in), mooncake, or one from an entry point."""
    options: dict[str, str] = {}
    """Parameters of the backend, such as {path: /data/kv, limit: 100GiB} for file."""
    prefetch: Literal["timeout", "best_effort", "wait_complete"] = "timeout"
    """How long a request waits for its pages from storage: for `prefetch_timeout` and
    `prefetch_timeout_per_1k`, until it could start, or until they are there. In no case longer than
    computing them takes."""
    prefetch_timeout: float = Field(default=1.0, ge=0)
    """Seconds, for any number of tokens..."""
    prefetch_timeout_per_1k: float = Field(default=0.25, ge=0)
    """... and for each thousand of them."""
    heads_per_object: int | None = Field(default=None, ge=1)
    """KV heads and layers of a page that are stored as one object; None: all. What shares a storage
    must agree on both."""
    layers_per_object: int | None = Field(default=None, ge=1)


class CacheEventsSpec(SpecModel):
    """What enters and leaves the device and host tiers, told to routers as vLLM and SGLang do."""

    publish: Endpoint = ""
    """Such as tcp://127.0.0.1:5557; empty: no events. Each process binds an address of its own:
    with port `*` or 0 any free one, else this port and its number, counted through the prefill
    replicas, decode, both, and then the keepers, with `replicas.max` + 1 numbers for each role."""
    replay: Endpoint = ""
    """Likewise, for subscribers that missed some."""
    topic: str = ""
    buffer: int = Field(default=10_000, ge=1)
    """Batches kept for replays, and the most that wait for each subscriber."""

    @model_validator(mode="after")
    def _published(self) -> CacheEventsSpec:
        if self.replay and not self.publish:
            raise ValueError("replay: expected publish beside it")
        return self


class CacheSpec(SpecModel):
    device: bool = True
    """Reuse pages of earlier requests with the same prefix."""
    eviction: Annotated[str, AfterValidator(_known_order)] = "lru"
    """Which pages go first, on the device and in the host tier."""
    load: Literal["auto", "always", "never"] = "auto"
    """Pages that the host tier or storage has are used where that is predicted to be faster than
    computing them, always, or never: they are only kept, for others."""
    host: HostCacheSpec | None = None
    storage: StorageCacheSpec | None = None
    events: CacheEventsSpec = CacheEventsSpec()

    @model_validator(mode="after")
    def _tiers(self) -> CacheSpec:
        if self.storage is not None and self.host is None:
            raise ValueError("storage: expected host beside it, for pages come and go through it")
        if self.host is not None and not self.device:
            raise ValueError("host: expected device to be true")
        if self.events.publish and not self.device:
            raise ValueError("events: expected device to be true")
        return self


class PrioritySpec(SpecModel):
    """A class of requests."""

    slack: float | None = Field(default=1.0, gt=0)
    """A request is refused where it is expected to take more than so many times the `objectives`;
    None: never for that."""
    share: float | None = Field(default=None, gt=0, le=1)
    """Of `max_queue`: with more in use, by whichever class, this one is refused. None: all of it
    for the first class, and for each of n classes 1/n less than for the one before."""


class RouterSpec(SpecModel):
    policy: Literal["cost", "prefix", "least_loaded", "round_robin"] = "cost"
    """By which replicas are chosen: the least expected time, the longest prefix that is cached
    there, the fewest requests, or in turn."""
    local_prefill_tokens: int = Field(default=64, ge=0)
    """A prompt with at most so many uncached tokens is prefilled on the decode replica itself."""
    max_queue: int = Field(default=512, ge=1)
    """Requests admitted and not finished, per API process; more are answered 429."""
    priorities: dict[Name, PrioritySpec] = Field(default={}, max_length=MAX_PRIORITIES)
    """Classes that requests may name, the one that is served first at first, such as {interactive:
    {}, batch: {slack: 10}}."""
    default_priority: str = ""
    """Of requests that name none; empty: the first."""

    @model_validator(mode="after")
    def _has_default(self) -> RouterSpec:
        names = list(self.priorities)
        if self.default_priority and self.default_priority not in names:
            raise ValueError(
                f"default_priority: found {self.default_priority!r}, expected one of "
                f"{', '.join(names) or 'priorities, of which there are none'}"
            )
        return self

    def classes(self) -> list[PrioritySpec]:
        """By priority, with their shares; without `priorities` one."""
        specs = list(self.priorities.values()) or [PrioritySpec()]
        return [
            spec if spec.share else spec.model_copy(update={"share": 1 - number / len(specs)})
            for number, spec in enumerate(specs)
        ]

    @property
    def needs_pages(self) -> bool:
        """Whether the policy asks what is cached where."""
        return self.policy in ("cost", "prefix")


class ApiSpec(SpecModel):
    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=0, le=65535)
    """0: any free port, printed when ready."""
    replicas: int = Field(default=1, ge=1, le=64)
    """Processes that listen there, on the controller's host."""
    keys: tuple[Key, ...] = Field(default=(), strict=False)
    """Accepted bearer tokens; none here and in `tenants`: no authentication. `${NAME}` is an
    environment variable."""
    tenants: dict[Tenant, Annotated[tuple[Key, ...], Field(strict=False)]] = {}
    """More of them, by the tenant whose requests they come with. With those of `keys`, or without
    any, the header X-Tenant-Id says whose a request is."""
    max_body: Bytes = 8 * 2**20
    max_n: int = Field(default=16, ge=1)
    max_logprobs: int = Field(default=20, ge=0, le=1000)

    @model_validator(mode="after")
    def _keys_differ(self) -> ApiSpec:
        places = dict.fromkeys(self.keys, "keys")
        for tenant, keys in self.tenants.items():
            for key in keys:
                if places.setdefault(key, here := f"tenants.{tenant}") != here:
                    raise ValueError(f"{here}: a key that is in {places[key]} as well")
        return self


class TimeoutSpec(SpecModel):
    """Seconds."""

    start: float = Field(default=300.0, gt=0)
    request: float = Field(default=600.0, gt=0)
    heartbeat: float = Field(default=10.0, gt=0)
    """A process not heard of for so long is ended."""
    collective: float = Field(default=60.0, gt=0)
    """Ranks of a replica wait for each other so long in a step; then the replica ends."""
    takeover: float = Field(default=120.0, gt=0)
    """A request whose decode replica is lost waits so long for one that goes on with it."""
    drain: float = Field(default=120.0, gt=0)
    """What a replica that is to go still has after so long goes on elsewhere without its pages."""
    controller: float = Field(default=300.0, gt=0)
    """Processes end by themselves when no controller has asked for them for so long; until then a
    new `pd serve` adopts them."""
    stop: float = Field(default=10.0, gt=0)


class ObjectivesSpec(SpecModel):
    """Seconds, in the mean; None: no objective."""

    ttft: float | None = Field(default=None, gt=0)
    """From a request's arrival to its first token."""
    tpot: float | None = Field(default=None, gt=0)
    """From each further token to the next."""


class PlannerSpec(SpecModel):
    """How many replicas of each role there are, between `replicas.min` and `replicas.max`. Load is
    measured in what a replica can do at most, objectives included."""

    interval: float = Field(default=1.0, gt=0)
    """Seconds between two looks at the load."""
    up: float = Field(default=0.8, gt=0, le=1)
    """Replicas are added while each has more load than this..."""
    up_after: float = Field(default=5.0, ge=0)
    """... for so many seconds,"""
    down: float = Field(default=0.6, gt=0)
    """and taken away, a quarter of them at most, if the rest would have less than this..."""
    down_after: float = Field(default=120.0, ge=0)
    """... for so many seconds, and so many after the last change."""
    max_replicas: int | None = Field(default=None, ge=1)
    """Of all roles together; where more are wanted, roles take replicas from each other."""

    @model_validator(mode="after")
    def _apart(self) -> PlannerSpec:
        if self.down >= self.up:
            raise ValueError(f"expected down ({self.down:g}) below up ({self.up:g})")
        return self


class ClusterSpec(SpecModel):
    name: Name = "pagerelay"
    """Names the Ray namespace; two clusters of one name on one Ray cluster are refused."""
    model: ModelSpec
    page_tokens: int = Field(default=64, ge=1, le=1024)
    roles: RolesSpec
    transfer: TransferSpec = TransferSpec()
    cache: CacheSpec = CacheSpec()
    router: RouterSpec = RouterSpec()
    api: ApiSpec = ApiSpec()
    objectives: ObjectivesSpec = ObjectivesSpec()
    planner: PlannerSpec = PlannerSpec()
    timeouts: TimeoutSpec = TimeoutSpec()
    network: Literal["auto", "ipc", "tcp"] = "auto"
    """Between processes: auto is ipc while Ray has one node and the spec wants no other (by labels,
    or by numbers of replicas that may grow), else tcp with CURVE keys."""

    @model_validator(mode="after")
    def _least_fits(self) -> ClusterSpec:
        least = sum(role.replicas.min for _, role in self.roles.items())
        most = self.planner.max_replicas
        if most is not None and least > most:
            raise ValueError(
                f"planner.max_replicas: found {most}, expected at least {least}, the sum of all "
                "replicas.min"
            )
        return self


# ------------------------------------------------------------------------------------------ reading


def load_spec(path: Path) -> ClusterSpec:
    """Read a spec file; relative `model.path` and `model.chat_template` become absolute.

    Raises SpecError, also when the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error
    spec = parse_spec(text, str(path))
    folder = path.resolve().parent
    model = spec.model.model_copy(
        update={
            "path": _resolve_model_path(spec.model.path, folder),
            "chat_template": _resolve(spec.model.chat_template, folder),
        }
    )
    return spec.model_copy(update={"model": model})


def parse_spec(text: str, source: str) -> ClusterSpec:
    """Read a spec; `source` stands before the line number in errors. Paths are left as they are."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            raise SpecError(f"{source}: empty; expected a mapping with model and roles")
        lines: dict[tuple[Any, ...], int] = {}
        problems = list(_walk(root, (), lines, set()))
        if problems:
            raise SpecError("\n".join(f"{source}:{line}: {text}" for line, text in problems))
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{mark.line + 1}:{mark.column + 1}" if mark else "?"
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise SpecError(f"{source}:{place}: not YAML: {what}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"{source}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise SpecError(f"{source}:1: found {_show(data)}, expected a mapping with model and roles")
    try:
        return ClusterSpec.model_validate(_interpolate(data))
    except pydantic.ValidationError as error:
        found = [_describe(problem, lines) for problem in error.errors(include_url=False)]
    except _EnvironmentError as error:
        found = [(lines.get(error.loc, 1), f"{_join(error.loc)}: {error}")]
    raise SpecError("\n".join(f"{source}:{line}: {problem}" for line, problem in sorted(found)))


def _walk(
    node: yaml.Node, loc: tuple[Any, ...], lines: dict[tuple[Any, ...], int], open_nodes: set[int]
) -> Iterator[tuple[int, str]]:
    """Note every key's line in `lines`; yield (line, problem) for duplicate keys and cycles."""
    line = node.start_mark.line + 1
    lines.setdefault(loc, line)
    if id(node) in open_nodes:
        yield line, f"{_join(loc)}: expected a value, found an alias of something that contains it"
        return
    open_nodes.add(id(node))
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            key_line = key.start_mark.line + 1
            name = key.value if isinstance(key, yaml.ScalarNode) else "?"
            here = (*loc, name)
            if name in first and name != "<<":
                yield key_line, f"{_join(here)}: duplicate key, first given on line {first[name]}"
            first.setdefault(name, key_line)
            lines[here] = key_line
            yield from _walk(value, here, lines, open_nodes)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _walk(item, (*loc, index), lines, open_nodes)
    open_nodes.remove(id(node))


class _EnvironmentError(Exception):
    def __init__(self, loc: tuple[Any, ...], message: str) -> None:
        super().__init__(message)
        self.loc = loc


def _interpolate(data: dict[str, Any]) -> dict[str, Any]:
    """A copy of `data` with `${NAME}` in api.keys and api.tenants replaced."""
    api = data.get("api")
    if not isinstance(api, dict):
        return data
    api = dict(api)
    api["keys"] = _from_environment(("api", "keys"), api.get("keys", []))
    if isinstance(tenants := api.get("tenants"), dict):
        api["tenants"] = {
            tenant: _from_environment(("api", "tenants", tenant), keys)
            for tenant, keys in tenants.items()
        }
    return {**data, "api": api}


def _from_environment(loc: tuple[Any, ...], keys: Any) -> Any:
    if not isinstance(keys, list):
        return keys

    def replace(index: int, value: Any) -> Any:
        def lookup(match: re.Match[str]) -> str:
            name = match[1]
            if not os.environ.get(name):
                raise _EnvironmentError(
                    (*loc, index),
                    f"found ${{{name}}}, expected the environment variable {name} to be set",
                )
            return os.environ[name]

        return re.sub(r"\$\{(\w+)\}", lookup, value) if isinstance(value, str) else value

    return [replace(i, key) for i, key in enumerate(keys)]


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a string (put it in quotes)",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "tuple_type": "a list",
    "greater_than": "a value above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "a value below {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_too_short": "at least {min_length} character",
    "invalid_key": "a key that is a string",
}


def _describe(problem: Any, lines: dict[tuple[Any, ...], int]) -> tuple[int, str]:
    """(line, text) of one of pydantic's errors."""
    loc: tuple[Any, ...] = problem["loc"]
    if problem["type"] == "invalid_key":
        loc = (*loc[:-1], str(loc[-1]))
    if loc and loc[-1] == "[key]":  # of a mapping: the key itself is at fault
        loc = loc[:-1]
    known = loc
    while known not in lines:
        known = known[:-1]
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "missing":
        text = "missing"
        if (field := _fields(loc[:-1]).get(str(loc[-1]))) and (
            model := _model_of(field.annotation)
        ):
            text += f"; expected a mapping with {', '.join(model.model_fields)}"
    elif kind == "extra_forbidden":
        text = f"unknown key{_suggestion(loc)}"
    elif kind == "value_error":
        text = str(context["error"])
        if not loc:
            return lines.get(_split(text.split(":")[0]), 1), text
        if not isinstance(value, dict | BaseModel):
            text = f"found {_show(value)}, {text}"
    else:
        expected = _EXPECTED.get(kind)
        text = f"expected {expected.format(**context)}" if expected else problem["msg"]
        text = f"found {_show(value)}, {text}"
    return lines[known], f"{_join(loc)}: {text}"


def _suggestion(loc: tuple[Any, ...]) -> str:
    """What the writer of an unknown key may have meant."""
    siblings, key = list(_fields(loc[:-1])), str(loc[-1])
    if close := difflib.get_close_matches(key, siblings, n=1):
        return f"; did you mean {close[0]}?"
    if places := [place for place in _all_keys(ClusterSpec) if place[-1] == key]:
        nearest = max(places, key=lambda place: place[:2] == loc[:2])
        return f"; did you mean {_join(nearest)}?"
    return f"; expected one of {', '.join(siblings)}" if siblings else ""


def _all_keys(model: type[BaseModel], loc: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        yield (*loc, name)
        if inner := _model_of(field.annotation):
            yield from _all_keys(inner, (*loc, name))


def _fields(loc: tuple[Any, ...]) -> dict[str, Any]:
    """Fields of the mapping at `loc`; empty where it has none of its own."""
    model: type[BaseModel] | None = ClusterSpec
    for part in loc:
        field = model.model_fields.get(str(part)) if model else None
        model = _model_of(field.annotation) if field else None
    return dict(model.model_fields) if model else {}


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_model_of(part) for part in typing.get_args(annotation))
    return next((model for model in inner if model), None)


def _join(loc: tuple[Any, ...]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return text.removeprefix(".") or "spec"


def _split(path: str) -> tuple[str, ...]:
    return tuple(path.split("."))


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60
_repr.maxlevel = 2


def _show(value: Any) -> str:
    return "nothing" if value is None else _repr.repr(value)


def _resolve(path: str, folder: Path) -> str:
    return str((folder / Path(path).expanduser()).resolve()) if path else ""


def _resolve_model_path(path: str, folder: Path) -> str:
    """Resolve what is a path, by its look or because it is there; other names stay."""
    if path.startswith("package:"):
        return path
    looks_like_path = path.startswith((".", "/", "~")) or path.endswith(".gguf")
    return _resolve(path, folder) if looks_like_path or (folder / path).exists() else path

"""Every bad spec stops with the key's path, the value found and what was expected."""

from __future__ import annotations

from pathlib import Path

import pytest

from hicache.policy import order_names
from pd.spec import ClusterSpec, SpecError, load_spec, parse_bytes, parse_spec

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*.yaml"))

GOOD = """
model: {path: org/model}
roles:
  prefill: {replicas: 2}
  decode: {replicas: {min: 1, max: 3}}
"""


def spec(roles: str = "{both: {}}", model: str = "{path: org/model}", more: str = "") -> str:
    return f"model: {model}\nroles: {roles}\n{more}"


# Name: (text, one (key path, fragments of its message) per problem, in the order of the lines).
BAD: dict[str, tuple[str, list[tuple[str, ...]]]] = {
    "empty": ("", [("", "empty", "expected a mapping with model and roles")]),
    "only a comment": ("# nothing\n", [("", "empty")]),
    "a list": ("[1, 2]", [("", "found [1, 2]", "expected a mapping")]),
    "a string": ("hello", [("", "found 'hello'", "expected a mapping")]),
    "syntax": ("model: {path: a\nroles: 3", [("", "2:6", "not YAML")]),
    "tab": ("model:\n\tpath: a", [("", "2:1", "not YAML", "'\\t'")]),
    "python tag": ("model: !!python/object:os.system x", [("", "1:8", "not YAML", "tag")]),
    "control character": ("a: \x00", [("", "not YAML", "#x0000")]),
    "impossible date": ("a: 2020-13-45", [("", "not YAML", "month")]),
    "duplicate key": (
        spec(more="model: {path: b}"),
        [("model", "duplicate key", "first given on line 1")],
    ),
    "nested duplicate key": (
        spec("\n  both:\n    threads: 1\n    threads: 2"),
        [("roles.both.threads", ":5:", "duplicate key", "line 4")],
    ),
    "alias of its own parent": ("a: &x [*x]", [("a[0]", "alias")]),
    "key is not a string": (spec(more="1: 2"), [("1", ":3:", "found 1", "a string")]),
    "no model": ("roles: {both: {}}", [("model", "missing", "path")]),
    "no roles": ("model: {path: a}", [("roles", "missing", "prefill, decode, both")]),
    "no path": (spec(model="{name: a}"), [("model.path", "missing")]),
    "empty path": (spec(model="{path: ''}"), [("model.path", "found ''", "at least 1 character")]),
    "model is a string": (spec(model="org/model"), [("model", "found 'org/model'", "a mapping")]),
    "path is a number": (spec(model="{path: 3}"), [("model.path", "found 3", "a string")]),
    "dtype": (
        spec(model="{path: a, dtype: fp8}"),
        [("model.dtype", "found 'fp8'", "'float32', 'bfloat16' or 'float16'")],
    ),
    "context of 0": (
        spec(model="{path: a, max_context: 0}"),
        [("model.max_context", "found 0", "at least 1")],
    ),
    "misspelt top key": (spec(more="netwrk: tcp"), [("netwrk", "unknown", "mean network?")]),
    "misspelt nested key": (
        spec("{both: {replcas: 1}}"),
        [("roles.both.replcas", "unknown", "mean replicas?")],
    ),
    "misspelt model key": (
        spec(model="{path: a, dtipe: float32}"),
        [("model.dtipe", "unknown", "mean dtype?")],
    ),
    "key in the wrong place": (
        spec("{both: {pages: 100}}"),
        [("roles.both.pages", "unknown", "mean roles.both.pool.pages?")],
    ),
    "unknown key like no other": (
        spec(more="api: {zzz: 1}"),
        [("api.zzz", "unknown", "expected one of host, port")],
    ),
    "unknown role": (spec("{both: {}, encode: {}}"), [("roles.encode", "unknown", "mean decode?")]),
    "no role": (spec("{}"), [("roles", "expected prefill and decode, or both")]),
    "role without a value": (spec("{both: }"), [("roles", "expected prefill and decode, or both")]),
    "prefill alone": (spec("{prefill: {}}"), [("roles", "prefill alone", "expected decode")]),
    "decode alone": (spec("{decode: {}}"), [("roles", "decode alone", "expected prefill")]),
    "replicas in words": (
        spec("{both: {replicas: two}}"),
        [("roles.both.replicas", "found 'two'", "a whole number, or a mapping of min and max")],
    ),
    "half a replica": (
        spec("{both: {replicas: 1.5}}"),
        [("roles.both.replicas", "found 1.5", "a whole number")],
    ),
    "replicas.min in words": (
        spec("{both: {replicas: {min: one, max: 2}}}"),
        [("roles.both.replicas.min", "found 'one'", "a whole number")],
    ),
    "replicas without max": (
        spec("{both: {replicas: {min: 1}}}"),
        [("roles.both.replicas.max", "missing")],
    ),
    "replicas in the wrong order": (
        spec("{both: {replicas: {min: 3, max: 2}}}"),
        [("roles.both.replicas", "min (3)", "max (2)")],
    ),
    "negative replicas": (
        spec("{both: {replicas: {min: -1, max: 2}}}"),
        [("roles.both.replicas.min", "found -1", "at least 0")],
    ),
    "tp is true": (
        spec("{both: {topology: {tp: true}}}"),
        [("roles.both.topology.tp", "found True", "a whole number")],
    ),
    "device": (
        spec("{both: {device: tpu}}"),
        [("roles.both.device", "found 'tpu'", "'cpu' or 'cuda'")],
    ),
    "cuda without a GPU": (
        spec("{both: {device: cuda, resources: {GPU: 0}}}"),
        [("roles.both", "resources.GPU above 0")],
    ),
    "resource in quotes": (
        spec("{both: {resources: {CPU: '1'}}}"),
        [("roles.both.resources.CPU", "found '1'", "a number")],
    ),
    "negative resource": (
        spec("{both: {resources: {CPU: -1}}}"),
        [("roles.both.resources.CPU", "found -1", "at least 0")],
    ),
    "label is a number": (
        spec("{both: {labels: {zone: 3}}}"),
        [("roles.both.labels.zone", "found 3", "a string", "quotes")],
    ),
    "pool of two sizes": (
        spec("{both: {pool: {pages: 10, memory: 1GiB}}}"),
        [("roles.both.pool", "one of pages, memory, memory_fraction", "pages and memory")],
    ),
    "pool of no size": (spec("{both: {pool: {}}}"), [("roles.both.pool", "got none")]),
    "pool is a number": (
        spec("{both: {pool: 10}}"),
        [("roles.both.pool", "found 10", "a mapping")],
    ),
    "one page": (
        spec("{both: {pool: {pages: 1}}}"),
        [("roles.both.pool.pages", "found 1", "at least 2")],
    ),
    "size without a unit": (
        spec("{both: {pool: {memory: 1 lot}}}"),
        [("roles.both.pool.memory", "found '1 lot'", "512MiB")],
    ),
    "all the memory": (
        spec("{both: {pool: {memory_fraction: 1.0}}}"),
        [("roles.both.pool.memory_fraction", "found 1.0", "at most 0.95")],
    ),
    "no memory": (
        spec("{both: {pool: {memory_fraction: 0}}}"),
        [("roles.both.pool.memory_fraction", "found 0", "above 0")],
    ),
    "tokens as a float": (
        spec("{both: {max_batch_tokens: 512.0}}"),
        [("roles.both.max_batch_tokens", "found 512.0", "a whole number")],
    ),
    "running as text": (
        spec("{both: {max_running: 1e3}}"),
        [("roles.both.max_running", "found '1e3'", "a whole number")],
    ),
    "too many running": (
        spec("{both: {max_running: 5000}}"),
        [("roles.both.max_running", "found 5000", "at most 4096")],
    ),
    "page of 0 tokens": (spec(more="page_tokens: 0"), [("page_tokens", "found 0", "at least 1")]),
    "name": (spec(more="name: My_Cluster"), [("name", "found 'My_Cluster'", "text that matches")]),
    "transfer": (
        spec(more="transfer: {backend: rdma}"),
        [("transfer.backend", "found 'rdma'", "nixl, mooncake, shm, ipc, loopback")],
    ),
    "transfer option": (
        spec(more="transfer: {options: {threads: 4}}"),
        [("transfer.options.threads", "found 4", "a string")],
    ),
    "cache": (
        spec(more="cache: {device: 'yes'}"),
        [("cache.device", "found 'yes'", "true or false")],
    ),
    "eviction order": (
        spec(more="cache: {eviction: fifo}"),
        [("cache.eviction", "found 'fifo'", "lru, lfu, slru, s3fifo, cost")],
    ),
    "storage backend": (
        spec(more="cache: {host: {memory: 64MiB}, storage: {backend: tape}}"),
        [("cache.storage.backend", "found 'tape'", "file, mooncake, nixl, memory")],
    ),
    "storage without host": (
        spec(more="cache: {storage: {backend: file}}"),
        [("cache", "storage: expected host beside it")],
    ),
    "host without device": (
        spec(more="cache: {device: false, host: {memory: 64MiB}}"),
        [("cache", "host: expected device to be true")],
    ),
    "host memory": (
        spec(more="cache: {host: {memory: plenty}}"),
        [("cache.host.memory", "found 'plenty'", "512MiB")],
    ),
    "host of no size": (spec(more="cache: {host: {}}"), [("cache.host.memory", "missing")]),
    "write policy": (
        spec(more="cache: {host: {memory: 1GiB, write: later}}"),
        [("cache.host.write", "found 'later'", "'write_through'", "'write_back'")],
    ),
    "quotas that are none": (
        spec(
            more="cache:\n  host:\n    memory: 1GiB\n    quotas:\n      a: 1.0\n      b: -1\n"
            "      c: true\n      d: 25%"
        ),
        [
            ("cache.host.quotas.a", ":7:", "found 1.0", "pages, or a share of the host tier"),
            ("cache.host.quotas.b", ":8:", "found -1", "a whole number of pages"),
            ("cache.host.quotas.c", ":9:", "found True"),
            ("cache.host.quotas.d", ":10:", "found '25%'"),
        ],
    ),
    "quota of no tenant": (
        spec(more="cache: {host: {memory: 1GiB, quotas: {'a b': 5}}}"),
        [("cache.host.quotas.a b", "found 'a b'", "expected '*' or a tenant, up to 128 of A-Z")],
    ),
    "keys of no tenant": (
        spec(more="api: {tenants: {'*': [a]}}"),
        [("api.tenants.*", "found '*'", "expected a tenant, up to 128")],
    ),
    "a tenant's key in no list": (
        spec(more="api: {tenants: {a: secret}}"),
        [("api.tenants.a", "found 'secret'", "a list")],
    ),
    "a key of two tenants": (
        spec(more="api: {tenants: {a: [secret], b: [secret]}}"),
        [("api", "tenants.b: a key that is in tenants.a as well")],
    ),
    "a default that is no class": (
        spec(more="router: {priorities: {a: {}, b: {}}, default_priority: c}"),
        [("router", "default_priority: found 'c', expected one of a, b")],
    ),
    "a share of more than all": (
        spec(more="router: {priorities: {a: {share: 1.5}}}"),
        [("router.priorities.a.share", "found 1.5", "at most 1")],
    ),
    "a class's name": (
        spec(more="router: {priorities: {A: {}}}"),
        [("router.priorities.A", "found 'A'", "text that matches")],
    ),
    "a tenant's key not in the environment": (
        spec(more="api:\n  tenants:\n    a:\n      - ${PAGERELAY_TEST_NO_SUCH}"),
        [("api.tenants.a[0]", ":6:", "PAGERELAY_TEST_NO_SUCH", "to be set")],
    ),
    "events at a path": (
        spec(more="cache: {events: {publish: /tmp/events}}"),
        [("cache.events.publish", "found '/tmp/events'", "tcp://HOST:PORT")],
    ),
    "events at no port": (
        spec(more="cache: {events: {publish: 'tcp://127.0.0.1:70000'}}"),
        [("cache.events.publish", "tcp://HOST:PORT")],
    ),
    "replay without events": (
        spec(more="cache: {events: {replay: 'tcp://*:0'}}"),
        [("cache.events", "replay: expected publish beside it")],
    ),
    "events without device": (
        spec(more="cache: {device: false, events: {publish: 'tcp://*:0'}}"),
        [("cache", "events: expected device to be true")],
    ),
    "events of no buffer": (
        spec(more="cache: {events: {buffer: 0}}"),
        [("cache.events.buffer", "found 0", "at least 1")],
    ),
    "port": (spec(more="api: {port: 70000}"), [("api.port", "found 70000", "at most 65535")]),
    "keys as text": (spec(more="api: {keys: secret}"), [("api.keys", "found 'secret'", "a list")]),
    "key is a number": (spec(more="api: {keys: [a, 3]}"), [("api.keys[1]", "found 3", "a string")]),
    "key not in the environment": (
        spec(more="api:\n  keys:\n    - ${PAGERELAY_TEST_NO_SUCH}"),
        [("api.keys[0]", ":5:", "PAGERELAY_TEST_NO_SUCH", "to be set")],
    ),
    "too many API processes": (
        spec(more="api: {replicas: 65}"),
        [("api.replicas", "found 65", "at most 64")],
    ),
    "objectives": (
        spec(more="objectives:\n  ttft: 0\n  tpot: 20ms"),
        [
            ("objectives.ttft", ":4:", "found 0", "above 0"),
            ("objectives.tpot", ":5:", "found '20ms'", "a number"),
        ],
    ),
    "misspelt objective": (
        spec(more="objectives: {tfft: 1}"),
        [("objectives.tfft", "unknown", "mean ttft?")],
    ),
    "planner": (
        spec(more="planner: {interval: 0, up: 1.5, down_after: soon, max_replicas: 0}"),
        [
            ("planner.down_after", "found 'soon'", "a number"),
            ("planner.interval", "found 0", "above 0"),
            ("planner.max_replicas", "found 0", "at least 1"),
            ("planner.up", "found 1.5", "at most 1"),
        ],
    ),
    "planner without hysteresis": (
        spec(more="planner:\n  up: 0.5\n  down: 0.5"),
        [("planner", ":3:", "expected down (0.5) below up (0.5)")],
    ),
    "fewer replicas than there must be": (
        spec("{both: {replicas: 3}}", more="planner:\n  max_replicas: 2"),
        [("planner.max_replicas", ":4:", "found 2", "at least 3, the sum of all replicas.min")],
    ),
    "timeout in quotes": (
        spec(more="timeouts: {start: '30'}"),
        [("timeouts.start", "found '30'", "a number")],
    ),
    "timeout of 0": (spec(more="timeouts: {stop: 0}"), [("timeouts.stop", "found 0", "above 0")]),
    "endless timeout": (
        spec(more="timeouts: {request: .inf}"),
        [("timeouts.request", "found inf", "a finite number")],
    ),
    "network": (
        spec(more="network: udp"),
        [("network", "found 'udp'", "'auto', 'ipc' or 'tcp'")],
    ),
    "several problems": (
        spec("\n  both:\n    threads: many\n    device: tpu", more="nme: x"),
        [
            ("roles.both.threads", ":4:", "found 'many'"),
            ("roles.both.device", ":5:", "found 'tpu'"),
            ("nme", ":6:", "mean name?"),
        ],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_spec(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAGERELAY_TEST_NO_SUCH", raising=False)
    text, problems = BAD[name]
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "cluster.yaml")
    lines = str(caught.value).split("\n")
    assert len(lines) == len(problems), lines
    for line, (key, *fragments) in zip(lines, problems, strict=True):
        assert line.startswith("cluster.yaml:")
        if key:
            assert f": {key}: " in line
        for fragment in fragments:
            assert fragment in line


def test_there_are_thirty_bad_specs() -> None:
    assert len(BAD) >= 30


def test_good_spec() -> None:
    result = parse_spec(GOOD, "cluster.yaml")
    assert result.roles.prefill is not None
    assert result.roles.decode is not None
    assert (result.roles.prefill.replicas.min, result.roles.prefill.replicas.max) == (2, 2)
    assert (result.roles.decode.replicas.min, result.roles.decode.replicas.max) == (1, 3)
    assert [role for role, _ in result.roles.items()] == ["prefill", "decode"]


def test_cache_tiers() -> None:
    assert parse_spec(spec(), "x").cache.host is None
    host = "host: {memory: '64MiB', write: write_back}"
    storage = "storage: {backend: file, options: {path: /kv}}"
    events = "events: {publish: 'tcp://[::1]:*', replay: 'tcp://*:5558', topic: kv}"
    cache = parse_spec(spec(more=f"cache: {{{host}, {storage}, {events}}}"), "x").cache
    assert cache.host is not None
    assert cache.host.memory == 64 << 20
    assert cache.storage is not None
    assert cache.storage.prefetch == "timeout"
    assert (cache.events.publish, cache.events.buffer) == ("tcp://[::1]:*", 10_000)
    for order in order_names():
        text = spec(more=f"cache: {{eviction: {order}}}")
        assert parse_spec(text, "x").cache.eviction == order


def test_objectives_and_planner() -> None:
    default = parse_spec(spec(), "x")
    assert (default.objectives.ttft, default.objectives.tpot) == (None, None)
    assert default.planner.max_replicas is None
    more = "objectives: {ttft: 1, tpot: 0.05}\nplanner: {up: 0.7, down: 0.6, max_replicas: 8}"
    given = parse_spec(spec(more=more), "x")
    assert (given.objectives.ttft, given.objectives.tpot) == (1.0, 0.05)
    assert (given.planner.up, given.planner.down, given.planner.max_replicas) == (0.7, 0.6, 8)


def test_classes_and_their_shares() -> None:
    router = parse_spec(spec(), "x").router
    assert [(each.slack, each.share) for each in router.classes()] == [(1.0, 1.0)]
    classes = "{interactive: {}, batch: {slack: 10}, night: {slack: null, share: 0.1}}"
    more = f"router: {{priorities: {classes}, default_priority: batch}}"
    router = parse_spec(spec(more=more), "x").router
    assert [*router.priorities] == ["interactive", "batch", "night"]
    assert router.default_priority == "batch"
    found = [(each.slack, each.share) for each in router.classes()]
    assert found == [(1.0, 1.0), (10.0, pytest.approx(2 / 3)), (None, 0.1)]


def test_tenants_and_quotas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGERELAY_TEST_KEY", "s3cret")
    tenants = "api: {tenants: {a: ['${PAGERELAY_TEST_KEY}', two], b: [three]}}"
    host = "cache: {host: {memory: 1GiB, quotas: {a: 0.25, b: 7, '*': 0}}}"
    result = parse_spec(spec(more=f"{tenants}\n{host}"), "x")
    assert result.api.tenants == {"a": ("s3cret", "two"), "b": ("three",)}
    assert result.cache.host is not None
    assert result.cache.host.quota_pages(99) == {"a": 24, "b": 7, "*": 0}


def test_whole_numbers_are_numbers() -> None:
    text = spec("{both: {resources: {CPU: 2}}}", more="timeouts: {start: 30}")
    result = parse_spec(text, "cluster.yaml")
    assert result.timeouts.start == 30.0
    assert result.roles.both is not None
    assert result.roles.both.rank_resources() == {"CPU": 2.0}


def test_keys_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGERELAY_TEST_KEY", "s3cret")
    text = spec(more="api: {keys: ['${PAGERELAY_TEST_KEY}', plain, 'a-${PAGERELAY_TEST_KEY}']}")
    assert parse_spec(text, "cluster.yaml").api.keys == ("s3cret", "plain", "a-s3cret")


def test_anchors_and_merges_are_allowed() -> None:
    text = spec(
        "\n  prefill: &role {threads: 2, max_running: 8}\n  decode: {<<: *role, max_running: 16}"
    )
    result = parse_spec(text, "cluster.yaml")
    assert result.roles.decode is not None
    assert (result.roles.decode.threads, result.roles.decode.max_running) == (2, 16)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1", 1), ("2KiB", 2048), ("1.5 GB", 1_500_000_000), ("512MiB", 2**29), ("3t", 3 * 10**12)],
)
def test_parse_bytes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"missing\.yaml: no such file"):
        load_spec(tmp_path / "missing.yaml")


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec(tmp_path)


def test_not_text(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("./weights", "{folder}/weights"),
        ("../weights", "{parent}/weights"),
        ("here", "{folder}/here"),
        ("model.gguf", "{folder}/model.gguf"),
        ("/data/weights", "/data/weights"),
        ("org/model", "org/model"),
        ("package:some_model", "package:some_model"),
    ],
)
def test_paths_are_relative_to_the_file(tmp_path: Path, path: str, expected: str) -> None:
    (tmp_path / "here").mkdir()
    file = tmp_path / "cluster.yaml"
    file.write_text(spec(model=f"{{path: {path}, chat_template: chat.jinja}}"))
    result = load_spec(file)
    assert result.model.path == expected.format(folder=tmp_path, parent=tmp_path.parent)
    assert result.model.chat_template == str(tmp_path / "chat.jinja")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGERELAY_API_KEY", "key")
    assert isinstance(load_spec(path), ClusterSpec)


def test_there_are_examples() -> None:
    names = {path.stem for path in EXAMPLES}
    assert names >= {"local", "one-host-two-gpus", "several-nodes", "colocated"}

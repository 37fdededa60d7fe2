"""The caches' endpoints: keepers behind the client that answer, refuse, are silent or go away."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from pd.api.caches import Caches
from pd.messages import CacheAnswer, CacheCommand, Heartbeat, ReplicaLoad, RequestStats

CACHE = {"host": {"memory": "64MiB"}}
FIGURES = {
    "found_pages": 5.0,
    "evicted_pages": 3.0,
    "open_exchanges": 1.0,
    "group_0_free_pages": 7.0,
    "group_0_cached_pages": 2.0,
    "group_0_used_pages": 1.0,
    "group_0_page_bytes": 4096.0,
    "storage_bytes_written": 99.0,
    "storage_corrupt_objects": 4.0,
    "storage_breaker_open": 1.0,
    "tenant_pages:team-a": 6.0,
    "tenant_quota:team-a": 8.0,
}


@dataclasses.dataclass
class Keepers:
    """Stand-ins: each answers with its name, or as `refuses` says; those in `silent` never do."""

    caches: Caches = None  # type: ignore[assignment]
    refuses: dict[str, str] = dataclasses.field(default_factory=dict)
    silent: set[str] = dataclasses.field(default_factory=set)
    received: list[tuple[str, CacheCommand]] = dataclasses.field(default_factory=list)

    def send(self, name: str, message: Any) -> None:
        assert isinstance(message, CacheCommand)
        self.received.append((name, message))
        if name not in self.silent:
            report = json.dumps({"name": name, "did": message.action}).encode()
            answer = CacheAnswer(message.serial, self.refuses.get(name, ""), report)
            asyncio.get_running_loop().call_soon(self.caches.answered, name, answer)


@pytest.fixture
def cluster(serve: Callable[..., Any]) -> Iterator[tuple[Any, Keepers]]:
    """A server whose client has two keepers."""
    api = serve(cache=CACHE)
    keepers = Keepers(caches=api.client.caches)
    send = api.client.caches._send

    def both(name: str, message: Any) -> None:
        (keepers.send if name.startswith("cache-") else send)(name, message)

    def join() -> None:
        api.client.caches._send = both
        for name in ("cache-0", "cache-1"):
            api.client.caches.keeper_up(name)

    api.on_loop(join)
    yield api, keepers
    assert api.on_loop(lambda: api.client.caches._pending) == {}


def delete(api: Any, path: str, **options: Any) -> Any:
    import requests

    return requests.delete(api.url + path, timeout=20, **options)


def test_reports(cluster: tuple[Any, Keepers]) -> None:
    api, _ = cluster
    load = ReplicaLoad(pages_free=(3,), pages_cached=(2,), pages_used=(1,), host_pages_in=8)
    api.on_loop(lambda: api.client.on_message("prefill-0", Heartbeat(load)))
    answer = api.get("/cache").json()
    assert [each["name"] for each in answer["keepers"]] == ["cache-0", "cache-1"]
    (prefill,) = (each for each in answer["replicas"] if each["role"] == "prefill")
    assert prefill["pages"] == [{"group": 0, "free": 3, "cached": 2, "used": 1}]
    assert prefill["host_pages_in"] == 8
    one = api.get("/cache?keeper=cache-1").json()
    assert [each["name"] for each in one["keepers"]] == ["cache-1"]


def test_commands(cluster: tuple[Any, Keepers]) -> None:
    api, keepers = cluster
    options = {"path": "/kv", "limit": "1GiB"}
    answers = [
        api.post("/cache/clear", {"tenant": "me"}),
        api.post("/cache/clear", {}),
        api.post("/cache/storage?keeper=cache-0", {"backend": "file", "options": options}),
        delete(api, "/cache/storage"),
        api.post("/cache/storage/clear", None),
    ]
    assert [answer.status_code for answer in answers] == [200] * 5
    assert answers[2].json() == {"keepers": [{"name": "cache-0", "did": "attach"}]}
    asked = [(c.action, c.tenant, c.backend, c.options) for _, c in keepers.received]
    assert asked == [
        *[("clear", "me", "", {})] * 2,
        *[("clear", "", "", {})] * 2,
        ("attach", "", "file", options),
        *[("detach", "", "", {})] * 2,
        *[("clear_storage", "", "", {})] * 2,
    ]
    serials = [command.serial for _, command in keepers.received]
    assert len(set(serials)) == len(serials)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/cache/clear", {"tenant": 3}, "tenant"),
        ("/cache/clear", {"tenants": "x"}, "tenants"),
        ("/cache/storage", {}, "backend"),
        ("/cache/storage", {"backend": "tape"}, "backend"),
        ("/cache/storage", {"backend": "file", "options": {"limit": 5}}, "options.limit"),
    ],
)
def test_bad_input_names_the_field(
    cluster: tuple[Any, Keepers], path: str, body: Any, param: str
) -> None:
    api, keepers = cluster
    answer = api.post(path, body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] is not None
    assert param.startswith(error["param"])
    assert param in error["message"]
    assert keepers.received == []


def test_an_unknown_keeper(cluster: tuple[Any, Keepers]) -> None:
    api, _ = cluster
    answer = delete(api, "/cache/storage?keeper=cache-7")
    assert answer.status_code == 404
    assert (
        answer.json()["error"]["message"] == "keeper: found 'cache-7', there are cache-0, cache-1"
    )


def test_a_refusal_is_the_keepers_own(cluster: tuple[Any, Keepers]) -> None:
    api, keepers = cluster
    keepers.refuses["cache-1"] = "storage file: option limit: expected a size"
    answer = api.post("/cache/storage", {"backend": "file", "options": {"limit": "x"}})
    assert answer.status_code == 409
    message = "cache-1: storage file: option limit: expected a size"
    assert answer.json()["error"]["message"] == message


def test_no_host_tier(serve: Callable[..., Any]) -> None:
    api = serve()
    for answer in (
        api.get("/cache"),
        api.post("/cache/clear", {}),
        delete(api, "/cache/storage"),
    ):
        assert answer.status_code == 404
        assert "no cache.host" in answer.json()["error"]["message"]


def test_no_keeper_is_up(serve: Callable[..., Any]) -> None:
    api = serve(cache=CACHE)
    assert api.get("/cache").json()["keepers"] == []
    assert api.post("/cache/clear", {}).status_code == 503


def test_a_key_is_needed(serve: Callable[..., Any]) -> None:
    api = serve(cache=CACHE, api={"keys": ["secret"]})
    assert api.get("/cache").status_code == 401
    assert api.post("/cache/clear", {}).status_code == 401
    headers = {"Authorization": "Bearer secret"}
    assert api.get("/cache", headers=headers).status_code == 200


def test_a_keeper_that_goes_fails_its_commands_at_once(
    cluster: tuple[Any, Keepers], wait_until: Callable[..., None]
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    api, keepers = cluster
    keepers.silent.add("cache-1")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(api.post, "/cache/clear", {})
        wait_until(lambda: len(keepers.received) == 2)
        api.on_loop(lambda: api.client.caches.keeper_down("cache-1", "its node is gone"))
        answer = asked.result(5)
    assert answer.status_code == 503
    message = answer.json()["error"]["message"]
    assert message == "cache-1: it was lost: its node is gone"


def test_silence_ends_with_the_deadline_and_late_answers_count_for_nothing() -> None:
    async def scenario() -> None:
        keepers = Keepers(silent={"cache-1"})
        caches = keepers.caches = Caches(keepers.send)
        caches.keeper_up("cache-0")
        caches.keeper_up("cache-1")
        first, second = await caches.command("report", timeout_s=0.01)
        assert (first.error, first.report) == ("", {"name": "cache-0", "did": "report"})
        assert (second.error, second.is_refused) == ("no answer for 0.01 s", False)
        serial = keepers.received[1][1].serial
        assert not caches.answered("cache-1", CacheAnswer(serial, ""))

    asyncio.run(scenario())


def test_answers_that_nobody_waits_for() -> None:
    async def scenario() -> None:
        keepers = Keepers(silent={"cache-0"})
        caches = keepers.caches = Caches(keepers.send)
        caches.keeper_up("cache-0")
        asked = asyncio.ensure_future(caches.command("report"))
        await asyncio.wait([asked], timeout=0.01)
        serial = keepers.received[0][1].serial
        assert not caches.answered("cache-9", CacheAnswer(serial, "no"))
        assert caches.answered("cache-0", CacheAnswer(serial, "", b"not JSON"))
        assert not caches.answered("cache-0", CacheAnswer(serial, "again"))
        (answer,) = await asked
        assert answer.error
        assert not answer.is_refused

    asyncio.run(scenario())


def test_the_keepers_metrics(cluster: tuple[Any, Keepers]) -> None:
    api, _ = cluster
    api.on_loop(lambda: api.client.on_message("cache-0", Heartbeat(cache=FIGURES)))
    load = ReplicaLoad(host_pages_in=8, host_bytes_out=7, pages_evicted=6, fetching=5)
    api.on_loop(lambda: api.client.on_message("decode-0", Heartbeat(load)))
    lines = api.get("/metrics").text.splitlines()
    labels = 'replica="decode-0",role="decode"'
    for line in (
        'pagerelay_host_found_pages_total{keeper="cache-0"} 5.0',
        'pagerelay_host_evicted_pages_total{keeper="cache-0"} 3.0',
        'pagerelay_host_open_exchanges{keeper="cache-0"} 1.0',
        'pagerelay_host_pages{group="0",keeper="cache-0",state="free"} 7.0',
        'pagerelay_host_pages{group="0",keeper="cache-0",state="used"} 1.0',
        'pagerelay_host_page_bytes{group="0",keeper="cache-0"} 4096.0',
        'pagerelay_storage_written_bytes_total{keeper="cache-0"} 99.0',
        'pagerelay_storage_corrupt_objects_total{keeper="cache-0"} 4.0',
        'pagerelay_storage_breaker_open{keeper="cache-0"} 1.0',
        'pagerelay_host_tenant_pages{keeper="cache-0",tenant="team-a"} 6.0',
        'pagerelay_host_tenant_quota_pages{keeper="cache-0",tenant="team-a"} 8.0',
        f"pagerelay_from_host_pages_total{{{labels}}} 8.0",
        f"pagerelay_to_host_bytes_total{{{labels}}} 7.0",
        f"pagerelay_evicted_pages_total{{{labels}}} 6.0",
        f"pagerelay_fetching_requests{{{labels}}} 5.0",
    ):
        assert line in lines, line
    assert not any('keeper="cache-1"' in line for line in lines)
    api.on_loop(lambda: api.client.caches.keeper_down("cache-0", "over"))
    assert 'keeper="cache-0"' not in api.get("/metrics").text


def test_every_figure_of_a_keeper_that_is_a_metric_exists() -> None:
    from hicache.keeper import KeeperStats
    from hicache.storage_tier import StorageTierStats
    from pd.api.metrics import _KEEPER_COUNTERS, _KEEPER_GAUGES

    known = {field.name for field in dataclasses.fields(KeeperStats)}
    known |= {f"storage_{field.name}" for field in dataclasses.fields(StorageTierStats)}
    known |= {"evicted_pages", "open_exchanges", "storage_breaker_open"}
    known |= {"event_overruns", "events_asked_too_late"}
    assert {*_KEEPER_GAUGES, *_KEEPER_COUNTERS} <= known


def test_cached_tokens_by_tier(serve: Callable[..., Any]) -> None:
    api = serve()
    stats = RequestStats(
        cached_tokens_decode=4,
        cached_tokens_prefill=20,
        cached_tokens_host=12,
        cached_tokens_storage=5,
    )
    api.leaders._stats = lambda replica, generate: msgspec.structs.replace(stats)
    body = {"model": "tiny", "prompt": "hello world " * 6, "temperature": 0}
    usage = api.post("/v1/completions", body).json()["usage"]
    assert usage["prompt_tokens_details"] == {
        "cached_tokens": 20,
        "host_tokens": 7,
        "storage_tokens": 5,
    }
    text = api.get("/metrics").text
    for tier, tokens in (("device", 8), ("host", 7), ("storage", 5)):
        assert f'pagerelay_cached_tokens_by_tier_total{{tier="{tier}"}} {tokens}.0' in text

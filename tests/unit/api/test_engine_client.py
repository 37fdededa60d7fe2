"""Streams end exactly once, whatever the replicas do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest

from hicache.keys import page_hashes, root_hash
from pd.api.client import EngineClient, Failure, OutputStream, merge
from pd.messages import (
    Abort,
    Generate,
    Heartbeat,
    Output,
    Outputs,
    ReplicaLoad,
    SamplingParams,
    split_hashes,
    unpack_ints,
)
from pd.router import NoReplica, Overloaded, Router
from pd.spec import PrioritySpec

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13]
PARAMS = SamplingParams(max_tokens=5, temperature=0.0)
Make = Callable[..., EngineClient]


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(body, 20))


async def drain(stream: OutputStream) -> list[Output]:
    outputs = [output async for output in stream]
    assert [o.finish_reason is not None for o in outputs] == [False] * (len(outputs) - 1) + [True]
    assert stream.is_ended
    return outputs


async def two_tokens(stream: OutputStream, total: int = 2) -> None:
    while stream.num_tokens < total:  # noqa: ASYNC110 (nothing tells of a token that is not read)
        await asyncio.sleep(0)


def last_error(outputs: list[Output]) -> str:
    assert outputs[-1].finish_reason == "error"
    return outputs[-1].error


def test_a_request_is_sent_and_answered(engine_client: Make, leaders: Any) -> None:
    async def body() -> None:
        client = engine_client()
        outputs = await drain(client.submit(PROMPT, PARAMS, cache_salt="salt", timeout_s=30))
        (replica, generate), *_ = leaders.received
        assert (replica, generate.prefill) == ("decode-0", "prefill-0")
        assert unpack_ints(generate.prompt).tolist() == PROMPT
        root = root_hash("test model", "salt")
        assert generate.root == root
        assert split_hashes(generate.page_hashes) == page_hashes(PROMPT, 4, root)
        assert 0 < generate.timeout_s <= 30
        expected = leaders.tokens_for(generate)
        assert [t for o in outputs for t in o.token_ids] == expected
        assert outputs[-1].finish_reason == "length"
        assert outputs[-1].stats is not None
        client.check_integrity()

    run(body())


def test_what_was_not_read_is_merged(engine_client: Make, leaders: Any) -> None:
    async def body() -> None:
        client = engine_client()
        stream = client.submit(PROMPT, SamplingParams(max_tokens=5, temperature=0.0, logprobs=1))
        for _ in range(20):
            await asyncio.sleep(0)
        (output,) = await drain(stream)
        assert len(output.token_ids) == len(output.logprobs) == 5

    run(body())


def test_request_ids_do_not_repeat(engine_client: Make, leaders: Any) -> None:
    async def body() -> None:
        client = engine_client()
        for _ in range(20):
            client.submit(PROMPT, PARAMS).close()
        assert len({generate.request_id for generate in leaders.generates()}) == 20
        client.check_integrity()

    run(body())


def test_closing_aborts_on_the_decode_replica_once(engine_client: Make, leaders: Any) -> None:
    async def body() -> None:
        client = engine_client()
        leaders.mode = "stuck_after_two"
        stream = client.submit(PROMPT, PARAMS)
        await anext(stream)
        stream.close()
        stream.close()
        outputs = await drain(stream)
        assert outputs[-1].finish_reason == "abort"
        request_id = leaders.generates()[0].request_id
        aborts = [m for m in leaders.received if isinstance(m[1], Abort)]
        assert aborts == [("decode-0", Abort(request_id))]
        client.on_message("decode-0", Outputs((Output(request_id, (1,)),)))
        assert client.counters.late_outputs == 1
        assert client.router.in_flight == 0

    run(body())


def test_closing_a_finished_stream_sends_nothing(engine_client: Make, leaders: Any) -> None:
    async def body() -> None:
        stream = engine_client().submit(PROMPT, PARAMS)
        await drain(stream)
        stream.close()
        assert not leaders.aborted_ids()

    run(body())


def test_a_request_goes_on_where_its_decode_replica_left_it(
    engine_client: Make, leaders: Any
) -> None:
    """What was delivered is part of the prompt, and comes once."""

    async def body() -> None:
        client = engine_client()
        client.on_peer_up("decode-1", "decode", "test model")
        leaders.mode = "stuck_after_two"
        stream = client.submit(PROMPT, SamplingParams(max_tokens=5, temperature=0.0, min_tokens=4))
        await two_tokens(stream)
        first = list(stream.delivered)
        leaders.mode = "answer"
        assert stream.placement is not None
        lost = stream.placement.decode
        client.on_peer_down(lost, "killed")
        (_, one), (replica, two) = [m for m in leaders.received if isinstance(m[1], Generate)]
        assert {lost, replica} == {"decode-0", "decode-1"}
        assert two.prefill == "prefill-0"
        assert unpack_ints(two.prompt).tolist() == [*PROMPT, *first]
        assert two.num_delivered == len(first) == 2
        assert two.sampling == msgspec.structs.replace(one.sampling, max_tokens=3)
        assert split_hashes(two.page_hashes) == page_hashes([*PROMPT, *first], 4, one.root)
        outputs = await drain(stream)
        tokens = [token for output in outputs for token in output.token_ids]
        assert tokens == stream.delivered == [*first, *leaders.tokens_for(two)]
        assert client.counters.replays == 1
        late = Output(stream.generate.request_id, (1,), position=2)
        num_late = client.counters.late_outputs
        client.on_message(lost, Outputs((late,)))
        assert client.counters.late_outputs == num_late + 1
        client.check_integrity()

    run(body())


def test_a_draining_replica_hands_its_requests_over(engine_client: Make, leaders: Any) -> None:
    """It is named as the one that prefills; one of another cohort computes all anew."""

    async def body(cohort: str, source: str) -> None:
        leaders.received.clear()
        client = engine_client()
        leaders.mode = "stuck_after_two"
        stream = client.submit(PROMPT, PARAMS)
        await two_tokens(stream)
        client.on_peer_draining("decode-0")
        assert len(leaders.generates()) == 1, "there is no other yet"
        with pytest.raises(NoReplica):
            client.submit(PROMPT, PARAMS)
        client.on_peer_up("decode-1", "decode", "another model" if cohort else "test model", cohort)
        assert ("decode-0", Abort(stream.generate.request_id)) in leaders.received
        (_, one), (replica, two) = [m for m in leaders.received if isinstance(m[1], Generate)]
        assert (replica, two.prefill) == ("decode-1", source)
        prompt = unpack_ints(two.prompt).tolist()
        assert prompt == [*PROMPT, *stream.delivered[:2]]
        assert (two.root == one.root) == (not cohort)
        assert split_hashes(two.page_hashes) == page_hashes(prompt, 4, two.root)
        leaders.mode = "answer"
        client.on_peer_down("decode-1", "killed")
        client.on_peer_up("decode-2", "decode", "test model")
        await drain(stream)
        assert (client.counters.moves, client.counters.replays) == (1, 1)
        assert stream.num_tokens == PARAMS.max_tokens
        client.check_integrity()

    run(body("", "decode-0"))
    run(body("other", ""))


def test_a_request_ends_where_it_is_if_no_other_holds_it(engine_client: Make, leaders: Any) -> None:
    async def body() -> None:
        client = engine_client()
        leaders.mode = "stuck_after_two"
        stream = client.submit(PROMPT, PARAMS)
        await two_tokens(stream)
        client.on_peer_draining("decode-0")
        longest = len(PROMPT) + PARAMS.max_tokens
        client.on_peer_up("decode-1", "decode", "test model", max_context=longest - 1)
        assert client.counters.moves == 0
        assert len(leaders.generates()) == 1
        client.on_peer_draining("decode-1")
        leaders.mode = "answer"
        client.on_peer_up("decode-2", "decode", "test model", max_context=longest)
        await drain(stream)
        assert client.counters.moves == 1
        client.check_integrity()

    run(body())


def test_a_router_is_exchanged_under_way(engine_client: Make, leaders: Any) -> None:
    """Requests are counted on, though their class is not there any more."""

    async def body() -> None:
        client = engine_client()
        client.use_router(Router(8, classes=[PrioritySpec(), PrioritySpec(), PrioritySpec()]))
        leaders.mode = "stuck_after_two"
        stream = client.submit(PROMPT, PARAMS, priority=2)
        await two_tokens(stream)
        client.on_peer_up("decode-1", "decode", "test model")
        client.on_peer_draining("prefill-0")
        client.use_router(Router(8))
        assert client.router.in_flight == 1
        states = {state.name: state.draining for state in client.replicas()}
        assert states == {"prefill-0": True, "decode-0": False, "decode-1": False}
        leaders.mode = "answer"
        client.on_peer_draining("decode-0")
        await drain(stream)
        client.check_integrity()

    run(body())


def test_lost_requests_wait_for_a_replica(engine_client: Make, leaders: Any) -> None:
    async def body() -> None:
        client = engine_client()
        leaders.mode = "stuck_after_two"
        streams = [client.submit(PROMPT, PARAMS) for _ in range(3)]
        await asyncio.gather(*(two_tokens(stream) for stream in streams))
        client.on_peer_down("decode-0", "killed")
        streams[2].close()
        assert client.counters.replays == 0
        client.on_peer_up("decode-0", "decode", "test model")
        await asyncio.gather(*(two_tokens(stream, 4) for stream in streams[:2]))
        leaders.mode = "answer"
        client.on_peer_down("decode-0", "killed")
        client.on_peer_up("decode-0", "decode", "test model")
        for stream in streams[:2]:
            await drain(stream)
            assert stream.num_tokens == 5
            assert stream.generate.num_delivered == 4
        assert client.counters.replays == 2 + 2
        client.check_integrity()

    run(body())


def test_a_request_that_replicas_die_of_is_not_sent_for_ever(
    engine_client: Make, leaders: Any
) -> None:
    async def body() -> None:
        client = engine_client()
        leaders.mode = "silent"
        stream = client.submit(PROMPT, PARAMS)
        for _ in range(4):
            assert not stream.is_ended
            client.on_peer_down("decode-0", "killed")
            client.on_peer_up("decode-0", "decode", "test model")
        assert "as were 3 before it" in last_error(await drain(stream))
        assert len(leaders.generates()) == 4
        client.check_integrity()

    run(body())


def test_nobody_takes_over(engine_client: Make, leaders: Any) -> None:
    async def body() -> None:
        client = engine_client(takeover_s=0.05)
        leaders.mode = "silent"
        stream = client.submit(PROMPT, PARAMS)
        client.on_peer_down("decode-0", "no heartbeat for 10 s")
        error = last_error(await drain(stream))
        assert "decode-0" in error
        assert "no heartbeat for 10 s" in error
        assert stream.failure is Failure.REPLICA_LOST
        assert not leaders.aborted_ids()
        client.check_integrity()

    run(body())


def test_a_lost_prefill_replica_ends_no_request(engine_client: Make, leaders: Any) -> None:
    """The decode leader finds another, or prefills itself."""

    async def body() -> None:
        client = engine_client()
        leaders.mode = "silent"
        stream = client.submit(PROMPT, PARAMS)
        client.on_peer_down("prefill-0")
        assert not stream.is_ended
        assert not leaders.aborted_ids()
        stream.close()

    run(body())


def test_a_lost_prefill_replica_does_not_end_what_it_has_prefilled(
    engine_client: Make, leaders: Any
) -> None:
    async def body() -> None:
        client = engine_client()
        stream = client.submit(PROMPT, PARAMS)
        await anext(stream)
        client.on_peer_down("prefill-0")
        assert (await drain(stream))[-1].finish_reason == "length"
        assert client.submit(PROMPT, PARAMS).placement.prefill == ""  # type: ignore[union-attr]

    run(body())


@pytest.mark.parametrize(
    ("mode", "stage"),
    [("silent", "waiting for the first token"), ("stuck_after_two", "2 of at most 5 tokens")],
)
def test_the_deadline_names_the_stage(
    engine_client: Make, leaders: Any, mode: Any, stage: str
) -> None:
    async def body() -> None:
        client = engine_client()
        leaders.mode = mode
        stream = client.submit(PROMPT, PARAMS, timeout_s=0.02)
        assert stage in last_error(await drain(stream))
        assert stream.failure is Failure.TIMEOUT
        assert leaders.aborted_ids() == {stream.generate.request_id}
        client.check_integrity()

    run(body())


def test_more_tokens_than_asked_for_is_an_error(engine_client: Make, leaders: Any) -> None:
    async def body() -> None:
        client = engine_client()
        leaders.mode = "silent"
        stream = client.submit(PROMPT, PARAMS)
        output = Output(stream.generate.request_id, (1,) * 6)
        client.on_message("decode-0", Outputs((output,)))
        assert "sent 6 tokens of at most 5" in last_error(await drain(stream))

    run(body())


def test_stray_messages_change_nothing(engine_client: Make, leaders: Any) -> None:
    async def body() -> None:
        client = engine_client()
        leaders.mode = "silent"
        stream = client.submit(PROMPT, PARAMS)
        finish = Output(stream.generate.request_id, (1,), finish_reason="stop")
        client.on_message("decode-9", Outputs((finish,)))
        client.on_message("decode-0", Outputs((Output("unknown", (1,)),)))
        client.on_message("decode-0", Abort("unknown"))
        client.on_message("decode-9", Heartbeat(ReplicaLoad()))
        client.on_peer_down("decode-9")
        assert not stream.is_ended
        assert client.counters.late_outputs == 2
        assert client.counters.unexpected_messages == 1
        assert [replica.name for replica in client.replicas()] == ["decode-0", "prefill-0"]
        stream.close()

    run(body())


def test_choices_after_the_first_wait_for_its_first_token(
    engine_client: Make, leaders: Any
) -> None:
    async def body() -> None:
        client = engine_client()
        client.on_peer_up("decode-1", "decode", "test model")
        streams = client.submit_all(
            [(PROMPT, SamplingParams(max_tokens=5, seed=2**64 - 1))], n=3, timeout_s=30
        )
        assert len(leaders.generates()) == 1
        ended = [i async for i, output in merge(streams) if output.finish_reason]
        assert sorted(ended) == [0, 1, 2]
        assert [g.sampling.seed for g in leaders.generates()] == [2**64 - 1, 0, 1]
        assert len({replica for replica, _ in leaders.received}) == 1
        client.check_integrity()

    run(body())


@pytest.mark.parametrize("how", ["close", "lost", "deadline", "error"])
def test_choices_that_wait_end_as_the_first_ends(
    engine_client: Make, leaders: Any, how: str
) -> None:
    async def body() -> None:
        client = engine_client(takeover_s=0.05)
        leaders.mode = "error" if how == "error" else "silent"
        streams = client.submit_all(
            [(PROMPT, PARAMS)], n=3, timeout_s=0.02 if how == "deadline" else 30
        )
        if how == "close":
            streams[0].close()
        elif how == "lost":
            client.on_peer_down("decode-0")
        reasons = [(await drain(stream))[-1].finish_reason for stream in streams]
        assert set(reasons) == {"abort" if how == "close" else "error"}
        assert len(leaders.generates()) == 1
        client.check_integrity()

    run(body())


def test_overload_and_missing_replicas_send_nothing(engine_client: Make, leaders: Any) -> None:
    async def body() -> None:
        client = engine_client(max_queue=3)
        with pytest.raises(Overloaded):
            client.submit_all([(PROMPT, PARAMS), (PROMPT, PARAMS)], n=2)
        client.on_peer_down("decode-0")
        with pytest.raises(NoReplica):
            client.submit(PROMPT, PARAMS)
        assert leaders.received == []
        client.check_integrity()
        with pytest.raises(NoReplica):
            engine_client(with_replicas=False).submit(PROMPT, PARAMS)

    run(body())


def test_random_aborts_leave_nothing(engine_client: Make, leaders: Any) -> None:
    async def body() -> None:
        client = engine_client(max_queue=1000)
        streams = []
        for i in range(60):
            streams += client.submit_all([(PROMPT, PARAMS)], n=1 + i % 3, timeout_s=30)
            for _ in range(i % 5):
                await asyncio.sleep(0)
            streams[(i * 7) % len(streams)].close()
        for stream in streams:
            await drain(stream)
        client.check_integrity()
        assert client.router.in_flight == 0
        assert {type(message) for _, message in leaders.received} <= {Generate, Abort}

    run(body())

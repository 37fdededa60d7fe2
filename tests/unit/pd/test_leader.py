"""What a leader decides by itself; with others: tests/sim."""

from __future__ import annotations

import pytest

from hicache.index import PageIndex
from pd.engine.batch import LAST_SAMPLED, StepResult
from pd.events import Effect, LookAhead, PeerUp, Received, RunStep, Send, StepDone
from pd.leader import Leader
from pd.messages import Generate, Outputs, SamplingParams, pack_ints
from transfer.layout import LayerGroup, PageLayout

GROUP = LayerGroup("full", (0,), 1, 4)


def make_leader(**options: object) -> Leader:
    """Of pools with pages for 20 tokens."""
    layouts = [PageLayout(GROUP, 4, 4)]
    leader = Leader("both-0", PageIndex([GROUP], [6], 4), layouts, 64, 4, 0, **options)  # type: ignore[arg-type]
    leader.handle(PeerUp("api-0"), 0.0)
    return leader


def ask(leader: Leader, name: str, length: int, now: float) -> list[Effect]:
    prompt = pack_ints(list(range(length)))
    hashes = bytes(32 * (length // 4))
    params = SamplingParams(max_tokens=4, temperature=0.0)
    message = Generate(name, prompt, bytes(32), hashes, params, "", 60.0)
    return leader.handle(Received("api-0", message), now)


def test_a_request_longer_than_the_pools_ends_and_holds_up_nobody() -> None:
    """It was let in when other replicas were up."""
    leader = make_leader(max_context=20)

    def errors(name: str, length: int) -> list[str]:
        sent = [each.message for each in ask(leader, name, length, 1.0) if isinstance(each, Send)]
        return [o.error for m in sent if isinstance(m, Outputs) for o in m.outputs]

    assert errors("long", 17) == ["21 tokens, but both-0 holds at most 20"]
    assert errors("short", 16) == []
    assert leader.load().running == 1
    leader.check_integrity()


@pytest.mark.parametrize("early_s", [0.0, 0.0004])
def test_a_decode_step_is_planned_shortly_before_the_end_of_the_one_before(early_s: float) -> None:
    """A request that comes until then is in it. Timers may be early."""
    leader = make_leader(looks_ahead=True)

    def steps(effects: list[Effect]) -> list[list[int]]:
        return [each.command.tokens.tolist() for each in effects if isinstance(each, RunStep)]

    def done(now: float, count: int = 1) -> list[list[int]]:
        result = StepResult([7] * count, [None] * count, 0.02)
        return steps(leader.handle(StepDone(result), now))

    assert steps(ask(leader, "one", 5, 1.0)) == [[0, 1, 2, 3, 4]]
    assert leader.look_ahead_at is None  # nothing is planned beside a prompt
    assert done(1.0) == [[7], [LAST_SAMPLED]]  # what a step takes is not known yet
    assert done(1.02) == []
    at = leader.look_ahead_at
    assert at == pytest.approx(1.02 + 0.02 - 0.003)
    assert steps(ask(leader, "other", 3, 1.03)) == []
    assert steps(leader.handle(LookAhead(), at - 0.002)) == []
    assert steps(leader.handle(LookAhead(), at - early_s)) == [[LAST_SAMPLED, 0, 1, 2]]
    assert leader.look_ahead_at is None
    leader.check_integrity()

"""Messages whose types are right and whose fields are anything: none ends a replica or leaves its
pages in doubt."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest
from cluster_sim import PAGE, ROOT, SimReplica

from hicache.keys import page_hashes
from pd import messages
from pd.checks import is_sound
from pd.engine.batch import StepResult
from pd.events import (
    Digest,
    Digested,
    Event,
    PeerDown,
    PeerUp,
    Received,
    RunStep,
    Send,
    StepDone,
    Tick,
    Write,
    Written,
)
from pd.messages import (
    Abort,
    AnyMessage,
    Ask,
    Cancel,
    Generate,
    GroupPages,
    HandoverClosed,
    PagesWritten,
    PrefillDone,
    Reserve,
    SamplingParams,
    Settled,
    SettledHeard,
    Unknown,
    pack_ints,
)
from transfer.topology import Topology

_INTS = (0, 1, 1, 2, 3, 4, 5, 7, 60, -1, 2**31, 2**40, -(2**40), 2**63 - 1)
_FLOATS = (0.0, 1.0, 30.0, 1e5, -1.0, float("inf"), float("nan"))
_BYTES = (
    b"",
    b"abc",
    bytes(32),
    bytes(64),
    pack_ints([0]),
    pack_ints([-1]),
    pack_ints([5, 5]),
    pack_ints([2**31 - 1, 3]),
    pack_ints(list(range(7))),
    pack_ints(list(range(20))),
)
_NAMES = ("a", "b", "prefill-0", "decode-1", "api", "")


def strange(rng: random.Random) -> AnyMessage:
    def number() -> int:
        return rng.choice(_INTS)

    def real() -> float:
        return rng.choice(_FLOATS)

    def raw() -> bytes:
        return rng.choice(_BYTES)

    def name() -> str:
        return rng.choice(_NAMES)

    def some() -> range:
        return range(rng.choice((0, 1, 2, 2, 2, 3)))

    params = SamplingParams(max_tokens=rng.choice((-1, 0, 1, 1, 5, 9, 2**40)))
    landed, complete = tuple(number() for _ in some()), rng.random() < 0.5
    targets = tuple(GroupPages(number(), raw()) for _ in some())
    digests = tuple(raw() for _ in some())
    tenant = rng.choice(("", "a", "x" * 128, "x" * 129))
    ours = Generate(name(), raw(), raw(), raw(), params, name(), real(), tenant, number(), number())
    theirs = Reserve(
        number(),
        number(),
        name(),
        raw(),
        raw(),
        raw(),
        params,
        targets,
        real(),
        complete,
        tenant,
        number(),
        number(),
    )
    done = PrefillDone(number(), name(), number(), None, number(), real(), real())
    written = PagesWritten(
        number(), landed, complete, number(), number(), number(), real(), digests
    )
    found = (ours, Abort(name()), theirs, Ask(number(), number()), Cancel(number(), number()))
    answers = (done, written, HandoverClosed(number(), landed, name()), Unknown(number()))
    return rng.choice((*found, Settled(number()), *answers, SettledHeard(number())))


def sound(rng: random.Random) -> tuple[Generate, Reserve]:
    """One request that this replica decodes, and one that it prefills."""
    prompt = [rng.randrange(97) for _ in range(rng.randint(1, 30))]
    hashes = b"".join(page_hashes(np.array(prompt, np.int32), PAGE, ROOT))
    params = SamplingParams(max_tokens=5)
    total = -(-len(prompt) // PAGE)
    needed = max(0, (total - 1) * PAGE - 9) // PAGE
    targets = tuple(GroupPages(n, pack_ints([1] * (total - n))) for n in (0, needed))
    ours = Generate("a", pack_ints(prompt), ROOT, hashes, params, "prefill-0", 1e5)
    theirs = Reserve(1, 1, "h", ours.prompt, ROOT, hashes, params, targets, 1e5)
    return ours, theirs


def test_a_tenants_name_is_bounded() -> None:
    groups = SimReplica("decode-0", 40, 8, 4, 0).groups
    for message in sound(random.Random(0)):
        for length, expected in ((128, True), (129, False)):
            named = msgspec.structs.replace(message, tenant="x" * length)
            assert is_sound(named, groups, PAGE) is expected


def test_classes_are_few() -> None:
    groups = SimReplica("decode-0", 40, 8, 4, 0).groups
    for message in sound(random.Random(0)):
        for priority, expected in ((-1, False), (0, True), (15, True), (16, False)):
            of_class = msgspec.structs.replace(message, priority=priority)
            assert is_sound(of_class, groups, PAGE) is expected


@pytest.mark.parametrize("seed", range(150))
def test_strange_messages_end_no_replica(seed: int) -> None:
    rng = random.Random(seed)
    ours, peers = rng.choice(((Topology(), Topology()), (Topology(2, 2, 2), Topology(cp=3))))
    replica = SimReplica("decode-0", 40, 8, 4, 0, verify=rng.random() < 0.5, topology=ours)
    leader, now = replica.leader, 0.0
    generate, reserve = sound(rng)
    coming: list[Event] = [PeerUp("api"), PeerUp("prefill-0", "prefill", peers)]
    coming += [PeerUp("decode-1", "decode", peers)]
    coming += [Received("api", generate), Received("decode-1", reserve)]

    def handle(event: Event) -> None:
        for effect in leader.handle(event, now):
            match effect:
                case RunStep(command):
                    sampled = [3] * int(command.sample.sum())
                    coming.append(StepDone(StepResult(sampled, [None] * len(sampled), 0.0)))
                case Write(write_id):
                    error = None if rng.random() < 0.8 else "lost"
                    coming.append(Written(write_id, error, 1, 1, 0.1))
                case Digest(number, _, pages):
                    coming.append(Digested(number, np.zeros(len(pages), np.uint64)))
                case Send(_, message):
                    messages.encode(message, "decode-0", 1, 2)
        leader.check_integrity()

    for _ in range(40):
        if coming and rng.random() < 0.7:
            handle(coming.pop(0))
        elif rng.random() < 0.2:
            now += rng.random() * 3
            handle(Tick())
        else:
            sender = rng.choice(("prefill-0", "decode-1", "api"))
            handle(Received(sender, strange(rng)))
    coming += [PeerDown(name, "enough") for name in ("api", "prefill-0", "decode-1")]
    while coming:
        handle(coming.pop(0))
    assert leader.is_idle

"""What becomes of one request when its handover fails, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cluster_sim import GROUPS, PAGE, Faults, SimReplica, Simulation, reference

from pd.messages import Cancel, HandoverClosed, PagesWritten, PrefillDone, Reserve

PROMPT = [(7 * i) % 97 for i in range(41)]
NUM_TOKENS = 12


class Run:
    """One request to decode-0, prefilled by prefill-0 page by page."""

    def __init__(
        self, num_prefills: int = 2, faults: Faults | None = None, verify: bool = False
    ) -> None:
        names = [f"prefill-{number}" for number in range(num_prefills)]
        replicas = [
            SimReplica(name, 60, PAGE, 4, 0, verify, GROUPS[:1]) for name in (*names, "decode-0")
        ]
        self.simulation = Simulation(1, replicas, faults)
        self.decode = replicas[-1].leader
        self.sent: list[tuple[str, str, Any]] = []
        send = self.simulation._send

        def record(sender: SimReplica, to: str, message: Any) -> None:
            self.sent.append((sender.name, to, message))
            send(sender, to, message)

        self.simulation._send = record  # type: ignore[method-assign]
        self.simulation.generate("r", PROMPT, NUM_TOKENS, "decode-0", "prefill-0")

    def when(self, condition: Callable[[], bool], action: Callable[[], None]) -> None:
        def look() -> None:
            if condition():
                action()
            else:
                self.simulation.at(self.simulation.now + 0.1, look)

        look()

    def landed(self) -> int:
        """Pages that decode knows to have landed."""
        return sum(sum(i.handover.landed) for i in self.decode._receiving._incoming.values())

    def reserves(self) -> list[tuple[str, int]]:
        """(to whom, first page) of each handover; an Ask may overtake its Reserve, which is then
        sent again."""
        found = {
            (to, message.serial): (to, message.targets[0].first_page)
            for _, to, message in self.sent
            if isinstance(message, Reserve)
        }
        return list(found.values())

    def finish(self) -> None:
        """Run to the end; the request has its tokens, and nothing is left."""
        self.simulation.run()
        assert self.simulation.reasons("r") == ["length"]
        assert self.simulation.tokens("r") == reference(PROMPT, NUM_TOKENS)
        for replica in self.simulation.replicas.values():
            assert not replica.alive or replica.leader.is_idle


def test_another_replica_continues_from_the_first_missing_page() -> None:
    run = Run()
    run.when(lambda: run.landed() >= 4, lambda: run.simulation.kill("prefill-0"))
    run.finish()
    (first, second) = run.reserves()
    assert first == ("prefill-0", 0)
    assert second[0] == "prefill-1"
    assert 4 <= second[1] < 10
    assert run.decode.load().handovers_failed == 1
    assert run.decode.load().failed == 0


def test_without_another_replica_the_decode_replica_prefills_the_rest() -> None:
    run = Run(num_prefills=1)
    run.when(lambda: run.landed() >= 4, lambda: run.simulation.kill("prefill-0"))
    run.finish()
    assert run.reserves() == [("prefill-0", 0)]
    assert 0 < run.decode.load().prefill_tokens <= len(PROMPT) - 4 * PAGE


def test_a_request_that_waits_for_pages_finds_another_replica_too() -> None:
    run = Run()
    taken = run.decode.index.allocate(0, 59)
    assert taken is not None
    run.simulation.at(5, lambda: run.simulation.kill("prefill-0"))
    run.simulation.at(50, lambda: run.decode.index.release(0, taken))
    run.decode.check_integrity = lambda: None  # type: ignore[method-assign]
    run.finish()
    assert run.reserves() == [("prefill-1", 0)]


def test_a_first_token_is_delivered_once() -> None:
    """Its handover fails after it; the next one brings it again."""
    run = Run()
    seen = lambda: bool(run.simulation.tokens("r"))  # noqa: E731
    run.when(seen, lambda: run.simulation.kill("prefill-0"))
    run.finish()
    senders = [sender for sender, _, m in run.sent if isinstance(m, PrefillDone)]
    assert set(senders) == {"prefill-0", "prefill-1"}


def test_pages_stay_in_quarantine_while_a_silent_sender_may_write() -> None:
    run = Run()
    simulation, load = run.simulation, run.decode.load
    run.when(lambda: run.landed() >= 2, lambda: simulation.freeze("prefill-0"))
    seen = []

    def look() -> None:
        seen.append((load().pages_quarantined, load().handovers_overdue, load().finished))

    simulation.at(200, look)
    simulation.at(201, lambda: simulation.thaw("prefill-0"))
    run.finish()
    ((quarantined, overdue, finished),) = seen
    assert (finished, overdue) == (1, 1)
    assert 0 < quarantined[0] <= 9
    assert load().pages_quarantined == (0,)
    assert [to for to, _ in run.reserves()] == ["prefill-0", "prefill-1"]
    assert any("nothing heard for 30 s" in warning for warning in simulation.warnings)
    cancels = [to for _, to, m in run.sent if isinstance(m, Cancel)]
    assert len(cancels) > 100
    assert set(cancels) == {"prefill-0"}


def test_a_failed_write_is_repeated_on_the_same_pair_first() -> None:
    run = Run(faults=Faults(fail_writes=0.15))
    run.finish()
    assert run.reserves() == [("prefill-0", 0)]
    moved = run.simulation.replicas["prefill-0"].leader.load().kv_pages
    assert moved > 11


def test_writes_that_always_fail_move_the_request_on() -> None:
    run = Run(faults=Faults(fail_writes=1.0))
    run.finish()
    assert run.reserves() == [("prefill-0", 0), ("prefill-1", 0)]
    closed = [m for _, _, m in run.sent if isinstance(m, HandoverClosed)]
    assert {m.reason for m in closed} == {"a write failed: lost"}


def test_pages_that_differ_are_asked_for_again_and_never_used() -> None:
    run = Run(faults=Faults(corrupt_writes=1.0), verify=True)
    run.finish()
    assert [to for to, _ in run.reserves()] == ["prefill-0", "prefill-0", "prefill-1"]
    assert run.decode.load().digest_mismatches >= 33
    assert "layer group 0: pages [0, 1, 2" in run.simulation.warnings[0]


def test_pages_that_are_verified_carry_digests() -> None:
    run = Run(verify=True)
    run.finish()
    complete = {m for _, _, m in run.sent if isinstance(m, PagesWritten) and m.complete}
    assert [[len(digests) for digests in m.digests] for m in complete] == [[8 * 11]]
    assert len(run.reserves()) == 1


def test_a_large_prompt_is_not_starved_by_small_ones_that_come_later() -> None:
    """They are prefilled here, and would always find the few pages that they need."""
    decode = SimReplica("decode-0", 24, 64, 8, 6)
    simulation = Simulation(1, [SimReplica("prefill-0", 200, 64, 8, 0), decode])
    for number in range(200):
        prompt = [number % 97, number // 97, 1, 2, 3]
        simulation.at(
            6.0 * number,
            lambda r=f"small-{number}", p=prompt: simulation.generate(r, p, 12, "decode-0", ""),
        )
    large = [(5 * i) % 97 for i in range(70)]
    simulation.at(60, lambda: simulation.generate("large", large, 4, "decode-0", "prefill-0"))
    ended = []
    simulation.at(600, lambda: ended.append(simulation.reasons("large")))
    simulation.run()
    assert ended == [["length"]]
    assert simulation.tokens("large") == reference(large, 4)

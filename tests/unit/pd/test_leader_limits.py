"""What a leader refuses by itself."""

from __future__ import annotations

from hicache.index import PageIndex
from pd.events import PeerUp, Received, Send
from pd.leader import Leader
from pd.messages import Generate, Outputs, SamplingParams, pack_ints
from transfer.layout import LayerGroup, PageLayout

GROUP = LayerGroup("full", (0,), 1, 4)


def test_a_request_longer_than_the_pools_ends_and_holds_up_nobody() -> None:
    """It was let in when other replicas were up."""
    leader = Leader(
        "both-0", PageIndex([GROUP], [6], 4), [PageLayout(GROUP, 4, 4)], 64, 4, 0, max_context=20
    )
    leader.handle(PeerUp("api-0"), 0.0)

    def ask(name: str, length: int) -> list[str]:
        prompt = pack_ints(list(range(length)))
        hashes = bytes(32 * (length // 4))
        params = SamplingParams(max_tokens=4, temperature=0.0)
        message = Generate(name, prompt, bytes(32), hashes, params, "", 60.0)
        effects = leader.handle(Received("api-0", message), 1.0)
        sent = [each.message for each in effects if isinstance(each, Send)]
        return [o.error for m in sent if isinstance(m, Outputs) for o in m.outputs]

    assert ask("long", 17) == ["21 tokens, but both-0 holds at most 20"]
    assert ask("short", 16) == []
    assert leader.load().running == 1
    leader.check_integrity()

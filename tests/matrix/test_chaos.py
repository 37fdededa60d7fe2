"""kill -9 of every kind of process behind the API, at random moments under load: every request ends
with the right tokens, and the service is whole again."""

from __future__ import annotations

import random
import time
from pathlib import Path

from rank_kills import spec_for, steady_load
from real_cluster import Cluster, RayHead, short_folder, wait_until
from reference_model import ReferenceModel

from pd.bench.tiny import make_tiny_model

NUM_KILLS = 30


def test_kill_9_at_random(head: RayHead, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", "gemma3_text")
    model, rng = ReferenceModel(folder), random.Random(0)
    with short_folder() as work:
        spec = spec_for("chaos", folder, 1, {})
        role = spec["roles"].pop("both")
        spec["roles"] = {
            "prefill": {**role, "topology": {"tp": 2}},
            "decode": {**role, "replicas": 2},
        }
        spec |= {"router": {"local_prefill_tokens": 0}, "cache": {"host": {"memory": "16MiB"}}}
        cluster = Cluster(spec, work, head.address)
        units = {
            "prefill-0": "prefill-0",
            "prefill-0-rank1": "prefill-0",
            "decode-0": "decode-0",
            "decode-1": "decode-1",
            "cache-0": "cache-0",
        }
        back = dict.fromkeys(units.values(), 0)
        seconds = []
        try:
            cluster.wait_ready()
            with steady_load(cluster, model) as lengths:
                for _ in range(NUM_KILLS):
                    victim = rng.choice(sorted(units))
                    time.sleep(2 * rng.random())
                    begin = time.monotonic()
                    cluster.kill(victim)
                    back[units[victim]] += 1
                    cluster.wait_back(units[victim], back[units[victim]])
                    seconds.append(time.monotonic() - begin)
            assert sum(lengths) > 0
            assert cluster.get("/health").status_code == 200
            print(
                f"{NUM_KILLS} kills, {len(lengths)} requests, {sum(lengths)} tokens; whole again "
                f"after {sorted(seconds)[len(seconds) // 2]:.1f} s (median), at most "
                f"{max(seconds):.1f} s"
            )
            wait_until(lambda: not cluster.get("/admin/status").json()["in_flight"], "all is done")
        except BaseException:
            print(cluster.log)
            raise
        finally:
            cluster.stop()

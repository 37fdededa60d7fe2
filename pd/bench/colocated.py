"""P/D beside one colocated replica, in one run: `python -m pd.bench.colocated [options of pd bench
serve]`.

Makes a tiny Qwen3 (4 layers, hidden 256, 8 heads, 2 KV heads, vocabulary 4,096, bfloat16, random
weights), serves it twice (one prefill and one decode replica over NIXL; one replica for both), and
puts the same load on both, one after the other.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from pd.bench.server import Server, ServerError
from pd.bench.tiny import make_tiny_model

_MODEL: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 768,
    "vocab_size": 4096,
    "dtype": "bfloat16",
}
_ROLE = {"pool": {"pages": 4000}, "max_batch_tokens": 512}
_SHAPES: dict[str, dict[str, Any]] = {
    "disaggregated": {"prefill": _ROLE, "decode": _ROLE},
    "colocated": {"both": _ROLE},
}


def main() -> int:
    console = Console()
    servers: list[Server] = []
    with tempfile.TemporaryDirectory(prefix="pagerelay-bench-") as folder:
        model = make_tiny_model(Path(folder) / "tiny-qwen3", "qwen3", **_MODEL)
        try:
            urls = []
            for name, roles in _SHAPES.items():
                spec = Path(folder) / f"{name}.yaml"
                spec.write_text(
                    yaml.safe_dump(
                        {
                            "name": name,
                            "model": {"path": str(model), "dtype": "bfloat16"},
                            "page_tokens": 16,
                            "roles": roles,
                        }
                    )
                )
                console.print(f"starting {name}")
                servers.append(Server(spec))
                urls.append(servers[-1].wait_ready(console))
            command = [sys.executable, "-m", "pd.cli", "bench", "serve", "--url", urls[0]]
            return subprocess.call([*command, "--compare", urls[1], *sys.argv[1:]])
        except ServerError as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
        finally:
            for server in servers:
                server.stop()


if __name__ == "__main__":
    sys.exit(main())

"""The `pd` command: what it prints, its exit codes, and one line for an error."""

from __future__ import annotations

import http.server
import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers import LlamaConfig

from pd.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        monkeypatch.setattr(sys, "argv", ["pd", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        code = caught.value.code
        captured = capsys.readouterr()
        return (code if isinstance(code, int) else 0), captured.out, captured.err

    return call


SPEC = """
model: {path: ./model, dtype: bfloat16}
page_tokens: 4
roles:
  prefill: {pool: {pages: 65}, replicas: {min: 1, max: 3}}
  decode: {pool: {memory: 24KiB}}
api: {keys: [secret]}
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    LlamaConfig(
        num_hidden_layers=3,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    ).save_pretrained(tmp_path / "model")
    (tmp_path / "spec.yaml").write_text(SPEC)
    return tmp_path / "spec.yaml"


def test_heavy_modules_are_left_out() -> None:
    heavy = "{'torch', 'ray', 'transformers', 'aiohttp', 'pydantic', 'uvloop', 'zmq'}"
    code = f"import sys, pd.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version(run: Run) -> None:
    code, out, _ = run("version")
    assert (code, out.split()[0]) == (0, "pagerelay")


@pytest.mark.parametrize("arguments", [["--help"], ["check", "-h"], ["bench", "serve", "--help"]])
def test_help(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert "Usage" in out


@pytest.mark.parametrize("command", ["check", "serve"])
def test_bad_spec(run: Run, tmp_path: Path, command: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("model: {path: a}\nroles: {both: {replcas: 1}}\nnme: x")
    code, out, err = run(command, str(file))
    assert (code, out) == (2, "")
    first, second = err.splitlines()
    assert first == f"pd: {file}:2: roles.both.replcas: unknown key; did you mean replicas?"
    assert second == f"pd: {file}:3: nme: unknown key; did you mean name?"


def test_check_without_a_model(run: Run, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("model: {path: ./none}\nroles: {both: {}}")
    code, _, err = run("check", str(tmp_path / "spec.yaml"))
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "model.path" in err


def test_check(run: Run, spec: Path) -> None:
    code, out, err = run("check", str(spec))
    assert (code, err) == (0, "")
    assert "secret" not in out
    for text in ("page_tokens: 4", "KV 384 B a token", "1.5 KiB", "1 to 3", "0-2", "60 tokens"):
        assert text in out


def test_check_json(run: Run, spec: Path) -> None:
    code, out, _ = run("check", str(spec), "--json")
    assert code == 0
    answer = json.loads(out)
    assert answer["cost"]["max_context"] == 60
    assert answer["cost"]["roles"][1]["pages"] == {"device": [16]}
    assert answer["spec"]["api"]["keys"] == ["***"]
    tenants = spec.read_text().replace("keys: [", "tenants: {ann: [hidden]}, keys: [")
    spec.write_text(tenants)
    code, out, _ = run("check", str(spec), "--json")
    assert code == 0
    assert json.loads(out)["spec"]["api"]["tenants"] == {"ann": ["***"]}


# --------------------------------------------------------------------------------- against a server

STATUS = {
    "model": "tiny",
    "replicas": [
        {
            "name": "decode-0",
            "role": "decode",
            "waiting": 2,
            "running": 3,
            "pages": [{"group": 0, "free": 10, "cached": 4, "used": 6}],
        }
    ],
}


STORAGE = {
    "backend": "file",
    "objects": 1200,
    "object_bytes": 5 << 20,
    "limit_bytes": 1 << 30,
    "pages_written": 1300,
    "bytes_written": 6 << 20,
    "pages_restored": 40,
    "bytes_read": 3 << 10,
    "pages_used": 30,
    "pages_wasted": 10,
    "queued_pages": 2,
    "hit_objects": 41,
    "missed_objects": 42,
    "corrupt_objects": 43,
    "failed_objects": 44,
    "breaker": "open",
}
CACHE: dict[str, Any] = {
    "model": "tiny",
    "replicas": [
        {
            "name": "prefill-0",
            "role": "prefill",
            "pages": [{"group": 0, "free": 10, "cached": 4, "used": 6}],
            "pages_evicted": 77,
            "host_pages_in": 1,
            "host_bytes_in": 1 << 10,
            "host_seconds_in": 0.0,
            "host_pages_out": 2,
            "host_bytes_out": 2 << 10,
            "host_seconds_out": 0.5,
        }
    ],
    "keepers": [
        {
            "name": "cache-0",
            "groups": [{"kind": "full", "page_bytes": 1 << 20, "free": 5, "cached": 3, "used": 0}],
            "found_pages": 11,
            "read_pages": 12,
            "offered_pages": 13,
            "copied_pages": 14,
            "refused_pages": 15,
            "evicted_pages": 16,
            "storage": STORAGE,
            "tenants": {"ann": 17, "bob": 5, "": 18},
            "quotas": {"ann": 1700},
            "top_prefixes": [
                {"hash": "00ff", "first_page": 0, "pages": 9, "matches": 8, "tenant": "ann"}
            ],
        },
        {"name": "cache-1", "error": "no answer for 10 s"},
    ],
}


class Handler(http.server.BaseHTTPRequestHandler):
    bodies: ClassVar[list[dict[str, Any]]] = []
    changes: ClassVar[list[tuple[str, str]]] = []
    refusal: ClassVar[str] = ""
    fail_in_stream: ClassVar[bool] = False

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != "Bearer key":
            self._send(401, b'{"error": {"message": "the API key is not known"}}')
        elif self.path == "/cache":
            self._send(200, json.dumps(CACHE).encode())
        elif self.path == "/admin/status":
            self._send(200, json.dumps(STATUS).encode())
        else:
            self._send(200, b'{"data": [{"id": "tiny"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
        self.bodies.append(body)
        if self.path.startswith("/cache"):
            self.do_DELETE()
            return
        events: list[Any] = [{"choices": [{"delta": {"content": text}}]} for text in ("Hel", "lo")]
        if self.fail_in_stream:
            events[1] = {"error": {"message": "rank died"}}
        data = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        self._send(200, (data + "data: [DONE]\n\n").encode())

    def do_DELETE(self) -> None:
        self.changes.append((self.command, self.path))
        if self.refusal:
            self._send(409, json.dumps({"error": {"message": self.refusal}}).encode())
        else:
            self._send(200, b'{"keepers": [{"name": "cache-0"}, {"name": "cache-1"}]}')


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Handler, "bodies", [])
    monkeypatch.setattr(Handler, "changes", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_status(run: Run, url: str) -> None:
    code, out, _ = run("status", "--url", url, "--key", "key")
    assert code == 0
    assert "decode-0" in out
    assert "10 / 4 / 6" in out
    code, out, _ = run("status", "--url", f"{url}/v1/", "--key", "key", "--json")
    assert json.loads(out) == STATUS


def test_cache(run: Run, url: str) -> None:
    code, out, err = run("cache", "--url", url, "--key", "key")
    assert (code, err) == (0, "")
    for text in (
        "20.0 MiB",
        "8.0 MiB",
        "5.0 MiB of 1.0 GiB",
        "1,200 objects:",
        "16 evicted",
        "43 corrupt",
        "ann 17 pages of 1,700, bob 5 pages",
        "00ff",
        "cache-1: no answer for 10 s",
        "left alone",
    ):
        assert text.replace(".0 ", " ") in out, text
    code, out, _ = run("cache", "--url", f"{url}/v1", "--key", "key", "--json")
    assert json.loads(out) == CACHE


@pytest.mark.parametrize(
    ("arguments", "request_line", "body", "printed"),
    [
        (["clear"], ("POST", "/cache/clear"), {"tenant": ""}, "the host tier is cleared"),
        (["clear", "--tenant", "ann"], ("POST", "/cache/clear"), {"tenant": "ann"}, "ann"),
        (
            ["attach", "file", "--option", "path=/a=b", "--option", "limit=1GiB"],
            ("POST", "/cache/storage"),
            {"backend": "file", "options": {"path": "/a=b", "limit": "1GiB"}},
            "file is attached",
        ),
        (["detach"], ("DELETE", "/cache/storage"), None, "detached"),
        (
            ["clear-storage", "--keeper", "cache 0"],
            ("POST", "/cache/storage/clear?keeper=cache%200"),
            None,
            "cleared",
        ),
    ],
)
def test_cache_commands(
    run: Run,
    url: str,
    arguments: list[str],
    request_line: tuple[str, str],
    body: Any,
    printed: str,
) -> None:
    code, out, err = run("cache", *arguments, "--url", url, "--key", "key")
    assert (code, err) == (0, "")
    assert printed in out
    assert "cache-0, cache-1" in out
    assert Handler.changes == [request_line]
    assert Handler.bodies == ([] if request_line[0] == "DELETE" else [body])


def test_a_refused_cache_command(run: Run, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "refusal", "cache-0: no storage is attached")
    code, out, err = run("cache", "detach", "--url", url)
    assert (code, out) == (1, "")
    assert err == f"pd: {url}/cache/storage: 409: cache-0: no storage is attached\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attach", "file", "--option", "path"], "--option: found 'path', expected KEY=VALUE"),
        (["attach", "file", "--option", "a=1", "--option", "a=2"], "--option: a is given twice"),
        (["--url", "http://there", "clear"], "--url: expected after clear"),
        (["--json", "detach"], "--json: expected after detach"),
    ],
)
def test_wrong_cache_arguments(run: Run, arguments: list[str], message: str) -> None:
    code, out, err = run("cache", *arguments)
    assert (code, out, err) == (2, "", f"pd: {message}\n")


def test_status_with_a_wrong_key(run: Run, url: str) -> None:
    code, out, err = run("status", "--url", url, "--key", "other")
    assert (code, out) == (1, "")
    assert err == f"pd: {url}/admin/status: 401: the API key is not known\n"


@pytest.mark.parametrize(
    "command", [["status"], ["chat"], ["bench", "serve"], ["cache"], ["cache", "detach"]]
)
def test_no_server(run: Run, command: list[str]) -> None:
    code, _, err = run(*command, "--url", "http://127.0.0.1:1")
    assert code == 1
    assert "cannot be reached" in err
    assert len(err.splitlines()) == 1


def test_not_a_url(run: Run) -> None:
    code, _, err = run("status", "--url", "nowhere")
    assert code == 1
    assert len(err.splitlines()) == 1


def chat(run: Run, url: str, text: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return run("chat", "--url", url, "--key", "key", "--system", "Be brief.", "--seed", "7")


def test_chat(run: Run, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "hi\n\n/what\nmore\n/reset\nagain\n/quit\nnever\n"
    code, out, err = chat(run, url, lines, monkeypatch)
    assert (code, err) == (0, "")
    assert out.count("Hello") == 3
    assert "expected /reset, /quit" in out
    system = {"role": "system", "content": "Be brief."}
    hello = {"role": "assistant", "content": "Hello"}
    users = [{"role": "user", "content": text} for text in ("hi", "more", "again")]
    assert [body["messages"] for body in Handler.bodies] == [
        [system, users[0]],
        [system, users[0], hello, users[1]],
        [system, users[2]],
    ]
    assert Handler.bodies[0]["seed"] == 7


def test_chat_goes_on_after_an_error(run: Run, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "fail_in_stream", True)
    code, out, err = chat(run, url, "hi\n", monkeypatch)
    assert code == 0
    assert "Hel" in out
    assert err == "pd: rank died\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-len", "x"], "length: found 'x'"),
        (["--concurrency", "1,none"], "--concurrency: found '1,none'"),
        (["--rate", "-1"], "--rate: found -1.0"),
        (["--extra-body", "[]"], "--extra-body: found '[]'"),
    ],
)
def test_bad_load(run: Run, arguments: list[str], message: str) -> None:
    code, _, err = run("bench", "serve", *arguments)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1

"""The demo, `python -m pd.bench.demo [SPEC]`: the real thing, once, with figures.

Starts `pd serve` on a free port, streams a completion, says where the time went and what moved
between the workers, sends the prompt again to show the prefix hit, and stops the server. Exits 0
only if all of that happened; else it prints why, with the end of the server's log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from pd.bench.server import Server, ServerError
from pd.cost import format_bytes
from pd.http_client import HttpError, get_json, stream_json

MAX_TOKENS = 48

# Charles Darwin, "On the Origin of Species" (1859), introduction; in the public domain.
PROMPT = """\
When on board H.M.S. 'Beagle,' as naturalist, I was much struck with certain facts in the \
distribution of the inhabitants of South America, and in the geological relations of the present \
to the past inhabitants of that continent. These facts seemed to me to throw some light on the \
origin of species--that mystery of mysteries, as it has been called by one of our greatest \
philosophers. On my return home, it occurred to me, in 1837, that something might perhaps be \
made out on this question by patiently accumulating and reflecting on all sorts of facts which \
could possibly have any bearing on it. After five years' work I allowed myself to speculate on \
the subject, and drew up some short notes; these I enlarged in 1844 into a sketch of the \
conclusions, which then seemed to me probable: from that period to the present day I have \
steadily pursued the same object. I hope that I may be excused for entering on these personal \
details, as I give them to show that I have not been hasty in coming to a decision.

My work is now nearly finished; but as it will take me two or three more years to complete it, \
and as my health is far from strong, I have been urged to publish this Abstract. I have more \
especially been induced to do this, as Mr. Wallace, who is now studying the natural history of \
the Malay archipelago, has arrived at almost exactly the same general conclusions that I have on\
"""


class DemoError(RuntimeError):
    """The demo did not go as it should; one line."""


@dataclasses.dataclass(slots=True)
class Answer:
    text: str
    num_prompt: int
    num_output: int
    timings: dict[str, Any]
    ttft_s: float
    """As the client saw it."""
    total_s: float


def complete(url: str, model: str, prompt: str, console: Console) -> Answer:
    """Stream one greedy completion, printing it as it comes. Raises HttpError, DemoError."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_timings": True,
    }
    start = time.perf_counter()
    first: float | None = None
    parts: list[str] = []
    timings: dict[str, Any] = {}
    usage: dict[str, Any] = {}
    for event in stream_json(f"{url}/v1/completions", body):
        timings = event.get("timings") or timings
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            if choice["text"]:
                first = first or time.perf_counter()
                parts.append(choice["text"])
                console.out(choice["text"], end="", highlight=False)
    console.print()
    if first is None:
        raise DemoError("the answer is empty")
    end = time.perf_counter()
    num_prompt, num_output = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
    return Answer("".join(parts), num_prompt, num_output, timings, first - start, end - start)


def report(answer: Answer) -> list[str]:
    """Where one answer's time and bytes went, a line each."""
    timings = answer.timings

    def ms(name: str) -> str:
        return f"{timings.get(name, 0.0) * 1000:9.1f} ms"

    per_token = (answer.total_s - answer.ttft_s) / max(1, answer.num_output - 1)
    path = f"{timings.get('prefill_replica') or '-'} -> {timings.get('decode_replica') or '-'}"
    lines = [
        f"prompt        {answer.num_prompt:9} tokens, {answer.num_output} out, {path}",
        f"queue         {ms('queue_s')}",
        f"prefill       {ms('prefill_s')}",
        f"transfer      {ms('transfer_s')}, {ms('transfer_exposed_s').strip()} of it not hidden",
        f"first token   {answer.ttft_s * 1000:9.1f} ms",
        f"per token     {per_token * 1000:9.1f} ms",
        f"total         {answer.total_s * 1000:9.1f} ms",
        moved(timings),
    ]
    cached = [timings.get(f"cached_tokens_{role}", 0) for role in ("decode", "prefill")]
    lines.append(f"from cache    {cached[0]:9} tokens on decode, {cached[1]} on prefill")
    return lines


def moved(timings: dict[str, Any]) -> str:
    size, seconds = timings.get("bytes_moved", 0), timings.get("transfer_s", 0.0)
    pages, descriptors = timings.get("pages_moved", 0), timings.get("descriptors", 0)
    rate = f" at {size / seconds / 1e9:.2f} GB/s" if size and seconds else ""
    return f"moved         {pages:9} pages, {format_bytes(size)}, {descriptors} descriptors{rate}"


def run(spec: Path, console: Console) -> None:
    console.print(f"[bold]pd serve {spec}[/bold]", highlight=False)
    start = time.monotonic()
    server = Server(spec)
    try:
        url = server.wait_ready(console)
        model = get_json(f"{url}/v1/models")["data"][0]["id"]
        seconds = time.monotonic() - start
        console.print(f"{model} at {url}, ready after {seconds:.1f} s\n", highlight=False)
        console.print(f"... {PROMPT[-90:]}", style="dim", highlight=False, markup=False, end="")
        first = complete(url, model, PROMPT, console)
        _print_lines("where the time went", report(first), console)
        console.print("[bold]the same prompt again[/bold]")
        again = complete(url, model, PROMPT, console)
        _print_lines("where the time went", report(again), console)
        if again.text != first.text:
            raise DemoError("the same prompt gave another answer")
        console.print(
            f"first token: {first.ttft_s * 1000:.0f} ms, then {again.ttft_s * 1000:.0f} ms; moved "
            f"{format_bytes(first.timings.get('bytes_moved', 0))}, then "
            f"{format_bytes(again.timings.get('bytes_moved', 0))}",
            highlight=False,
        )
        with console.status("stopping"):
            server.stop()
        console.print("stopped")
    except BaseException as error:
        with console.status("stopping"), contextlib.suppress(ServerError):
            server.stop()
        if not isinstance(error, KeyboardInterrupt):
            console.print("\nthe server's last lines:", style="dim")
            for line in server.last_lines:
                console.print(f"  {line}", style="dim", highlight=False, markup=False)
        raise


def _print_lines(title: str, lines: list[str], console: Console) -> None:
    console.print(f"\n[bold]{title}[/bold]")
    for line in lines:
        console.print(f"  {line}", highlight=False)
    console.print()


def main() -> int:
    arguments = sys.argv[1:]
    if len(arguments) > 1 or arguments[:1] == ["--help"]:
        print("usage: python -m pd.bench.demo [SPEC]", file=sys.stderr)
        return 2
    console = Console(soft_wrap=True)
    try:
        run(Path(arguments[0] if arguments else "examples/local.yaml"), console)
    except (DemoError, ServerError, HttpError, KeyError, IndexError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

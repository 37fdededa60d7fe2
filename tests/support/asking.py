"""Clients that ask one request after the other, while something happens to the cluster."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import requests
import torch
from real_cluster import Cluster
from reference_model import ReferenceModel

from pd.http_client import HttpError

NEAR_TIE = 1e-4
"""Two logits so close may change places with the order of a sum in float32."""
Answered: TypeAlias = list[tuple[list[int], list[int]]]
"""(prompt, tokens)"""


@contextmanager
def keep_asking(
    num_clients: int,
    ask: Callable[[random.Random], tuple[list[int], list[int]]],
    may_fail: Callable[[float], bool] = lambda began: False,
) -> Iterator[Answered]:
    """`ask` gives a prompt and its answer. What fails ends the test, but for requests that may,
    by when they began (monotonic)."""
    over = threading.Event()
    problems: list[str] = []
    answered: Answered = []

    def work(number: int) -> None:
        rng = random.Random(number)
        while not over.is_set():
            began = time.monotonic()
            try:
                answered.append(ask(rng))
            except (requests.RequestException, AssertionError, HttpError, OSError) as error:
                if not may_fail(began):
                    problems.append(str(error))
                    return
                time.sleep(0.2)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(num_clients)]
    for thread in threads:
        thread.start()
    try:
        yield answered
    finally:
        over.set()
        for thread in threads:
            thread.join(300)
    assert not problems, problems[0]
    assert answered


def short_request(
    cluster: Cluster, text: Sequence[int] | None = None
) -> Callable[[random.Random], tuple[list[int], list[int]]]:
    """Up to 200 tokens in, of `text` or any, and 60 out, not streamed."""

    def ask(rng: random.Random) -> tuple[list[int], list[int]]:
        length = rng.randrange(5, 200)
        if text is None:
            prompt = [rng.randrange(256) for _ in range(length)]
        else:
            begin = rng.randrange(len(text) - length)
            prompt = list(text[begin : begin + length])
        return prompt, cluster.complete(prompt, rng.randrange(1, 60)).tokens

    return ask


def check_tokens(model: ReferenceModel, answered: Answered) -> None:
    torch.set_num_threads(1)  # the cluster may still be busy
    for prompt, tokens in answered:
        gap = model.gap(prompt, tokens)
        assert gap < NEAR_TIE, f"{len(prompt)} tokens, then {tokens}: {gap} below the best"

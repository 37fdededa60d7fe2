"""Tickets: each number is drawn once, by whichever of two processes is first; and how a part of a
page is cut into shares."""

import multiprocessing
from multiprocessing.connection import Connection

import numpy as np
import pytest

from transfer.pulling import cut_part
from transfer.tickets import TicketFile, Tickets
from transfer.transport import PagePart, PeerError


def draw_all(file: TicketFile, connection: Connection) -> None:
    tickets = Tickets(file)
    connection.recv()
    drawn = []
    while (number := tickets.draw()) is not None:
        drawn.append(number)
    connection.send(drawn)


def test_each_number_is_drawn_once() -> None:
    tickets = Tickets()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=draw_all, args=(tickets.describe(), there), daemon=True)
    process.start()
    for number in range(2000):
        assert tickets.put(number)
    here.send("go")
    ours = []
    while (number := tickets.draw()) is not None:
        ours.append(number)
    theirs = here.recv()
    assert sorted(ours + theirs) == list(range(2000))
    assert ours == sorted(ours)
    assert theirs == sorted(theirs)
    process.join()
    tickets.close()
    tickets.close()
    assert tickets.draw() is None
    assert not tickets.put(1)


def test_those_of_a_closed_pipe_are_none() -> None:
    tickets = Tickets()
    opened = Tickets(tickets.describe())
    tickets.put(7)
    file = tickets.describe()
    tickets.close()
    assert opened.draw() == 7
    assert opened.draw() is None
    opened.close()
    with pytest.raises(PeerError, match="pipe"):
        Tickets(file)


@pytest.mark.parametrize("max_bytes", [1, 64, 300, 4096, 10000, 1 << 20])
@pytest.mark.parametrize(
    "part",
    [
        PagePart(0, 0, 100_000),
        PagePart(7, 11, 61, 8, 61, 70),
        PagePart(5, 0, 9000, 3, 9001, 10000),
        PagePart(0, 0, 8192),
    ],
)
def test_a_part_is_cut_into_the_same_bytes(part: PagePart, max_bytes: int) -> None:
    def places(cut: PagePart) -> np.ndarray:
        run = np.arange(cut.length)
        return np.concatenate(
            [
                np.stack(
                    [
                        cut.source_offset + k * cut.source_stride + run,
                        cut.target_offset + k * cut.target_stride + run,
                    ]
                )
                for k in range(cut.count)
            ],
            axis=1,
        )

    cuts = cut_part(part, max_bytes)
    np.testing.assert_array_equal(
        np.concatenate([places(cut) for cut in cuts], axis=1), places(part)
    )
    assert all(cut.page_bytes < max_bytes + 4096 for cut in cuts)

"""The parts of the benchmark that its figures rest on; what it measures is not a matter for tests."""

import socket
import threading
from collections.abc import Iterator
from xml.etree import ElementTree

import pytest

import scripts.benchmark.rows  # noqa: F401 - fills ROWS
from scripts.benchmark.link import Link
from scripts.benchmark.report import chart
from scripts.benchmark.results import ROWS, Result, Row, Sample

PAYLOAD = bytes(range(256)) * 4096


@pytest.fixture
def echo() -> Iterator[int]:
    """Serve, on the port given, connections that get back what they sent once they have sent it all."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.sendall(read_all(connection))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def read_all(connection: socket.socket) -> bytes:
    received = bytearray()
    while data := connection.recv(1 << 16):
        received += data
    return bytes(received)


@pytest.mark.parametrize(("round_trip", "rate"), [(0.0, 0.0), (0.02, 0.0), (0.0, 20e6)])
def test_the_link_passes_every_byte_and_the_end_of_the_stream(
    echo: int, round_trip: float, rate: float
) -> None:
    with Link(echo) as link:
        link.set(round_trip, rate)
        with socket.create_connection(("127.0.0.1", link.port), timeout=20) as client:
            client.sendall(PAYLOAD)
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == PAYLOAD


def result(*samples: Sample, goal: float = 1.0, error: str | None = None) -> Result:
    row = Row("name", "a < b", "peer", goal, "x", lambda _: iter(samples))
    return Result(row, row.title, row.peer, list(samples), error)


def test_the_figure_with_a_peer_is_the_median_of_the_ratios_of_each_repetition() -> None:
    measured = result(Sample(1.0, 2.0), Sample(9.0, 3.0), Sample(4.0, 4.0))
    assert measured.figures == [0.5, 3.0, 1.0]
    assert measured.median == 1.0
    assert (measured.ours, measured.theirs) == (4.0, 3.0)


def test_a_goal_is_met_up_to_the_goal_itself_and_never_by_a_row_that_failed() -> None:
    assert result(Sample(2.0), goal=2.0).met
    assert not result(Sample(2.1), goal=2.0).met
    assert not result(Sample(1.0), goal=2.0, error="cut short").met


def test_the_chart_shows_every_row_also_where_there_is_nothing_to_draw() -> None:
    drawn = chart([result(Sample(0.0), goal=0.0), result(error="failed"), result(Sample(3.0, 1.0))])
    texts = [element.text for element in ElementTree.fromstring(drawn).iter() if element.tag.endswith("text")]
    assert texts.count("a < b") == 3
    assert "failed" in texts


def test_every_row_says_what_is_measured() -> None:
    assert [name for name, row in ROWS.items() if not row.measure.__doc__] == []

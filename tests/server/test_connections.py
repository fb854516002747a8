"""What a connection may cost: clients that send nothing, little, or too many."""

import socket
import threading
import time
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
import uvicorn

from helpers import server
from helpers.server import connections
from tests.series import wait_for


async def count(scope, receive, send):
    """Answer with the size of the body."""
    if scope["type"] != "http":
        return
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_TIMEOUT", 1)
    monkeypatch.setattr(connections, "STALLED", 1)
    config = uvicorn.Config(count, port=0, log_level="error", http=connections.Connection)
    serving = uvicorn.Server(config)
    thread = threading.Thread(target=serving.run)
    thread.start()
    assert wait_for(lambda: serving.started)
    yield serving.servers[0].sockets[0].getsockname()
    serving.should_exit = True
    thread.join()


@contextmanager
def connected(address):
    with socket.create_connection(address, timeout=10) as connection:
        yield connection


def drip(connection, parts, pause):
    """Send parts with pauses; tell whether the server took all of them."""
    try:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
    except ConnectionError:
        return False
    return True


def is_closed(connection):
    try:
        return connection.recv(100) == b""
    except ConnectionError:
        return True


def test_connection_that_sends_nothing_is_closed(address):
    with connected(address) as connection:
        assert is_closed(connection)


def test_headers_that_never_end_are_not_waited_for(address):
    with connected(address) as connection:
        header = [b"POST / HTTP/1.1\r\nHost: x\r\n", *[b"a: b\r\n"] * 15]
        assert not drip(connection, header, 0.3)


def test_second_request_of_a_connection_has_the_same_time(address):
    with connected(address) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in connection.recv(1000)
        assert not drip(connection, [b"GET / HTTP/1.1\r\n", *[b"a: b\r\n"] * 15], 0.3)


def test_body_that_stops_is_not_waited_for_and_a_slow_one_is(address):
    header = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n"
    with connected(address) as stopped, connected(address) as slow:
        stopped.sendall(header + b"12345")
        assert drip(slow, [header, *[b"x"] * 10], 0.4)
        assert b"\r\n10\r\n" in slow.recv(1000)
        assert is_closed(stopped)


def test_too_many_connections_keep_nobody_out(running_server):
    address = urlsplit(running_server.url)
    idle = [
        socket.create_connection((address.hostname, address.port), timeout=10)
        for _ in range(connections.MOST_CONNECTIONS + 50)
    ]
    try:
        assert server.answers(running_server.url)
        # The oldest went first.
        assert all(is_closed(connection) for connection in idle[:50])
        idle[-1].settimeout(0.1)
        with pytest.raises(TimeoutError):
            idle[-1].recv(1)
    finally:
        for connection in idle:
            connection.close()


def test_log_of_a_server_does_not_grow_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(connections, "MOST_LOGGED", 10_000)
    stream = connections.RotatingStream(tmp_path / "log.txt")
    for number in range(3_000):
        print(f"line {number}", file=stream)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 2
    assert max(sizes) <= 10_000
    assert (tmp_path / "log.txt").read_text().endswith("line 2999\n")

"""Claims about webserver.py, in the order of its sections.

What the server says on a connection is tested over a socket pair, in this process; the life of processes is tested
with real ones, signals and ports. `wsgiref.validate` and `http.client` are the honest referees, raw bytes the
dishonest client.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any, Callable, Iterator, NamedTuple

import pytest

import webserver

WEBSERVER = os.path.abspath(webserver.__file__)
PATIENCE = 20.0  # seconds: the bound on every wait


# ---- The harness ------------------------------------------------------------


class Answer(NamedTuple):
    """A response as a strict client reads it."""

    status: int
    fields: list[tuple[str, str]]
    body: bytes

    def get(self, name: str) -> str | None:
        """The one value of a field; it is an error of the server to send it twice."""
        values = [value for key, value in self.fields if key.lower() == name.lower()]
        assert len(values) < 2, "%s twice" % name
        return values[0] if values else None


def wait_until(condition: Callable[[], Any], what: str = "the condition", seconds: float = PATIENCE) -> Any:
    """Poll until the condition holds; return what it returned."""
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, "waited in vain for " + what
        time.sleep(0.01)


def hello(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """The smallest application; it reads no body."""
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "6")])
    return [b"hello\n"]


def echo(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """Answers with the method, the path and the body it was sent."""
    body = environ["wsgi.input"].read()
    text = "%s %s " % (environ["REQUEST_METHOD"], environ["PATH_INFO"])
    start_response("200 OK", [("Content-Type", "application/octet-stream")])
    return [text.encode("latin-1") + body]


@contextlib.contextmanager
def connected(application: Any = echo, **options: Any) -> Iterator[socket.socket]:
    """The client's end of a connection that the server serves in a thread; on leaving, the server must have ended."""
    client, server = socket.socketpair()
    client.settimeout(PATIENCE)
    activity = webserver.Activity(*webserver.make_scoreboard(1), 0)
    settings = webserver.Options(**{"access_log": "off", **options})
    arguments = (application, settings, server, ("192.0.2.7", 4711), activity)
    thread = threading.Thread(target=webserver.serve_connection, args=arguments, daemon=True)
    thread.start()
    try:
        yield client
    finally:
        client.close()
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server does not end"


def receive_all(client: socket.socket) -> bytes:
    """All bytes until the server closes."""
    pieces = []
    with contextlib.suppress(ConnectionResetError):
        while True:
            piece = client.recv(65536)
            if not piece:
                break
            pieces.append(piece)
    return b"".join(pieces)


def exchange(*pieces: bytes, application: Any = echo, **options: Any) -> bytes:
    """Send the pieces one by one, end our side, and return all that the server says."""
    with connected(application, **options) as client:
        answers = []
        reader = threading.Thread(target=lambda: answers.append(receive_all(client)), daemon=True)
        reader.start()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may refuse before it has all
            for piece in pieces:
                client.sendall(piece)
            client.shutdown(socket.SHUT_WR)
        reader.join(PATIENCE)
        assert answers, "the server neither answers nor closes"
        return answers[0]


def parse_answers(data: bytes, *methods: str) -> list[Answer]:
    """The responses to requests of these methods (GET for those not named), read as RFC 9112 §6.3 tells a client."""
    answers = []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        assert end, "no end of the head: %r" % head[:200]
        lines = head.decode("latin-1").split("\r\n")
        assert re.fullmatch(r"HTTP/1\.1 [1-9][0-9][0-9] [^\r\n]*", lines[0]), lines[0]
        fields = []
        for line in lines[1:]:
            name, colon, value = line.partition(":")
            assert colon and re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name), line
            fields.append((name, value.strip(" \t")))
        answer = Answer(int(lines[0][9:12]), fields, b"")
        method = methods[len([a for a in answers if a.status >= 200])] if len(answers) < len(methods) else "GET"
        body, data = split_body(answer, data, method)
        answers.append(answer._replace(body=body))
    return answers


def split_body(answer: Answer, data: bytes, method: str) -> tuple[bytes, bytes]:
    """The body of the answer, and the bytes behind it."""
    length, coding = answer.get("Content-Length"), answer.get("Transfer-Encoding")
    assert length is None or coding is None, "both framings"
    if answer.status < 200 or answer.status in (204, 304) or method == "HEAD":
        return b"", data
    if length is not None:
        assert len(data) >= int(length), "a short body: %r" % data
        return data[: int(length)], data[int(length) :]
    if coding is None:
        return data, b""
    assert coding == "chunked"
    body = b""
    while True:
        size, end, data = data.partition(b"\r\n")
        assert end and re.fullmatch(rb"[0-9a-f]+", size), "not a chunk-size: %r" % size
        body, tail, data = body + data[: int(size, 16)], data[int(size, 16) :][:2], data[int(size, 16) + 2 :]
        assert tail == b"\r\n", "a chunk cut short"
        if size == b"0":
            return body, data


def talk(*pieces: bytes, methods: tuple[str, ...] = (), application: Any = echo, **options: Any) -> list[Answer]:
    """The responses to what was sent."""
    return parse_answers(exchange(*pieces, application=application, **options), *methods)


class Running:
    """A server in a process of its own, started as a user would, from a folder that holds app.py."""

    def __init__(self, folder: Any, *words: str, app: str = "", port: int = 0, **environment: str) -> None:
        self.folder = str(folder)
        self.port = port or free_port()
        if app:
            with open(os.path.join(self.folder, "app.py"), "w") as file:
                file.write(textwrap.dedent(app))
        bind = [] if {"--bind", "-b"} & set(words) else ["--bind", "127.0.0.1:%d" % self.port]
        self.out, self.err = open(self.folder + "/out", "wb"), open(self.folder + "/err", "wb")
        self.process = subprocess.Popen(
            [sys.executable, WEBSERVER, *bind, *words, *(["app:app"] if app else [])], cwd=self.folder,
            stdin=subprocess.DEVNULL, stdout=self.out, stderr=self.err,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        )  # fmt: skip
        self.pid = self.process.pid

    def __enter__(self) -> Running:
        wait_until(lambda: self.process.poll() is not None or "serving on" in self.errors(), "the start")
        assert self.process.poll() is None, self.errors()
        return self

    def __exit__(self, *_: Any) -> None:
        family = [self.pid, *self.children()]
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        for pid in family:
            if self.process.poll() is None or pid != self.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait(PATIENCE)
        self.out.close()
        self.err.close()

    def output(self) -> str:
        """What it has written to stdout so far."""
        with open(self.folder + "/out", encoding="utf-8", errors="replace") as file:
            return file.read()

    def errors(self) -> str:
        """What it has written to stderr so far."""
        with open(self.folder + "/err", encoding="utf-8", errors="replace") as file:
            return file.read()

    def connect(self) -> socket.socket:
        """A connection to it."""
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE)

    def get(self, path: str = "/", **fields: str) -> Answer:
        """The response to a GET on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("GET", path, headers={"Connection": "close", **fields})
            response = connection.getresponse()
            return Answer(response.status, response.getheaders(), response.read())

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """Send the signal, and return the exit status."""
        self.process.send_signal(signum)
        return self.process.wait(PATIENCE)

    def children(self) -> list[int]:
        """The pids of its children, zombies included."""
        return [pid for pid, parent, _ in list_processes() if parent == self.pid]

    def zombies(self) -> list[int]:
        """The pids of its children that have ended and were not reaped."""
        return [pid for pid, parent, state in list_processes() if parent == self.pid and state.startswith("Z")]


def list_processes() -> list[tuple[int, int, str]]:
    """The pid, parent and state of every process."""
    rows = subprocess.run(["ps", "-eo", "pid=,ppid=,stat="], stdout=subprocess.PIPE, check=True).stdout.split(b"\n")
    return [(int(row[0]), int(row[1]), row[2].decode()) for row in map(bytes.split, rows) if row]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])



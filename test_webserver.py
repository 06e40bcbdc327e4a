"""Claims about webserver.py, in the order of its sections; what a rule of a standard demands is a row of a table.

Its promises, each with the tests that hold it to them:

1. It needs the standard library alone, no writable disk, no certain user, and may be PID 1:
   test_needs_the_standard_library_alone_and_no_writable_disk, test_as_pid_1_it_reaps_orphans_and_obeys_sigterm
2. A request that crashes, hangs, exits or wants too much memory ends its own connection and no other:
   test_a_crash_touches_its_connection_only, test_a_limit_of_memory_ends_the_request_that_exceeds_it,
   test_random_kills_under_load_cost_only_their_connections
3. Every wait has a deadline:
   test_a_hang_in_python_is_answered_504_with_its_stack_in_the_log, test_answers_408_wherever_a_request_stalls,
   test_what_ignores_the_deadline_is_killed_and_logged, test_the_deadlines_hold_over_tls
4. Malformed HTTP is refused and never repaired, and no application can split a response:
   test_refuses, test_understands_no_request_that_was_cut_short, test_refuses_bad_headers_and_names_the_culprit
5. SIGTERM answers what was accepted, and ends the server with 0 within a bound:
   test_sigterm_answers_every_kind_of_client_and_exits_with_0, test_the_graceful_timeout_kills_the_rest_and_says_so,
   test_sigterm_answers_what_waits_in_the_queue_of_the_kernel
6. SIGHUP loads new code and loses no request and no connection; what does not load changes nothing:
   test_reloads_under_load_without_one_failed_request, test_the_old_code_goes_on_when_the_new_does_not_load,
   test_a_reload_leaves_requests_in_hand_and_connections_at_rest_alone
7. A connection at rest costs a descriptor, not a process:
   test_a_thousand_connections_at_rest_cost_no_process, test_no_request_is_lost_at_the_moment_of_rest
8. There is no zombie:
   test_leaves_no_zombie_after_kill_9_of_waiting_children, test_a_soak_of_mixed_kinds_leaves_no_trace
9. What a first request loads is loaded once for all processes:
   test_a_warm_up_is_done_once_for_all_processes

What the server says on a connection is tested over a socket pair, in this process; the life of processes is tested
with real ones, signals and ports. `wsgiref.validate` and `http.client` are the honest referees, raw bytes the
dishonest client. `pytest -k "9112 and 6.3"` runs the rows of RFC 9112 §6.3.
"""

from __future__ import annotations

import base64
import bz2
import contextlib
import email.utils
import fcntl
import gzip
import hashlib
import http.client
import io
import json
import lzma
import operator
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap
import threading
import time
import types
import wsgiref.validate
from typing import Any, Callable, Iterator, NamedTuple
from urllib.parse import quote

import pytest

import webserver

WEBSERVER = os.path.abspath(webserver.__file__)
PATIENCE = 20.0  # seconds: the bound on every wait
SLACK = 4.0  # seconds that a busy machine may add to what takes one or two
pytest_plugins = [__name__]  # has a hook itself


def pytest_make_parametrize_id(val: Any, argname: str) -> str | None:
    """Name a row of the tables of requests by its reason, with the rule of the standard in full."""
    return re.sub(r"(?<!RFC )\b([0-9]{4}) §", r"RFC \1 §", val[-1]) if argname == "row" else None


# ---- The harness ------------------------------------------------------------


def wait_until(condition: Callable[[], Any], what: str = "the condition", seconds: float = PATIENCE) -> Any:
    """Poll until the condition holds; return what it returned."""
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, "waited in vain for " + what
        time.sleep(0.01)


def find(pattern: str, text: str) -> str:
    """The one group of the pattern, where it is first found in the lines of the text."""
    match = re.search(pattern, text, re.M)
    assert match, "no %s in %s" % (pattern, text)
    return match.group(1)


def rows(names: str, *table: Any) -> Any:
    """A test of every row; the last column says why, and names the row."""
    return pytest.mark.parametrize(names.split(", "), [row[:-1] for row in table], ids=[row[-1] for row in table])


# Requests


def head(line: bytes, *fields: bytes) -> bytes:
    """A head of these lines."""
    return b"\r\n".join((line, *fields, b"", b""))


def get(*fields: bytes, target: bytes = b"/", method: bytes = b"GET", version: bytes = b"HTTP/1.1") -> bytes:
    """A request with a good Host and these fields."""
    return head(b" ".join((method, target, version)), b"Host: h", *fields)


def post(*fields: bytes, body: bytes = b"abc") -> bytes:
    """A request with these fields and this body."""
    return get(*fields, method=b"POST") + body


def chunked(body: bytes) -> bytes:
    """A chunked request; the bytes are the chunked body as it goes over the wire."""
    return post(b"Transfer-Encoding: chunked", body=body)


GET = get()
HEAD = get(method=b"HEAD")
OLD = head(b"GET / HTTP/1.0")
KEPT = head(b"GET / HTTP/1.0", b"Connection: keep-alive")
NEXT = get(target=b"/next")  # what must, or must not, be answered behind another
CLOSE = b"Connection: close"
SMUGGLED = get(target=b"/smuggled")  # a body that must never be taken for a request
THREE = b"3\r\nabc\r\n0\r\n\r\n"
CLIENT_HELLO = b"\x16\x03\x01\x00\xc4\x01\x00\x00\xc0\x03\x03" + bytes(range(200, 232)) + b"\x20\x00\x04\x13\x01"


# Applications


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


def blocks(*items: Any) -> Iterator[Any]:
    """Yield the items, but raise those that are exceptions."""
    for item in items:
        if isinstance(item, BaseException):
            raise item
        yield item


def play(*steps: Any) -> Any:
    """An application: tuples are calls of start_response, bytes and str are written, exceptions raised, else returned.

    What is callable is called with the environ, and its result returned.
    """

    def application(environ: Any, start_response: Any) -> Any:
        write, result = None, None
        for step in blocks(*steps):
            if isinstance(step, tuple):
                write = start_response(step[0], step[1][:], *step[2:])
            elif isinstance(step, (bytes, str)):
                write(step)
            else:
                result = step(environ) if callable(step) else step
        return result

    return application


def later(*steps: Any) -> Any:
    """As `play`, but a generator: all of it happens in the iteration, and bytes are yielded."""

    def application(environ: Any, start_response: Any) -> Any:
        for step in blocks(*steps):
            if isinstance(step, tuple):
                start_response(step[0], step[1][:], *step[2:])
            else:
                yield step

    return application


def give(body: Any, *headers: tuple[str, str], status: str = "200 OK") -> Any:
    """An application without surprises; a callable body is made from the environ."""
    return play((status, [*headers]), body)


def route(application: Any) -> Any:
    """The application, and under /next one that says hello."""
    return lambda environ, start: (hello if environ["PATH_INFO"] == "/next" else application)(environ, start)


def stream(*items: Any) -> Callable[[Any], Any]:
    """A body that is a generator of these items."""
    return lambda environ: blocks(*items)


def endless(environ: Any) -> Iterator[bytes]:
    """A body without end."""
    return iter(lambda: b"x", b"")


def wrapped(make: Callable[[], Any]) -> Callable[[Any], Any]:
    """A body that is a file in wsgi.file_wrapper."""
    return lambda environ: environ["wsgi.file_wrapper"](make())


def sized(length: Any) -> tuple[str, str]:
    """A Content-Length."""
    return ("Content-Length", str(length))


PLAIN = ("Content-Type", "text/plain")
OK = ("200 OK", [PLAIN])
TROUBLE = (KeyError, KeyError("trouble"), None)
AGAIN = ("503 Again", [PLAIN], TROUBLE)
open_file: Any = open  # for the server to close


# Answers


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

    def framing(self) -> str:
        """What says where the body ends: a number, "chunked", or "close", also if there can be no body."""
        return self.get("Content-Length") or self.get("Transfer-Encoding") or "close"


def parse_answers(data: bytes, *methods: str) -> list[Answer]:
    """The responses to requests of these methods (GET for those not named), read as RFC 9112 §6.3 tells a client."""
    answers: list[Answer] = []
    while data:
        lines, end, data = data.partition(b"\r\n\r\n")
        assert end, "no end of the head: %r" % lines[:200]
        status, *fields = lines.decode("latin-1").split("\r\n")
        assert re.fullmatch(r"HTTP/1\.1 [1-9][0-9][0-9] [^\r\n]*", status), status
        parts = [re.fullmatch(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*?)[ \t]*", field) for field in fields]
        assert all(parts), "a malformed field in %r" % lines
        answer = Answer(int(status[9:12]), [(part.group(1), part.group(2)) for part in parts if part], b"")
        number = len([found for found in answers if found.status >= 200])
        body, data = split_body(answer, data, methods[number] if number < len(methods) else "GET")
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


def assert_cut(data: bytes) -> None:
    """The one answer is cut short, in a way that its client can tell."""
    assert data.startswith(b"HTTP/1.1 200 ") and data.count(b"HTTP/1.1 ") == 1
    with pytest.raises(AssertionError, match="a short body|a chunk cut short|not a chunk-size: b''"):
        parse_answers(data)


def receive_all(client: socket.socket) -> bytes:
    """All bytes until the server closes."""
    pieces = []
    with contextlib.suppress(ConnectionResetError):
        pieces.extend(iter(lambda: client.recv(65536), b""))
    return b"".join(pieces)


def receive_until(client: socket.socket, end: bytes) -> bytes:
    """The bytes that come until these are among them; the connection stays open."""
    data = b""
    while end not in data:
        piece = client.recv(65536)
        assert piece, "the connection ended in %r" % data
        data += piece
    return data


def receive_answer(client: socket.socket) -> Answer:
    """The one response on the connection, which must end after it."""
    data = receive_all(client)
    client.close()  # the server lingers for that
    (answer,) = parse_answers(data)
    return answer


def read_answer(client: socket.socket) -> Answer:
    """The response with a Content-Length that comes next on the connection, which stays open."""
    data = receive_until(client, b"\r\n\r\n")
    whole = data.index(b"\r\n\r\n") + 4 + int(find("(?i)^content-length: *([0-9]+)", data.decode("latin-1")))
    while len(data) < whole:
        piece = client.recv(whole - len(data))
        assert piece, "the connection ended in %r" % data
        data += piece
    return parse_answers(data)[0]


# Connections, in this process


@contextlib.contextmanager
def connected(application: Any = echo, orders: int = 0, **options: Any) -> Iterator[socket.socket]:
    """The client's end of a connection that the server serves in a thread; on leaving, the server must have ended."""
    client, server = socket.socketpair()
    client.settimeout(PATIENCE)
    webserver.limit_waits(server)
    settings = webserver.Options(**{"access_log": "off", **options})
    slot = webserver.Slot(webserver.Scoreboard(1))
    slot.board.order(orders, True)

    def serve_to_the_end() -> None:
        while webserver.serve_connection(application, settings, server, ("192.0.2.7", 4711), slot):
            select.select([server], [], [])  # at rest

    thread = threading.Thread(target=serve_to_the_end, daemon=True)
    thread.start()
    try:
        yield client
    finally:
        client.close()
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server does not end"


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


def talk(*pieces: bytes, methods: tuple[str, ...] = (), application: Any = echo, **options: Any) -> list[Answer]:
    """The responses to what was sent."""
    return parse_answers(exchange(*pieces, application=application, **options), *methods)


def ask(asked: bytes, application: Any, **options: Any) -> Answer:
    """The answer, when a second request follows at once: that is answered exactly if the first answer says it may."""
    method = asked.split(b" ")[0].decode()
    answer, *others = talk(asked, NEXT, methods=(method,), application=route(application), **options)
    said = (answer.get("Connection") or "").lower()
    persists = "close" not in said if b" HTTP/1.1\r\n" in asked else "keep-alive" in said
    assert [other.body for other in others] == [b"hello\n"] * persists
    stamp = answer.get("Date") or ""  # RFC 9110 §5.6.7 and §6.6.1; `get` refuses what comes twice
    assert re.fullmatch(r"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT", stamp) and answer.get("Server")
    date = email.utils.mktime_tz(email.utils.parsedate_tz(stamp) or (0,) * 10)
    assert " 1994 " in stamp or abs(date - time.time()) < SLACK
    return answer


class Served(NamedTuple):
    """What came of the bytes of one connection."""

    answers: list[Answer]  # interim responses left out
    requests: list[dict[str, Any]]  # the environs that the application was called with, the whole body under "body"
    access: list[str]  # lines of the access log
    errors: list[str]  # and of the error log

    def paths(self) -> list[str]:
        """What was asked for."""
        return [request["PATH_INFO"] for request in self.requests]


class Trickle(socket.socket):
    """The server's end of a connection on which bytes arrive in pieces of these sizes, then in ones of the last."""

    sizes: list[int]

    def _next(self, asked: int) -> int:
        size = self.sizes.pop(0) if len(self.sizes) > 1 else self.sizes[0]
        if 0 < asked < size and len(self.sizes) > 1:
            self.sizes.insert(0, size - asked)
        return min(asked or size, size)

    def recv(self, asked: int, flags: int = 0) -> bytes:
        """Receive no more than the piece."""
        return super().recv(self._next(asked), flags)

    def recv_into(self, buffer: Any, asked: int = 0, flags: int = 0) -> int:
        """Receive no more than the piece."""
        return super().recv_into(buffer, self._next(asked or len(buffer)), flags)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Interrupt a server that does not come back."""

    def interrupt(*_: Any) -> None:
        raise TimeoutError("the server hangs")

    handler = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


SLOT = webserver.Slot(webserver.Scoreboard(1))
READ_ALL = operator.methodcaller("read")


def serve(
    data: bytes,
    *sizes: int,
    read: Callable[[Any], bytes] = READ_ALL,
    peer: Any = ("192.0.2.7", 4711),
    deadline: float | None = None,
    **options: Any,
) -> Served:
    """Serve a connection whose client has sent all this and ended; no threads, nothing to wait for."""
    requests: list[dict[str, Any]] = []

    def record(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        requests.append({**environ, "body": read(environ["wsgi.input"])})
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]

    client, server = socket.socketpair()
    end = Trickle(fileno=server.detach())
    end.sizes = list(sizes) or [1 << 20]
    assert len(data) < 150000, "more than the buffers of a socket pair hold"
    client.sendall(data)
    client.shutdown(socket.SHUT_WR)
    settings = webserver.Options(**{"access_log": "combined", **options})
    transport = webserver.Transport(settings)
    SLOT.memo = b""
    with logged() as lines, bounded():
        webserver.serve_connection(transport.wrap(record), settings, end, peer, SLOT, deadline, transport)
    with client:
        methods = [request["REQUEST_METHOD"] for request in requests]
        answers = [answer for answer in parse_answers(receive_all(client), *methods) if answer.status >= 200]
    return Served(answers, requests, [text for fd, text in lines if fd == 1], [text for fd, text in lines if fd == 2])


def check_accepted(served: Served, seen: dict[str, Any], times: int = 1) -> None:
    """The application saw this, so many times or once where the connection closes, and nothing was refused."""
    times = 1 if "closes" in seen else times
    assert [answer.status for answer in served.answers] == [200] * times
    assert len(served.requests) == times and len(served.access) == times
    assert all("an underscore" in line for line in served.errors)  # the one remark about a request that is served
    for request, answer in zip(served.requests, served.answers):
        assert request["SERVER_NAME"] and request["SERVER_PORT"]  # PEP 3333: "can never be empty strings"
        for key, wanted in seen.items():
            if key != "closes":
                assert request.get(key) in (wanted if isinstance(wanted, tuple) else (wanted,)), key
        kept = ("keep-alive",) if request["SERVER_PROTOCOL"] == "HTTP/1.0" else ("keep-alive", None)
        assert answer.get("Connection") in (("close",) if "closes" in seen else kept), "persistence"


def check_refused(served: Served, statuses: Any, before: int = 0) -> None:
    """So many requests were answered, the next was refused in the right form, and nothing behind it was looked at."""
    assert len(served.requests) == before, "understood"
    assert [answer.status for answer in served.answers[:-1]] == [200] * before
    refusal = served.answers[-1]
    assert refusal.status in (statuses if isinstance(statuses, tuple) else (statuses,))
    assert refusal.get("Connection") == "close"
    assert (refusal.get("Content-Type") or "").split(";")[0] == "text/plain"
    reason = refusal.body.decode("ascii").strip().splitlines()[-1]
    assert 5 < len(reason) < 200, "a short reason"
    assert len(served.access) == before + 1
    assert not [line for line in served.errors if "underscore" not in line]  # which is logged for the first one only
    facts = read_log("combined", served.access[-1])
    assert facts["status"] == refusal.status and facts["detail"] and facts["detail"] in reason, "the reason in the log"


# Logs


@contextlib.contextmanager
def logged() -> Iterator[list[tuple[int, str]]]:
    """The lines that the server writes to its logs: the descriptor, the text."""
    lines: list[tuple[int, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(webserver, "write_line", lambda fd, line: lines.append((fd, line)))
        yield lines


QUOTED = r'"(?P<%s>(?:[^"\\]|\\.)*)"'
COMBINED = (
    r"(?P<client>192\.0\.2\.7|-) - - \[\d\d/[A-Z][a-z]{2}/\d{4}(?::\d\d){3} [+-]\d{4}\] %s (?P<status>\d{3})"
    r" (?P<bytes>\d+|-) %s %s (?P<seconds>\d+\.\d+)(?: %s)?" % tuple(
        QUOTED % name for name in ("request", "referer", "user_agent", "detail"))
)  # fmt: skip


def read_log(style: str, line: str) -> dict[str, Any]:
    """The facts that a line of the access log states."""
    assert line.isprintable(), line
    if style == "json":
        return dict(json.loads(line))
    match = re.fullmatch(COMBINED, line)
    assert match, line
    texts = {name: text and text.encode("ascii").decode("unicode_escape") for name, text in match.groupdict().items()}
    return {**texts, "status": int(texts["status"]), "bytes": int(texts["bytes"].replace("-", "0"))}


@pytest.fixture
def log() -> Iterator[Callable[[int], list[str]]]:
    """The lines that the server wrote to a descriptor."""
    with logged() as lines:
        yield lambda fd: [line for number, line in lines if number == fd]


@pytest.fixture
def quick(monkeypatch: Any) -> None:
    """A server in this process looks at its deadlines ten times as often."""
    monkeypatch.setattr(webserver, "ONE_SECOND", struct.pack("@ll", 0, 100_000))


@pytest.fixture
def tcp(monkeypatch: Any) -> list[Any]:
    """Connects the harness's client and server by TCP: a reset is not to be seen on a Unix socket. The addresses."""
    addresses = []

    def pair() -> tuple[socket.socket, socket.socket]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            addresses.append(listener.getsockname())
            client = socket.create_connection(addresses[-1], PATIENCE)
            return client, listener.accept()[0]

    monkeypatch.setattr(socket, "socketpair", pair)
    return addresses


# Servers, in processes of their own

PROGRAM = (sys.executable, WEBSERVER)
on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
LOST = (ConnectionError, http.client.HTTPException)  # how a client sees that its connection was cut

# An application that runs the code in its query, so that each claim shows its own; the answer is the pid unless the
# code sets one. At its import it leaves what a child must not repeat.
RUNS_QUERY = """
    import atexit, os, random, sys, time
    from urllib.parse import unquote

    print("imported")
    atexit.register(lambda: os.write(1, b"inherited by %d\\n" % os.getpid()))

    def app(environ, start_response):
        names = {"environ": environ, "answer": None, "os": os, "time": time}
        exec(unquote(environ["QUERY_STRING"]), names)
        answer = os.getpid() if names["answer"] is None else names["answer"]
        start_response("200 OK", [("Content-Type", "text/plain")])
        return answer if hasattr(answer, "close") else [str(answer).encode()]
"""
UNTIL_GO = "while not os.path.exists('go'): time.sleep(0.01)\n"  # hold a request until the test says go
HOLDING = "open('held-%d' % os.getpid(), 'w').close()\n"  # say so by a name in the folder
HELD = HOLDING + UNTIL_GO

# One that gives the same answer to everything.
ANSWERS = """
    def app(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"%s"]
"""


class Running:
    """A server in a process of its own, started as a user would, from a folder that holds app.py."""

    def __init__(
        self,
        folder: Any,
        *words: str,
        app: str = "",
        bind: str | None = None,
        port: int = 0,
        argv: Any = PROGRAM,
        popen: Any = None,
        **environment: str,
    ) -> None:
        self.folder = str(folder)
        self.port = port or free_port()
        if app:
            write_file(os.path.join(self.folder, "app.py"), app)
        address = "127.0.0.1:%d" % self.port if bind is None else bind
        command = [*argv, *(["--bind", address] if address else []), *words, *(["app:app"] if app else [])]
        with open(self.folder + "/out", "wb") as out, open(self.folder + "/err", "wb") as err:
            options = make_options(self.folder, popen, environment)
            self.process = subprocess.Popen(command, stdout=out, stderr=err, **options)
        self.pid = self.process.pid

    def __enter__(self) -> Running:
        wait_until(lambda: self.process.poll() is not None or "serving on" in self.errors(), "the start")
        assert self.process.poll() is None, self.errors()
        return self

    def __exit__(self, *_: Any) -> None:
        self.go()
        family = self.children()
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            self.process.kill()
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(PATIENCE)

    def output(self) -> str:
        """What it has written to stdout so far."""
        return read_file(self.folder + "/out")

    def errors(self) -> str:
        """What it has written to stderr so far."""
        return read_file(self.folder + "/err")

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

    def answers(self, text: str) -> bool:
        """The application answers with that on a new connection."""
        return self.get().body == text.encode()

    def run(self, code: str, path: str = "/run") -> str:
        """The answer of RUNS_QUERY to this code, on a connection of its own."""
        answer = self.get(make_target(code, path))
        assert answer.status == 200, self.errors()
        return answer.body.decode()

    def send(self, code: str = "", *fields: bytes, path: str = "/run", method: bytes = b"GET") -> socket.socket:
        """A connection on which the request for this code was sent; persistent unless a field says otherwise."""
        client = self.connect()
        client.sendall(get(*fields, target=make_target(code, path).encode(), method=method))
        return client

    def go(self) -> None:
        """Let all requests go on that wait in UNTIL_GO."""
        write_file(self.folder + "/go", "")

    def wait_held(self, number: int = 1) -> list[int]:
        """Wait until so many requests are held in the application; the pids of their processes."""

        def find_held() -> list[int]:
            pids = [int(name[5:]) for name in os.listdir(self.folder) if name.startswith("held-")]
            return pids if len(pids) == number else []

        return list(wait_until(find_held, "the held requests"))

    def wait_for_log(self, pattern: str) -> str:
        """The line on stderr that holds the pattern."""
        expression = re.compile("^.*(?:%s).*$" % pattern, re.M | re.I)
        wait_until(lambda: expression.search(self.errors()) or self.process.poll() is not None, pattern)
        found = expression.search(self.errors())
        assert found, "the server has ended: " + self.errors()
        return found.group()

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

    def leaves_no_zombie(self) -> bool:
        """Every child that is a zombie now is reaped soon."""
        found = set(self.zombies())
        return not found or bool(wait_until(lambda: not found.intersection(self.zombies()), "the reaper", SLACK))

    def wait_end(self, pid: Any) -> None:
        """Wait until the process has ended: the connection that it has served, if still open, is at rest then."""
        wait_until(lambda: int(pid) not in self.children(), "the end of the process")

    def wait_spare(self) -> None:
        """Wait until nothing is left but the one process that waits for a connection."""
        wait_until(lambda: len(self.children()) == 1 and not self.zombies(), "one spare and no zombie")


def run_command(folder: Any, *words: str, argv: Any = PROGRAM, popen: Any = None, **environment: str) -> Any:
    """What a command ends with that does not go on to serve."""
    options = make_options(folder, popen, environment)
    return subprocess.run([*argv, *words], capture_output=True, text=True, timeout=PATIENCE, **options)


def make_options(folder: Any, popen: Any, environment: dict[str, str]) -> dict[str, Any]:
    """The options of Popen for a program that runs in the folder."""
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return {"cwd": str(folder), "stdin": subprocess.DEVNULL, "env": env, **(popen or {})}


def make_target(code: str, path: str = "/run") -> str:
    """The target that makes RUNS_QUERY run the code."""
    return path + "?" + quote(textwrap.dedent(code))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_file(path: Any, text: str) -> None:
    """Put the text there at one stroke, as an editor does."""
    with open(str(path) + ".new", "w") as file:
        file.write(textwrap.dedent(text))
    os.replace(str(path) + ".new", str(path))


def read_file(path: Any) -> str:
    """The text that is there so far."""
    with open(str(path), encoding="utf-8", errors="replace") as file:
        return file.read()


def list_processes() -> list[tuple[int, int, str]]:
    """The pid, parent and state of every process."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid=,stat="], stdout=subprocess.PIPE, check=True).stdout.decode()
    return [(int(pid), int(parent), state) for pid, parent, state in map(str.split, table.splitlines())]


def is_alive(pid: int) -> bool:
    """The process runs; a zombie does not."""
    return any(found == pid and not state.startswith("Z") for found, _, state in list_processes())


def wait_stopped(pid: int) -> None:
    """Wait until SIGSTOP has stopped the process."""
    wait_until(lambda: any(found == pid and state[0] == "T" for found, _, state in list_processes()), "the stop")


def list_files(pid: int) -> list[str]:
    """What the open file descriptors of the process are (Linux)."""
    links = []
    for name in os.listdir("/proc/%d/fd" % pid):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink("/proc/%d/fd/%s" % (pid, name)))
    return sorted(link for link in links if link != "/proc/%d/stat" % pid)  # there os.fork looks for threads


def cpu_seconds(pid: int) -> float:
    """The CPU time that the process has used (Linux)."""
    fields = read_file("/proc/%d/stat" % pid).rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ask_at(address: Any, family: int = socket.AF_INET, code: str = "") -> Answer:
    """The response to a GET on a connection to the address, which may be a path; RUNS_QUERY runs the code."""
    with socket.socket(family) as client:
        client.settimeout(PATIENCE)
        client.connect(address)
        client.sendall(get(CLOSE, target=make_target(code).encode()))
        return receive_answer(client)


@contextlib.contextmanager
def closing(*clients: Any) -> Iterator[None]:
    """Close them all at the end, also when the claim is false."""
    try:
        yield
    finally:
        for client in clients:
            client.close()


def is_persistent(client: socket.socket) -> bool:
    """The server has not closed this connection."""
    try:
        client.settimeout(0.01)
        return client.recv(1, socket.MSG_PEEK) != b""
    except socket.timeout:
        return True
    except ConnectionError:
        return False
    finally:
        client.settimeout(PATIENCE)


@pytest.fixture(scope="module", autouse=True)
def heed_signals() -> None:
    """Undo what nohup, or `&` in a script, has set: the servers would inherit it, and ignore these signals."""
    for signum, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, 0), (signal.SIGQUIT, 0)):
        if signal.getsignal(signum) == signal.SIG_IGN:
            signal.signal(signum, handler)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: Any) -> Iterator[Running]:
    """One server for all claims that leave it as it was: which is itself a claim."""
    port = free_port()  # on all addresses, where IPv4 clients have mapped ones
    with Running(tmp_path_factory.mktemp("shared"), app=RUNS_QUERY, bind=":%d" % port, port=port) as server:
        yield server
        assert server.leaves_no_zombie() and server.process.poll() is None
        assert server.stop() == 0


# ---- 1. Options and limits --------------------------------------------------


def make_head(size: int) -> bytes:
    """A head of so many bytes, line ends and the empty line included."""
    lines = [b"X: ".ljust(6000, b"a")] * 10
    return get(*lines, b"Y: ".ljust(size - len(get(*lines)) - 2, b"b"))


def make_extensions(size: int) -> bytes:
    """A chunked body with so many bytes of extensions."""
    sizes = [1000] * (size // 1000 - 1) + [1000 + size % 1000]
    return b"".join(b"1" + b";".ljust(each_size, b"a") + b"\r\nx\r\n" for each_size in sizes) + b"0\r\n\r\n"


LIMITS = [
    ("MAX_REQUEST_LINE", 414, lambda n: get(target=b"/".ljust(n - 13, b"a")), "a long path"),
    ("MAX_REQUEST_LINE", 414, lambda n: get(target=b"/?".ljust(n - 13, b"q")), "a long query"),
    ("MAX_FIELD_LINE", 431, lambda n: get(b"X: ".ljust(n, b"a")), "a long value"),
    ("MAX_FIELD_LINE", 431, lambda n: get(b"X" * (n - 3) + b": y"), "a long name"),
    ("MAX_FIELD_LINE", 431, lambda n: get(b"X:".ljust(n - 1) + b"y"), "much white space"),
    ("MAX_FIELDS", 431, lambda n: get(*[b"X: y"] * (n - 1)), "the same field again and again"),
    ("MAX_FIELDS", 431, lambda n: get(*[b"X-%d: y" % i for i in range(n - 1)]), "many fields"),
    ("MAX_FIELDS", 431, lambda n: get(*[b"X_Y: y"] * (n - 1)), "many that are dropped"),
    ("MAX_FIELDS", (400, 431), lambda n: chunked(b"0\r\n" + b"X: y\r\n" * n + b"\r\n"), "trailers"),
    ("MAX_FIELD_LINE", (400, 431), lambda n: chunked(b"0\r\n" + b"X: ".ljust(n, b"a") + b"\r\n\r\n"), "a long trailer"),
    ("MAX_HEAD", 431, make_head, "a head of lines each within its limit"),
    ("MAX_CHUNK_LINE", 400, lambda n: chunked(b"1;".ljust(n, b"a") + b"\r\nx\r\n0\r\n\r\n"), "a long extension"),
    ("MAX_CHUNK_LINE", 400, lambda n: chunked(b'1;a="'.ljust(n - 1, b" ") + b'"\r\nx\r\n0\r\n\r\n'), "a long string"),
    ("MAX_CHUNK_EXTENSIONS", 400, lambda n: chunked(make_extensions(n)), "many extensions"),
]  # fmt: skip


@pytest.mark.parametrize("name, statuses, make, what", LIMITS, ids=[row[0] + " " + row[-1] for row in LIMITS])
def test_keeps_limits_to_the_byte(name: str, statuses: Any, make: Any, what: str) -> None:
    """At its value and one below a limit lets pass, one above it refuses; whole and in pieces."""
    limit = getattr(webserver, name)
    for sizes in ((), (99 if limit > 9999 else 1,), (1000,), (len(make(limit)) - 3, 2, 1 << 20)):
        check_accepted(serve(make(limit - 1) + make(limit), *sizes), {}, 2)
        check_refused(serve(make(limit + 1) + NEXT, *sizes), statuses)


def test_names_the_kind_of_excess_also_when_no_line_ever_ends() -> None:
    """RFC 9112 §3, RFC 6585 §5: 414 and 431 do not wait for a line end that may never come."""
    check_refused(serve(b"GET /" + b"a" * 100000, 1000), 414)
    check_refused(serve(get()[:-2] + b"X: " + b"a" * 100000, 1000), 431)
    check_refused(serve(get()[:-2] + b"X: y\r\n" * 20000, 1000), 431)
    check_refused(serve(b"G" * 100000, 1000), (400, 414, 501))
    check_refused(serve(chunked(b"1;" + b"a" * 100000), 1000), 400)
    check_refused(serve(chunked(b"0" * 100000), 1000), 400)
    check_refused(serve(chunked(b"0\r\nX: " + b"a" * 100000), 1000), (400, 431))
    check_refused(serve(chunked(b"0\r\n" + b"X: y\r\n" * 20000), 1000), (400, 431))


@pytest.mark.parametrize("limit", [0, 1, 64])
def test_limits_a_body_of_either_framing(limit: int) -> None:
    """RFC 9110 §15.5.14: at the limit and one below a body passes; 413 above, also in the middle of a chunked one."""

    def in_bytes(size: int) -> bytes:
        return chunked(b"1\r\nx\r\n" * size + b"0\r\n\r\n")

    def in_one(size: int) -> bytes:
        return chunked((b"%x\r\n%b\r\n" % (size, b"x" * size) if size else b"") + b"0\r\n\r\n")

    def at_once(size: int) -> bytes:
        return post(b"Content-Length: %d" % size, body=b"x" * size)

    for make in (in_bytes, in_one, at_once):
        for size in {max(limit - 1, 0), limit}:
            check_accepted(serve(make(size), limit_request_body=limit), {"body": b"x" * size})
        check_refused(serve(make(limit + 1) + NEXT, limit_request_body=limit), 413)
        check_refused(serve(make(limit + 1) + NEXT, 1, limit_request_body=limit), 413)
    check_refused(serve(chunked(b"fffffff\r\n"), limit_request_body=limit), 413)
    check_refused(serve(post(b"Content-Length: 99999999999"), limit_request_body=limit), 413)


# ---- 2 to 6. From bytes to environ ------------------------------------------
# A row is (the bytes, what becomes of them, why). Expectations were written from RFC 9110, 9112 and 3986 before the
# code was read. In what the application is to see, None is a key that must be absent and a tuple holds alternatives,
# all of them legal; so does a tuple of statuses. "closes" tells that the connection does not persist.
ONCE: dict[str, Any] = {"closes": True}


def fill(template: bytes, expected: Any, why: str, *values: bytes) -> list[Any]:
    """A row for each value, put in the place of %b; all of them for the same reason."""
    return [(template % value, expected, why) for value in values]


START = b"%b\r\nHost: h\r\n\r\n"
METHOD = b"%b / HTTP/1.1\r\nHost: h\r\n\r\n"
TARGET = b"GET %b HTTP/1.1\r\nHost: h\r\n\r\n"
VERSION = b"GET / %b\r\nHost: h\r\n\r\n"
HOST = b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n"
FIELD = b"GET / HTTP/1.1\r\nHost: h\r\n%b\r\n\r\n"
OLD_FIELD = b"GET / HTTP/1.0\r\nHost: h\r\n%b\r\n\r\n" + THREE
LENGTH = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %b\r\n\r\nabc"
CODING = b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: %b\r\n\r\n" + THREE
EXPECT = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nExpect: %b\r\n\r\nabc"
CHUNKED = b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n%b"
CHUNK_SIZE = CHUNKED % b"%b\r\nabc\r\n0\r\n\r\n"
TRAILER = CHUNKED % b"3\r\nabc\r\n0\r\n%b\r\n\r\n"

VALID_LINES = [
    (get(), {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "QUERY_STRING": "", "SCRIPT_NAME": "", "body": b"",
             "SERVER_PROTOCOL": "HTTP/1.1", "REQUEST_URI": "/", "HTTP_HOST": "h", "CONTENT_LENGTH": (None, ""),
             "CONTENT_TYPE": (None, ""), "HTTP_CONTENT_LENGTH": None}, "9112 §3: the plainest"),
    (b"\r\n" + get(), {"PATH_INFO": "/"}, "9112 §2.2: an empty line before the request-line is ignored"),
    (get(method=b"BREW"), {"REQUEST_METHOD": "BREW"}, "9110 §16.1: methods are open-ended; the application decides"),
    (get(method=b"get"), {"REQUEST_METHOD": "get"}, "9110 §9.1: a method is case-sensitive, this is another one"),
    (get(method=b"!#$%&'*+-.^_`|~09azAZ"), {"REQUEST_METHOD": "!#$%&'*+-.^_`|~09azAZ"}, "9110 §5.6.2: every tchar"),
    (get(method=b"TRACE"), {"REQUEST_METHOD": "TRACE"}, "9110 §9.3.8: an ordinary request without content"),
    (get(version=b"HTTP/1.9"), {"SERVER_PROTOCOL": ("HTTP/1.1", "HTTP/1.9")},
     "9110 §2.5: a higher minor is 1.1; 9112 §9.3: it persists as well"),
    (OLD, {"SERVER_PROTOCOL": "HTTP/1.0", "HTTP_HOST": None, **ONCE}, "9112 §3.2: Host is not required in 1.0"),
    (get(target=b"/a/../b//c;d=e"), {"PATH_INFO": "/a/../b//c;d=e"}, "9112 §3.2.1: the path is not normalised"),
    (get(target=b"//x.example/a"), {"PATH_INFO": "//x.example/a", "HTTP_HOST": "h"}, "9112 §3.2.1: still a path"),
    (get(target=b"////foo"), {"PATH_INFO": "////foo"}, "9112 §3.2.1: empty segments are segments (llhttp)"),
    (get(target=b"/%41%2F%3f%C3%A9%ff"), {"PATH_INFO": "/A/?\xc3\xa9\xff", "REQUEST_URI": "/%41%2F%3f%C3%A9%ff"},
     "PEP 3333: decoded, latin-1; 3986 §2.1: hex of either case"),
    (get(target=b"/%3Fa?b?c"), {"PATH_INFO": "/?a", "QUERY_STRING": "b?c"}, "3986 §3.4: the first raw ? begins it"),
    (get(target=b"/a;b=c,d+e"), {"PATH_INFO": "/a;b=c,d+e"}, "3986 §3.3: no form decoding in a path"),
    (get(target=b"/%2541"), {"PATH_INFO": "/%41"}, "3986 §2.4: never decoded twice"),
    (get(target=b"/?"), {"PATH_INFO": "/", "QUERY_STRING": ""}, "3986 §3.4: an empty query"),
    (get(target=b"/p?a=%2f+?b/c&d"), {"PATH_INFO": "/p", "QUERY_STRING": "a=%2f+?b/c&d",
     "REQUEST_URI": "/p?a=%2f+?b/c&d"}, "3875 §4.1.7: the query is raw"),
    (get(target=b"/?u=http://x@y:z/"), {"QUERY_STRING": "u=http://x@y:z/"}, "3986 §3.4: all of it pchar"),
    (get(target=b"/:@!$&'()*+,;=-._~"), {"PATH_INFO": "/:@!$&'()*+,;=-._~"}, "3986 §3.3: every pchar"),
    (get(target=b'/"<>\\^`{|}'), {"PATH_INFO": '/"<>\\^`{|}'}, "visible ASCII passes: browsers send it"),
    (get(target=b"http://x.example/a?b"), {"HTTP_HOST": "x.example", "PATH_INFO": "/a", "QUERY_STRING": "b"},
     "9112 §3.2.2: the target's authority replaces a Host that differs"),
    (get(target=b"http://x.example:81"), {"HTTP_HOST": "x.example:81", "PATH_INFO": "/"}, "9110 §4.2.3: no path is /"),
    (get(target=b"HTTP://x.example?q"), {"HTTP_HOST": "x.example", "PATH_INFO": "/", "QUERY_STRING": "q"},
     "3986 §3.1: a scheme in either case (llhttp: no path, a query)"),
    (get(target=b"http://x:/"), {"HTTP_HOST": ("x:", "x")}, "3986 §3.2.3: a port may be empty"),
    (get(target=b"http://[::1]:8000/a"), {"HTTP_HOST": "[::1]:8000", "PATH_INFO": "/a"}, "3986 §3.2.2: IPv6"),
    (get(target=b"http://x/http://y/"), {"HTTP_HOST": "x", "PATH_INFO": "/http://y/"}, "3986 §3.3: a path with //"),
    (head(b"GET http://x/ HTTP/1.0"), {"HTTP_HOST": "x", **ONCE}, "9112 §3.2.2: also where no Host was sent"),
    (get(target=b"*", method=b"OPTIONS"), {"PATH_INFO": ("*", "", "/"), "REQUEST_METHOD": "OPTIONS"}, "9112 §3.2.4"),
]
VALID_FIELDS = [
    (get(b"X-Y: a"), {"HTTP_X_Y": "a"}, "PEP 3333: HTTP_ and the name"),
    (get(b"x-y:a"), {"HTTP_X_Y": "a"}, "9110 §5.1: names in any case; 9112 §5: OWS is optional"),
    (get(b"X: \t a \t b \t "), {"HTTP_X": "a \t b"}, "9112 §5.1: OWS around is no part of the value, within it is"),
    (get(b"X:"), {"HTTP_X": ""}, "9110 §5.5: a value may be empty"),
    (get(b"X: \t "), {"HTTP_X": ""}, "9112 §5.1: empty but for OWS"),
    (get(b"X: :a:b"), {"HTTP_X": ":a:b"}, "9112 §5: the first colon ends the name"),
    (get(b"X: \xe9\xa0\x80\xff"), {"HTTP_X": "\xe9\xa0\x80\xff"}, "9110 §5.5: obs-text; PEP 3333: latin-1"),
    (get(b"X: \xa0a\x85"), {"HTTP_X": "\xa0a\x85"}, "9112 §5.1: OWS is SP and HTAB, not all that str.strip() takes"),
    (get(b"X: a\x85Content-Length: 5"), {"HTTP_X": "a\x85Content-Length: 5", "CONTENT_LENGTH": (None, "")},
     "9112 §2.2: NEL ends no line"),
    (get(b'X: "a\\"b'), {"HTTP_X": '"a\\"b'}, "9110 §5.5: opaque to the server"),
    (get(b"!#$%&'*+-.^`|~09azAZ: a"), {"PATH_INFO": "/"}, "9110 §5.6.2: every tchar"),
    (get(b"X: a", b"Y: b", b"x: c"), {"HTTP_X": ("a,c", "a, c"), "HTTP_Y": "b"}, "9110 §5.2: joined in order"),
    (get(b"X:", b"X: b"), {"HTTP_X": (",b", ", b")}, "9110 §5.2: an empty line counts"),
    (get(b"Cookie: a=1", b"Cookie: b=2"), {"HTTP_COOKIE": "a=1; b=2"}, "6265 §5.4; 9113 §8.2.3: by a semicolon"),
    (get(b"X_Y: b"), {"HTTP_X_Y": None}, "dropped: it would pass for X-Y"),
    (get(b"X_Y: b", b"X-Y: a", b"X_y: c"), {"HTTP_X_Y": "a"}, "dropped: nor joined to it, wherever it stands"),
    (get(b"_: a", b"Content_Type: b/c"), {"HTTP__": None, "CONTENT_TYPE": (None, "")}, "dropped: nor for these"),
    (get(b"Content_Length: 5"), {"CONTENT_LENGTH": (None, ""), "body": b""}, "dropped: and frames nothing"),
    (get(b"Transfer_Encoding: chunked"), {"HTTP_TRANSFER_ENCODING": None, "body": b""}, "dropped: nor this"),
    (get(b"Content-Type: a/b; c=d"), {"CONTENT_TYPE": "a/b; c=d", "HTTP_CONTENT_TYPE": None},
     "3875 §4.1.3: without HTTP_"),
    (get(b"TE: trailers, gzip;q=0.5", b"Connection: TE"), {"HTTP_TE": "trailers, gzip;q=0.5"}, "9110 §10.1.4"),
    (get(b"Upgrade: websocket", b"Connection: Upgrade"), {"body": b""}, "9110 §7.8: a server may ignore Upgrade"),
    (get(b"Upgrade: h2c, HTTP/3.0", b"Connection: Upgrade, HTTP2-Settings", b"HTTP2-Settings: AAMAAABk"), {},
     "9113 §3.1: h2c is history"),
    (get(CLOSE), ONCE, "9112 §9.3"),
    (get(b"Connection: CLOSE"), ONCE, "9110 §7.6.1: options in any case"),
    (get(b"Connection: x,\tClose ,y"), ONCE, "9110 §5.6.1: a list, OWS around its commas"),
    (get(b"Connection:,,close,"), ONCE, "9110 §5.6.1.2: empty elements are ignored"),
    (get(b"Connection: keep-alive", b"X: y", b"connection: close"), ONCE, "9110 §5.3: several lines; 9112 §9.3"),
    (get(b"Connection: keep-alive, close"), ONCE, "9112 §9.3: close goes first, wherever it stands"),
    (get(b"Connection: close, keep-alive"), ONCE, "9112 §9.3: close goes first"),
    (get(b"Connection: closed"), {"HTTP_CONNECTION": "closed"}, "9110 §7.6.1: another option"),
    (get(b"Connection: not-close"), {}, "9110 §7.6.1: another option"),
    (get(b"Connection: close\xa0"), {}, "9110 §5.6.3: NBSP is no white space; another, bad, option"),
    (get(b"Connection:"), {}, "9110 §5.6.1: an empty list"),
    (get(b"Connection: host, content-length", b"Content-Length: 0"), {"HTTP_HOST": "h"}, "9110 §7.6.1: for proxies"),
    (get(b"Proxy-Connection: close"), {}, "9112 C.2.2: not a field of HTTP"),
    (get(b"Keep-Alive: timeout=1, max=1"), {}, "9112 C.2.2: ignored"),
    (get(version=b"HTTP/1.0"), ONCE, "9112 §9.3: 1.0 closes"),
    (head(b"GET / HTTP/1.0", b"Keep-Alive: timeout=5"), ONCE, "9112 C.2.2: Keep-Alive is not the option"),
    (KEPT, {"HTTP_HOST": None}, "9112 §9.3: but for keep-alive"),
    (get(b"Connection: Keep-Alive", version=b"HTTP/1.0"), {}, "9110 §7.6.1: options in any case"),
    (get(b"Connection: a, keep-alive", b"Connection: b", version=b"HTTP/1.0"), {}, "9112 §9.3"),
    (get(b"Connection: keep-alive, close", version=b"HTTP/1.0"), ONCE, "9112 §9.3: close goes first"),
    (get(b"Connection: keep-alive"), {}, "9112 §9.3: nothing new in 1.1"),
    *((HOST % value, {"HTTP_HOST": value.decode("latin-1")}, "9110 §7.2, 3986 §3.2.2: a good Host") for value in (
        b"h.example", b"H.EXAMPLE:80", b"h.", b"h:", b"127.0.0.1:8000", b"[::1]", b"[::1]:8000", b"[2001:DB8::7]",
        b"[::ffff:192.0.2.1]", b"[1:2:3:4:5:6:7:8]", b"a_b-c~d", b"%41.example", b"a!$&'()*+;=b", b"1",
        b"xn--e1a.example",
    )),
    (head(b"GET / HTTP/1.1", b"Host:\th \t"), {"HTTP_HOST": "h"}, "9112 §5.1: OWS"),
]
VALID_BODIES = [
    (post(b"Content-Length: 3"), {"body": b"abc", "CONTENT_LENGTH": "3", "HTTP_CONTENT_LENGTH": None},
     "9110 §8.6; 3875 §4.1.2: without HTTP_"),
    (post(b"content-length:3 \t"), {"body": b"abc", "CONTENT_LENGTH": "3"}, "9112 §5.1: OWS (llhttp)"),
    (post(b"Content-Length: 0003"), {"body": b"abc", "CONTENT_LENGTH": ("3", "0003")}, "9110 §8.6: 1*DIGIT"),
    (post(b"Content-Length: 3", b"Content-Length: 3"), {"body": b"abc", "CONTENT_LENGTH": "3"},
     "9110 §8.6 leaves a choice: here repeats must agree"),
    (post(b"Content-Length: 0", body=b""), {"body": b"", "CONTENT_LENGTH": "0"}, "9110 §8.6"),
    (post(body=b""), {"body": b"", "CONTENT_LENGTH": (None, "", "0")}, "9112 §6.3: no framing field, no body"),
    (get(b"Content-Length: 3") + b"abc", {"body": b"abc"}, "9110 §9.3.1: a body on GET is framed like any"),
    (get(b"Content-Length: 3", method=b"BREW") + b"abc", {"body": b"abc"}, "9112 §6.3: framing regardless of method"),
    (get(b"Content-Length: 3", version=b"HTTP/1.0") + b"abc", {"body": b"abc", **ONCE}, "9112 §6.2"),
    (post(b"Content-Length: 6", body=b"\r\n\0\n\xff\r"), {"body": b"\r\n\0\n\xff\r"}, "9112 §6: any octets"),
    (post(b"Content-Length: %d" % len(SMUGGLED), body=SMUGGLED), {"body": SMUGGLED, "PATH_INFO": "/"}, "9112 §6.3"),
    (post(b"Transfer-Encoding: CHUNKED", body=THREE), {"body": b"abc"}, "9112 §7: codings in any case"),
    (post(b"Transfer-Encoding:\t chunked \t", body=THREE), {"body": b"abc"}, "9112 §5.1: OWS"),
    (get(b"Transfer-Encoding: chunked", version=b"HTTP/1.2") + THREE, {"body": b"abc"}, "9110 §2.5: as in 1.1"),
    (get(b"Transfer-Encoding: chunked", CLOSE) + THREE, {"body": b"abc", **ONCE}, "9112 §9.6"),
    (post(b"Expect: 100-continue", b"Content-Length: 3"), {"body": b"abc"}, "9110 §10.1.1"),
    (post(b"expect: 100-Continue", b"Content-Length: 3"), {"body": b"abc"}, "9110 §10.1.1: in any case"),
    (post(b"Expect: 100-continue", b"Transfer-Encoding: chunked", body=THREE), {"body": b"abc"}, "9110 §10.1.1"),
    (get(b"Expect: 100-continue"), {"body": b""}, "9110 §10.1.1: without content there is nothing to wait for"),
    (get(b"Expect: 100-continue", b"Content-Length: 3", version=b"HTTP/1.0") + b"abc", {"body": b"abc", **ONCE},
     "9110 §10.1.1: ignored in 1.0"),
    *((chunked(body), {"body": b"abc", "CONTENT_LENGTH": "3", "HTTP_TRANSFER_ENCODING": None, "HTTP_X": None}, why)
      for body, why in (
        (THREE, "9112 §7.1"),
        (b"1\r\na\r\n2\r\nbc\r\n0\r\n\r\n", "9112 §7.1: several chunks"),
        (b"0003\r\nabc\r\n000\r\n\r\n", "9112 §7.1: chunk-size is 1*HEXDIG, last-chunk 1*\"0\""),
        (b"3;a\r\nabc\r\n0;b\r\n\r\n", "9112 §7.1.1: an extension without a value, also in the last"),
        (b"3;a=b;c=d\r\nabc\r\n0\r\n\r\n", "9112 §7.1.1: two of them"),
        (b'3;a="b;c\\"\t\xe9 =\\\\"\r\nabc\r\n0\r\n\r\n', "9112 §7.1.1, 9110 §5.6.4: a quoted-string"),
        (b'3;a=""\r\nabc\r\n0\r\n\r\n', "9110 §5.6.4: which may be empty"),
        (b"3\r\nabc\r\n0\r\nX: y\r\nZ:\r\n\r\n", "9112 §7.1.2: trailers are dropped"),
        (b"3\r\nabc\r\n0\r\nX_Y: \xe9 \t\r\n\r\n", "9112 §7.1.2: any that are field lines"),
    )),
    (chunked(b"A\r\n0123456789\r\n0\r\n\r\n"), {"body": b"0123456789"}, "9112 §7.1: hex in upper case"),
    (chunked(b"a\r\n0123456789\r\n0\r\n\r\n"), {"body": b"0123456789"}, "9112 §7.1: hex in lower case"),
    (chunked(b"5\r\n\r\n0\r\n\r\n0\r\n\r\n"), {"body": b"\r\n0\r\n"}, "9112 §7.1: data that looks like framing"),
    (chunked(b"0\r\n\r\n"), {"body": b"", "CONTENT_LENGTH": "0"}, "9112 §7.1: nothing at all"),
    (chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)), {"body": SMUGGLED}, "9112 §7.1"),
]
REFUSED_LINES = [
    (b"GET /\r\n\r\n", 400, "9112 §3: no HTTP/0.9"),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400, 505), "9113 §3.4: the preface of HTTP/2"),
    (CLIENT_HELLO + b"\r\n\r\n", 400, "8446 §4.1.2: TLS on the plain port"),
    *fill(VERSION, 400, "9112 §2.3: HTTP-version is HTTP/DIGIT.DIGIT, case-sensitive",
          b"http/1.1", b"Http/1.1", b"HTTP/01.1", b"HTTP/1.01", b"HTTP/1.10", b"HTTP/11.1", b"HTTP/1", b"HTTP/1.",
          b"HTTP/.1", b"HTTP/1,1", b"HTTP/1.1x", b"HTTP/1.1.1", b"HTTP/-1.1", b"HTTP/+1.1", b"HTTP/1.x", b"HTTP /1.1",
          b"HTTP/ 1.1", b"HTTP 1.1", b"HTTPS/1.1", b"ICE/1.0", b"RTSP/1.0", b"XHTTP/1.1", b"1.1", b"HTTP/\xb9.1",
          b"HTTP/1.\xd9\xa1", b"HTTP/1.1/", b"HTTP/1.1 ", b"HTTP/1.1\t", b" HTTP/1.1", b"\tHTTP/1.1"),
    *fill(VERSION, 505, "9110 §15.6.6: a major version that we do not speak (llhttp has 5.6)",
          b"HTTP/2.0", b"HTTP/3.0", b"HTTP/0.9", b"HTTP/5.6"),
    *fill(VERSION, (400, 505), "9112 §2.3: the minor is missing; but then the version shows", b"HTTP/2", b"HTTP/3"),
    *fill(START, 400, "9112 §3: request-line is method SP request-target SP HTTP-version, by single spaces",
          b"GET /", b"GET", b"GET HTTP/1.1", b"/ HTTP/1.1", b" / HTTP/1.1", b"Host: h", b"HTTP/1.1 200 OK",
          b"GET  / HTTP/1.1", b" GET / HTTP/1.1", b"GET\t/ HTTP/1.1", b"GET /\tHTTP/1.1", b"GET /\x0bHTTP/1.1",
          b"GET\xa0/ HTTP/1.1", b"\0GET / HTTP/1.1", b"\xef\xbb\xbfGET / HTTP/1.1", b"\r\n GET / HTTP/1.1", b"3",
          b" "),
    *fill(START, 400, "9112 §2.2: a bare CR or LF ends no line",
          b"\nGET / HTTP/1.1", b"\rGET / HTTP/1.1", b"GET / HTTP/1.1\nX: y", b"GET / HTTP/1.1\rX: y",
          b"GET / HTTP/1.1\r", b"GET / HTTP/1.1\n\rX: y", b"GET / HTTP/1.1\n", b"GET /\nHTTP/1.1", b"GET\r/ HTTP/1.1",
          b"\r\n\nGET / HTTP/1.1"),
    *fill(b"%b", 400, "9112 §2.2: nor the head",
          b"GET / HTTP/1.1\nHost: h\n\n", b"GET / HTTP/1.1\r\nHost: h\n\r\n", b"GET / HTTP/1.1\r\nHost: h\r\n\n",
          b"GET / HTTP/1.1\r\nHost: h\r\n\r \r\n", b"GET / HTTP/1.1\rHost: h\r\r",
          b"GET / HTTP/1.1\r\nHost: h\r\n\n\r\n"),
    *fill(METHOD, 400, "9110 §5.6.2: no token (picohttpparser)",
          b"G:T", b":GET", b"G(T", b"G/T", b"G@T", b"G[T", b"G{T", b'G"T', b"G,T", b"G=T", b"G\\T", b"G\0T", b"G\x1bT",
          b"G\x7fT", b"G\xc9T"),
    *fill(TARGET, 400, "9112 §3.2: no request-target",
          b"/#", b"/a#b", b"/a?b#c", b"#", b"/a b", b"/a\tb", b"/\0", b"/\x01", b"/\x1b[31m", b"/\x7f", b"/\x80",
          b"/\xff", b"/\xc3\xa9", b"/?\xe9", b"\x7fhello", b"index.html", b"?a=b", b"a/b", b"*", b"**", b"*/", b"./",
          b"\\", b"..", b"h", b"h:80", b"[::1]:80", b"127.0.0.1", b"@", b"%2f", b"%"),
    *fill(TARGET, 400, "3986 §2.1: % HEXDIG HEXDIG",
          b"/%", b"/%4", b"/%zz", b"/%4g", b"/%%41", b"/%-1", b"/%+1", b"/% 1", b"/%0x", b"/%u0041"),
    *fill(TARGET, 400, "9110 §4.2.1, §4.2.4: no host, userinfo, or no authority at all",
          b"http://", b"http:///a", b"http://:80/", b"http:/h/", b"http:h", b"http:", b"http://u@h/", b"http://u:p@h/",
          b"http://@h/", b"http://a%12:b!&*$@h:1234/toto", b"http://h\\@x/", b"http://h/#f", b"http://h#f", b"://h/",
          b"1http://h/"),
    *fill(TARGET, 400, "3986 §3.2.2, §3.2.3: no host, no port",
          b"http://h:x/", b"http://h:-1/", b"http://h:80:80/", b"http://[::1/", b"http://::1/", b"http://[g]/",
          b"http://[::1]a/", b"http://h%zz/", b"http://h<x>/", b"http://h|/", b"http://h\xe9/", b"http://[1::2::3]/"),
    *fill(TARGET, (400, 421), "9110 §7.4: not ours to answer",
          b"ftp://h/", b"file:///etc/passwd", b"ws://h/", b"httpx://h/", b"javascript:alert(1)", b"mailto:a@b",
          b"urn:a"),
    *fill(START, 400, "9112 §3.2.3, §3.2.4: the asterisk is for OPTIONS, authority-form for CONNECT",
          b"M-SEARCH * HTTP/1.1", b"OPTIONS *?a HTTP/1.1", b"OPTIONS *a HTTP/1.1", b"options * HTTP/1.1",
          b"OPTIONS h:443 HTTP/1.1"),
    *fill(START, 501, "9110 §9.3.6: no tunnels",
          b"CONNECT h:443 HTTP/1.1", b"CONNECT [::1]:443 HTTP/1.1", b"CONNECT h:443 HTTP/1.0"),
    (get(method=b"CONNECT"), (400, 501), "9112 §3.2.3: CONNECT with another form; and no tunnels"),
]
REFUSED_FIELDS = [
    *fill(FIELD, 400, "9112 §5.1, 9110 §5.1: no field name and colon",
          b"X : a", b"X\t: a", b"X", b"X a", b":", b": a", b":a", b"X Y: a", b"X(Y): a", b'X"Y": a', b"X/Y: a",
          b"/: 1", b"X@Y: a", b"X[0]: a", b"{: a", b"X=Y: a", b"X,Y: a", b"X;Y: a", b"X\\Y: a", b"X<Y: a", b"X?: a",
          b"X\0Y: a", b"X\x01: a", b"X\x7f: a", b"X\x80: a", b"\xc3\xa9: a", b"\xa0X: a", b"X\xa0: a", b"X\x0b: a",
          b"\x0cX: a", b"=", b"a=b", b"Transfer-Encoding : chunked", b"Transfer-Encoding\t: chunked",
          b"Content-Length : 3", b"Host : h", b"GET / HTTP/1.1"),
    *fill(FIELD, 400, "9112 §5.2: folding",
          b"X: a\r\n b", b"X: a\r\n\tb", b"X: a\r\n ", b"X: a\r\n\t", b"X: a\r\n Y: b", b" : a", b" X: a", b"X:\r\n a",
          b"X: a\r\n\tTransfer-Encoding: chunked", b"X: a\r\n \t Content-Length: 3",
          b"Transfer-Encoding:\r\n chunked"),
    *fill(START, 400, "9112 §2.2: white space before the first field line",
          b"GET / HTTP/1.1\r\n X: a", b"GET / HTTP/1.1\r\n\tX: a", b"GET / HTTP/1.1\r\n "),
    *fill(FIELD, 400, "9110 §5.5: a control byte; 9112 §2.2: a bare CR or LF",
          *(b"X: a%cb" % octet for octet in (*range(0x09), *range(0x0A, 0x20), 0x7F)), b"X: \0", b"X: a\r", b"X: a\n",
          b"X: \r", b"X: a\nTransfer-Encoding: chunked", b"X: a\rTransfer-Encoding: chunked", b"X\n: a",
          b"Transfer\r-Encoding: chunked"),
    *fill(b"%b", 400, "9112 §3.2: no Host in 1.1, nor in what is handled as 1.1, nor with an absolute target",
          head(b"GET / HTTP/1.1"), head(b"GET / HTTP/1.2"), head(b"GET / HTTP/1.1", b"X-Host: h"),
          head(b"GET http://h/ HTTP/1.1"), head(b"GET / HTTP/1.1", b"Host_: h"),
          head(b"GET / HTTP/1.1", b"Hos: h", b"Hostt: h")),
    *fill(FIELD, 400, "9112 §3.2: two of them, the same or not",
          b"Host: h", b"host: other", b"Host:", b"X: y\r\nHOST: h"),
    *fill(b"%b", 400, "9112 §3.2: any request with two or with a bad one, also in 1.0 or with an absolute target",
          get(b"Host: h", version=b"HTTP/1.0"), get(b"Host: x", target=b"http://h/"),
          head(b"GET / HTTP/1.0", b"Host: a b"), head(b"GET http://h/ HTTP/1.1", b"Host: a b")),
    *fill(HOST, 400, '9110 §7.2, 3986 §3.2.2: no uri-host [ ":" port ]',
          b"a b", b"a\tb", b"h/", b"h/a", b"h?", b"h#", b"u@h", b"u:p@h", b"http://h", b"h:x", b"h:-1", b"h:+80",
          b"h: 80", b"h :80", b"h:80:80", b"h:8_0", b"h:\xb2", b"h\xa0", b"\xe9.example", b"h<", b"h>", b'h"', b"h\\",
          b"h^", b"h`", b"h{", b"h|", b"%", b"%4", b"%zz", b"::1", b"::1:80", b"[::1", b"::1]", b"[::1]x", b"[::1]:x",
          b"[::1]80", b"[]", b"[]:80", b"[h]", b"[1]", b"[::g]", b"[1::2::3]", b"[12345::]", b"[1:2:3:4:5:6:7]",
          b"[1:2:3:4:5:6:7:8:9]", b"[::1.2.3.256]", b"[1.2.3.4]", b"[:::]", b"[::1%eth0]", b"[[::1]]", b"h[::1]"),
]
REFUSED_BODIES = [
    *fill(LENGTH, 400, "9110 §8.6: Content-Length is 1*DIGIT, and what int() takes besides is not",
          b"", b" ", b"+3", b"-3", b"-0", b"+0", b"3.0", b"3.", b".3", b"3,4", b"4,3", b"3;", b"3 3", b"3\t3", b"0x3",
          b"0b11", b"3a", b"a", b"1_0", b"0_3", b"3e0", b"NaN", b'"3"', b"(3)", b"3\xa0", b"\xa03", b"\x853", b"\xb3",
          b"\xd9\xa3", b"\xef\xbc\x93", b"3-", b"3h", b"three", b"3, 3, 4", b"3, +3", b"3, x", b"3 , 3 4", b"\x0b3",
          b"3\0"),
    *fill(LENGTH, 400, "9112 §6.3: two that differ, or of which one is invalid",
          b"3\r\nContent-Length: 4", b"4\r\nX: y\r\ncontent-length: 3", b"3\r\nContent-Length:",
          b"0\r\nContent-Length: -0", b"3\r\nContent-Length: 3, 4", b"\r\nContent-Length: 3",
          b"3\r\nContent-Length: 3\r\nContent-Length: 30"),
    *fill(LENGTH, (400, 413), "9110 §8.6: no overflow; and there is a limit",
          b"4294967299", b"9223372036854775808", b"18446744073709551619", b"99999999999999999999", b"1" * 5000),
    (get(b"Content-Length: x"), 400, "9112 §6.3: on any method"),
    (get(b"Content-Length: -1", version=b"HTTP/1.0"), 400, "9112 §6.3: in any version"),
    *fill(CODING, 400, "9112 §6.1: both framings, never together",
          b"chunked\r\nContent-Length: 13", b"chunked\r\nContent-Length: 0", b"Chunked\r\nX: y\r\nContent-Length: 3",
          b"chunked\r\nContent-Length: x", b"chunked\r\nContent-Length:"),
    *fill(LENGTH, 400, "9112 §6.1: in the other order",
          b"13\r\nTransfer-Encoding: chunked", b"0\r\nTransfer-Encoding:chunked"),
    *fill(LENGTH, (400, 501), "9112 §6.1: nor with another coding",
          b"3\r\nTransfer-Encoding: gzip", b"3\r\nTransfer-Encoding:", b"3\r\nTransfer-Encoding: identity"),
    *fill(CODING, (400, 501), "9112 §6.1, §6.3: not chunked, alone, once and last",
          b"xchunked", b"chunkedx", b"chunked-x", b"x chunked", b"chun ked", b"chunke", b"chunked;q=1", b"chunked;",
          b'"chunked"', b"'chunked'", b"identity", b"gzip", b"deflate", b"compress", b"pigeons", b"br",
          b"chunked, gzip", b"chunked, identity", b"identity, chunked", b"gzip, identity", b"\xa0chunked",
          b"chunked\xa0", b"chunked\x85", b"chun\xe2\x84\xaaed", b"0", b"null", b"chunked=1", b"chunked, chunked",
          b"chunked,chunked", b"chunked, Chunked", b"chunked\t,\tchunked", b"", b",", b"chunked chunked",
          b"chunked\r\nTransfer-Encoding: identity", b"chunked\r\nTransfer-Encoding: x"),
    *fill(CODING, 501, "9112 §6.1: a coding that we do not understand",
          b"gzip, chunked", b"pigeons\r\nTransfer-Encoding: chunked"),
    *fill(CODING, 400, "9112 §6.1: once; 9110 §5.5: no control byte (http-garden)",
          b"chunked\r\nTransfer-Encoding: chunked", b"\x0bchunked", b"chunked\0", b"chunked\r", b"\rchunked",
          b"\x0cchunked"),
    *fill(OLD_FIELD, 400, "9112 §6.1: faulty framing in 1.0",
          b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked\r\nContent-Length: 13",
          b"Transfer-Encoding: chunked\r\nConnection: keep-alive"),
    *fill(OLD_FIELD, (400, 501), "9112 §6.1: in 1.0", b"Transfer-Encoding: gzip", b"Transfer-Encoding:"),
    *fill(EXPECT, 417, "9110 §10.1.1: an expectation that we do not know",
          b"200-ok", b"100-continue, foo", b"foo", b"100-continue=1", b"100-continue;a", b"100", b"continue",
          b"100-continues", b"100 continue", b'"100-continue"', b"100-continue\xa0", b"100-continue\r\nExpect: x=y"),
    *fill(CHUNK_SIZE, 400, "9112 §7.1, §7.1.1: not chunk-size [ chunk-ext ]",
          b"", b" ", b"g", b"x", b"0x3", b"0X3", b"x3", b"+3", b"-3", b"-0", b"+0", b"3_", b"0_3", b"_3", b" 3",
          b"\t3", b"3 ", b"3\t", b"3  ", b"3 3", b"3h", b"3,", b"3.0", b"3:", b"#3", b'"3"', b"\xb3", b"\xd9\xa3",
          b"3\xa0", b"3\0", b"\0003", b"3\x0b", b"0x", b"3\r", b"\r\n3", b"3 a", b"3 a=b", b"3a b", b"3=a", b"3;",
          b"3;;a", b"3;a;", b"3;=", b"3;=b", b"3;a=", b"3;a==b", b"3;a=b=c", b"3;a b", b'3;a="b', b'3;a=b"',
          b'3;a="b"c', b'3;a="b\\', b'3;"a"', b"3;a=b,c", b"3;a\rb", b"3;a\nb", b'3;a="\r"', b'3;a="\n"', b"3;a\0",
          b"3;a\x01", b"3;a=\x7f", b'3;a="\0"', b'3;a="\x01"', b'3;a="\\\x01"', b"3;a\xe9", b"3;a=(b)", b"3;a\r",
          b"3;\r", b"3;\xa0a", b"3;a[]", b"3;a=b;", b"1 invalid extension", b"/3", b"3@", b"3`", b"G3", b"3:a",
          b"%33"),
    *fill(CHUNK_SIZE, (400, 413), "9112 §7.1: no overflow, no wrap-around; 17 digits (hyper)",
          b"f" * 16, b"7fffffffffffffff", b"8000000000000000", b"ffffffffffffffff3", b"10000000000000003",
          b"f0000000000000003", b"1" + b"0" * 31 + b"3", b"f" * 4000),
    *fill(CHUNKED, 400, "9112 §7.1: data longer or shorter than its size",
          b"2\r\nabc\r\n0\r\n\r\n", b"4\r\nabc\r\n0\r\n\r\n", b"3\r\nabc \r\n0\r\n\r\n", b"3\r\nabc0\r\n\r\n", b"abc",
          b"\r\n"),
    *fill(CHUNKED, 400, "9112 §7.1: CRLF behind the data and nothing else, not two bytes of any kind (http-garden)",
          b"3\r\nabcXX0\r\n\r\n", b"3\r\nabc\n0\r\n\r\n", b"3\r\nabc\r0\r\n\r\n", b"3\r\nabc\n\r0\r\n\r\n",
          b"3\r\nabc\n\n0\r\n\r\n", b"3\r\nabc\r\r\n0\r\n\r\n", b"3\r\nabc\r\n\r\n0\r\n\r\n",
          b"3\r\nabc\r\n \r\n0\r\n\r\n", b"3\r\nabc\0\n0\r\n\r\n"),
    *fill(CHUNKED, 400, "9112 §7.1: CRLF behind the size and its extensions (hyper)",
          b"3\nabc\r\n0\r\n\r\n", b"3\rabc\r\n0\r\n\r\n", b"3\n\nabc\r\n0\r\n\r\n", b"3;a=b\nabc\r\n0\r\n\r\n",
          b"3;a\rabc\r\n0\r\n\r\n", b"3\r\nabc\r\n0\n\r\n", b"3\r\nabc\r\n0\r\n\n", b"3\r\nabc\r\n0\r\n\rX",
          b"3\r\nabc\r\n0;a\n\r\n"),
    *fill(TRAILER, 400, "9112 §7.1.2, §5: no field line",
          b"X", b"X : y", b": y", b" X: y", b"\tX: y", b"X: y\r\n z", b"X: \0", b"X: \x1b", b"X: y\n", b"X: y\rz",
          b"X: y\r", b"X\xe9: y", b"X: y\nZ: z", b"GET / HTTP/1.1", b"0", b"3\r\nabc"),
]


# Where the standards leave a choice: either what the application sees when it is accepted, or a status.
EITHER = [
    (b"\r\n\r\n" + get(), {"PATH_INFO": "/"}, 400, "9112 §2.2: one empty line at least is to be ignored"),
    (HOST % b":80", {"HTTP_HOST": ":80"}, 400, "3986 §3.2.2: a name may be empty, but 9110 §4.2.1: not in http"),
    (HOST % b"", {"HTTP_HOST": ""}, 400, "9110 §7.2: empty where there is no authority, but §4.2.1: http has one"),
    (head(b"GET / HTTP/1.0", b"Host:"), {"closes": True}, 400, "the same in 1.0"),
    (HOST % b"h:99999", {"HTTP_HOST": "h:99999"}, 400, "3986 §3.2.3: *DIGIT, but not a port of TCP"),
    (HOST % b"a,b", {"HTTP_HOST": "a,b"}, 400, "3986 §3.2.2: a sub-delim, but it looks like a joined list"),
    (get(target=b"http://h:99999/"), {"HTTP_HOST": "h:99999"}, 400, "3986 §3.2.3"),
    (get(target=b"https://x/"), {"HTTP_HOST": "x"}, (400, 421), "9110 §7.4: perhaps a proxy took the TLS off"),
    (get(target=b"http://x", method=b"OPTIONS"), {"PATH_INFO": ("*", "", "/")}, 400, "9112 §3.2.4: meant as *"),
    (get(target=b"/?%zz"), {"QUERY_STRING": "%zz"}, 400, "3986 §2.1 allows no such query, and browsers send it"),
    (get(target=b"/?a=100%"), {"QUERY_STRING": "a=100%"}, 400, "3986 §2.1; QUERY_STRING is raw, nothing is decoded"),
    (get(target=b"/%00"), {"PATH_INFO": "/\0"}, 400, "3986 §7.3: NUL may be refused"),
    (post(b"Content-Length: 3, 3"), {"body": b"abc", "CONTENT_LENGTH": "3"}, 400, "9110 §8.6: refuse or repair"),
    (post(b"Content-Length: 3,"), {"body": b"abc", "CONTENT_LENGTH": "3"}, 400, "9110 §5.6.1.2 against §8.6"),
    (post(b"Content-Length: 3", b"Content-Length: 03"), {"body": b"abc"}, 400, "9110 §8.6: same value, other spelling"),
    (post(b"Content-Length: " + b"0" * 5000 + b"3"), {"body": b"abc"}, 400, "9110 §8.6: 1*DIGIT, but bounded"),
    (post(b"Transfer-Encoding: chunked,", body=THREE), {"body": b"abc"}, (400, 501), "9110 §5.6.1.2: empty elements"),
    (post(b"Transfer-Encoding: ,chunked", body=THREE), {"body": b"abc"}, (400, 501), "9110 §5.6.1.2"),
    (get(b"Expect:"), {}, (400, 417), "9110 §5.6.1: an empty list"),
    (post(b"Expect: 100-continue, 100-continue", b"Content-Length: 3"), {"body": b"abc"}, 417, "9110 §10.1.1: a list"),
    (get(b"Expect: foo", version=b"HTTP/1.0"), {"closes": True}, 417, "9110 §10.1.1: 1.0 knows no Expect"),
    (get(b"Connection: @, a b"), {}, 400, "9110 §7.6.1: no tokens; framing nothing"),
    *((chunked(size + b"\r\nabc\r\n0\r\n\r\n"), {"body": b"abc"}, 400, why) for size, why in (
        (b"3 ;a", "9112 §7.1.1: BWS is to be parsed, and was used for smuggling"),
        (b"3; a", "9112 §7.1.1: BWS"), (b"3;\ta = b", "9112 §7.1.1: BWS"), (b"3;a ;b", "9112 §7.1.1: BWS"),
        (b"0" * 30 + b"3", "9112 §7.1: leading zeros, bounded"), (b"0" * 1000 + b"3", "9112 §7.1: leading zeros"),
    )),
    *((TRAILER % line, {"body": b"abc", "HTTP_HOST": "h", "CONTENT_LENGTH": "3"}, 400,
       "9110 §6.5.1: forbidden in trailers, to be dropped or refused")
      for line in (b"Content-Length: 9", b"Transfer-Encoding: chunked", b"Host: x", b"Content-Type: a/b", b"TE: x")),
    *((get(name + b": a", name + b": b"), {key: ("a,b", "a, b")}, 400,
       "9110 §5.3: a singleton field repeated; joined or refused, but never one of the two")
      for name in (b"Authorization", b"Content-Type", b"User-Agent", b"Referer", b"Range", b"If-Range", b"From",
                   b"Date", b"If-Modified-Since", b"If-Unmodified-Since", b"Max-Forwards", b"Proxy-Authorization",
                   b"Origin", b"Content-Location", b"Content-Range")
      for key in (("" if name == b"Content-Type" else "HTTP_") + name.decode().upper().replace("-", "_"),)),
]

VALID = VALID_LINES + VALID_FIELDS + VALID_BODIES
REFUSED = REFUSED_LINES + REFUSED_FIELDS + REFUSED_BODIES


@pytest.mark.parametrize("row", VALID)
def test_accepts(row: Any) -> None:
    """Every legal request is understood: whole, a byte at a time, split in two anywhere, and ten in one packet."""
    data, seen, _ = row
    check_accepted(serve(data), seen)
    check_accepted(serve(data, 1), seen)
    for position in range(1, len(data)):
        check_accepted(serve(data, position, 1 << 20), seen)
    check_accepted(serve(data * 10), seen, 10)
    check_accepted(serve(data * 10, 7), seen, 10)


@pytest.mark.parametrize("row", REFUSED)
def test_refuses(row: Any) -> None:
    """Every malformed request is refused: whole, a byte at a time, and between two good ones; the last is not read."""
    data, statuses, _ = row
    check_refused(serve(data + NEXT), statuses)
    check_refused(serve(data + NEXT, 1), statuses)
    check_refused(serve(NEXT + data + NEXT), statuses, 1)
    check_refused(serve(NEXT + data + NEXT, 1), statuses, 1)


@pytest.mark.parametrize("row", EITHER)
def test_accepts_or_refuses_but_always_alike(row: Any) -> None:
    """Where there is a choice, it does not depend on the pieces in which the bytes come."""
    data, seen, statuses, _ = row
    served = serve(data)
    check: Any = check_accepted if served.requests else check_refused
    check(served, seen if served.requests else statuses)
    check(serve(data, 1), seen if served.requests else statuses)
    if served.requests:
        check(serve(data * 10), seen, 10)
    else:
        check(serve(data + NEXT, 3), statuses)


@pytest.mark.parametrize("row", VALID)
def test_understands_no_request_that_was_cut_short(row: Any) -> None:
    """The end of input at every byte: no request, no traceback, and at most one answer, a refusal."""
    for length in range(len(row[0])):
        served = serve(NEXT + row[0][:length], 29)
        assert served.paths() == ["/next"] and not served.errors, length
        assert served.answers[0].status == 200 and len(served.answers) <= 1 + (length > 0)
        for answer in served.answers[1:]:
            assert answer.status == 400 and answer.get("Connection") == "close"


SPICE = [bytes([octet]) for octet in b"\r\n\0 \t:;,=\"\\/?#%&+-_.0123456789abfxGHT\x7f\x80\xa0\xff\x0b\x0c"] + [
    b"\r\n", b"\n\n", b"\r\n\r\n", b"0\r\n\r\n", b" HTTP/1.1", b"%00", b"chunked", b"close"]  # fmt: skip
LINES = [
    b"Content-Length: 3", b"Content-Length: 0", b"Content-Length: 4", b"content-length: 03", b"Content-Length : 3",
    b"Content_Length: 3", b"Transfer-Encoding: chunked", b"Transfer-Encoding : chunked", b"Transfer-Encoding: identity",
    b"Transfer-Encoding: gzip, chunked", b"transfer-encoding: Chunked", b"Transfer_Encoding: chunked", b"Host: x",
    b"Host:",
    CLOSE, b"Connection: keep-alive", b"Expect: 100-continue", b" folded", b"", b"X", b"3", b"0", b"abc",
    b"GET / HTTP/1.1", b"POST /x HTTP/1.0", b"X: \xff", b"3;a=b", b"0\r\nX: y\r\n",
]  # fmt: skip
SOUND = [row[0] for row in VALID]


def mutate(chance: random.Random, data: bytes) -> bytes:
    """The bytes with one mutation: of a byte or of a line, inserted, replaced, deleted, doubled or swapped."""
    lines, at = data.split(b"\r\n"), chance.randrange(len(data) + 1)
    one, other = chance.randrange(len(lines)), chance.randrange(len(lines))
    swapped = {one: lines[other], other: lines[one]}
    return chance.choice((
        lambda: data[:at] + chance.choice(SPICE) + data[at:],
        lambda: data[:at] + chance.choice(SPICE) + data[at + 1 :],
        lambda: data[:at] + data[at + 1 :],
        lambda: data[: at + 1] + data[at:],
        lambda: data[:at] + data[at + 1 : at + 2] + data[at : at + 1] + data[at + 2 :],
        lambda: data[:at] + data[chance.randrange(at + 1) :],
        lambda: b"\r\n".join(lines[:one] + [chance.choice(LINES)] + lines[one:]),
        lambda: b"\r\n".join(lines[:one] + lines[one + 1 :]),
        lambda: b"\r\n".join(lines[:one] + [lines[other]] + lines[one:]),
        lambda: b"\r\n".join(swapped.get(number, line) for number, line in enumerate(lines)),
    ))()  # fmt: skip


def make_noise(chance: random.Random) -> bytes:
    """One to three sound requests, one to four times mutated."""
    data = b"".join(chance.choice(SOUND) for _ in range(chance.randint(1, 3)))
    for _ in range(chance.randint(1, 4)):
        data = mutate(chance, data)
    return data


def test_holds_its_invariants_under_noise() -> None:
    """No traceback, no hang, no request from nowhere, nothing after a refusal, and the next connection is served."""
    for number in range(int(os.environ.get("WEBSERVER_FUZZ", "2000"))):
        chance = random.Random(number)
        data = make_noise(chance)
        sizes = chance.choice([(), (1,), (chance.randint(1, 99),), (chance.randint(1, len(data) + 1), 9)])
        served = serve(data, *sizes)
        case = "case %d: %r" % (number, data)
        statuses = [answer.status for answer in served.answers]
        assert not served.errors, case
        assert len(served.requests) <= data.count(b" HTTP/1."), case
        assert statuses[: len(served.requests)] == [200] * len(served.requests), case
        if len(statuses) > len(served.requests):
            assert len(statuses) == len(served.requests) + 1 and statuses[-1] in (400, 413, 417, 431, 501, 505), case
            assert served.answers[-1].get("Connection") == "close", case
        for answer in served.answers[:-1]:
            assert answer.get("Connection") != "close", case
        assert serve(NEXT).paths() == ["/next"], case


# ---- 3. Stream --------------------------------------------------------------


STALLS = [
    b"G", b"GET /", b"GET / HTTP/1.1\r\n", get()[:-2], get()[:-1], b"\r\nG", post(b"Content-Length: 5"),
    post(b"Content-Length: 5", body=b""), chunked(b""), chunked(b"3"), chunked(b"3\r"), chunked(b"3\r\nab"),
    chunked(b"3\r\nabc"), chunked(b"3\r\nabc\r\n"), chunked(THREE[:-2]), chunked(THREE[:-2] + b"X: y\r\n"),
]  # fmt: skip


def test_answers_408_wherever_a_request_stalls(quick: None) -> None:
    """RFC 9110 §15.5.9: in the request-line, the fields, the body, a trailer; alone or behind another."""
    with contextlib.ExitStack() as stack:
        stalled = []
        for data in (piece for stall in STALLS for piece in (stall, NEXT + stall)):
            stalled.append((data, stack.enter_context(connected(echo, timeout=0.3))))
            stalled[-1][1].sendall(data)
        for data, client in stalled:
            answers = parse_answers(receive_all(client))
            assert [answer.status for answer in answers] == [200] * data.startswith(NEXT) + [408], data
            assert answers[-1].get("Connection") == "close"


@pytest.mark.parametrize("start", [b"G", b"GET / HTTP/1.1\r\nX: "])
def test_answers_408_to_a_head_that_drips(start: bytes, monkeypatch: Any) -> None:
    """A byte now and then does not renew the head's deadline."""
    monkeypatch.setattr(webserver, "HEAD_TIMEOUT", 0.3)
    with connected(echo, timeout=5) as client:
        client.sendall(start)
        client.settimeout(0.02)
        answer, began = b"", time.monotonic()
        while not answer and time.monotonic() < began + SLACK:
            client.sendall(b"a")
            with contextlib.suppress(socket.timeout):
                answer = client.recv(65536)
        assert answer.startswith(b"HTTP/1.1 408 ") and 0.25 < time.monotonic() - began < SLACK


def test_answers_408_also_when_the_next_byte_is_always_there(monkeypatch: Any) -> None:
    """The head's deadline is looked at, and not only left to a receive that never has to wait."""
    monkeypatch.setattr(webserver, "HEAD_TIMEOUT", 0.001)
    check_refused(serve(get(b"X: " + b"a" * 8000) + NEXT, 1), 408)


def test_does_not_cut_a_body_that_makes_progress(quick: None) -> None:
    """The deadline counts time without progress."""
    with connected(echo, timeout=0.8) as client:
        client.sendall(post(b"Content-Length: 6", CLOSE, body=b""))
        for octet in b"abcdef":
            time.sleep(0.15)  # longer than the server waits until it looks at the deadline
            client.sendall(bytes([octet]))
        assert [answer.body for answer in parse_answers(receive_all(client))] == [b"POST / abcdef"]


@pytest.mark.parametrize("fields", [(b"Content-Length: 4000000",), (b"Transfer-Encoding: chunked",)])
def test_lingers_so_that_a_client_still_sending_reads_the_413(fields: tuple[bytes, ...]) -> None:
    """RFC 9112 §9.6: closing at once would reset the connection, and the answer with it."""
    size = b"3d0900\r\n" if b"chunked" in fields[0] else b""
    with connected(echo, limit_request_body=1000, timeout=5) as client:
        client.sendall(post(*fields, body=size) + bytes(4000000))
        client.sendall(NEXT)
        client.shutdown(socket.SHUT_WR)
        assert [answer.status for answer in parse_answers(receive_all(client))] == [413]


@pytest.mark.parametrize("delay", [0.1, 0.7])
def test_what_a_client_sends_after_its_last_request_costs_no_answer(shared: Running, delay: float) -> None:
    """While the application works, or behind its answer: a close with it unread would reset the connection."""
    with shared.send("time.sleep(0.4); answer = 'x' * 2000000", CLOSE) as client:
        time.sleep(delay)
        client.sendall(b"\r\n")
        time.sleep(0.5)
        assert receive_answer(client).body == b"x" * 2000000


def test_lingers_also_while_another_request_waits_for_a_fork() -> None:
    with connected(echo, orders=webserver.WANTED | webserver.LATE, limit_request_body=1000) as client:
        client.sendall(post(b"Content-Length: 4000000", body=b"x"))
        assert receive_all(client).startswith(b"HTTP/1.1 413 ")
        for _ in range(3):
            time.sleep(0.05)
            client.sendall(b"x" * 1000)  # BrokenPipeError if the server has closed


def test_leaves_a_refused_client_that_never_closes(quick: None) -> None:
    """The lingering is bounded; and the client has its answer, and the end of it, before."""
    with connected(echo, timeout=10) as client:
        client.sendall(b"\0")
        assert receive_all(client).startswith(b"HTTP/1.1 400 ")
        poller = select.poll()
        poller.register(client, 0)  # POLLHUP: the server's end is closed in both directions
        assert poller.poll(2000) == [(client.fileno(), select.POLLHUP)]


# ---- 4. Request -------------------------------------------------------------


def test_takes_an_empty_line_behind_a_body_for_nothing() -> None:
    """RFC 9112 §2.2: old clients send one; with nothing behind it there is no request to refuse."""
    for data in (post(b"Content-Length: 3"), chunked(THREE)):
        assert [answer.status for answer in serve(data + b"\r\n").answers] == [200]
        check_accepted(serve(data + b"\r\n" + data, 1), {"body": b"abc"}, 2)
    with connected(echo) as client:
        client.sendall(NEXT + b"\r\n")
        read_answer(client)
        client.sendall(NEXT)
        assert read_answer(client).status == 200


@pytest.mark.parametrize("data", [CLIENT_HELLO, b"\0", get()[:-2] + b"X: \0", b"GET / HTTP/1.1\n", get()[:-2] + b"\n"])
def test_refuses_what_cannot_become_good_without_waiting_for_the_rest(data: bytes) -> None:
    """A client that speaks TLS to us waits for our answer; it should not have to wait for a deadline."""
    with connected(echo, timeout=10) as client:
        began = time.monotonic()
        client.sendall(data)
        assert client.recv(65536).startswith(b"HTTP/1.1 400 ") and time.monotonic() - began < SLACK


# ---- 5. Body ----------------------------------------------------------------


TEXT = b"one\ntwo\n\n" + SMUGGLED + b"the end"
READS: list[tuple[Callable[[Any], bytes], bytes, str]] = [  # how the body is read, what must come of it, why
    (lambda file: b"", b"", "nothing"),
    (lambda file: file.read(0), b"", "nothing of it"),
    (lambda file: file.read(1), TEXT[:1], "one byte"),
    (lambda file: file.read(len(TEXT) - 1), TEXT[:-1], "all but one"),
    (lambda file: file.read(len(TEXT)), TEXT, "exactly all"),
    (lambda file: file.read(len(TEXT) + 1), TEXT, "more than all"),
    (lambda file: file.read(1 << 30), TEXT, "far more"),
    (lambda file: file.read(), TEXT, "to the end"),
    (lambda file: file.read(-1), TEXT, "to the end by -1"),
    (lambda file: file.read() + file.read() + file.read(9) + file.readline(), TEXT, "to the end and past it"),
    (lambda file: b"".join(file.read(7) for _ in range(20)), TEXT, "past it piece by piece"),
    (lambda file: file.readline(), b"one\n", "a line"),
    (lambda file: file.readline(2), b"on", "a part of a line"),
    (lambda file: b"|".join(file.readlines()), TEXT.replace(b"\n", b"\n|"), "lines"),
    (lambda file: b"|".join(file), TEXT.replace(b"\n", b"\n|"), "lines by iteration"),
    (lambda file: b"|".join(file.readlines(5)), b"one\n|two\n", "some lines"),
    (lambda file: b"|".join(file.readline() for _ in range(9)),
     TEXT.replace(b"\n", b"\n|") + b"|" * (9 - 1 - TEXT.count(b"\n")), "lines past the end"),
    (lambda file: file.readline() + file.read(), TEXT, "a line and the rest"),
    (lambda file: (lambda room: bytes(room[: file.readinto(room)]))(bytearray(8)), TEXT[:8], "into a buffer"),
    (lambda file: next(iter(file), b""), b"one\n", "iteration broken off"),
]
FRAMED = [
    (post(b"Content-Length: %d" % len(TEXT), body=TEXT), "sized"),
    (chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(TEXT), TEXT)), "one chunk"),
    (chunked(b"".join(b"1\r\n%c\r\n" % octet for octet in TEXT) + b"0\r\nX: y\r\n\r\n"), "many chunks"),
    (post(b"Content-Length: %d" % len(TEXT), b"Expect: 100-continue", body=TEXT), "expecting 100"),
]


@rows("data", *FRAMED)
@rows("read, wanted", *READS)
def test_stays_in_step_however_much_is_read(data: bytes, read: Any, wanted: bytes) -> None:
    """A body read in any way is exactly this message's; the pipelined request behind it is answered, or the end."""
    for sizes in ((), (1,), (50,), (len(data),), (len(data) - 1, 1)):
        served = serve(data + get(target=b"/2") + data + NEXT, *sizes, read=read)
        paths = served.paths()
        assert len(served.answers) == len(paths) and not served.errors
        assert paths == ["/", "/2", "/", "/next"][: len(paths)], "desynchronised"
        assert len(paths) == 4 or served.answers[-1].get("Connection") == "close", "neither answered nor closed"
        assert [request["body"] for request in served.requests if request["PATH_INFO"] == "/"][0] == wanted
    if b"Expect" not in data:
        assert len(serve(data + NEXT, read=lambda file: b"").answers) == 2, "a small unread body is drained"


def test_drains_an_unread_body_up_to_a_bound() -> None:
    """Up to MAX_DRAINED the connection is kept; beyond it is closed, or the rest skipped, but never interpreted."""
    for size in (webserver.MAX_DRAINED - 1, webserver.MAX_DRAINED):
        body = (SMUGGLED * size)[:size]
        served = serve(post(b"Content-Length: %d" % size, body=body) + NEXT, 1000, read=lambda file: b"")
        assert served.paths() == ["/", "/next"]
    for size in (webserver.MAX_DRAINED + 1, 120000):
        for framed in (post(b"Content-Length: %d" % size, body=(SMUGGLED * size)[:size]),
                       chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (size, (SMUGGLED * size)[:size]))):
            served = serve(framed + NEXT, 1000, read=lambda file: b"")
            paths = served.paths()
            assert paths in (["/"], ["/", "/next"]) and len(served.answers) == len(paths)
            assert (served.answers[0].get("Connection") == "close") == (paths == ["/"]), "9112 §9.6: the last says so"
    size = webserver.Options().buffer_chunked + webserver.MAX_DRAINED
    large = chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (size, bytes(size)))
    for asked in post(b"Content-Length: 120000", body=bytes(120000)), large:
        for body in [b"no"], stream(b"no"):
            assert ask(asked, give(body)).get("Connection") == "close"


def test_half_of_an_empty_line_before_a_request_is_not_taken_for_rest(quick: None) -> None:
    with connected(hello) as client:
        client.sendall(GET + b"\r")
        read_answer(client)
        assert not select.select([client], [], [], 0.3)[0], "neither an answer nor the end"
        client.sendall(b"\n" + get(CLOSE))
        assert receive_answer(client).status == 200


BUFFERED = webserver.Options().buffer_chunked


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_collects_a_chunked_body_of_up_to_1_mib_and_streams_a_larger_one(over: int) -> None:
    """The first has a CONTENT_LENGTH and is chunked no more; the second none; both arrive whole."""
    size = BUFFERED + over
    body = random.Random(size).getrandbits(8 * size).to_bytes(size, "big")
    seen = []

    def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        fields = environ.get("CONTENT_LENGTH"), environ.get("HTTP_TRANSFER_ENCODING")
        seen.append((*fields, environ["wsgi.input"].read()))
        start_response("200 OK", [("Content-Length", "0")])
        return []

    chunks = [body[at : at + 50000] for at in range(0, len(body), 50000)]
    data = chunked(b"".join(b"%x;a=b\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\nX: y\r\n\r\n")
    assert [answer.status for answer in talk(data + NEXT, application=application)] == [200, 200]
    assert seen[0][2] == body and seen[1][2] == b""
    assert seen[0][:2] == (str(len(body)), None) if over <= 0 else seen[0][0] in (None, "")


@pytest.mark.parametrize("swallow", [False, True])
@pytest.mark.parametrize("tail, status", [(b"x\r\n", 400), (b"5\r\nabc\r\n0\r\n\r\n", 400), (b"200000\r\n", 413),
                                          (b"0\r\nX : y\r\n\r\n", 400)])
def test_closes_on_a_streamed_body_that_turns_out_bad(tail: bytes, status: int, swallow: bool) -> None:
    """Refused when the application meets it; if that swallows the error and answers, the connection still ends."""
    calls = []

    def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        calls.append(environ["PATH_INFO"])
        try:
            environ["wsgi.input"].read()
        except Exception:
            if not swallow:
                raise
        start_response("200 OK", [("Content-Length", "0")])
        return []

    data = chunked(b"120000\r\n" + bytes(0x120000) + b"\r\n" + tail)
    answers = talk(data + NEXT, application=application, limit_request_body=0x180000)
    assert [answer.status for answer in answers] in ([[status], [200]] if swallow else [[status]])
    assert answers[0].get("Connection") == "close" and calls == ["/"]


def test_never_blocks_at_the_end_of_the_body() -> None:
    """PEP 3333, "Input and Error Streams": the end of the body is the end of file, though the client stays."""

    def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        results = [read(environ["wsgi.input"]) for read in [READ_ALL, *(row[0] for row in READS[3:13])]]
        start_response("200 OK", [("Content-Length", "3")])
        return [b"%03d" % len(b"".join(results))]

    for data in (post(b"Content-Length: 3"), chunked(THREE), get(), post(body=b"")):
        wanted = b"003" if b"abc" in data else b"000"
        with connected(application, timeout=5) as client:
            client.sendall(data)
            assert receive_until(client, b"\r\n\r\n" + wanted).startswith(b"HTTP/1.1 200 ")


def test_a_missing_body_that_is_closed_leaves_later_ones_whole() -> None:
    def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        body = environ["wsgi.input"].read()
        environ["wsgi.input"].close()
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]

    answers = talk(GET, GET, post(b"Content-Length: 3"), GET, application=application)
    assert [(answer.status, answer.body) for answer in answers] == [(200, b""), (200, b""), (200, b"abc"), (200, b"")]


def test_continues_when_the_application_reads_and_only_once() -> None:
    """RFC 9110 §10.1.1: a client that waits is told to go on, in either framing; not again at the next read."""
    for field, body in ((b"Content-Length: 3", b"abc"), (b"Transfer-Encoding: chunked", THREE)):
        with connected(echo, timeout=5) as client:
            client.sendall(post(field, b"Expect: 100-continue", body=b""))
            assert client.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
            for octet in body:
                client.sendall(bytes([octet]))
            client.sendall(NEXT)
            client.shutdown(socket.SHUT_WR)
            answers = parse_answers(receive_all(client), "POST")
            assert [(answer.status, answer.body) for answer in answers] == [(200, b"POST / abc"), (200, b"GET /next ")]


def test_does_not_continue_where_nobody_reads_or_waits() -> None:
    """RFC 9110 §10.1.1: not before or within a final answer, not for a body that is here, not in HTTP/1.0."""
    expecting = post(b"Content-Length: %d" % len(SMUGGLED), b"Expect: 100-continue", body=b"")
    with connected(hello, timeout=5) as client:
        client.sendall(expecting)
        first = client.recv(65536)
        assert first.startswith(b"HTTP/1.1 200 ")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(SMUGGLED)
            client.shutdown(socket.SHUT_WR)
        assert b"HTTP/" not in receive_all(client), "the body, sent all the same, is taken for a request"
    assert [answer.status for answer in talk(expecting + SMUGGLED)] == [200]
    assert [answer.status for answer in talk(expecting, limit_request_body=3)] == [413]

    def late(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"first"
        yield environ["wsgi.input"].read()

    with connected(late, timeout=5) as client:
        client.sendall(post(b"Content-Length: 3", b"Expect: 100-continue", body=b""))
        data = client.recv(65536)
        client.sendall(b"abc")
        assert [answer.body for answer in parse_answers(data + receive_all(client), "POST")] == [b"firstabc"]
    old = get(b"Content-Length: 3", b"Expect: 100-continue", version=b"HTTP/1.0")
    with connected(echo, timeout=5) as client:
        client.sendall(old)
        client.settimeout(0.1)
        with pytest.raises(socket.timeout):
            client.recv(65536)
        client.settimeout(PATIENCE)
        client.sendall(b"abc")
        assert [answer.status for answer in parse_answers(receive_all(client))] == [200]


# ---- 6. Environ -------------------------------------------------------------


@pytest.mark.parametrize("no_fork", [False, True])
def test_gives_the_environ_of_pep_3333(tcp: list[Any], no_fork: bool) -> None:
    """PEP 3333, "environ Variables": all of them, of their types, and of this request alone."""
    data = post(b"X: y", b"Content-Type: a/b", b"Content-Length: 3") + get(target=b"/%C3%A9?q=%41")
    first, second = serve(data, no_fork=no_fork).requests
    for environ in (first, second):
        assert type(environ) is dict
        for key, value in environ.items():
            assert type(key) is str and (type(value) is str or "." in key or key == "body"), key
        wanted = {
            "SCRIPT_NAME": "", "SERVER_PROTOCOL": "HTTP/1.1", "REMOTE_ADDR": "192.0.2.7", "REMOTE_PORT": "4711",
            "HTTP_HOST": "h", "wsgi.version": (1, 0), "wsgi.url_scheme": "http",
            "wsgi.multithread": False, "wsgi.multiprocess": not no_fork, "wsgi.run_once": False,
            "wsgi.input_terminated": True, "SERVER_NAME": "127.0.0.1", "SERVER_PORT": str(tcp[-1][1]),
        }  # fmt: skip
        assert {key: environ.get(key) for key in wanted} == wanted
        assert isinstance(environ["wsgi.input"], io.BufferedIOBase) and hasattr(environ["wsgi.errors"], "write")
        assert environ["SERVER_SOFTWARE"] and not {"HTTP_CONTENT_TYPE", "HTTP_CONTENT_LENGTH"} & set(environ)
    assert (first["CONTENT_TYPE"], first["CONTENT_LENGTH"], first["HTTP_X"]) == ("a/b", "3", "y")
    assert not second.get("CONTENT_TYPE") and not second.get("CONTENT_LENGTH") and "HTTP_X" not in second
    assert (second["PATH_INFO"], second["QUERY_STRING"]) == ("/\xc3\xa9", "q=%41")
    assert second["REQUEST_URI"] == "/%C3%A9?q=%41" and first["wsgi.input"] is not second["wsgi.input"]


def test_gives_every_request_an_environ_of_its_own() -> None:
    """PEP 3333, "environ Variables": the application may change it as it likes."""
    seen = []

    def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        seen.append(dict(environ))
        environ["wsgi.input"].close()
        environ.clear()
        environ.update(HTTP_LEFT="behind", SERVER_NAME="forged")
        return hello(environ, start_response)

    data = GET + chunked(THREE) + post(b"Content-Length: 3") + get(b"X-One: 1") + GET
    assert len(talk(data, application=application)) == 5
    assert {environ["SERVER_NAME"] for environ in seen} == {"localhost"}
    assert set(seen[0]) == set(seen[4]) == set(seen[3]) - {"HTTP_X_ONE"} and "HTTP_LEFT" not in seen[1]


def test_gives_applications_a_text_stream_for_errors(capfd: Any) -> None:
    def application(environ: Any, start_response: Any) -> Any:
        environ["wsgi.errors"].write("one \xe9\n")
        environ["wsgi.errors"].writelines(["two\n", "three\n"])
        environ["wsgi.errors"].flush()
        return hello(environ, start_response)

    assert ask(GET, application).status == 200
    assert "one \xe9\ntwo\nthree\n" in capfd.readouterr().err


def read_form(environ: Any, start_response: Any) -> Any:
    """Uses every method of wsgi.input that the validator allows."""
    file = environ["wsgi.input"]
    start_response(*OK)
    return [file.read(3), file.readline(), *file.readlines(4), *file, file.read(10), file.readline()]


@pytest.mark.filterwarnings("error")
@rows(
    "asked, application, status, body",
    (GET, give([b"x"], PLAIN, sized(1)), 200, b"x", "a list, sized"),
    (GET, give([], PLAIN), 200, b"", "nothing"),
    (GET, give(stream(b"", b"x", b"", b"y"), PLAIN), 200, b"xy", "a stream with empty blocks"),
    (OLD, give(stream(b"x", b"y"), PLAIN), 200, b"xy", "a stream to HTTP/1.0"),
    (GET, later(OK, b"x"), 200, b"x", "start_response in the first next"),
    (GET, play(OK, b"w", b"v", [b"x"]), 200, b"wvx", "write()"),
    (GET, play(OK, AGAIN, [b"x"]), 503, b"x", "exc_info"),
    (GET, play(("204 No Content", []), []), 204, b"", "204"),
    (GET, play(("304 Not Modified", [("ETag", '"e"')]), []), 304, b"", "304"),
    (GET, give(wrapped(lambda: io.BytesIO(b"file")), PLAIN), 200, b"file", "a file"),
    (HEAD, give([], PLAIN, sized(7)), 200, b"", "HEAD"),
    (HEAD, give([b"x"], PLAIN), 200, b"", "HEAD with a body"),
    (get(target=b"*", method=b"OPTIONS"), give([], PLAIN), 200, b"", "asterisk-form: PATH_INFO must be legal"),
    (get(target=b"http://h"), give([], PLAIN), 200, b"", "absolute-form without a path"),
    (post(b"Content-Length: 12", body=b"12\n3\n4\n5\n6\n7"), read_form, 200, b"12\n3\n4\n5\n6\n7", "POST"),
    (chunked(b"6\r\n12\n3\n4\r\n1\r\n\n\r\n0\r\n\r\n"), read_form, 200, b"12\n3\n4\n", "POST, chunked"),
    (GET, play(ValueError("early")), 500, None, "an error before start_response"),
    (GET, play(OK, ValueError("early")), 500, None, "an error after start_response"),
    (GET, give(stream(b"", ValueError("in it")), PLAIN), 500, None, "an error in the iteration"),
)  # fmt: skip
def test_passes_the_validator(asked: bytes, application: Any, status: int, body: Any, log: Any, capfd: Any) -> None:
    answer = ask(asked, wsgiref.validate.validator(application))
    assert answer.status == status and body in (answer.body, None), log(2)
    assert "AssertionError" not in "".join(log(2)) and bool(log(2)) == (status == 500)
    assert "without being closed" not in capfd.readouterr().err  # of this the validator's destructor complains


# ---- 7. Response ------------------------------------------------------------


DATA = bytes(range(256)) * 1000
FAKE_RESPONSE = b"0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"
BIG = b"x" * 300000


class Sequence:
    """Iterates by the old protocol, without __iter__."""

    def __getitem__(self, index: int) -> bytes:
        return (b"a", b"bc")[index]


@rows(
    "asked, application, body, framings",
    (GET, give([b"abc"]), b"abc", "3", "one block in a list is measured"),
    (OLD, give([b"abc"]), b"abc", "3", "one block to HTTP/1.0"),
    (GET, give(lambda _: (b"abc",)), b"abc", "3 chunked", "one block in a tuple"),
    (GET, give([b"a", b"bc"]), b"abc", "3 chunked", "two blocks in a list"),
    (GET, give({b"abc"}), b"abc", "3 chunked", "any iterable"),
    (GET, give(lambda _: Sequence()), b"abc", "chunked", "an iterable by __getitem__"),
    (GET, give(lambda _: io.BytesIO(b"a\nbc\nd")), b"a\nbc\nd", "6 chunked", "a file is an iterable of lines"),
    (GET, give(stream(b"a", b"bc")), b"abc", "chunked", "a generator (RFC 9112 7.1)"),
    (OLD, give(stream(b"a", b"bc")), b"abc", "close", "never chunked in HTTP/1.0 (RFC 9112 6.1)"),
    (KEPT, give(stream(b"a", b"bc")), b"abc", "close", "nor when it asks for keep-alive"),
    (KEPT, give(stream(b"a", b"bc"), sized(3)), b"abc", "3", "sized, kept alive"),
    (GET, give(stream(b"a", b"bc"), ("content-LENGTH", "3")), b"abc", "3", "as the application says, in any case"),
    (GET, give(stream(b"", b"", b"abc", b"", b"")), b"abc", "chunked", "an empty block is not the last chunk"),
    (GET, give([b"", b"abc", b""]), b"abc", "3 chunked", "empty blocks in a list"),
    (GET, give([]), b"", "0 chunked", "no block"),
    (GET, give([b""]), b"", "0 chunked", "an empty block"),
    (GET, give(stream()), b"", "0 chunked", "a generator of nothing"),
    (GET, give(stream(b"", b"")), b"", "0 chunked", "a generator of empty blocks"),
    (OLD, give(stream()), b"", "0 close", "a generator of nothing to HTTP/1.0"),
    (GET, give([BIG]), BIG, "300000", "a large block"),
    (GET, give(stream(BIG, b"y" * 20000)), BIG + b"y" * 20000, "chunked", "large chunks"),
    (GET, give([FAKE_RESPONSE] * 2), FAKE_RESPONSE * 2, "48 chunked", "a body that looks like framing"),
    (GET, play(OK, b"a", b"bc", []), b"abc", "chunked", "write() (PEP 3333)"),
    (OLD, play(OK, b"a", b"bc", []), b"abc", "close", "write() to HTTP/1.0"),
    (GET, play(("200 OK", [sized(3)]), b"a", b"b", [b"c"]), b"abc", "3", "write(), sized, then a list"),
    (GET, play(OK, b"", b"a", b"", [b"", b"bc"]), b"abc", "chunked", "what is written precedes what is returned"),
    (GET, later(OK, b"a", b"bc"), b"abc", "chunked", "start_response in the first next"),
    (HEAD, give([b"hello"], sized(5)), b"", "5", "HEAD: as GET would say"),
    (HEAD, give([], sized(5)), b"", "5", "HEAD: no body is no shortfall"),
    (HEAD, give([b"hello"]), b"", "5 close chunked", "HEAD: the right length or none (RFC 9110 8.6)"),
    (HEAD, give(stream(b"he", b"llo")), b"", "close chunked", "HEAD of a stream"),
    (HEAD, give([]), b"", "close chunked", "HEAD: no block, which says nothing about GET (RFC 9110 8.6)"),
    (HEAD, give(stream()), b"", "close chunked", "HEAD: nor does a generator of nothing"),
    (HEAD, give(endless), b"", "close chunked", "HEAD of an endless stream: no use to iterate on"),
    (HEAD, play(OK, b"hello", []), b"", "close chunked", "HEAD with write()"),
    (KEPT.replace(b"GET", b"HEAD"), give([b"hello"], sized(5)), b"", "5", "HEAD, HTTP/1.0"),
    (GET, give([], status="204 No Content"), b"", "close", "204 has neither framing (RFC 9110 8.6, RFC 9112 6.1)"),
    (GET, give([b"hello"], status="204 No Content"), b"", "close", "204: a body is dropped"),
    (GET, give(stream(b"he", b"llo"), status="204 No Content"), b"", "close", "204: a stream is dropped"),
    (GET, give([], sized(0), status="204 No Content"), b"", "close", "204 with a length, even 0 (RFC 9110 8.6)"),
    (GET, give([b"hello"], sized(5), status="204 No Content"), b"", "close", "204 with a length and a body"),
    (KEPT, give([], status="204 No Content"), b"", "close", "204 needs no close in HTTP/1.0"),
    (GET, give([], status="304 Not Modified"), b"", "close", "304: no length is not 0 (RFC 9110 15.4.5)"),
    (GET, give([b"hello"], status="304 Not Modified"), b"", "5 close", "304: a body is dropped"),
    (GET, give([b"hello"], sized(5), status="304 Not Modified"), b"", "5", "304: the length of the 200"),
    (GET, play(("304 Not Modified", []), b"hello", []), b"", "close", "304 with write()"),
    (GET, give([], status="205 Reset Content"), b"", "0 chunked", "205 needs its framing (RFC 9110 15.3.6)"),
    (GET, give([b"x"], status="205 Reset Content"), b"", "0 chunked", "205 has no content (RFC 9110 15.3.6)"),
)  # fmt: skip
def test_frames_the_body(asked: bytes, application: Any, body: bytes, framings: str, log: Any) -> None:
    answer = ask(asked, application)  # what follows on the connection proves that no other body came
    assert answer.status // 100 in (2, 3) and answer.body == body and answer.framing() in framings.split()
    assert not log(2)
    has_body = not asked.startswith(b"HEAD") and answer.status not in (204, 304)
    said = (answer.get("Connection") or "").lower()
    is_ended_by_close = answer.framing() == "close" and has_body
    assert "close" not in said or is_ended_by_close or asked is OLD  # closes only where it must


class Tracked:
    """An iterable that counts how often it is closed."""

    def __init__(self, *items: Any, failure: BaseException | None = None) -> None:
        self.items, self.failure, self.closed = items, failure, 0

    def __iter__(self) -> Any:
        if not self.items:
            raise ValueError("in iter()")
        return blocks(*self.items)

    def close(self) -> None:
        self.closed += 1
        if self.failure:
            raise self.failure


@rows(
    "application, status",
    (play(OK, [b"x"]), 200, "once"),
    (play(("200 OK", [], None), [b"x"]), 200, "exc_info may be None"),
    (play(AGAIN, [b"x"]), 503, "exc_info in the first call"),
    (play(OK, AGAIN, [b"x"]), 503, "again with exc_info: replaces"),
    (play(OK, AGAIN, ("502 More", [], TROUBLE), [b"x"]), 502, "and again"),
    (later(OK, b"", AGAIN, b"x"), 503, "an empty block does not send the head"),
    (play(OK, OK, [b"x"]), 500, "twice without exc_info"),
    (play(AGAIN, OK, [b"x"]), 500, "twice, the first with exc_info"),
    (play(OK, ("200 OK", [], None), [b"x"]), 500, "twice with an empty exc_info"),
    (play([b"x"]), 500, "never"),
    (play([]), 500, "never, no block"),
    (later(), 500, "never, a generator"),
    (play(wrapped(lambda: io.BytesIO(b"x"))), 500, "never, a file"),
    (later(b"x", OK), 500, "after the first block"),
    (play(OK), 500, "returns None"),
    (play(OK, 7), 500, "returns a number"),
    (play(OK, lambda environ: "text"), 500, "returns a str"),
    (play(OK, lambda environ: b"bytes"), 500, "returns bytes, whose items are numbers"),
    (play(OK, ["x"]), 500, "a str in a list"),
    (play(OK, [b"x", None]), 500, "a list ends in None"),
    (play(OK, ["", b"x"]), 500, "an empty str"),
    (play(OK, lambda environ: io.StringIO("text\n")), 500, "a text file"),
    (play(OK, "x", []), 500, "write() of a str"),
    (play(OK, lambda _: Tracked(ValueError(1), failure=ValueError(2))), 500, "close() fails after a failure"),
    (lambda environ: [b"x"], 500, "an application that takes no start_response"),
)  # fmt: skip
@pytest.mark.parametrize("asked", [GET, HEAD, OLD], ids=["GET", "HEAD", "1.0"])
def test_start_response_protocol(asked: bytes, application: Any, status: int, log: Any) -> None:
    answer = ask(asked, application)
    assert answer.status == status and bool(log(2)) == (status == 500)
    if status == 500:
        assert (answer.get("Content-Type") or "").startswith("text/plain") and b"Traceback" not in answer.body
    else:
        assert answer.body == (b"" if asked is HEAD else b"x")


def test_exc_info_replaces_all_that_was_said() -> None:
    first = ("200 OK", [PLAIN, sized(99), ("X-First", "1"), ("Connection", "close"), ("Server", "a"), ("Date", "b")])
    answer = ask(GET, play(first, AGAIN, [b"x"]))
    assert (answer.status, answer.body, answer.get("X-First"), answer.get("Connection")) == (503, b"x", None, None)
    assert answer.get("Content-Length") != "99" and answer.get("Server") != "a" and answer.get("Date") != "b"


@pytest.mark.parametrize("is_first", [True, False], ids=["first call", "again with exc_info"])
def test_a_refused_start_response_leaves_nothing_behind(is_first: bool) -> None:
    def application(environ: Any, start_response: Any) -> Any:
        if not is_first:
            start_response("200 OK", [sized(1)])
        with pytest.raises(Exception, match="Bad"):  # "while the application is still running" (PEP 3333)
            headers = [("X-Left", "1"), sized(9), ("Connection", "close"), ("Bad", "\n")]
            start_response("201 Created", headers, *([] if is_first else [TROUBLE]))
        if is_first:
            start_response("200 OK", [sized(1)])
        return iter([b"x"])

    answer = ask(GET, application)
    assert (answer.status, answer.body, answer.get("X-Left"), answer.get("Connection")) == (200, b"x", None, None)


def test_exc_info_is_raised_again_once_the_head_is_out(log: Any) -> None:
    caught = []

    def application(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        yield b"x"
        try:
            raise LookupError("the cause")
        except LookupError as error:
            try:
                start_response("500 Trouble", [], sys.exc_info())
            except LookupError as again:
                caught.append(again is error)
                raise

    assert_cut(exchange(GET, NEXT, application=route(application)))
    assert caught == [True] and "the cause" in "".join(log(2))


@rows(
    "status",
    ("20 OK", "two digits"), ("2000 OK", "four digits"), ("2x0 OK", "no number"), ("OK", "no number at all"),
    ("", "empty"), (" 200 OK", "a space before"), ("200OK", "no space"), ("-20 OK", "a sign"), ("000 No", "000"),
    ("099 Low", "below 100"), ("\u0662\u0660\u0660 OK", "digits of another script"), ("200\tOK", "a tab for the space"),
    ("200 OK\r\nX-Evil: 1", "response splitting"), ("200 OK\n", "LF at the end"), ("200 O\rK", "bare CR"),
    ("200 O\0K", "NUL"), ("200 \x1bOK", "a control byte"), ("200 \u20ac", "not latin-1"), (200, "a number"),
    (b"200 OK", "bytes"), (None, "None"), ("100 Continue", "1xx is not final (RFC 9110 15.2)"),
    ("101 Switching Protocols", "an upgrade that the server does not make"), ("199 Odd", "1xx, unknown"),
)  # fmt: skip
def test_refuses_a_bad_status_and_names_it(status: Any, log: Any) -> None:
    answer = ask(GET, give([b"x"], PLAIN, status=status))
    assert answer.status == 500 and answer.get("X-Evil") is None
    assert repr(status) in "".join(log(2)).replace("\\\\", "\\")


@rows(
    "headers, culprit",
    ((("X-A", "1"),), "X-A", "a tuple, no list (PEP 3333)"), ({"X-A": "1"}, "X-A", "a dict"), (None, "None", "none"),
    ("X-A: 1", "X-A", "a str"), ([["X-A", "1"]], "X-A", "a list for the tuple"), (["X-A: 1"], "X-A: 1", "a str in it"),
    ([("X-A", "1", "2")], "X-A", "three of them"), ([("X-A",)], "X-A", "one alone"), ([None], "None", "None in it"),
    ([(b"X-A", "1")], "X-A", "a name in bytes"), ([("X-A", b"1")], "X-A", "a value in bytes"),
    ([("X-A", 1)], "X-A", "a number"), ([("X-A", None)], "X-A", "None for a value"), ([(5, "1")], "5", "a name 5"),
    ([("", "1")], "''", "no name"), ([("X A", "1")], "X A", "a space inside"), ([("X-A ", "1")], "X-A", "after it"),
    ([("X-A:", "1")], "X-A:", "a colon in the name"), ([("X-\xe9", "1")], "X-", "a name beyond ASCII"),
    ([("X-A\r\nX-Evil", "1")], "X-Evil", "a name that splits"), ([("X(A", "1")], "X(A", "no token (RFC 9110 5.1)"),
    ([("X-A", "1\r\nX-Evil: 1")], "X-Evil", "a value that splits"), ([("X-A", "1\n 2")], "X-A", "a folded value"),
    ([("X-A", "1\r")], "X-A", "CR at the end"), ([("X-A", "1\n")], "X-A", "LF at the end"),
    ([("X-A", "\0")], "X-A", "NUL"), ([("X-A", "\x1b[m")], "X-A", "a control byte"), ([("X-A", "\x7f")], "X-A", "DEL"),
    ([("X-A", "\u20ac")], "X-A", "a value beyond latin-1"), ([("X-A", "\u010d\u010a")], "X-A", "CR LF when truncated"),
    ([("Transfer-Encoding", "chunked")], "Transfer-Encoding", "the framing is the server's"),
    ([("transfer-encoding", "identity")], "transfer-encoding", "in any case"),
    ([("Keep-Alive", "timeout=5")], "Keep-Alive", "hop-by-hop"), ([("TE", "trailers")], "TE", "hop-by-hop TE"),
    ([("Upgrade", "h2c")], "Upgrade", "hop-by-hop Upgrade"), ([("Trailers", "X")], "Trailers", "so in RFC 2616 13.5.1"),
    ([("Trailer", "X")], "Trailer", "a trailer section that will not come (RFC 9110 6.6.2)"),
    ([("Proxy-Authenticate", "Basic")], "Proxy-Authenticate", "hop-by-hop (PEP 3333, RFC 2616 13.5.1)"),
    ([("Proxy-Authorization", "x")], "Proxy-Authorization", "hop-by-hop too"),
    ([("Connection", "keep-alive")], "Connection", "persistence is the server's"),
    ([("Connection", "X-A")], "Connection", "other connection options"),
    ([sized(-1)], "-1", "a negative length"), ([sized("+1")], "+1", "a sign"), ([sized("")], "Content-Length", "empty"),
    ([sized("one")], "one", "no number"), ([sized("1.0")], "1.0", "a fraction"), ([sized("0x1")], "0x1", "hexadecimal"),
    ([sized("1_0")], "1_0", "int() is not a validator"), ([sized("\xb9")], "Content-Length", "superscript"),
    ([sized("1,1")], "1,1", "a list (RFC 9110 8.6)"), ([("Content-Length", 1)], "Content-Length", "an int"),
    ([sized(1), sized(1)], "Content-Length", "a length twice"), ([sized(1), sized(2)], "Content-Length", "two lengths"),
)  # fmt: skip
@pytest.mark.parametrize("status", ["200 OK", "304 Not Modified"])
def test_refuses_bad_headers_and_names_the_culprit(headers: Any, culprit: str, status: str, log: Any) -> None:
    answer = ask(GET, lambda environ, start_response: start_response(status, headers) and [b"x"])
    assert answer.status == 500 and {"x-evil", "x-a"}.isdisjoint(name.lower() for name, value in answer.fields)
    assert culprit in "".join(log(2))


@pytest.mark.parametrize("status", ["200 ", "200 Tr\xe8s bien", "299 (odd) reason: ~", "418 I'm a teapot", "599 Last"])
def test_sends_legal_status_and_headers_as_they_are_and_in_order(status: str) -> None:
    given = [("X-b", "2"), ("x_under", "!#$%&'*+.^`|~"), ("X-Empty", ""), ("X-Latin", "\xe9"), ("Set-Cookie", "a=1"),
             ("Set-Cookie", "b=2; Expires=Wed, 09 Jun 2021 10:18:14 GMT"), ("X-a", "a  b:c")]  # fmt: skip
    data = exchange(GET, application=give([b"x"], *given, status=status))
    assert data.startswith(b"HTTP/1.1 %s\r\n" % status.encode("latin-1"))
    assert [field for field in parse_answers(data)[0].fields if field in given] == given


class Text(str):
    """A str by inheritance, as a framework's marked strings are."""


class Disguised(str):
    """A str whose text differs from what it is."""

    def __str__(self) -> str:
        return "X: y\r\nX-Evil: 1"

    __add__ = __radd__ = __mod__ = lambda self, _: "X: y\r\nX-Evil: 1"
    lower = strip = lambda self, *_: "harmless"


def test_sends_what_it_has_checked_of_a_str_by_inheritance() -> None:
    application = give([b"x"], (Disguised("X-Name"), Disguised("value")), status=Disguised("299 Fine"))
    data = exchange(GET, application=application)
    assert data.startswith(b"HTTP/1.1 299 Fine\r\n") and b"\r\nX-Name: value\r\n" in data and b"Evil" not in data
    for header in ((Disguised("X: 1\r\nX-Evil"), "1"), ("X", Disguised("1\r\nX-Evil: 1")), (Disguised("Upgrade"), "x")):
        assert ask(GET, give([b"x"], header)).status == 500


def test_judges_a_header_alike_whatever_came_before_it() -> None:
    marked, plain = give([b"x"], ("X-Alike", Text("1"))), give([b"x"], ("X-Alike", "1"))
    before = ask(GET, marked).status  # PEP 3333 leaves open whether it is a native string
    assert ask(GET, plain).status == 200 and ask(GET, marked).status == before


@pytest.mark.parametrize("spell", [str, str.lower, str.upper], ids=["as is", "lower", "upper"])
def test_leaves_date_server_and_length_to_an_application_that_gives_them(spell: Any) -> None:
    given = [("Date", "Sun, 06 Nov 1994 08:49:37 GMT"), ("Server", "mine/1"), sized(1)]
    answer = ask(GET, give([b"x"], *[(spell(name), value) for name, value in given]))
    assert [(name, answer.get(name)) for name, _ in given] == given and answer.get("Transfer-Encoding") is None


@rows(
    "body, length, sent",
    ([b"hello"], 3, b"hel", "one block"),
    ([b"hello"], 0, b"", "a length of 0"),
    ([b"hel", b"lo"], 3, b"hel", "at a block's end"),
    (stream(b"he", b"ll", b"o"), 3, b"hel", "within the second block"),
    (wrapped(lambda: io.BytesIO(b"hello")), 3, b"hel", "a file"),
    (endless, 3, b"xxx", "a stream without end: stop (PEP 3333, Content-Length)"),
)
@pytest.mark.parametrize("asked", [GET, OLD, KEPT], ids=["1.1", "1.0", "1.0 kept"])
def test_cuts_and_logs_a_body_beyond_its_length(asked: bytes, body: Any, length: int, sent: bytes, log: Any) -> None:
    answer = ask(asked, give(body, PLAIN, sized(length)))
    assert (answer.status, answer.body) == (200, sent)
    assert re.search("(?i)content-length", "".join(log(2)))


def test_cuts_what_write_sends_beyond_the_length() -> None:
    data = exchange(GET, application=play(("200 OK", [sized(3)]), b"he", b"llo", b"!", [b"?"]))
    assert data.endswith(b"\r\n\r\nhel")  # an error in write() is as good: PEP 3333 allows both


@rows(
    "application",
    (give(stream(b"abc", ValueError("boom")), sized(3)), "a generator, after its last block"),
    (play(("200 OK", [sized(3)]), b"abc", ValueError("boom")), "the application, after write()"),
    (give(lambda _: Tracked(b"abc", failure=ValueError("boom")), sized(3)), "close()"),
)
def test_a_failure_after_the_last_byte_spoils_nothing(application: Any, log: Any) -> None:
    first, *others = talk(GET, NEXT, application=route(application))
    assert (first.status, first.body) == (200, b"abc") and [other.status for other in others] in ([], [200])
    assert "boom" in "".join(log(2))  # to stop at the last byte would be legal too (PEP 3333), and hide it


class Failing:
    """A file whose second read fails; it has nothing but `read`."""

    def __init__(self) -> None:
        self.items = blocks(b"hello", OSError("the disk"))

    def read(self, size: int) -> bytes:
        return next(self.items)


@rows(
    "steps",
    ([stream(b"hello", ValueError("boom"))], "a generator fails"),
    ([stream(b"hello", b"", ValueError("boom"))], "a generator fails after an empty block"),
    ([stream(b"hello", SystemExit(0))], "a generator exits"),
    ([stream(b"hello", "str")], "a str for a block"),
    ([stream(b"hello", 7)], "a number for a block"),
    ([b"hello", ValueError("boom")], "write(), then a failure"),
    ([b"hello", None], "write(), then no iterable"),
    ([b"hello", ["str"]], "write(), then a str"),
    ([b"hello", OK, []], "start_response too late"),
    ([b"hello", AGAIN, []], "start_response too late, with exc_info"),
    ([wrapped(Failing)], "a file fails"),
)
@pytest.mark.parametrize("framed", ["chunked", "sized", "sized in 1.0", "by close"])
def test_a_failure_after_the_head_is_seen_by_the_client(tcp: None, steps: list[Any], framed: str, log: Any) -> None:
    application = play(("200 OK", [sized(9)] if framed.startswith("sized") else []), *steps)
    data, is_reset = b"", False
    with connected(route(application)) as client:
        client.sendall(GET + NEXT if framed in ("chunked", "sized") else OLD)
        try:
            for piece in iter(lambda: client.recv(65536), b""):
                data += piece
        except ConnectionResetError:
            is_reset = True
    if framed == "by close":
        assert is_reset  # a plain close would mean the end (RFC 9112 §6.3)
    else:
        assert_cut(data)
        assert data.endswith(b"\r\n\r\n5\r\nhello\r\n" if framed == "chunked" else b"\r\n\r\nhello")
    assert log(2)


@pytest.mark.parametrize("body", [[b"hello"], [], stream(b"he", b"llo")], ids=["a block", "no block", "a stream"])
@pytest.mark.parametrize("asked", [GET, OLD, KEPT], ids=["1.1", "1.0", "1.0 kept"])
def test_a_body_below_its_length_ends_the_connection(asked: bytes, body: Any, log: Any) -> None:
    assert_cut(exchange(asked, NEXT, application=route(give(body, sized(9)))))
    assert re.search("(?i)content-length", "".join(log(2)))


@rows(
    "steps, tracked",
    ([OK], Tracked(b"a", b"b"), "all is well"),
    ([OK], Tracked(b""), "nothing to send"),
    ([("204 No Content", [])], Tracked(b"a", b"b"), "204"),
    ([("304 Not Modified", [])], Tracked(b"a", b"b"), "304"),
    ([OK, b"w"], Tracked(b"a", b"b"), "after write()"),
    ([("200 OK", [sized(1)])], Tracked(b"a", b"b"), "a length too small"),
    ([("200 OK", [sized(9)])], Tracked(b"a", b"b"), "a length too large"),
    ([], Tracked(b"a"), "start_response never"),
    ([OK], Tracked(), "fails in iter()"),
    ([OK], Tracked(ValueError("boom")), "fails before the first block"),
    ([OK], Tracked(SystemExit(1)), "exits before the first block"),
    ([OK], Tracked(b"a", ValueError("boom")), "fails after it"),
    ([OK], Tracked(b"a", SystemExit(1)), "exits after it"),
    ([OK], Tracked("a"), "a str"),
    ([OK], Tracked(b"a", "b"), "a str after it"),
    ([OK], Tracked(b"a", failure=ValueError("boom")), "fails in close()"),
    ([OK], Tracked(b"a", failure=SystemExit(1)), "exits in close()"),
    ([OK], Tracked(ValueError("boom"), failure=ValueError("bang")), "fails, and in close() too"),
    ([OK], Tracked(b"a", ValueError("boom"), failure=ValueError("bang")), "fails late, and in close() too"),
)
@pytest.mark.parametrize("asked", [GET, HEAD, OLD], ids=["GET", "HEAD", "1.0"])
def test_closes_the_iterable_exactly_once(asked: bytes, steps: list[Any], tracked: Tracked, log: Any) -> None:
    tracked.closed = 0
    exchange(asked, application=play(*steps, lambda environ: tracked))
    assert tracked.closed == 1
    raised = [item for item in (*tracked.items, tracked.failure) if isinstance(item, BaseException)]
    assert asked is HEAD or all(str(error) in "".join(log(2)) for error in raised)


@pytest.mark.parametrize("kind", ["stream", "file", "write"])
@pytest.mark.parametrize("manner", ["leaves at once", "leaves in the middle", "does not read"])
def test_ends_the_response_to_a_client_that(manner: str, kind: str, tmp_path: Any, log: Any, quick: None) -> None:
    (tmp_path / "data").write_bytes(DATA * 12)
    file, tracked, written = open_file(str(tmp_path / "data"), "rb"), Tracked(*[DATA] * 12), []

    def write_forever(environ: Any, start_response: Any) -> Any:
        try:
            write = start_response("200 OK", [])
            while True:
                write(DATA)
        finally:
            written.append("ended")

    application, is_ended = {
        "stream": (give(lambda environ: tracked), lambda: tracked.closed),
        "file": (give(wrapped(lambda: file)), lambda: file.closed),
        "write": (write_forever, lambda: written),
    }[kind]
    with connected(application, timeout=0.2 if manner == "does not read" else PATIENCE) as client:
        client.sendall(GET)
        if manner == "leaves in the middle":
            client.recv(100000)
        if manner == "does not read":
            wait_until(is_ended, "the deadline")
            assert_cut(receive_all(client))
    assert is_ended() and tracked.closed == (kind == "stream")
    assert not log(2)  # that a client leaves is no error of the application
    file.close()


@pytest.mark.parametrize("asked, rest", [(GET + NEXT, [b"END"]), (OLD, [])], ids=["1.1, more", "1.0, no more"])
def test_sends_nothing_behind_a_gap_that_the_application_ignores(
    tcp: None, quick: None, asked: bytes, rest: Any, log: Any
) -> None:
    is_caught = threading.Event()

    def application(environ: Any, start_response: Any) -> Any:
        write = start_response("200 OK", [])
        try:
            write(bytes(20_000_000))
        except Exception:
            is_caught.set()
        return rest

    with connected(application, timeout=0.2, access_log="json") as client:
        client.sendall(asked)
        assert is_caught.wait(PATIENCE)
        data, is_reset = bytearray(), False
        try:
            while piece := client.recv(1 << 20):
                data += piece
        except ConnectionResetError:
            is_reset = True
        assert data.count(b"HTTP/1.1 ") <= 1 and b"END" not in data and not data.endswith(b"0\r\n\r\n")
        assert is_reset or asked != OLD, "a plain end would mean a complete body"
    assert "the client has gone" in "".join(log(1)) and not log(2)


@pytest.mark.parametrize("asked", [GET, OLD], ids=["1.1", "1.0"])
@pytest.mark.parametrize("is_written", [False, True], ids=["yield", "write"])
def test_sends_each_block_before_it_asks_for_the_next(asked: bytes, is_written: bool) -> None:
    arrived = threading.Event()

    def application(environ: Any, start_response: Any) -> Any:
        write = start_response("200 OK", [])
        if is_written:
            write(b"one")
        else:
            yield b"one"
        yield b"two" if arrived.wait(PATIENCE) else b"never"

    with connected(application) as client:
        client.sendall(asked)
        client.shutdown(socket.SHUT_WR)
        data = receive_until(client, b"one")
        arrived.set()
        assert parse_answers(data + receive_all(client))[0].body == b"onetwo"


@pytest.mark.parametrize("first", [[b"x"], [], (b"x",)], ids=["sized", "empty", "chunked"])
@rows(
    "misuse",
    (lambda start, write: write(b"junk"), "write"),
    (lambda start, write: start("200 OK", [("X-Evil", "1")]), "start_response"),
    (lambda start, write: start("200 OK", [("X-Evil", "1")], TROUBLE), "start_response with exc_info"),
)
def test_a_callable_kept_from_an_earlier_request_does_no_harm(misuse: Any, first: Any) -> None:
    kept: list[Any] = []

    def application(environ: Any, start_response: Any) -> Any:
        if kept:
            with contextlib.suppress(Exception):
                misuse(*kept)
            return hello(environ, start_response)
        kept.extend([start_response, start_response("200 OK", [])])
        return iter(first) if isinstance(first, tuple) else first

    answers = talk(GET, NEXT, application=application)
    assert [answer.body for answer in answers] == [b"".join(first), b"hello\n"] and not answers[1].get("X-Evil")


@pytest.fixture
def path(tmp_path: Any) -> str:
    """The path of a file that holds DATA."""
    (tmp_path / "data").write_bytes(DATA)
    return str(tmp_path / "data")


def pipe(data: bytes) -> Any:
    """The reading end of a pipe that has the data."""
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    return os.fdopen(reader, "rb")


def after(file: Any, *calls: Any) -> Any:
    """The file, when these methods were called on it."""
    for name, *arguments in calls:
        getattr(file, name)(*arguments)
    return file


def packed(module: Any, path: str) -> Any:
    """A file that unpacks what the file under its descriptor holds."""
    with open(path, "wb") as file:
        file.write(module.compress(DATA))
    return module.open(path)


class Shouting(io.FileIO):
    """A file whose bytes are not those under its descriptor."""

    def read(self, size: int = -1) -> bytes:
        return (super().read(size) or b"").upper()


class Bare:
    """A file that can do nothing but read."""

    def __init__(self, path: str) -> None:
        self.read = io.BytesIO(DATA).read


@rows(
    "make, expected",
    (lambda path: open_file(path, "rb"), DATA, "a whole file"),
    (lambda path: open_file(path, "rb", buffering=0), DATA, "unbuffered"),
    (lambda path: open_file(path, "r+b"), DATA, "open for writing too"),
    (lambda path: after(open_file(path, "rb"), ("seek", 100000)), DATA[100000:], "from its position (PEP 3333)"),
    (lambda path: after(open_file(path, "rb"), ("read", 10)), DATA[10:], "read ahead: not the descriptor's position"),
    (lambda path: after(open_file(path, "rb"), ("seek", 9), ("read", 70000)), DATA[70009:], "sought and read"),
    (lambda path: after(open_file(path, "rb"), ("seek", 1 << 40)), b"", "beyond its end"),
    (lambda path: after(open_file(path, "w+b"), ("write", b"fresh"), ("seek", 2)), b"esh", "written and rewound"),
    (lambda path: after(open_file(path, "r+b"), ("read", 4), ("write", b"#"), ("seek", 0)), DATA[:4] + b"#" + DATA[5:],
     "read, written and sought inside the buffer"),
    (lambda path: open_file(os.devnull, "rb"), b"", "a device"),
    (lambda path: io.BytesIO(DATA), DATA, "BytesIO"),
    (lambda path: after(io.BytesIO(DATA), ("seek", 5)), DATA[5:], "BytesIO with an offset"),
    (lambda path: pipe(DATA[:5000]), DATA[:5000], "a pipe"),
    (lambda path: packed(gzip, path), DATA, "GzipFile: its descriptor has other bytes"),
    (lambda path: after(packed(gzip, path), ("read", 7)), DATA[7:], "GzipFile with an offset"),
    (lambda path: packed(bz2, path), DATA, "BZ2File"),
    (lambda path: packed(lzma, path), DATA, "LZMAFile"),
    (Shouting, DATA.upper(), "a class of its own"),
    (Bare, DATA, "an object that only reads"),
)  # fmt: skip
@pytest.mark.parametrize("asked", [GET, OLD, KEPT, HEAD], ids=["1.1", "1.0", "1.0 kept", "HEAD"])
@pytest.mark.parametrize("is_sized", [False, True], ids=["", "sized"])
def test_file_wrapper(asked: bytes, make: Any, expected: bytes, is_sized: bool, path: str, log: Any) -> None:
    file, headers = make(path), [sized(len(expected))] if is_sized else []
    answer = ask(asked, give(wrapped(lambda: file), *headers))
    assert answer.status == 200 and answer.body == (b"" if asked is HEAD else expected)
    assert answer.get("Content-Length") in (str(len(expected)), *([] if is_sized else [None]))
    assert getattr(file, "closed", True) and not log(2)


@pytest.mark.parametrize("name", ["/proc/self/limits", "/sys/devices/system/cpu/online", "/dev/zero"])
def test_file_wrapper_does_not_trust_the_size_of_special_files(name: str) -> None:
    if not os.path.exists(name):
        pytest.skip("no " + name)
    with open(name, "rb") as file:
        expected = file.read(1000)
    answer = ask(GET, give(wrapped(lambda: open_file(name, "rb")), *([sized(1000)] if name == "/dev/zero" else [])))
    assert answer.body[:1000] == expected


@rows(
    "use, body",
    (lambda wrap, file: wrap(file, 7), DATA, "with a size of block"),
    (lambda wrap, file: list(wrap(file, 1000)), DATA, "iterated by a middleware"),
    (lambda wrap, file: (block.swapcase() for block in wrap(file)), DATA.swapcase(), "wrapped by a middleware"),
    (lambda wrap, file: wrap(file) and [b"other"], b"other", "made and not returned"),
)
def test_file_wrapper_is_an_iterable_like_any_other(use: Any, body: bytes, path: str) -> None:
    with open(path, "rb") as file:
        assert ask(GET, give(lambda environ: use(environ["wsgi.file_wrapper"], file))).body == body


@rows("make", (lambda path: open_file(path, "rb"), "file"), (lambda path: io.BytesIO(DATA), "BytesIO"))
@rows(
    "asked, steps, expected, framings",
    (GET, [("200 OK", [sized(1000)])], DATA[:1000], "1000", "too short a length: cut there"),
    (GET, [("200 OK", [sized(0)])], b"", "0", "a length of 0"),
    (OLD, [("200 OK", [sized(70000)])], DATA[:70000], "70000", "too short a length, HTTP/1.0"),
    (HEAD, [("200 OK", [sized(1000)])], b"", "1000", "too short a length, HEAD"),
    (GET, [("304 Not Modified", [])], b"", "256000 close", "304"),
    (GET, [("204 No Content", [])], b"", "close", "204"),
    (GET, [OK, b"first"], b"first" + DATA, "chunked", "after write()"),
    (OLD, [OK, b"first"], b"first" + DATA, "close", "after write(), HTTP/1.0"),
    (GET, [("200 OK", [sized(8)]), b"first"], b"first" + DATA[:3], "8", "after write(), too short a length"),
    (GET, [("200 OK", [sized(len(DATA) + 1)])], None, "", "too long a length: seen by the client"),
    (OLD, [("200 OK", [sized(len(DATA) + 1)])], None, "", "too long a length, HTTP/1.0"),
)  # fmt: skip
def test_file_wrapper_keeps_to_the_framing(
    asked: bytes, steps: list[Any], expected: Any, framings: str, make: Any, path: str, log: Any
) -> None:
    file = make(path)
    application = play(*steps, wrapped(lambda: file))
    if expected is None:
        assert_cut(exchange(asked, NEXT, application=route(application)))
        assert log(2)
    else:
        answer = ask(asked, application)
        assert answer.body == expected and answer.framing() in framings.split()
    assert file.closed


@rows(
    "make",
    (lambda path: after(open_file(path, "rb"), ("close",)), "closed"),
    (lambda path: after(io.BytesIO(), ("close",)), "a closed BytesIO"),
    (lambda path: open_file(path, "ab"), "open for writing only"),
    (lambda path: after(open_file(path, "ab"), ("seek", 0)), "open for writing only, rewound"),
    (lambda path: after(open_file(path, "ab", buffering=0), ("seek", 0)), "open for writing only, unbuffered"),
    (lambda path: open_file(path, encoding="latin-1"), "of text"),
    (lambda path: io.StringIO("text"), "StringIO"),
    (lambda path: None, "None"),
)
def test_file_wrapper_answers_500_for_a_file_that_it_cannot_read(make: Any, path: str, log: Any) -> None:
    file = make(path)
    assert ask(GET, give(wrapped(lambda: file))).status == 500 and log(2)


@pytest.mark.parametrize("asked", [GET, OLD], ids=["1.1", "1.0"])
def test_file_wrapper_serves_a_client_that_reads_slowly(asked: bytes, tmp_path: Any) -> None:
    (tmp_path / "data").write_bytes(DATA * 12)
    file = open_file(str(tmp_path / "data"), "rb")
    with connected(give(wrapped(lambda: file))) as client:
        client.sendall(asked)
        client.shutdown(socket.SHUT_WR)
        data = b"".join(iter(lambda: client.recv(2000), b""))
    assert parse_answers(data)[0].body == DATA * 12 and file.closed


# ---- 8. Connection ----------------------------------------------------------


@rows(
    "asked, application",
    (GET, give([b"x"], ("Connection", "close")), "to HTTP/1.1"),
    (KEPT, give([b"x"], ("connection", "Close")), "to HTTP/1.0"),
    (HEAD, give([], ("Connection", "CLOSE")), "to HEAD"),
)
def test_closes_where_the_application_says_so(asked: bytes, application: Any) -> None:
    assert (ask(asked, application).get("Connection") or "").lower() == "close"


KINDS = [("GET", "/a", ""), ("HEAD", "/b", ""), ("GET", "/stream", ""), ("GET", "/204", ""), ("POST", "/c", "xyz"),
         ("HEAD", "/stream", ""), ("GET", "/304", ""), ("POST", "/stream", "GET / HTTP/1.1\r\n\r\n")] * 5  # fmt: skip


def test_answers_pipelined_requests_in_order() -> None:
    def application(environ: Any, start_response: Any) -> Any:
        path, body = environ["PATH_INFO"], environ["wsgi.input"].read()
        start_response((path[1:] if path in ("/204", "/304") else "200") + " Fine", [("X-Path", path)])
        return iter([path.encode(), body]) if path == "/stream" else [path.encode() + body]

    requests = [
        get(b"Content-Length: %d" % len(body), target=path.encode(), method=method.encode()) + body.encode()
        for method, path, body in KINDS
    ]
    for pieces in ([b"".join(requests)], requests):
        answers = talk(*pieces, methods=tuple(method for method, _, _ in KINDS), application=application)
        assert [(answer.get("X-Path"), answer.body) for answer in answers] == [
            (path, b"" if method == "HEAD" or path in ("/204", "/304") else (path + body).encode())
            for method, path, body in KINDS
        ]


def test_serves_any_number_of_requests() -> None:
    assert [answer.body for answer in talk(GET * 500, application=hello)] == [b"hello\n"] * 500


def test_serves_http_client(tcp: None) -> None:
    with connected(echo) as sock:
        client = http.client.HTTPConnection("h")
        client.sock = sock
        for method, body in [("GET", None), ("POST", b"abc"), ("HEAD", None), ("PUT", iter([b"abc"])), ("GET", None)]:
            client.request(method, "/p", body)  # an iterator goes chunked
            response = client.getresponse()
            expected = b"" if method == "HEAD" else method.encode() + b" /p " + (b"abc" if body else b"")
            assert response.read() == expected and not response.will_close


def test_gives_back_a_connection_that_is_at_rest(quick: None) -> None:
    """Silent for a while, before a first byte or between two requests; what comes then is read by the next process."""
    assert serve(b"") == Served([], [], [], [])
    client, server = socket.socketpair()
    settings = webserver.Options(access_log="off")
    with client, server, bounded():
        webserver.limit_waits(server)
        assert webserver.serve_connection(hello, settings, server, "", SLOT)
        client.sendall(GET + GET)
        client.shutdown(socket.SHUT_WR)
        assert not webserver.serve_connection(hello, settings, server, "", SLOT)
        assert len(parse_answers(receive_all(client))) == 2


def test_sends_no_body_when_it_refuses_a_head_request() -> None:
    """RFC 9110 §9.3.2: also an error answers HEAD without content, where the method could be understood."""
    for before in (b"", b"\r\n"):  # an empty line before the request-line is none of it (RFC 9112 §2.2)
        data = exchange(before + get(b"X : a", method=b"HEAD"))
        assert data.startswith(b"HTTP/1.1 400 ") and data.endswith(b"\r\n\r\n")


@rows(
    "asked",
    (OLD, "an answer to HTTP/1.0"),
    (get(CLOSE) + b"x" * 300000, "what follows the last request"),
    (post(b"Content-Length: 300000", body=b"x" * 300000), "a body too large to be drained"),
)
@pytest.mark.parametrize("application", [hello, give(stream(b"hel", b"lo\n"))], ids=["sized", "stream"])
def test_closes_so_that_the_answer_survives(tcp: None, asked: bytes, application: Any) -> None:
    with connected(application) as client:
        client.sendall(asked)
        client.shutdown(socket.SHUT_WR)
        data = b"".join(iter(lambda: client.recv(65536), b""))  # an early close() would reset (RFC 9112 9.6)
    assert parse_answers(data)[0].body == b"hello\n"


class Odd(BaseException):
    """As a cancelled task or greenlet raises."""


class UnspeakableError(Exception):
    """An error that cannot even be described."""

    def __str__(self) -> str:
        raise ValueError("no words")


ERRORS = [SystemExit(0), SystemExit("bye"), Odd(), GeneratorExit(), StopIteration(), RecursionError(), MemoryError(),
          UnspeakableError(), OSError(32, "pipe"), BrokenPipeError(), ConnectionResetError(),
          TimeoutError(), type("ArrayMemoryError", (MemoryError,), {})()]  # fmt: skip


def test_names_the_limit_of_memory_for_any_kind_of_memory_error() -> None:
    for error in (error for error in ERRORS if isinstance(error, MemoryError)):
        assert b"--limit-memory" in ask(GET, play(error)).body


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("application", [play, later], ids=["in the call", "in the iteration"])
def test_any_failure_of_an_application_is_a_500(error: BaseException, application: Any, log: Any) -> None:
    assert ask(GET, application(OK, error)).status == 500 and type(error).__name__ in "".join(log(2))


# ---- 9. Log -----------------------------------------------------------------


def nested(environ: Any, start_response: Any) -> Any:
    """Fails with a cause, in a generator, and with a message that would forge a log."""
    start_response("200 OK", [])
    try:
        {}["the key"]
    except KeyError as error:
        raise ValueError("first\n[1] forged\x1b[31m") from error
    yield b""


@rows(
    "application, expected",
    (nested, ["KeyError: 'the key'", "direct cause", "ValueError: first", "in nested", '{}["the key"]'], "a cause"),
    (play(("200 OK", [("X-A", "\n")])), ["in application", "X-A"], "a header"),
    (give(stream("text")), ["'text'"], "a block, of which no frame tells"),
    (later(OK, SystemExit("bye")), ["SystemExit: bye", "in blocks"], "an exit"),
    (play(ValueError("first\n" * 5000 + "last")), ["first", "[...]", "last"], "a long message, cut in its middle"),
)
def test_logs_the_traceback_from_the_application_on(application: Any, expected: list[str], log: Any) -> None:
    ask(get(target=b"/some?where"), application)
    lines = log(2)
    assert all(line.startswith("[%d] " % os.getpid()) and line.isprintable() for line in lines)  # none can be forged
    assert all(text in "\n".join(lines) for text in expected)
    frames = [line for line in lines if ' File "' in line]
    assert not frames or WEBSERVER not in frames[0]  # what the server's own checks add below does no harm


@rows(
    "asked, application, facts",
    (get(b"Referer: http://r/", b"User-Agent: curl/8", target=b"/a?b"), hello,
     ("GET /a?b HTTP/1.1", 200, 6, "http://r/", "curl/8"), "all the facts"),
    (OLD, hello, ("GET / HTTP/1.0", 200, 6, "-", "-"), "none of the fields"),
    (HEAD, hello, ("HEAD / HTTP/1.1", 200, 0, "-", "-"), "HEAD: the bytes sent"),
    (GET, give(stream(b"a", b"bc")), ("GET / HTTP/1.1", 200, 3, "-", "-"), "chunked: the bytes of the body"),
    (GET, play(OK, b"a", [b"bc"]), ("GET / HTTP/1.1", 200, 3, "-", "-"), "write()"),
    (GET, give([], status="304 Not Modified"), ("GET / HTTP/1.1", 304, 0, "-", "-"), "304"),
    (GET, give(wrapped(lambda: io.BytesIO(DATA)), sized(100)), ("GET / HTTP/1.1", 200, 100, "-", "-"), "a file"),
    (GET, play(ValueError()), ("GET / HTTP/1.1", 500, None, "-", "-"), "a failure"),
    (GET, give(stream(b"abc", ValueError())), ("GET / HTTP/1.1", 200, 3, "-", "-"), "a failure after the head"),
    (get(b'User-Agent: a" 200 "b', b"Referer: \\"), hello,
     ("GET / HTTP/1.1", 200, 6, "\\", 'a" 200 "b'), "quotes and backslashes"),
    (get(b"User-Agent: \xe9\x85\x9b", b"Referer: \xff"), hello,
     ("GET / HTTP/1.1", 200, 6, "\xff", "\xe9\x85\x9b"), "bytes beyond ASCII, C1 controls among them"),
    (b"GET / HTTP/1.1\r\n\r\n", hello, ("GET / HTTP/1.1", 400, None, "-", "-"), "a refusal, with its reason"),
    (b"G\x1b[31mT /\x00 HTTP/1.1\r\nHost: h\r\n\r\n", hello, (None, 400, None, "-", "-"), "control bytes, refused"),
)  # fmt: skip
@pytest.mark.parametrize("style", ["combined", "json"])
def test_access_log_states_the_facts(
    tcp: None, asked: bytes, application: Any, facts: Any, style: str, log: Any
) -> None:
    exchange(asked, application=application, access_log=style)
    (line,) = log(1)
    found = read_log(style, line)
    for name, fact in zip(("request", "status", "bytes", "referer", "user_agent"), facts):
        assert fact in (None, found[name]), name
    assert 0 <= float(found["seconds"]) < 5 and (found["detail"] or found["status"] < 400)


def test_access_log_counts_what_was_sent_before_the_client_went(tcp: None, log: Any) -> None:
    def count_unread() -> int:
        return int.from_bytes(fcntl.ioctl(client, termios.FIONREAD, bytes(4)), sys.byteorder)

    with connected(give([bytes(1 << 27)]), access_log="combined") as client:
        client.sendall(GET)
        wait_until(lambda: 0 < count_unread() == (time.sleep(0.05) or count_unread()), "the kernel to take no more")
        received = 0
        while received < 1000 << 16:  # more than the kernel takes at once
            received += len(client.recv(1 << 16))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
    (line,) = log(1)
    assert 999 << 16 <= read_log("combined", line)["bytes"] < 1 << 27


@pytest.mark.parametrize("style", ["combined", "json", "off"])
def test_access_log_has_a_line_for_every_request(tcp: None, style: str, log: Any) -> None:
    exchange(GET, HEAD, NEXT, b"NONSENSE\r\n\r\n", GET, application=hello, access_log=style)
    assert [read_log(style, line)["status"] for line in log(1)] == [200, 200, 200, 400] * (style != "off")


@pytest.mark.parametrize("style", ["combined", "json"])
def test_logs_the_longest_request_by_one_write_and_legibly(tcp: None, style: str, monkeypatch: Any) -> None:
    writes: list[tuple[int, bytes]] = []
    monkeypatch.setattr(os, "write", lambda fd, data: writes.append((fd, bytes(data))) or len(data))
    asked = get(b"User-Agent: " + b"\xe9" * 8000, b"Referer: " + b'"' * 8000, target=b"/" + b"p" * 8000)
    exchange(asked, application=hello, access_log=style)
    ((fd, data),) = writes
    assert fd == 1 and data.count(b"\n") == 1 and data.endswith(b"\n")
    assert read_log(style, data[:-1].decode("ascii"))["status"] == 200  # its texts may be cut, its facts not


def test_names_a_field_that_is_dropped_once_in_a_while_whichever_process_drops_it(shared: Running) -> None:
    for _ in range(3):
        with shared.send("", b"X_Real_IP: 192.0.2.1", CLOSE) as client:
            assert receive_answer(client).status == 200
    assert shared.errors().count("an underscore") == 1


def test_names_tls_and_http_2_in_the_log() -> None:
    """An operator sees at once which protocol met the plain port."""
    assert "TLS" in serve(CLIENT_HELLO).access[0]
    assert "HTTP/2" in serve(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").access[0]


def test_logs_a_refusal_with_its_reason_and_the_bytes_escaped() -> None:
    """What a client sends can neither forge a line nor reach the terminal; one line a request, also when refused."""
    (line,) = serve(b'GET /"\x1b[2J\xff\xe2\x80\xae HTTP/1.1\r\nHost: h\r\n\r\n').access
    assert "\\x1b[2J" in line and "\\xff" in line and '/"' not in line and " 400 " in line
    (line,) = serve(b"GET /a\rb\x85c HTTP/1.1\r\n\r\n", access_log="json").access
    facts = json.loads(line)
    assert "\r" not in line and 400 in facts.values() and "GET /a\rb\x85c HTTP/1.1" in facts.values()


def test_logs_requests_only_not_the_reset_of_an_idle_connection(tmp_path: Any) -> None:
    with Running(tmp_path, app=RUNS_QUERY) as server:
        with server.send() as client:
            pid = read_answer(client).body
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
        server.wait_end(pid)
        assert server.output().count(" - - [") == 1


def test_logs_how_much_of_a_file_the_client_has_taken(tmp_path: Any) -> None:
    write_file(tmp_path / "file", "x" * (1 << 23))
    with Running(tmp_path, app=RUNS_QUERY) as server:
        with server.send("answer = environ['wsgi.file_wrapper'](open('file', 'rb'))") as client:
            for _ in range(30):
                client.recv(65536)
        server.wait_spare()
        assert 1 << 18 <= int(find(r'" 200 (\d+)', server.output())) < 1 << 23


@pytest.mark.parametrize("style", ["combined", "json"])
@pytest.mark.parametrize("octet", [b"a", b"\xff"])
def test_logs_the_reason_also_of_a_refusal_that_is_too_long(octet: bytes, style: str, monkeypatch: Any) -> None:
    """The line is bounded, but what gets cut is what the client sent; JSON stays JSON."""
    reader, writer = os.pipe()
    write_line = webserver.write_line
    monkeypatch.setattr(webserver, "write_line", lambda fd, line: write_line(writer, line))
    longest = octet * (webserver.MAX_FIELD_LINE - 20)
    data = get(b"Referer: " + longest, b"User-Agent: " + longest, target=b"/".ljust(9000, b"a"))
    with open(reader, "rb") as log, open(writer, "wb"):
        assert talk(data, access_log=style)[0].status == 414
        data = get(b"Referer: " + longest, b"User-Agent: " + longest, b"Expect: x")
        assert talk(data, access_log=style)[0].status == 417
        for status, reason in (("414", "request-line"), ("417", "expectation")):
            line = log.readline().decode("ascii")
            assert len(line) <= 4096 and reason in line and status in line
            assert style == "combined" or any(reason in str(value) for value in json.loads(line).values())


@pytest.mark.parametrize("field", [b"Connection: keep-alive", b"Connection: close"])
def test_an_untouched_chunked_body_is_told_with_what_to_do(tmp_path: Any, field: bytes) -> None:
    """Django and Bottle take a body without CONTENT_LENGTH for none."""
    code = "answer = environ.get('CONTENT_LENGTH', '-') + environ['wsgi.input'].read(%s).decode()[:3]"
    words = "--buffer-chunked", "1K"
    with Running(tmp_path, *words, app=RUNS_QUERY) as server:
        for size, amount, expected in ((1024, "", b"1024xxx"), (1025, "", b"-xxx"), (70_000, "0", b"-")):
            assert "--buffer-chunked" not in server.errors()
            with server.connect() as client:
                target = make_target(code % amount).encode()
                head = get(field, b"Transfer-Encoding: chunked", target=target, method=b"POST")
                client.sendall(head + b"%x\r\n%s\r\n0\r\n\r\n" % (size, b"x" * size))
                assert read_answer(client).body == expected
        assert "more than 1024 bytes: raise --buffer-chunked" in server.wait_for_log("read nothing")


def test_the_request_line_is_known_also_behind_an_empty_line(shared: Running) -> None:
    with shared.connect() as client:
        client.sendall(b"\r\n" + get(target=make_target("os.abort()", "/behind").encode()))
        assert receive_all(client) == b""
    assert shared.wait_for_log('SIGABRT.*"GET /behind')


def test_what_an_application_prints_appears_once(shared: Running) -> None:
    shared.run("import sys; print('to', 'stdout', end=''); print('to', 'stderr', end='', file=sys.stderr)")
    wait_until(lambda: "to stdout" in shared.output() and "to stderr" in shared.errors(), "the flush")
    assert shared.output().count("imported") == 1
    assert shared.output().count("to stdout") == shared.errors().count("to stderr") == 1


def test_what_was_printed_at_import_stands_before_the_first_request(shared: Running) -> None:
    shared.run("")
    assert shared.output().startswith("imported\n")


# ---- 10. Listening socket ---------------------------------------------------


def has_ipv6() -> bool:
    """The machine can listen on ::1."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


BINDS = [  # the address, where it must answer
    ("127.0.0.1:PORT", ["127.0.0.1"]),
    ("localhost:PORT", ["localhost"]),
    ("0.0.0.0:PORT", ["127.0.0.1", "127.0.0.2"]),
    ("[::1]:PORT", ["::1"]),
    (":PORT", ["127.0.0.1", "::1"]),
    ("$PORT", ["127.0.0.1", "::1"]),
]


@pytest.mark.parametrize("bind, hosts", BINDS, ids=[row[0] for row in BINDS])
def test_serves_at_every_form_of_tcp_address(tmp_path: Any, bind: str, hosts: list[str]) -> None:
    if "::1" in hosts and not has_ipv6():
        pytest.skip("no IPv6 here")
    port = free_port()
    environment = {"PORT": str(port) if bind == "$PORT" else "1"}  # the option goes before the environment
    address = "" if bind == "$PORT" else bind.replace("PORT", str(port))
    with Running(tmp_path, app=RUNS_QUERY, bind=address, **environment) as server:
        for host in hosts:
            code, family = "answer = environ['SERVER_NAME']", socket.AF_INET6 if ":" in host else socket.AF_INET
            name = "[::1]" if ":" in host else socket.gethostbyname(host)  # RFC 3875 §4.1.14
            assert ask_at((host, port), family, code).body.decode() == name
        line = server.wait_for_log("serving on")
        assert re.search(r"http://\S+:%d\b" % port, line) and str(server.pid) in line


def test_serves_at_a_unix_socket_and_cleans_up(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind("socket")
    with Running(tmp_path, app=RUNS_QUERY, bind="unix:socket") as server:  # the stale one is replaced
        assert ask_at("socket", socket.AF_UNIX).status == 200
        second = run_command(tmp_path, "-b", "unix:socket")
        assert second.returncode == 1 and second.stderr.count("\n") == 1 and "in use" in second.stderr
        assert ask_at("socket", socket.AF_UNIX).status == 200
        assert server.stop() == 0 and not os.path.exists("socket")


def test_leaves_the_socket_file_of_a_successor_alone(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "next").mkdir()
    with Running(tmp_path, app=RUNS_QUERY, bind="unix:socket") as server:
        os.unlink("socket")
        with Running(tmp_path / "next", app=RUNS_QUERY, bind="unix:../socket") as successor:
            assert server.stop() == 0 and ask_at("socket", socket.AF_UNIX).status == 200
            assert successor.stop() == 0 and not os.path.exists("socket")


def test_leaves_the_socket_file_of_a_successor_alone_even_if_it_has_the_same_inode(tmp_path: Any) -> None:
    path, link = str(tmp_path / "socket"), str(tmp_path / "link")
    bind = "unix:" + path
    listener = webserver.Listener(webserver.open_listener(bind, ""), bind)
    os.link(path, link)
    listener.close()
    assert not os.path.exists(path)
    os.link(link, path)
    listener.close()
    assert os.path.exists(path)


@pytest.mark.parametrize("mode", ["600", "660", "0777"])
def test_a_unix_socket_has_the_mode_that_was_asked_for(tmp_path: Any, mode: str) -> None:
    with Running(tmp_path, "--socket-mode", mode, bind="unix:socket", app=RUNS_QUERY):
        assert os.stat(str(tmp_path / "socket")).st_mode & 0o777 == int(mode, 8)


@pytest.mark.parametrize("listening", [True, False])
def test_serves_on_an_inherited_descriptor(tmp_path: Any, listening: bool) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if listening:
            listener.listen(5)
        descriptor = listener.fileno()
        with Running(tmp_path, app=RUNS_QUERY, bind="fd:%d" % descriptor, popen={"pass_fds": [descriptor]}):
            assert ask_at(listener.getsockname()).status == 200


ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES="web")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_serves_on_the_socket_of_a_service_manager(tmp_path: Any, monkeypatch: Any, family: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(family) as listener:
        listener.bind("socket" if family == socket.AF_UNIX else ("127.0.0.1", 0))
        listener.listen(50)
        address, descriptor = listener.getsockname(), listener.fileno()
        argv = (sys.executable, "-c", ACTIVATE, str(descriptor), WEBSERVER)
        popen = {"pass_fds": [descriptor]}
        with Running(tmp_path, app=ANSWERS % "old", argv=argv, bind="", popen=popen) as server:
            assert ask_at(address, family).body == b"old"
            write_file(tmp_path / "app.py", ANSWERS % "new")
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda: ask_at(address, family).body == b"new", "the new code")
            assert server.stop() == 0
        assert family == socket.AF_INET or os.path.exists("socket")  # it is the manager's to remove
        waiting = [socket.socket(family) for _ in range(8)]
        with closing(*waiting):  # the socket is as it was: no second listen() has touched its queue
            for client in waiting:
                client.settimeout(SLACK)
                client.connect(address)


def test_what_a_service_manager_hands_to_another_process_is_ignored(tmp_path: Any) -> None:
    with Running(tmp_path, app=RUNS_QUERY, LISTEN_FDS="1", LISTEN_PID="1") as server:
        assert server.run("answer = [n for n in os.environ if n.startswith(('LISTEN_', 'WEBSERVER'))]") == "[]"


def test_another_holder_of_the_listening_socket_cannot_make_accept_block_for_good(tmp_path: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        descriptor, port = listener.fileno(), listener.getsockname()[1]
        options: dict[str, Any] = {"port": port, "popen": {"pass_fds": [descriptor]}}
        with Running(tmp_path, app=RUNS_QUERY, bind="fd:%d" % descriptor, **options) as server:
            listener.setblocking(True)

            def is_quick() -> bool:
                began = time.monotonic()
                server.run("")
                server.run("")
                return time.monotonic() - began < 0.5

            wait_until(is_quick, "two requests that wait for no clock")


@on_linux
def test_survives_that_accept_fails(tmp_path: Any) -> None:
    with Running(tmp_path, app=RUNS_QUERY) as server:
        wait_until(server.children, "the spare")
        soft, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (4, hard))
        with server.send("", CLOSE) as client:
            server.wait_for_log("too many open files")
            used, began = sum(map(cpu_seconds, [server.pid, *server.children()])), time.monotonic()
            wait_until(lambda: time.monotonic() > began + 0.8, "what a busy loop would cost")
            assert sum(map(cpu_seconds, [server.pid, *server.children()])) - used < 0.3
            for pid in (server.pid, *server.children()):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
            assert receive_answer(client).status == 200
        server.run("")
        assert server.errors().lower().count("too many open files") < 4


# ---- 12. Child --------------------------------------------------------------


@pytest.mark.usefixtures("overdue")  # whose requests take their time while other claims are tested
def test_serves_every_connection_with_a_fresh_process(shared: Running) -> None:
    pids = {shared.run("") for _ in range(10)}
    assert len(pids) == 10 and str(shared.pid) not in pids


def test_serves_all_requests_of_a_connection_with_one_process(shared: Running) -> None:
    with shared.send() as client:
        pids = {read_answer(client).body}
        for _ in range(4):
            client.sendall(GET)
            pids.add(read_answer(client).body)
    assert len(pids) == 1


@pytest.mark.parametrize("number, least, most", [("3", 4, 11), ("0", 1, 4)])
def test_reuses_a_process_as_told(tmp_path: Any, number: str, least: int, most: int) -> None:
    with Running(tmp_path, "--connections-per-child", number, app=RUNS_QUERY) as server:
        pids = [server.run("") for _ in range(12)]
        assert least <= len(set(pids)) <= most
        assert number == "0" or max(map(pids.count, pids)) <= int(number)
        assert server.leaves_no_zombie()


@on_linux
def test_a_child_holds_its_own_connection_only(shared: Running) -> None:
    with shared.send() as idle:
        read_answer(idle)
        code = """
        import socket
        answer = []
        for fd in range(64):
            try:
                with socket.socket(fileno=os.dup(fd)) as sock:
                    answer.append((sock.family.name, sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)))
            except OSError:
                pass
        """
        found = sorted((name.rstrip("6"), is_listening) for name, is_listening in eval(shared.run(code)))
        assert found == [("AF_INET", 0), ("AF_UNIX", 0), ("AF_UNIX", 0)]  # the queue and the mailbox


def test_random_numbers_do_not_repeat_between_children(shared: Running) -> None:
    code = "import random, uuid; answer = (random.random(), uuid.uuid4(), os.urandom(4))"
    assert len({shared.run(code) for _ in range(5)}) == 5


# What an application may do with processes, threads and signals

@rows(
    "code",
    ("import subprocess as s; answer = s.run(['sh', '-c', 'exit 7']).returncode == 7", "subprocess"),
    ("import subprocess as s; p = [s.Popen(['true']) for _ in range(5)]; answer = not any(x.wait() for x in p)",
     "subprocess-many"),
    ("import subprocess as s; p = s.Popen(['sleep', '60']); p.terminate(); answer = p.wait() == -15",
     "subprocess-terminate"),
    ("answer = os.system('exit 3') >> 8 == 3", "system"),
    ("import multiprocessing as m; p = m.get_context('fork').Process(target=os.getpid); "
     "p.start(); p.join(10); answer = p.exitcode == 0", "multiprocessing"),
    ("import multiprocessing as m; p = m.get_context('fork').Process(target=time.sleep, "
     "args=(60,)); p.start(); time.sleep(.1); p.terminate(); p.join(5); answer = p.exitcode == -15",
     "multiprocessing-terminate"),
    ("import multiprocessing as m\nwith m.get_context('fork').Pool(2) as p: answer = p.map(abs, [-1, -2]) == [1, 2]",
     "pool"),
    ("import threading as t; a = []; b = [t.Thread(target=a.append, args=(1,)) for _ in range(5)]; "
     "[x.start() for x in b]; [x.join() for x in b]; answer = len(a) == 5", "threads"),
    ("import concurrent.futures as c\nwith c.ThreadPoolExecutor(2) as e: answer = list(e.map(abs, [-1])) == [1]",
     "executor"),
    ("import asyncio\nasync def f():\n p = await asyncio.create_subprocess_exec('true')\n "
     "return await p.wait()\nanswer = asyncio.run(f()) == 0", "asyncio"),
    ("import signal as s; a = []; s.signal(s.SIGUSR1, lambda *_: a.append(1)); "
     "os.kill(os.getpid(), s.SIGUSR1); answer = a == [1]", "signal"),
    ("import signal as s\ndef f(*_): raise ZeroDivisionError\ns.signal(s.SIGALRM, f); "
     "s.setitimer(s.ITIMER_REAL, 0.05)\ntry: time.sleep(9)\nexcept ZeroDivisionError: answer = True", "alarm"),
    ("import sys\nif os.fork() == 0: sys.exit(0)\nanswer = os.wait()[1] == 0", "fork-exit"),
    ("import sys\nif os.fork() == 0: sys.exit(7)\nanswer = os.wait()[1] >> 8 == 7", "fork-exit-7"),
    ("import sys\nif os.fork() == 0: sys.exit()\nanswer = os.wait()[1] == 0", "fork-exit-none"),
    ("answer = os.fork() and os.wait()[1] == 0", "fork-return"),  # only one of the two may answer
)  # fmt: skip
def test_processes_threads_and_signals_work_in_applications(shared: Running, code: str) -> None:
    assert shared.run(code) == "True"


def test_a_process_of_the_application_writes_to_no_slot(tmp_path: Any) -> None:
    code = "if os.fork() == 0:\n  raise SystemExit(0)\nos.wait()\n" + HELD
    with Running(tmp_path, app=RUNS_QUERY) as server, server.send(code, path="/held"):
        server.wait_held()
        server.process.send_signal(signal.SIGUSR1)
        assert " busy " in server.wait_for_log("GET /held")


@pytest.mark.parametrize("version", [b"HTTP/1.0", b"HTTP/1.1"])
def test_a_response_ends_although_a_process_of_the_application_lives_on(tmp_path: Any, version: bytes) -> None:
    code = "if os.fork() == 0:\n  %s  os._exit(0)\nanswer = (word for word in (b'a', b'b'))" % UNTIL_GO
    with Running(tmp_path, app=RUNS_QUERY) as server, server.connect() as client:
        client.sendall(get(CLOSE, target=make_target(code).encode(), version=version))
        assert receive_answer(client).body == b"ab"
        server.go()


def test_a_default_timeout_of_the_application_is_not_ours(tmp_path: Any) -> None:
    app = "import socket\nsocket.setdefaulttimeout(0.05)\n" + textwrap.dedent(RUNS_QUERY)
    code = "answer = environ['wsgi.input'].read()"
    with Running(tmp_path, app=app) as server, server.send(code, b"Content-Length: 3", method=b"POST") as client:
        time.sleep(0.2)
        client.sendall(b"abc")
        assert read_answer(client).body == b"b'abc'"


@on_linux
def test_what_an_application_executes_inherits_three_descriptors(tmp_path: Any) -> None:
    with Running(tmp_path, "--connections-per-child", "5", app=RUNS_QUERY) as server, server.send() as idle:
        code = "answer = subprocess.run(['ls', '/proc/self/fd'], close_fds=False, stdout=-1).stdout.decode()"
        read_answer(idle)
        names = server.run("import subprocess\n" + code)
        assert set(names.split()) == {"0", "1", "2", "3"}  # 3: where ls reads the folder


@on_linux
def test_what_an_application_executes_inherits_no_signal_settings(shared: Running) -> None:
    command = "import subprocess as s; answer = s.run(['cat', '/proc/self/status'], stdout=s.PIPE).stdout.decode()"
    names: dict[str, Any] = {}
    exec(command, names)
    assert re.findall("Sig(?:Blk|Ign).*", shared.run(command)) == re.findall("Sig(?:Blk|Ign).*", names["answer"])


POOLS = {
    "Manager": "import multiprocessing as m, sys; sys.kept = m.Manager(); answer = sys.kept._process.pid",
    "Pool": "import multiprocessing as m, sys\nsys.kept = m.get_context('fork').Pool(1)\n"
            "answer = sys.kept.apply(os.getpid)",
}  # fmt: skip


@pytest.mark.parametrize("name", POOLS)
def test_no_process_of_multiprocessing_outlives_its_child(tmp_path: Any, name: str) -> None:
    app = "import multiprocessing.managers, multiprocessing.pool\n" + textwrap.dedent(RUNS_QUERY)
    with Running(tmp_path, app=app) as server:
        pid = int(server.run(POOLS[name]))
        wait_until(lambda: not is_alive(pid), "the end of the process that the application has started")


def test_processes_of_a_pool_do_not_hold_up_a_stop(tmp_path: Any) -> None:
    app = "import concurrent.futures as c\npool = c.ProcessPoolExecutor(1)\npool.submit(abs, -1).result()\n"
    with Running(tmp_path, app=app + textwrap.dedent(ANSWERS % "here")) as server:
        assert server.answers("here")
        began = time.monotonic()
        assert server.stop() == 0 and time.monotonic() - began < SLACK


def test_exit_handlers_of_the_child_run_and_inherited_ones_do_not(tmp_path: Any) -> None:
    with Running(tmp_path, app=RUNS_QUERY) as server:
        code = "import atexit; atexit.register(os.write, 1, b'registered by %d\\n' % os.getpid())"
        pids = [server.run(code), server.run(code)]
        wait_until(lambda: set(re.findall(r"registered by (\d+)", server.output())) == set(pids), "the exit handlers")
        server.run("os.kill(os.getppid(), 15)")
        assert server.process.wait(PATIENCE) == 0
        assert set(re.findall(r"inherited by (\d+)", server.output())) <= {str(server.pid)}


@pytest.mark.parametrize("is_program", [True, False])
def test_exit_handlers_that_a_fork_hook_registers_run_in_the_child(tmp_path: Any, is_program: bool) -> None:
    hook = "import atexit, os\nwrite = lambda: os.write(1, b'from the hook in %d\\n' % os.getpid())\n"
    app = hook + "os.register_at_fork(after_in_child=lambda: atexit.register(write))\n" + textwrap.dedent(RUNS_QUERY)
    port = free_port()
    settings: dict[str, Any] = {"app": app}
    if not is_program:
        code = "import webserver\n%s\nwebserver.serve(app, bind='127.0.0.1:%d')\n" % (app, port)
        settings = {"argv": (sys.executable, "-c", code), "bind": "", "PYTHONPATH": os.path.dirname(WEBSERVER)}
    with Running(tmp_path, port=port, **settings) as server:
        pids = {server.run(""), server.run("")}
        wait_until(lambda: pids <= set(re.findall(r"from the hook in (\d+)", server.output())), "the exit handlers")


def test_a_child_frees_nothing_that_an_exit_handler_of_the_parent_needs(tmp_path: Any) -> None:
    folder = "import atexit, os, tempfile\ndef make():\n    folder = tempfile.TemporaryDirectory()\n"
    folder += "    atexit.register(lambda: folder.cleanup())\n    return folder.name\nNAME = make()\n"
    code = "import app; answer = app.NAME if os.path.isdir(app.NAME) else 'gone'"
    with Running(tmp_path, app=folder + textwrap.dedent(RUNS_QUERY)) as server:
        name = server.run(code)
        assert server.run(code) == name != "gone"
        assert server.stop() == 0 and not os.path.exists(name)


def test_a_crash_is_reported_where_the_application_wants_it(tmp_path: Any) -> None:
    app = "import faulthandler\nfile = open('crashes', 'wb')\nfaulthandler.enable(file)\n" + textwrap.dedent(RUNS_QUERY)
    with Running(tmp_path, app=app) as server, server.send("os.abort()") as client:
        assert receive_all(client) == b""
        assert "Fatal Python error: Aborted" in read_file(tmp_path / "crashes")


def test_a_thread_that_never_ends_holds_back_no_output(tmp_path: Any) -> None:
    code = """
    import signal, threading
    print("printed in the request")
    later = lambda: [time.sleep(1.5), os.kill(os.getpid(), signal.SIGALRM), time.sleep(60)]
    threading.Thread(target=later).start()
    """
    with Running(tmp_path, "--timeout", "1", app=RUNS_QUERY, PYTHONUNBUFFERED="") as server:
        pid = server.run(code)
        wait_until(lambda: "printed in the request" in server.output(), "the output")
        server.wait_end(pid)


def test_no_child_returns_into_the_code_that_called_serve(tmp_path: Any) -> None:
    port = free_port()
    code = """\
    import os, sys, webserver

    class Broken:
        def flush(self):
            raise RuntimeError("no flush today")

    def app(environ, start_response):
        sys.stdout = Broken()
        return webserver.show_environ(environ, start_response)

    try:
        webserver.serve(app, bind="127.0.0.1:%d")
    finally:
        os.write(1, b"cleanup by %%d\\n" %% os.getpid())
    """
    argv = (sys.executable, "-c", textwrap.dedent(code % port))
    with Running(tmp_path, argv=argv, bind="", port=port, PYTHONPATH=os.path.dirname(WEBSERVER)) as server:
        assert [server.get().status for _ in range(3)] == [200] * 3
        assert server.stop() == 0
        assert re.findall("cleanup by (.*)", server.output()) == [str(server.pid)]


def test_a_child_runs_no_finalizer_that_it_has_inherited_but_its_own(tmp_path: Any) -> None:
    app = """
    import os, weakref

    class Resource:
        def __init__(self, name):
            weakref.finalize(self, os.write, 1, b"%s of %d by %d\\n" % (name, os.getpid(), os.getpid()))

    class Unlinks:
        def __init__(self):
            self.name = open("kept", "w").name
        def close(self):
            os.write(1, b"closed by %d\\n" % os.getpid())
        __del__ = close

    inherited, holder = Resource(b"inherited"), Resource(b"holder")
    weakref.finalize(holder, Unlinks().close)

    def app(environ, start_response):
        global own
        own = Resource(b"own")
        start_response("200 OK", [])
        return [b"%d" % os.getpid()]
    """
    with Running(tmp_path, "--access-log", "off", app=app) as server:
        pids = [server.get().body.decode() for _ in range(2)]
        wait_until(lambda: server.output().count("own") == 2, "the exits")
        assert sorted(re.findall("own of (.*) by", server.output())) == sorted(pids)
        assert "closed" not in server.output()
        assert server.stop() == 0
        assert server.output().count("inherited") == 1 and "closed by %d" % server.pid in server.output()


def test_a_child_that_fails_at_its_start_writes_into_no_other_slot() -> None:
    code = """
        import os, webserver
        board = webserver.Scoreboard(2)
        child = webserver.Child(None, 2, webserver.Channel(), board, webserver.Options())
        pid = os.fork()
        if pid == 0:
            child.run(1, lambda: 1 / 0)
        status = os.waitpid(pid, 0)[1]
        print(os.WEXITSTATUS(status), board.since[0], board.since[1] != 0)
    """
    argv = (sys.executable, "-c", textwrap.dedent(code))
    ran = subprocess.run(argv, cwd=os.path.dirname(WEBSERVER), capture_output=True)
    assert ran.stdout.split() == [b"1", b"0.0", b"True"] and b"ZeroDivisionError" in ran.stderr


# ---- 13. Reactor ------------------------------------------------------------


@on_linux
def test_the_parent_holds_a_connection_at_rest_and_no_process_does(tmp_path: Any) -> None:
    pids = set()
    with Running(tmp_path, app=RUNS_QUERY) as server:
        server.wait_spare()
        files = list_files(server.pid)
        with server.send() as client:
            for number in range(1, 3):  # the next request after a rest is served by another process
                pids.add(pid := read_answer(client).body)
                server.wait_end(pid)
                wait_until(lambda: len(list_files(server.pid)) == len(files) + 1, "the connection to come back")
                assert len(pids) == number
                client.sendall(GET)
            read_answer(client)
        wait_until(lambda: list_files(server.pid) == files, "the end of the connection")


def test_silent_connections_cost_no_process(shared: Running) -> None:
    clients = [shared.connect() for _ in range(50)]
    with closing(*clients):
        shared.run("")  # it stood behind them in the queue
        wait_until(lambda: len(shared.children()) <= 2, "the processes of silent connections to be none")
        assert all(map(is_persistent, clients))


def test_a_thousand_connections_at_rest_cost_no_process(tmp_path: Any) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
                                                resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with Running(tmp_path, app=ANSWERS % "at rest") as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.send()) for _ in range(1000)]
        assert {read_answer(client).body for client in clients} == {b"at rest"}
        server.wait_spare()
        began = time.monotonic()
        assert server.answers("at rest") and time.monotonic() - began < SLACK / 2
        for client in clients:
            client.sendall(GET)
        assert {read_answer(client).body for client in clients} == {b"at rest"}


def test_connections_at_rest_are_closed_in_time(tmp_path: Any) -> None:
    """Before a first byte, in the head and between two requests (RFC 9112 §9.5, RFC 9110 §15.5.9)."""
    words, path = ("--timeout", "1", "--keep-alive", "2"), tmp_path / "next"
    path.mkdir()
    with Running(tmp_path, *words, app=RUNS_QUERY) as server, Running(path, *words, app=RUNS_QUERY, bind="unix:socket"):
        begun, kept, fresh = server.connect(), server.send(), socket.socket(socket.AF_UNIX)
        with closing(begun, kept, fresh):
            began = time.monotonic()
            fresh.settimeout(PATIENCE)
            fresh.connect(str(path / "socket"))  # by TCP it may not even be accepted (TCP_DEFER_ACCEPT)
            begun.sendall(b"GET / HTTP/1.1\r\nHo")
            assert read_answer(kept).status == 200
            assert receive_all(kept) == b"" and 1.5 < time.monotonic() - began < 3 + SLACK
            assert parse_answers(receive_all(begun))[0].status == 408
            assert receive_all(fresh) == b"" and time.monotonic() - began < 3 + SLACK


@pytest.mark.parametrize("number", ["1", "0"])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX], ids=["tcp", "unix"])
def test_no_request_is_lost_at_the_moment_of_rest(tmp_path: Any, number: str, family: Any) -> None:
    """A request comes just as its connection is given back, queued or reloaded: pauses around one second."""
    answered: list[int] = []
    path = "/tmp/webserver-test-%d.sock" % os.getpid()  # a short one: it is limited to some 100 bytes

    def ask_around_a_second(server: Running, seed: int) -> None:
        chance = random.Random(seed)
        with socket.socket(family) as client:
            client.settimeout(PATIENCE)
            client.connect(path if family == socket.AF_UNIX else ("127.0.0.1", server.port))
            pauses = [chance.choice((chance.uniform(0.9, 1.1), chance.uniform(0.99, 1.01), 0)) for _ in range(3)]
            for pause in (0, *pauses):
                time.sleep(pause)
                client.sendall(GET)
                answered.append(read_answer(client).status)

    bind = "unix:" + path if family == socket.AF_UNIX else None
    words = ("--connections-per-child", number, "--access-log", "off")
    with Running(tmp_path, *words, app=ANSWERS % "x", bind=bind) as server:
        clients = [threading.Thread(target=ask_around_a_second, args=(server, seed), daemon=True) for seed in range(60)]
        for client in clients:
            client.start()
        while any(client.is_alive() for client in clients):
            server.process.send_signal(signal.SIGHUP)
            clients[-1].join(0.7)
        assert answered == [200] * 240
        assert server.stop() == 0


def test_at_the_limit_of_connections_the_longest_at_rest_gives_way(tmp_path: Any) -> None:
    with Running(tmp_path, "--max-connections", "20", app=RUNS_QUERY) as server:
        idle = [server.send() for _ in range(20)]
        with closing(*idle):
            longest = random.choice([(read_answer(client), client)[1] for client in idle])
            server.wait_spare()
            for client in idle:  # the order in which they were last used is not that of their start
                if client is not longest:
                    client.sendall(GET)
                    read_answer(client)
            server.wait_spare()
            began = time.monotonic()
            server.run("")
            assert time.monotonic() - began < SLACK / 2  # milliseconds, on an idle machine
            assert [client for client in idle if not is_persistent(client)] == [longest]
            assert len(re.findall("max-connections", server.errors())) == 1


@on_linux
def test_requests_in_line_count_for_the_limit_of_connections(tmp_path: Any) -> None:
    words = "--max-connections", "5", "--max-children", "1"
    with Running(tmp_path, *words, app=RUNS_QUERY) as server, server.send(HELD, CLOSE) as busy:
        server.wait_held()
        files, clients = len(list_files(server.pid)), [server.send("answer = 'served'", CLOSE) for _ in range(30)]
        with closing(*clients):
            began = time.monotonic()
            wait_until(lambda: time.monotonic() > began + 1.5 * webserver.TICK, "what a few more would be let in by")
            assert len(list_files(server.pid)) - files <= 5
            server.go()
            began = time.monotonic()
            assert [receive_answer(client).body for client in clients] == [b"served"] * 30
            assert time.monotonic() - began < 30 / 5 * webserver.TICK / 2, "room is used at once, not at the next tick"
        assert receive_answer(busy).status == 200


def test_survives_an_address_that_its_child_is_just_writing() -> None:
    slot = webserver.Slot(webserver.Scoreboard(1))
    slot.mark_client(b"2001:db8:")  # a part of it
    slot.mark_busy(b"GET / HTTP/1.1")
    assert not webserver.sort_fairly([], slot.board)


def test_a_default_timeout_of_the_application_does_not_hold_up_the_parent(tmp_path: Any) -> None:
    path = str(tmp_path / "socket")
    app = "import socket\nsocket.setdefaulttimeout(2)\n" + textwrap.dedent(ANSWERS % "x")
    silent, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    with Running(tmp_path, app=app, bind="unix:" + path) as server, silent, client:
        silent.connect(path)
        began = time.monotonic()
        client.connect(path)
        client.sendall(GET)
        assert read_answer(client).body == b"x" and time.monotonic() - began < 1.5
        assert not select.select([silent], [], [], 2)[0], "nor is a silent client cut off by it"
        assert server.leaves_no_zombie()


def test_an_incomplete_head_after_a_rest_has_the_time_of_a_head(tmp_path: Any) -> None:
    path = str(tmp_path / "socket")  # where a child gets the incomplete head
    words, client = ("--keep-alive", "3"), socket.socket(socket.AF_UNIX)
    with Running(tmp_path, *words, app=RUNS_QUERY, bind="unix:" + path) as server, client:
        client.connect(path)
        client.sendall(GET)
        server.wait_end(read_answer(client).body)
        client.sendall(GET[:-2])
        assert not select.select([client], [], [], 2.5)[0], "408, when the rest would have ended"
        client.sendall(GET[-2:])
        assert read_answer(client).status == 200


@on_linux
def test_a_head_that_is_cut_off_does_not_keep_the_parent_busy(tmp_path: Any) -> None:
    with Running(tmp_path, app=RUNS_QUERY) as server:
        server.wait_spare()
        files = list_files(server.pid)
        for end in (socket.SHUT_WR, socket.SHUT_RDWR):
            with server.connect() as client:
                client.sendall(b"G")
                wait_until(lambda: len(list_files(server.pid)) > len(files), "the connection at rest")
                client.shutdown(end)
                wait_until(lambda: list_files(server.pid) == files, "its end")
        server.wait_spare()


def test_closes_what_a_child_does_not_need_and_nothing_between() -> None:
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]
    kept = [held[2], held[5]]
    webserver.close_all(held[6:] + held[:2] + held[3:5])  # three runs, in no order
    assert [fd for fd in held if os.path.exists("/dev/fd/%d" % fd)] == kept
    webserver.close_all(kept)
    webserver.close_all([])


# ---- 14. Parent -------------------------------------------------------------


def test_children_step_back_while_a_request_waits_long_for_a_fork() -> None:
    board = webserver.Scoreboard(2)
    queue, slot = webserver.Queue(webserver.Channel(), board), webserver.Slot(board)
    board.allot()
    queue.put_in = 1
    for now, is_late in (10.0, False), (10.04, False), (10.06, True), (10.2, True):
        queue.order_late(now)
        assert slot.is_told(webserver.LATE) is is_late, now
    board.order(webserver.WANTED, True)
    began = time.monotonic()
    assert slot.end_request() and time.monotonic() > began + 0.06
    board.taken[0] = 1
    queue.order_late(10.3)
    assert not slot.is_told(webserver.LATE) and slot.is_told(webserver.WANTED)


def test_forks_no_child_beside_the_answer_of_the_spare_one(monkeypatch: Any) -> None:
    options, mailbox, forked = webserver.Options(), webserver.Channel(), []
    listener = webserver.Listener(webserver.open_listener("127.0.0.1:0", ""), "")
    child = webserver.Child(None, listener.family, mailbox, webserver.Scoreboard(4), options)
    signals = webserver.Signals(mailbox.sender)
    parent = webserver.Parent(child, webserver.Reactor(listener, mailbox, options), signals, options)
    monkeypatch.setattr(parent, "fork", lambda: forked.append("a child"))
    parent.keep_spare(10.0, 0)
    assert len(forked) == 1, "the first spare child"
    assert parent.keep_spare(20.0, 0) == 20.0 + webserver.FORK_DELAY and len(forked) == 1, "it has got a request"
    parent.keep_spare(20.0 + webserver.FORK_DELAY, 0)
    assert len(forked) == 2
    assert parent.keep_spare(30.0, -1) == 30.0 + webserver.FORK_DELAY and len(forked) == 3, "a request waits"


def test_waits_with_one_spare_process_and_returns_to_it(shared: Running) -> None:
    clients = [shared.send() for _ in range(5)]
    with closing(*clients):
        assert len({read_answer(client).body for client in clients}) == 5
        wait_until(lambda: len(shared.children()) == 6, "five at work and a spare")
    shared.wait_spare()


def test_a_spare_process_that_is_stopped_keeps_nobody_waiting_for_good(tmp_path: Any) -> None:
    with Running(tmp_path, app=RUNS_QUERY) as server:
        (pid,) = wait_until(server.children, "the spare")
        os.kill(pid, signal.SIGSTOP)
        try:
            wait_stopped(pid)
            assert server.run("") != str(pid)
            began = time.monotonic()
            assert server.run("") != str(pid) and time.monotonic() - began < SLACK  # it is counted on no more
        finally:
            os.kill(pid, signal.SIGCONT)


def test_the_cap_is_a_cap_and_logged_once(tmp_path: Any) -> None:
    with Running(tmp_path, "--max-children", "3", app=RUNS_QUERY) as server:
        clients = [server.send("time.sleep(0.1)", CLOSE) for _ in range(12)]
        with closing(*clients):
            counts = [len(server.children()) for _ in range(4)]
            assert [receive_answer(client).status for client in clients] == [200] * 12
        assert max(counts) <= 3
        assert len(re.findall("max-children", server.errors())) == 1, server.errors()


@pytest.mark.parametrize("connections", ["0", "10", "1"])
def test_at_the_cap_a_process_that_becomes_free_gets_the_next_request_at_once(tmp_path: Any, connections: str) -> None:
    words = "--max-children", "2", "--connections-per-child", connections
    with Running(tmp_path, *words, app=RUNS_QUERY) as server:
        began = time.monotonic()
        for _ in range(4):  # after each burst no event comes from outside that could wake the parent
            clients = [server.send("time.sleep(0.01)", CLOSE) for _ in range(12)]
            with closing(*clients):
                assert [receive_answer(client).status for client in clients] == [200] * 12
        assert time.monotonic() - began < 2 * webserver.TICK, "by the clock alone, each burst would take a tick or two"


def test_a_client_that_resets_its_connection_in_line_costs_nobody_else_anything(tmp_path: Any) -> None:
    words = "--max-children", "1", "--connections-per-child", "0"
    with Running(tmp_path, *words, app=RUNS_QUERY) as server, server.send(HELD, CLOSE) as busy:
        server.wait_held()
        impatient, patient = server.send("", CLOSE), server.send("answer = 'served'", CLOSE)
        server.wait_for_log("max-children")
        impatient.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
        impatient.close()
        server.go()
        assert receive_answer(busy).status == 200 and receive_answer(patient).body == b"served"
        assert "Traceback" not in server.errors()


@on_linux
def test_a_child_without_descriptors_says_that_it_loses_connections_and_leaves(tmp_path: Any) -> None:
    with Running(tmp_path, "--connections-per-child", "0", "--max-children", "1", app=RUNS_QUERY) as server:
        pid = server.run("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))")
        with contextlib.suppress(*LOST):
            server.get()
        server.wait_for_log("%s. connections are lost" % pid)
        assert server.run("") != pid


def test_at_the_cap_many_newcomers_do_not_wait_for_a_clock(tmp_path: Any) -> None:
    with Running(tmp_path, "--max-children", "4", app=RUNS_QUERY) as server, contextlib.ExitStack() as stack:

        def let_in() -> float:
            began = time.monotonic()
            newcomers = [stack.enter_context(server.send()) for _ in range(4)]
            assert [read_answer(client).status for client in newcomers] == [200] * 4
            return time.monotonic() - began

        let_in()  # into an empty house
        wait_until(lambda: time.sleep(0.1) or let_in() < 0.25, "a quick round")  # by a clock of 0.1 s none would be


def test_what_a_child_rehearses_is_not_seen(tmp_path: Any) -> None:
    with Running(tmp_path, app=RUNS_QUERY) as server:
        for _ in range(3):
            time.sleep(20 * webserver.IDLE_AFTER)  # the only sign would be in memory
            assert server.run("answer = environ['webserver.requests']") == "1"
        wait_until(lambda: server.output().count("HTTP/1.1") >= 3, "the access log")
        assert server.output().count("HTTP/1.1") == 3 and server.errors().count("\n") <= 2  # where it serves; as root


@on_linux
def test_survives_that_fork_fails(tmp_path: Any) -> None:
    app = RUNS_QUERY + """
    real_fork = os.fork

    def fork():
        if os.path.exists("no-fork"):
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return real_fork()

    os.fork = fork
    """  # RLIMIT_NPROC does not bind root
    with Running(tmp_path, app=app) as server:
        server.run("")
        wait_until(lambda: len(server.children()) == 1, "a spare")
        write_file(tmp_path / "no-fork", "")
        server.run("")  # by the spare
        clients = [server.send("answer = 'served'", CLOSE) for _ in range(3)]
        with closing(*clients):
            server.wait_for_log("cannot fork")
            busy, began = cpu_seconds(server.pid), time.monotonic()
            wait_until(lambda: time.monotonic() > began + 0.8, "what a busy loop would cost")
            assert cpu_seconds(server.pid) - busy < 0.3
            os.remove(str(tmp_path / "no-fork"))
            assert [receive_answer(client).body for client in clients] == [b"served"] * 3
        assert len(re.findall("cannot fork", server.errors())) in (1, 2), server.errors()


@on_linux
def test_all_get_their_turn_where_the_system_allows_few_processes(tmp_path: Any) -> None:
    app = textwrap.dedent(ANSWERS % "served") + textwrap.dedent("""
    import os
    real_fork, parent = os.fork, os.getpid()

    def fork():
        with open("/proc/%d/task/%d/children" % (parent, parent)) as file:
            if len(file.read().split()) > 1:
                raise BlockingIOError(11, "Resource temporarily unavailable")
        return real_fork()

    os.fork = fork
    """)
    answered, is_over = set(), threading.Event()

    def ask(number: int) -> None:
        while not is_over.is_set():  # it may have to give way, and then connects again
            with contextlib.closing(server.connect()) as client, contextlib.suppress(OSError):
                client.sendall(GET)
                while client.recv(65536) and not is_over.is_set():
                    answered.add(number)
                    client.sendall(GET)

    with Running(tmp_path, app=app) as server:
        clients = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(8)]
        for client in clients:
            client.start()
        try:
            wait_until(lambda: len(answered) == 8, "an answer to each of the busy clients")
        finally:
            is_over.set()
        for client in clients:
            client.join(PATIENCE)
        server.wait_for_log("cannot fork")


def test_sigusr1_prints_who_does_what(tmp_path: Any) -> None:
    with Running(tmp_path, app=RUNS_QUERY) as server:
        idle, busy = server.send(), server.send(HELD, path="/held")
        with closing(idle, busy):
            pids = {"idle": int(read_answer(idle).body)}
            idle.sendall(GET)
            read_answer(idle)
            (pids["busy"],) = server.wait_held()
            wait_until(lambda: len(server.children()) == 3, "the spare")
            (pids["waiting"],) = set(server.children()) - set(pids.values())
            server.process.send_signal(signal.SIGUSR1)
            totals = server.wait_for_log("reaped")
            lines = {state: server.wait_for_log(r"\]\s+%d\b" % pid) for state, pid in pids.items()}
            assert "127.0.0.1" in lines["idle"] and re.search(r"\b2\b", lines["idle"])
            assert "127.0.0.1" in lines["busy"] and "GET /held" in lines["busy"]
            assert "127.0.0.1" not in lines["waiting"]
            for word in ("2 connections", "3 forks", "0 reaped", "0 timeouts", "0 crashes"):
                assert word in totals, totals
            assert all(state in line for state, line in lines.items()), lines
            server.go()
            read_answer(busy)  # nobody was disturbed


def test_sigusr1_names_the_client_that_is_waited_for_not_the_one_before(tmp_path: Any) -> None:
    def ask_for_report() -> str:
        server.process.send_signal(signal.SIGUSR1)
        return server.errors()

    path = str(tmp_path / "socket")  # from a unix socket, a child gets a connection also without a whole head
    with Running(tmp_path, "--connections-per-child", "0", app=ANSWERS % "x", bind="unix:" + path) as server:
        for start in (GET, b"G"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.connect(path)
                client.sendall(start)
                if start == GET:
                    read_answer(client)
                else:
                    wait_until(lambda: 'waiting for unix ""' in ask_for_report(), "the client, without a request")


def test_advice_is_given_once_where_processes_cost_much(tmp_path: Any) -> None:
    with Running(tmp_path, app=RUNS_QUERY) as server:
        burn = "end = time.process_time() + 0.05\nwhile time.process_time() < end: pass"
        for code in [""] * webserver.ADVICE_AFTER + [burn] * (webserver.ADVICE_AFTER - 1):
            server.run(code)
        assert "--warm-up" not in server.errors()
        wait_until(lambda: server.run(burn) and "--warm-up" in server.errors(), "the advice")
        line = server.wait_for_log("--warm-up")
        assert re.search(r"a process takes [23]\d ms of processor and serves 1\.0 requests", line)
        assert server.errors().count("--connections-per-child N") == 1
        server.process.send_signal(signal.SIGUSR1)
        line = server.wait_for_log("in all")
        assert int(find(r"(\d+) requests", line)) >= webserver.ADVICE_AFTER
        assert int(find(r"(\d+) ms of processor", line)) > 25 * webserver.ADVICE_AFTER


# Crashes

CRASHES = [  # what the application does, the status of the answer (None: the connection is cut), what the log tells
    ("segfault", "import ctypes; ctypes.string_at(0)", None, "SIGSEGV"),
    ("abort", "os.abort()", None, "SIGABRT"),
    ("killed", "os.kill(os.getpid(), 9)", None, "SIGKILL"),
    ("terminated", "import signal; signal.signal(15, signal.SIG_DFL); os.kill(os.getpid(), 15)", None, "SIGTERM"),
    ("nameless", "os.kill(os.getpid(), 40)", None, "died of signal 40"),
    ("_exit", "os._exit(3)", None, "exited with 3"),
    ("_exit-0", "os._exit(0)", None, "exited with 0"),
    ("exec", "os.execv('/bin/true', ['true'])", None, "exited with 0"),
    ("sys.exit", "import sys; sys.exit(3)", 500, "SystemExit"),
    ("sys.exit-0", "import sys; sys.exit()", 500, "SystemExit"),
    ("KeyboardInterrupt", "raise KeyboardInterrupt", 500, "KeyboardInterrupt"),
    ("GeneratorExit", "raise GeneratorExit", 500, "GeneratorExit"),
    ("recursion", "def f(): f()\nf()", 500, "RecursionError"),
    ("memory", "import resource as r; r.setrlimit(r.RLIMIT_AS, (1 << 28,) * 2); bytearray(1 << 29)", 500, "Memory"),
    ("every-fd", "os.closerange(0, 65536)", None, ""),
    ("parent-probed", "os.kill(os.getppid(), 0)", 200, ""),
    ("forked", "answer = os.fork() and os.getpid() or os._exit(0)", 200, ""),
]  # fmt: skip


@pytest.mark.parametrize("name, code, status, word", CRASHES, ids=[row[0] for row in CRASHES])
def test_a_crash_touches_its_connection_only(shared: Running, name: str, code: str, status: Any, word: str) -> None:
    with shared.send() as other:
        pid = read_answer(other).body
        with shared.send(code, CLOSE, path="/crash-" + name) as client:
            data = receive_all(client)
        assert [answer.status for answer in parse_answers(data)[:1]] == [status] * (status is not None), data
        began = time.monotonic()
        shared.run("")
        assert time.monotonic() - began < SLACK / 2  # milliseconds, on an idle machine
        other.sendall(GET)
        assert read_answer(other).body == pid
    assert shared.leaves_no_zombie()
    if word:
        wait_until(lambda: word in shared.errors(), "the crash in the log")
    if word.startswith("SIG"):
        assert 'serving 127.0.0.1 "GET /crash-' + name in shared.wait_for_log(word + ".*crash-" + name)


def test_a_segfault_prints_the_stack_of_python(shared: Running) -> None:
    with shared.send("import ctypes\ndef read_nothing(): ctypes.string_at(0)\nread_nothing()") as client:
        assert receive_all(client) == b""
    shared.wait_for_log("in read_nothing")


def test_children_that_die_before_they_serve_are_no_fork_storm(tmp_path: Any) -> None:
    dies = "\n    os.register_at_fork(after_in_child=lambda: os.path.exists('die') and os._exit(0))\n"
    with Running(tmp_path, app=RUNS_QUERY + dies) as server:
        write_file(tmp_path / "die", "")
        with server.send("answer = 'served'", CLOSE) as waiting:  # perhaps by the spare, which lives
            began = time.monotonic()
            wait_until(lambda: time.monotonic() > began + 1, "many deaths")
            server.process.send_signal(signal.SIGUSR1)
            assert 3 < int(find(r"(\d+) forks", server.wait_for_log("forks"))) < 20
            os.remove(str(tmp_path / "die"))
            assert receive_answer(waiting).body == b"served"


@on_linux
def test_random_kills_under_load_cost_only_their_connections(tmp_path: Any) -> None:
    kills, failures, successes, end = [], [], [], time.monotonic() + 1.5

    def load(server: Running) -> None:
        while time.monotonic() < end:
            try:
                successes.append(server.run("time.sleep(0.1)"))
            except LOST as error:
                failures.append(error)

    with Running(tmp_path, "--access-log", "off", app=RUNS_QUERY) as server:
        server.run("")
        server.wait_spare()
        files = list_files(server.pid)
        clients = [threading.Thread(target=load, args=(server,)) for _ in range(8)]
        for client in clients:
            client.start()
        while time.monotonic() < end:
            victim = random.choice(server.children() or [0])
            if victim:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
                    kills.append(victim)
            assert server.leaves_no_zombie()
        for client in clients:
            client.join(PATIENCE)
        assert len(successes) > 10 and kills and len(failures) <= len(kills), failures
        server.wait_spare()
        assert list_files(server.pid) == files  # neither a descriptor nor a connection is kept


# Zombies


def test_leaves_no_zombie_after_kill_9_of_waiting_children(shared: Running) -> None:
    for _ in range(3):
        for pid in wait_until(shared.children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: not is_alive(pid), "its death")
        began = time.monotonic()
        shared.run("")
        assert time.monotonic() - began < SLACK / 2  # milliseconds, on an idle machine
        assert shared.leaves_no_zombie()


UNSHARE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def can_unshare() -> bool:
    """The machine lets us make a PID namespace."""
    with contextlib.suppress(OSError):
        return subprocess.run([*UNSHARE, "true"], stderr=subprocess.DEVNULL).returncode == 0
    return False


def test_as_pid_1_it_reaps_orphans_and_obeys_sigterm(tmp_path: Any) -> None:
    if not can_unshare():
        pytest.skip("no PID namespace may be made here (unshare --pid)")
    orphan = "if os.fork() == 0:\n  os.fork() or time.sleep(0.6)\n  os._exit(0)\nos.wait()"
    with Running(tmp_path, app=RUNS_QUERY, argv=(*UNSHARE, *PROGRAM)) as server:
        (pid_1,) = server.children()
        assert server.run("answer = os.getppid()") == "1"

        def family() -> list[str]:
            return [state[0] for _, parent, state in list_processes() if parent == pid_1]

        for _ in range(5):
            server.run(orphan)
        wait_until(lambda: len(family()) > 1, "the orphans to be given to PID 1")
        wait_until(lambda: len(family()) == 1 and "Z" not in family(), "the orphans to be reaped")
        assert "orphan" not in server.errors() and "died" not in server.errors()  # silently
        with server.send(HELD) as busy:
            server.wait_held()
            os.kill(pid_1, signal.SIGTERM)
            server.go()
            assert receive_answer(busy).status == 200
        assert server.process.wait(PATIENCE) == 0


# Deadlines

HANGS = {  # all of these at once, with --timeout 1
    "sleep": "def hang_sleep(): time.sleep(60)\nhang_sleep()",
    "loop": "def hang_loop():\n  while True: pass\nhang_loop()",
    "lock": "import threading\nlock = threading.Lock()\ndef hang_lock():\n  while True: lock.acquire()\nhang_lock()",
    "stream": "answer = (time.sleep(0.4) or b'%d' % n for n in range(6))",
    "stalled": "def stall():\n  yield b'first'\n  time.sleep(60)\nanswer = stall()",
    "stubborn": "while True:\n  try: time.sleep(60)\n  except BaseException: pass",
    "in-c": "import ctypes\nmutex, lock = ctypes.create_string_buffer(256), ctypes.PyDLL(None).pthread_mutex_lock\n"
            "ctypes.PyDLL(None).pthread_mutex_init(mutex, None), lock(mutex), lock(mutex)",
    "quick": "answer = 'quick'",
    "upload": "answer = len(environ['wsgi.input'].read())",
    "late": "time.sleep(0.95); answer = environ['wsgi.input'].read()",
    "empty": "def hang_empty():\n  while True: yield time.sleep(0.1) or b''\nanswer = hang_empty()",
    "download": "answer = environ['wsgi.file_wrapper'](open('download', 'rb'))",
}  # fmt: skip

DOWNLOAD = 2400000  # bytes: more than one send should have to take at once


def receive_steadily(client: socket.socket, rate: int) -> bytes:
    """All bytes, but no more than so many in a second."""
    data, began = b"", time.monotonic()
    while True:
        piece = client.recv(max(rate // 50, 1))
        data += piece
        if not piece:
            return data
        time.sleep(max(began + len(data) / rate - time.monotonic(), 0))


@pytest.fixture(scope="module")
def overdue(tmp_path_factory: Any) -> Iterator[Any]:
    """The server, and a function that awaits what one of HANGS comes to: the bytes of the answer, and the seconds."""
    outcomes = {}

    def ask(name: str) -> None:
        began = time.monotonic()
        fields = [CLOSE] + [b"Content-Length: 60"] * (name in ("upload", "late"))
        with server.send(HANGS[name], *fields, path="/" + name, method=b"POST") as client:
            for _ in range(6 if name == "upload" else 0):
                client.sendall(b"x" * 10)
                time.sleep(0.4)  # slow, but steady
            data = receive_steadily(client, DOWNLOAD // 6) if name == "download" else b""
            outcomes[name] = (data + receive_all(client), time.monotonic() - began)

    folder = tmp_path_factory.mktemp("overdue")
    write_file(folder / "download", "x" * DOWNLOAD)
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)  # of its connections, too
        port, descriptor = listener.getsockname()[1], listener.fileno()
        options: dict[str, Any] = {"port": port, "bind": "fd:%d" % descriptor, "popen": {"pass_fds": [descriptor]}}
        server = stack.enter_context(Running(folder, "--timeout", "1", app=RUNS_QUERY, **options))
        for name in HANGS:
            threading.Thread(target=ask, args=(name,), daemon=True).start()
        yield server, lambda name: wait_until(lambda: outcomes.get(name), name)
        assert server.leaves_no_zombie()


@pytest.mark.parametrize("name", ["sleep", "loop", "lock", "empty"])
def test_a_hang_in_python_is_answered_504_with_its_stack_in_the_log(overdue: Any, name: str) -> None:
    server, outcome = overdue
    data, seconds = outcome(name)
    (answer,) = parse_answers(data)
    assert answer.status == 504 and answer.get("Connection") == "close"
    assert 0.9 < seconds < 1 + SLACK
    assert "in hang_" + name in server.errors() and "POST /" + name in server.errors()


def test_a_stream_that_stalls_is_cut_so_that_the_client_can_tell(overdue: Any) -> None:
    server, outcome = overdue
    data, _ = outcome("stalled")
    assert b"first" in data and not data.endswith(b"0\r\n\r\n")
    assert server.wait_for_log("in stall")


@pytest.mark.parametrize("name, body", [("stream", b"012345"), ("upload", b"60"), ("quick", b"quick")])
def test_what_is_slow_but_steady_lives(overdue: Any, name: str, body: bytes) -> None:
    (answer,) = parse_answers(overdue[1](name)[0])
    assert (answer.status, answer.body) == (200, body)


def test_a_body_that_stays_away_is_the_fault_of_the_client_whenever_it_is_read(overdue: Any) -> None:
    """The deadline of the application starts anew where the wait for the client does: 408, not 504."""
    assert parse_answers(overdue[1]("late")[0])[0].status == 408


def test_a_steady_download_of_a_file_lives(overdue: Any) -> None:
    data, seconds = overdue[1]("download")
    assert len(parse_answers(data)[0].body) == DOWNLOAD and seconds > 5


@pytest.mark.parametrize("name", ["stubborn", "in-c"])
def test_what_ignores_the_deadline_is_killed_and_logged(overdue: Any, name: str) -> None:
    server, outcome = overdue
    data, seconds = outcome(name)
    assert data == b"" and 1 < seconds < 8 + SLACK
    assert server.wait_for_log("POST /%s.*SIGKILL|SIGKILL.*POST /%s" % (name, name))


# Stop


def test_sigterm_answers_every_kind_of_client_and_exits_with_0(tmp_path: Any) -> None:
    with Running(tmp_path, app=RUNS_QUERY) as server:
        idle, busy = server.send(), server.send(HELD)
        streamed = "def f():\n  yield b'first '\n  %s  yield b'last'\nanswer = f()" % UNTIL_GO
        streaming = server.send(HOLDING + streamed)
        counted = "answer = len(environ['wsgi.input'].read())"
        upload = server.send(HOLDING + counted, b"Content-Length: 100000", method=b"POST")
        slow = server.connect()
        with closing(idle, busy, streaming, upload, slow):
            read_answer(idle)
            slow.sendall(b"GET / HTTP/1.1\r\nHost:")
            upload.sendall(b"x" * 50000)
            first = streaming.recv(65536)
            server.wait_held(3)
            wait_until(lambda: len(server.children()) >= 4, "all kinds of clients at work")
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)  # slow clients are slow
            slow.sendall(b" a\r\n\r\n")
            upload.sendall(b"x" * 50000)
            for client, body in ((slow, None), (upload, b"100000")):
                answer = receive_answer(client)
                assert (answer.status, answer.get("Connection")) == (200, "close")
                assert body in (None, answer.body)
            assert receive_all(idle) == b"" and server.process.poll() is None  # soon, while others are held
            server.go()
            answer = receive_answer(busy)
            assert (answer.status, answer.get("Connection")) == (200, "close")
            (answer,) = parse_answers(first + receive_all(streaming))
            assert answer.body == b"first last"
            assert server.process.wait(PATIENCE) == 0
        assert "Traceback" not in server.errors()


def test_sigterm_answers_what_waits_in_the_queue_of_the_kernel(tmp_path: Any) -> None:
    with Running(tmp_path, "--max-children", "2", "--keep-alive", "5", app=RUNS_QUERY) as server:
        idle, busy = server.send(), server.send(HELD)
        read_answer(idle)
        server.wait_held()
        queued = [server.send(HELD + "answer = 'queued'") for _ in range(4)]
        with closing(idle, busy, *queued):
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert receive_all(idle) == b"" and time.monotonic() - began < SLACK  # at once, although others wait
            server.go()
            for client in (busy, *queued):
                answer = receive_answer(client)
                assert (answer.status, answer.get("Connection")) == (200, "close")
                assert client is busy or answer.body == b"queued"
            assert server.process.wait(PATIENCE) == 0
        assert time.monotonic() - began < 2 * SLACK


@pytest.mark.parametrize("graceful, signals", [("1", 1), ("60", 2)])
def test_sigterm_ends_the_server_although_no_child_lives_to_take_a_request(
    tmp_path: Any, graceful: str, signals: int
) -> None:
    dies = "\n    os.register_at_fork(after_in_child=lambda: os._exit(3))\n"
    with Running(tmp_path, "--graceful-timeout", graceful, app=RUNS_QUERY + dies) as server, server.send():
        server.wait_for_log("exited with 3")
        began = time.monotonic()
        for _ in range(signals):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        assert server.process.wait(PATIENCE) == 0 and time.monotonic() - began < 1 + SLACK


def test_sigterm_answers_what_waits_in_the_queue_of_the_kernel_for_room(tmp_path: Any) -> None:
    words = ("--max-connections", "3", "--max-children", "2")
    with Running(tmp_path, *words, app=RUNS_QUERY) as server:
        clients = [server.send("time.sleep(0.1)", CLOSE) for _ in range(16)]
        with closing(*clients):
            server.wait_for_log("requests wait")
            server.process.send_signal(signal.SIGTERM)
            assert [receive_answer(client).status for client in clients] == [200] * 16
        assert server.process.wait(PATIENCE) == 0


def test_sigterm_at_the_cap_does_not_wait_for_clients_that_stay(tmp_path: Any) -> None:
    with Running(tmp_path, "--max-children", "1", app=RUNS_QUERY) as server:
        busy = server.send(HELD)
        server.wait_held()
        queued = [server.send() for _ in range(8)]
        with closing(busy, *queued):
            used, began = cpu_seconds(server.pid) if sys.platform == "linux" else 0, time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: time.monotonic() > began + 0.8, "what a busy loop would cost")
            assert not used or cpu_seconds(server.pid) - used < 0.3
            server.go()
            began = time.monotonic()
            for client in (busy, *queued):  # none of which closes
                answer = read_answer(client) if client is not busy else receive_answer(client)
                assert (answer.status, answer.get("Connection")) == (200, "close")
            assert server.process.wait(PATIENCE) == 0 and time.monotonic() - began < 2 * SLACK


def test_sigterm_under_load_loses_no_request_that_was_accepted(tmp_path: Any) -> None:
    answered, refused, lost = [], [], []

    def load(server: Running) -> None:
        while not refused:
            try:
                client = server.send("time.sleep(0.02)", CLOSE)
            except ConnectionRefusedError:
                refused.append(1)
                break
            except ConnectionError:
                continue  # reset before the request was sent: nobody had accepted it
            with client:
                data = receive_all(client)
                (answered if data.endswith(b"0\r\n\r\n") or b"200 OK" in data else lost).append(data)

    with Running(tmp_path, "--access-log", "off", app=RUNS_QUERY) as server:
        threads = [threading.Thread(target=load, args=(server,), daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(answered) > 30, "the load")
        assert server.stop() == 0
        for thread in threads:
            thread.join(PATIENCE)
        assert len(lost) <= 1 and refused, lost  # the race that none can win: between the last accept and the close


def test_hears_signals_as_soon_as_it_says_that_it_serves(tmp_path: Any) -> None:
    heap = "\n    heap = [[] for _ in range(2000000)]  # which takes a while to collect\n"
    with Running(tmp_path, app=RUNS_QUERY + heap) as server:
        assert server.stop() == 0


def test_no_signal_is_lost_at_the_moment_of_a_fork(tmp_path: Any) -> None:
    for _ in range(10):
        with Running(tmp_path, app=RUNS_QUERY) as server:
            server.run("")  # which makes the parent fork the next one, while
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(PATIENCE) == 0


def test_sigterm_is_heard_although_the_mailbox_is_full(tmp_path: Any) -> None:
    fill = """
    import socket
    for fd in range(3, 40):
        try:
            sock = socket.socket(fileno=os.dup(fd))
        except OSError:
            continue
        while sock.family == socket.AF_UNIX and not sock.getsockname():
            try: sock.send(b"x", socket.MSG_DONTWAIT)
            except OSError: break
    """
    with Running(tmp_path, app=RUNS_QUERY) as server, server.send(HELD + textwrap.dedent(fill)) as busy:
        server.wait_held()
        os.kill(server.pid, signal.SIGSTOP)
        wait_stopped(server.pid)
        server.go()
        read_answer(busy)
        server.process.send_signal(signal.SIGTERM)
        os.kill(server.pid, signal.SIGCONT)
        assert server.process.wait(PATIENCE) == 0


def test_a_request_just_after_sigterm_on_a_connection_at_rest_is_answered(tmp_path: Any) -> None:
    with Running(tmp_path, app=RUNS_QUERY) as server, server.send() as idle:
        server.wait_end(read_answer(idle).body)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)  # that is the claim
        idle.sendall(GET)
        answer = receive_answer(idle)
        assert (answer.status, answer.get("Connection")) == (200, "close")
        assert server.process.wait(PATIENCE) == 0
        assert "stopping" in server.errors() and "stopped" in server.errors()


def test_an_idle_server_stops_at_once(tmp_path: Any) -> None:
    with Running(tmp_path, app=RUNS_QUERY) as server:
        server.wait_spare()
        began = time.monotonic()
        assert server.stop() == 0 and time.monotonic() - began < 0.9  # less than the last call


def test_goes_on_accepting_for_the_drain_delay(tmp_path: Any) -> None:
    with Running(tmp_path, "--drain-delay", "1", app=RUNS_QUERY) as server:
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log("stopping")
        with server.send() as newcomer:
            answer = receive_answer(newcomer)
            assert (answer.status, answer.get("Connection")) == (200, "close")
        assert server.process.wait(PATIENCE) == 0


def test_a_stop_does_not_wait_for_a_connection_that_comes_back_too_late(tmp_path: Any) -> None:
    streamed = "def f():\n  yield b'first '\n  %s  yield b'last'\nanswer = f()" % UNTIL_GO
    words = "--graceful-timeout", "15"
    with Running(tmp_path, *words, app=RUNS_QUERY) as server, server.send(HOLDING + streamed) as client:
        # Its head is out before the stop, without Connection: close.
        receive_until(client, b"first ")
        server.process.send_signal(signal.SIGTERM)
        assert not select.select([client], [], [], 1.5 * webserver.LAST_CALL)[0]
        client.sendall(GET)
        began = time.monotonic()
        server.go()
        assert b"last" in receive_all(client)
        assert server.process.wait(PATIENCE) == 0 and time.monotonic() - began < 8


def test_a_second_signal_stops_at_once(tmp_path: Any) -> None:
    with Running(tmp_path, app=RUNS_QUERY) as server, server.send(HELD) as busy:
        server.wait_held()
        children = server.children()
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGINT)
        server.process.wait(PATIENCE)
        assert receive_all(busy) == b"" and not any(map(is_alive, children))
        assert "Traceback" not in server.errors()


def test_a_stop_without_grace_kills_nothing_that_is_idle(tmp_path: Any) -> None:
    words = "--graceful-timeout", "0", "--connections-per-child", "0"
    with Running(tmp_path, *words, app=RUNS_QUERY) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.send(HELD, CLOSE)) for _ in range(6)]
        server.wait_held(6)
        server.go()
        assert all(receive_answer(client).status == 200 for client in clients)
        assert server.stop() == 0 and not re.search("killed|died", server.errors())


def test_a_request_that_came_while_the_parent_was_stopped_is_answered(tmp_path: Any) -> None:
    """Its connection has rested for too long when the parent looks at the time again, but not when the client sent."""
    with Running(tmp_path, "--keep-alive", "3", app=RUNS_QUERY) as server, server.send() as client:
        server.wait_end(read_answer(client).body)
        os.kill(server.pid, signal.SIGSTOP)
        wait_stopped(server.pid)
        client.sendall(GET)
        time.sleep(2.5)
        os.kill(server.pid, signal.SIGCONT)
        assert read_answer(client).status == 200


def test_a_pause_of_all_processes_is_not_blamed_on_the_application(tmp_path: Any) -> None:
    """As by `docker pause`: the request has a TICK to go on before its deadline counts."""
    app = HELD + "time.sleep(0.3)\nanswer = 'in time'"
    with Running(tmp_path, "--timeout", "0.5", app=RUNS_QUERY) as server, server.send(app) as client:
        (child,) = server.wait_held()
        for pid in (server.pid, child):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(3 * webserver.TICK)
        server.go()
        for pid in (server.pid, child):
            os.kill(pid, signal.SIGCONT)
        assert read_answer(client).body == b"in time"


def test_a_slow_look_at_the_source_files_suspends_no_deadline(tmp_path: Any) -> None:
    """As on a slow disk: the parent then comes late to each look at the deadlines."""
    slow = "import os, time\nlook = os.listdir\n"
    slow += "os.listdir = lambda path: path == os.getcwd() and time.sleep(1.5) or look(path)\n"
    app = slow + textwrap.dedent(RUNS_QUERY)
    with Running(tmp_path, "--reload", "--timeout", "0.5", app=app) as server:
        assert server.get(make_target("time.sleep(60)")).status == 504


def test_the_graceful_timeout_kills_the_rest_and_says_so(tmp_path: Any) -> None:
    with Running(tmp_path, "--graceful-timeout", "1", app=RUNS_QUERY) as server:
        with server.send(HELD, path="/held") as busy:
            server.wait_held()
            children, began = server.children(), time.monotonic()
            assert server.stop() == 0
            assert 0.9 < time.monotonic() - began < 1 + SLACK
            assert receive_all(busy) == b"" and not any(map(is_alive, children))
        assert server.wait_for_log("killed: 1") and "GET /held" in server.wait_for_log("SIGKILL")


def test_a_child_that_is_too_young_to_hear_sigterm_is_told_again(tmp_path: Any) -> None:
    slow_birth = "import os, time\nos.register_at_fork(after_in_child=lambda: time.sleep(0.5))\n"
    with Running(tmp_path, app=slow_birth + textwrap.dedent(RUNS_QUERY)) as server:
        wait_until(server.children, "the child")
        began = time.monotonic()
        assert server.stop() == 0 and time.monotonic() - began < 2 + SLACK


def test_control_c_stops_gracefully_without_a_traceback(tmp_path: Any) -> None:
    with Running(tmp_path, app=RUNS_QUERY, popen={"start_new_session": True}) as server:
        busy, idle = server.send(HELD), server.send()
        with closing(busy, idle):
            read_answer(idle)
            server.wait_held()
            os.killpg(server.pid, signal.SIGINT)  # as the terminal does: the children get it too
            assert receive_all(idle) == b""
            server.go()
            assert receive_answer(busy).get("Connection") == "close"
        assert server.process.wait(PATIENCE) == 0
        assert "Traceback" not in server.errors() and "KeyboardInterrupt" not in server.errors()


@pytest.mark.parametrize("number", ["1", "0"])
def test_when_the_parent_is_killed_children_finish_and_the_port_is_free(tmp_path: Any, number: str) -> None:
    (tmp_path / "next").mkdir()
    with Running(tmp_path, "--connections-per-child", number, app=RUNS_QUERY) as server, server.send(HELD) as busy:
        idle, lively = server.send(), server.send()
        read_answer(idle)
        read_answer(lively)
        server.wait_held()
        wait_until(lambda: len(server.children()) >= 2, "one busy and one spare")
        children = server.children()
        try:
            with closing(idle, lively):
                assert server.stop(signal.SIGKILL) == -signal.SIGKILL
                with Running(tmp_path / "next", app=RUNS_QUERY, port=server.port) as successor:
                    successor.run("")
                    server.go()
                    assert read_answer(busy).status == 200
                    with contextlib.suppress(ConnectionError):  # its process asks for the parent between two requests
                        lively.sendall(GET)
                        receive_all(lively)
                    assert receive_all(idle) == b""
            wait_until(lambda: not any(map(is_alive, children)), "the children to leave")
        finally:
            for pid in filter(is_alive, children):
                os.kill(pid, signal.SIGKILL)


# A short soak


def act(server: Running, kind: str) -> None:
    """One connection of this kind, to its end."""
    if kind == "crash":
        with pytest.raises(LOST):
            server.run("os.kill(os.getpid(), 11)")
        return
    with server.send() if kind == "persistent" else server.connect() as client:
        if kind == "persistent":
            for _ in range(5):
                assert read_answer(client).status == 200
                client.sendall(GET)
        elif kind == "aborted":
            client.sendall(b"GET / HTTP/1.1\r\nHo")
        elif kind == "abandoned":  # the answer is not awaited
            client.sendall(GET)
        elif kind == "malformed":
            client.sendall(GET.replace(b"\r", b"", 1))
            assert receive_answer(client).status == 400
        elif kind == "upload":
            client.sendall(post(CLOSE, b"Content-Length: 50000", body=b"x" * 50000))
            assert receive_answer(client).status == 200
        elif kind == "close":
            client.sendall(OLD)
            assert receive_answer(client).status == 200


@on_linux
def test_a_soak_of_mixed_kinds_leaves_no_trace(tmp_path: Any) -> None:
    kinds = ["persistent", "aborted", "abandoned", "malformed", "upload", "close", "crash"]
    faults: list[Any] = []
    counts = dict.fromkeys(kinds, 0)
    end = time.monotonic() + 2

    def load(server: Running, seed: int) -> None:
        choose = random.Random(seed).choice
        while time.monotonic() < end:
            kind = choose(kinds)
            try:
                act(server, kind)
                counts[kind] += 1
            except BaseException as error:
                faults.append((kind, error))

    with Running(tmp_path, app=RUNS_QUERY) as server:
        server.run("")
        server.wait_spare()
        files = list_files(server.pid)
        threads = [threading.Thread(target=load, args=(server, seed), daemon=True) for seed in range(6)]
        for thread in threads:
            thread.start()
        while time.monotonic() < end:
            assert server.leaves_no_zombie()
        for thread in threads:
            thread.join(PATIENCE)
        assert not faults and all(counts.values()), (faults[:3], counts)
        server.wait_spare()
        assert list_files(server.pid) == files and server.stop() == 0


# ---- 15. Reload -------------------------------------------------------------


def ask_for_ever(server: Running, is_over: Any, persistent: bool, lost: list[Any], seen: set[bytes]) -> None:
    """One request after the other; lost is every one of which a byte was sent and that was not answered whole."""
    client = None
    while not is_over.is_set():
        try:
            if client is None or not persistent or not is_persistent(client):
                if client:
                    client.close()
                client = server.connect()
            client.sendall(GET if persistent else get(CLOSE))
            answer = read_answer(client)
            assert answer.status == 200
            seen.add(answer.body)
            if answer.get("Connection") == "close":
                client.close()
                client = None
        except Exception as error:
            lost.append(error)
            client = None


def test_reloads_through_a_link_that_leads_to_a_new_release(tmp_path: Any) -> None:
    current = tmp_path / "current"
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        write_file(tmp_path / str(number) / "app.py", ANSWERS % number)
    os.symlink("1", str(current))
    with Running(current, app=ANSWERS % 1, PWD=str(current)) as server:
        assert server.answers("1")
        os.unlink(str(current))
        os.symlink("2", str(current))
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: server.answers("2"), "the new release")


def test_reloads_under_load_without_one_failed_request(tmp_path: Any) -> None:
    lost: list[Any] = []
    seen: set[bytes] = set()
    is_over = threading.Event()
    with Running(tmp_path, "--access-log", "off", app=ANSWERS % "0") as server:
        clients = [
            threading.Thread(target=ask_for_ever, args=(server, is_over, persistent, lost, seen), daemon=True)
            for persistent in (True, True, False, False)
        ]
        files = list_files(server.pid) if sys.platform.startswith("linux") else []
        for client in clients:
            client.start()
        for number in range(1, 5):
            write_file(tmp_path / "app.py", ANSWERS % number)
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda number=number: server.answers(str(number)), "the new code")
        is_over.set()
        for client in clients:
            client.join(PATIENCE)
        assert not lost, lost[:3]
        assert seen >= {b"1", b"2", b"3"}
        server.wait_spare()  # the old ones were reaped
        assert not files or len(list_files(server.pid)) == len(files)  # no descriptor is handed on by mistake
        assert server.process.poll() is None and server.stop() == 0


def test_a_reload_leaves_requests_in_hand_and_connections_at_rest_alone(tmp_path: Any) -> None:
    with Running(tmp_path, "--max-children", "3", app=RUNS_QUERY) as server:
        busy, idle = server.send(HELD + "answer = 'old'"), server.send()
        with closing(busy, idle):
            server.wait_held()
            server.wait_end(read_answer(idle).body)
            write_file(tmp_path / "app.py", ANSWERS % "new")
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda: server.answers("new"), "the new code")
            assert len(server.children()) <= 3  # the cap counts the old ones
            idle.sendall(GET)
            assert read_answer(idle).body == b"new"
            server.go()
            assert read_answer(busy).body == b"old"
            busy.sendall(GET)
            assert read_answer(busy).body == b"new"
        server.wait_spare()  # the old one was reaped


def test_a_reload_leaves_time_for_the_first_head(tmp_path: Any) -> None:
    path = str(tmp_path / "socket")  # a TCP connection without a byte waits in the kernel, this one in the parent
    words, client = ("--keep-alive", "0"), socket.socket(socket.AF_UNIX)
    with Running(tmp_path, *words, app=ANSWERS % "x", bind="unix:" + path) as server, client:
        client.connect(path)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: server.errors().count("serving on") == 2, "the reload")
        assert not select.select([client], [], [], 1.5 * webserver.TICK)[0]
        client.sendall(GET)
        assert receive_answer(client).body == b"x"


def test_a_request_in_hand_keeps_its_deadline_over_a_reload(tmp_path: Any) -> None:
    with Running(tmp_path, "--timeout", "2", app=RUNS_QUERY) as server:
        with server.send(HOLDING + "time.sleep(60)") as hung:
            began = time.monotonic()
            server.wait_held()
            write_file(tmp_path / "app.py", ANSWERS % "new")
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda: server.answers("new"), "the new code")
            assert receive_answer(hung).status == 504 and time.monotonic() - began < 4 + SLACK
        assert server.leaves_no_zombie()


@rows(
    "code, word",
    ("def app(:\n", "SyntaxError", "syntax"),
    ("import not_there_at_all\n", "ModuleNotFoundError", "import"),
    ("import sys\nsys.exit('not today')\n", "not today", "exit"),
    ("", "app", "empty"),
    ("import ctypes\nctypes.string_at(0)\n", "", "segfault"),
)
def test_the_old_code_goes_on_when_the_new_does_not_load(tmp_path: Any, code: str, word: str) -> None:
    with Running(tmp_path, app=ANSWERS % "old") as server:
        write_file(tmp_path / "app.py", code)
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_log(word)
        server.wait_for_log("old code")
        assert server.answers("old") and server.leaves_no_zombie()
        write_file(tmp_path / "app.py", ANSWERS % "mended")
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: server.answers("mended"), "the mended code")


@pytest.mark.parametrize("mended", [True, False])
def test_comes_back_when_code_that_was_tried_fails_after_all(tmp_path: Any, mended: bool) -> None:
    code = """
    import os
    open("loads", "a").write("x")
    if os.path.getsize("loads") > 2 and not os.path.exists("go"):  # at the start and at the trial it loads
        raise RuntimeError("the database is away")
    """
    with Running(tmp_path, "--max-children", "1", app=code + ANSWERS % "served") as server:
        server.wait_spare()
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_log("the database is away")
        if mended:
            with server.send() as waiting:  # in the queue of the kernel: the port is never refused
                server.go()
                assert read_answer(waiting).body == b"served"
            assert server.leaves_no_zombie()  # also of the old child, which has ended when nothing looped
        assert server.stop() == 0 or not mended


def test_a_program_that_cannot_be_started_again_goes_on(tmp_path: Any) -> None:
    code = "import webserver\nwebserver.serve(webserver.show_environ, bind='127.0.0.1:%d')\n"
    with tempfile.TemporaryFile() as script:
        port = free_port()
        script.write((code % port).encode())
        script.seek(0)
        options: dict[str, Any] = {"argv": (sys.executable, "-"), "bind": "", "port": port, "popen": {"stdin": script}}
        with Running(tmp_path, PYTHONPATH=os.path.dirname(WEBSERVER), **options) as server:
            server.process.send_signal(signal.SIGHUP)  # of the script on stdin nothing is left to read
            server.wait_for_log("the old code goes on")
            assert server.get().status == 200 and server.stop() == 0


@pytest.mark.parametrize("code", ["pthread_sigmask(s.SIG_BLOCK, s.valid_signals())", "signal(s.SIGTERM, s.SIG_IGN)"])
def test_an_application_does_not_make_the_server_deaf_at_a_reload(tmp_path: Any, code: str) -> None:
    with Running(tmp_path, app=ANSWERS % "old") as server:
        write_file(tmp_path / "app.py", "import signal as s\ns.%s\n" % code + textwrap.dedent(ANSWERS % "new"))
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: server.answers("new"), "the new code")
        assert server.stop() == 0


def test_a_reload_to_another_version_of_the_server_is_refused(tmp_path: Any) -> None:
    program = tmp_path / "server.py"
    shutil.copy(WEBSERVER, program)
    with Running(tmp_path, app=ANSWERS % "old", argv=(sys.executable, str(program))) as server:
        text = read_file(str(program))
        write_file(program, text.replace('__version__ = "', '__version__ = "9'))  # its scoreboard may differ
        server.process.send_signal(signal.SIGHUP)
        assert "cannot take over from %s: restart" % webserver.PRODUCT in server.wait_for_log("cannot take over")
        server.wait_for_log("the old code goes on")
        assert server.answers("old") and server.stop() == 0


def test_old_children_may_be_reaped_by_the_application_that_a_reload_loads(tmp_path: Any) -> None:
    app = """
    import signal, time
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with open("loads", "a") as file:
        file.write("x")
    if os.path.getsize("loads") == 3:  # behind the start and the check
        open("loading", "w").close()
        while not os.path.exists("go"): time.sleep(0.01)
    """
    with Running(tmp_path, "--graceful-timeout", "2", app=RUNS_QUERY + app) as server, server.send(HELD):
        (pid,) = server.wait_held()
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: os.path.exists(server.folder + "/loading"), "the load")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(pid), "the end of the old child")
        server.go()
        server.wait_for_log("reloaded: serving on")
        assert server.run("") != str(pid) and server.stop() == 0 and "Traceback" not in server.errors()


def test_an_exit_handler_that_hangs_holds_up_a_reload_for_some_seconds_only(tmp_path: Any) -> None:
    app = "import atexit, os, time\nPARENT = os.getpid()\nif not os.path.exists('new'):\n"
    app += "  atexit.register(lambda: PARENT == os.getpid() and time.sleep(60))\n" + textwrap.dedent(ANSWERS % "here")
    with Running(tmp_path, app=app) as server:
        write_file(tmp_path / "new", "")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_log("line [0-9]+, in <lambda>")
        server.wait_for_log("reloaded: ")
        assert server.answers("here") and server.stop() == 0


STARTS = {  # a process that an application starts and terminates
    "subprocess": "import subprocess\nprocess = subprocess.Popen(['sleep', '60'])\n"
                  "process.terminate()\nprocess.wait()\n",
    "multiprocessing": "import multiprocessing as m, time\n"
                       "process = m.get_context('fork').Process(target=time.sleep, args=(60,))\n"
                       "process.start()\nprocess.terminate()\nprocess.join()\n",
    "fork": "import os, time\npid = os.fork()\nif pid == 0:\n    time.sleep(60)\n    os._exit(0)\n"
            "os.kill(pid, 15)\nos.waitpid(pid, 0)\n",
}  # fmt: skip


@pytest.mark.parametrize("name", STARTS)
def test_an_application_can_terminate_processes_also_while_it_is_reloaded(tmp_path: Any, name: str) -> None:
    with Running(tmp_path, app=ANSWERS % "old") as server:
        write_file(tmp_path / "app.py", STARTS[name] + textwrap.dedent(ANSWERS % "new"))
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: server.answers("new"), "the new code")


def test_the_old_code_goes_on_and_stops_while_the_new_hangs(tmp_path: Any) -> None:
    with Running(tmp_path, app=ANSWERS % "old") as server:
        write_file(tmp_path / "app.py", "import os, time\n" + HOLDING + "time.sleep(60)\n")
        server.process.send_signal(signal.SIGHUP)
        (pid,) = server.wait_held()
        try:
            server.process.send_signal(signal.SIGHUP)  # a second one neither helps nor harms
            assert server.answers("old")
            began = time.monotonic()
            assert server.stop() == 0 and time.monotonic() - began < SLACK
            wait_until(lambda: not is_alive(pid), "the process that tried the new code to end")
        finally:
            if pid != server.pid and is_alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_stop_during_a_reload_is_obeyed(tmp_path: Any) -> None:
    slow = "import os, time\n" + HELD
    with Running(tmp_path, app=ANSWERS % "old") as server:
        assert server.answers("old")
        write_file(tmp_path / "app.py", slow + textwrap.dedent(ANSWERS % "new"))
        server.process.send_signal(signal.SIGHUP)
        (pid,) = server.wait_held()
        os.kill(server.pid, signal.SIGSTOP)  # so that the parent finds both at once: the signal and the good news
        server.process.send_signal(signal.SIGTERM)
        server.go()
        wait_until(lambda: pid in server.zombies(), "the end of the trial")
        os.kill(server.pid, signal.SIGCONT)
        assert server.process.wait(PATIENCE) == 0


def test_sighup_during_a_stop_starts_nothing(tmp_path: Any) -> None:
    with Running(tmp_path, app=RUNS_QUERY) as server, server.send(HELD) as busy:
        server.wait_held()
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log("stopping")
        server.process.send_signal(signal.SIGHUP)
        began = time.monotonic()
        wait_until(lambda: time.monotonic() > began + 1, "what a reload would take")
        server.go()
        assert receive_answer(busy).status == 200
        assert server.process.wait(PATIENCE) == 0 and server.errors().count("serving on") == 1


def test_signals_that_come_during_the_first_load_are_handled_behind_it(tmp_path: Any) -> None:
    write_file(tmp_path / "app.py", "import os, time\n" + HELD + textwrap.dedent(ANSWERS % "old"))
    server = Running(tmp_path, "app:app")
    try:
        server.wait_held()
        server.process.send_signal(signal.SIGUSR1)
        server.process.send_signal(signal.SIGHUP)
        write_file(tmp_path / "go", "")
        with server:
            server.wait_for_log("connections at rest: 0")
            wait_until(lambda: server.errors().count("serving on") == 2, "the reload")
            assert server.answers("old") and server.stop() == 0
    finally:
        server.process.kill()


@pytest.mark.parametrize("moment", ["load", "service"])
def test_sighup_of_a_terminal_that_was_closed_ends_the_server(tmp_path: Any, moment: str) -> None:
    head = "import os, time\n" + (HELD if moment == "load" else HOLDING)
    write_file(tmp_path / "app.py", head + textwrap.dedent(ANSWERS % "here"))
    terminal, stderr = os.openpty()
    command, port = (*PROGRAM, "--access-log", "off"), free_port()
    process = subprocess.Popen(
        [*command, "--bind", "127.0.0.1:%d" % port, "app:app"], stderr=stderr, **make_options(tmp_path, None, {})
    )
    try:
        os.close(stderr)
        wait_until(lambda: any(name.startswith("held-") for name in os.listdir(str(tmp_path))), "the load")
        if moment == "service":
            said = b""
            while b"serving on" not in said:
                select.select([terminal], [], [], PATIENCE)
                said += os.read(terminal, 4096)
        os.close(terminal)
        process.send_signal(signal.SIGHUP)  # the load does not end by itself
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait(PATIENCE)


STOPS = signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize("signals", [STOPS[:1], STOPS[:1] * 2, STOPS, STOPS[::-1]], ids=str)
def test_a_stop_while_a_reload_loads_waits_for_the_end_of_the_load_or_for_a_second_one(
    tmp_path: Any, signals: Any
) -> None:
    slow = """
    with open("loads", "a") as file:
        file.write("x")
    if os.path.getsize("loads") == 3:  # behind the start and the check
        open("loading", "w").close()
        while not os.path.exists("go"): time.sleep(0.01)
    """
    with Running(tmp_path, app=RUNS_QUERY + slow) as server, server.send(HELD) as busy:
        server.wait_held()
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: os.path.exists(server.folder + "/loading"), "the load")
        with server.send("answer = 'accepted'", CLOSE) as late:
            for signum in signals:
                server.process.send_signal(signum)
                time.sleep(0.1)
            if len(signals) == 1:
                server.go()
                assert receive_answer(late).body == b"accepted"
            assert server.process.wait(PATIENCE) == 0
            server.go()
        assert receive_answer(busy).status == 200
        assert server.errors().count("stopping") == (len(signals) == 1)


def test_a_stop_in_the_first_load_removes_the_socket_file(tmp_path: Any) -> None:
    write_file(tmp_path / "app.py", "import os, time\n" + HELD)
    server = Running(tmp_path, "app:app", bind="unix:socket")
    server.wait_held()
    assert os.path.exists(tmp_path / "socket")
    assert server.stop() == 0 and not os.path.exists(tmp_path / "socket")


def test_a_reload_starts_the_interpreter_of_the_start_and_counts_anew(tmp_path: Any) -> None:
    app = "import sys\nsys.executable = '/nowhere'\n" + textwrap.dedent(RUNS_QUERY)
    with Running(tmp_path, app=app) as server, server.send(HELD) as busy:
        server.wait_held()
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: server.errors().count("serving on") == 2, "the reload")
        server.process.send_signal(signal.SIGUSR1)
        assert " 0 connections, " in (said := server.wait_for_log("in all:")) and " 0 requests, " in said
        server.go()
        assert read_answer(busy).status == 200


@on_linux
def test_a_reload_without_descriptors_is_refused(tmp_path: Any) -> None:
    app = "keep = [open('/dev/null') for _ in range(60)]\n" + textwrap.dedent(ANSWERS % "old")
    popen = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))}
    with Running(tmp_path, app=app, popen=popen) as server:
        begun = []
        with contextlib.ExitStack() as stack:
            while "cannot accept" not in server.errors():
                begun.append(stack.enter_context(server.connect()))
                begun[-1].sendall(b"GET / HTTP/1.1\r\nH")
                time.sleep(0.01)
            server.process.send_signal(signal.SIGHUP)
            server.wait_for_log("the old code goes on")
            assert server.answers("old") and server.process.poll() is None


@on_linux
def test_children_have_the_limit_of_descriptors_that_the_application_has_set(tmp_path: Any) -> None:
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (200, 4096))\n"
    popen = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (60, 4096))}
    with Running(tmp_path, app=limit + textwrap.dedent(RUNS_QUERY), popen=popen) as server:
        code = "import resource; answer = resource.getrlimit(resource.RLIMIT_NOFILE)"
        assert server.run(code) == "(200, 4096)"


def test_a_reload_hands_over_more_connections_than_the_soft_limit_of_descriptors(public: Any) -> None:
    folder, argv = public

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (60, 4096))
        if os.getuid() == 0:
            become_nobody()  # no limit of descriptors in flight binds root

    with Running(folder, app=ANSWERS % "old", argv=argv, popen={"preexec_fn": limit}) as server:
        clients = [server.connect() for _ in range(100)]
        with closing(*clients):
            for client in clients:
                client.sendall(GET)
                assert read_answer(client).body == b"old"
            server.wait_spare()
            write_file(folder + "/app.py", ANSWERS % "new")
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda: server.answers("new"), "the new code")
            for client in clients:
                client.sendall(GET)
                assert read_answer(client).body == b"new"


# By itself, after a save


def test_reload_by_itself_soon_after_a_save(tmp_path: Any) -> None:
    indirect = "import helper\n" + textwrap.dedent(ANSWERS % "%s").replace('b"%s"', "helper.text")
    write_file(tmp_path / "helper.py", "text = b'0'")
    with Running(tmp_path, "--reload", app=indirect) as server:
        assert server.answers("0")
        write_file(tmp_path / "helper.py", "text = b'1'")  # a module that the application imports
        began = time.monotonic()
        wait_until(lambda: server.answers("1"), "the new code")
        assert time.monotonic() - began < 1 + SLACK
        write_file(tmp_path / "helper.py", "text = = b'2'")
        server.wait_for_log("SyntaxError")
        assert server.answers("1")
        write_file(tmp_path / "helper.py", "text = b'3'")
        wait_until(lambda: server.answers("3"), "the mended code")
        assert server.process.poll() is None and server.leaves_no_zombie()


def test_reload_starts_even_of_a_file_in_a_package(tmp_path: Any) -> None:
    (tmp_path / "site").mkdir()
    write_file(tmp_path / "site" / "__init__.py", "")
    write_file(tmp_path / "package.py", ANSWERS % "0")
    with Running(tmp_path, "--reload", "package:app") as server:
        write_file(tmp_path / "package.py", ANSWERS % "1")
        wait_until(lambda: server.answers("1"), "the new code")


@pytest.fixture
def project(tmp_path: Any, monkeypatch: Any) -> Callable[[str], Any]:
    """Make a folder with an app.py, which counts as imported."""

    def make(name: str) -> Any:
        path = tmp_path / name
        path.mkdir(parents=True)
        write_file(path / "app.py", "")
        module = types.ModuleType("project")
        module.__file__ = str(path / "app.py")
        monkeypatch.setitem(sys.modules, "project", module)
        return path

    return make


@rows(
    "name, is_watched",
    ("site", True, "a folder"),
    ("env-app", True, "a sibling of the venv"),
    ("env/app", True, "a folder inside the venv"),
    ("env/lib/python3/site-packages/app", False, "what pip has installed"),
    ("lib/python3/dist-packages/app", False, "what the system has installed"),
)
def test_reload_watches_what_is_not_installed(project: Any, tmp_path: Any, monkeypatch: Any, name: str,
                                              is_watched: bool) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "env"))
    path = str(project(name) / "app.py")
    assert (path in webserver.list_sources()) == is_watched


def test_reload_survives_files_that_vanish_and_links_that_lead_nowhere(project: Any) -> None:
    path = project("site")
    os.symlink("loop.py", str(path / "loop.py"))
    os.symlink("user@host.1", str(path / "lock.py"))
    assert {os.path.basename(name) for name in webserver.list_sources() if name.startswith(str(path))} == {"app.py"}
    for name in ("loop.py", "lock.py", "app.py"):
        os.unlink(str(path / name))
    path.rmdir()
    webserver.list_sources()


# ---- 16. TLS ----------------------------------------------------------------

needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl, which makes the certificates")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: Any) -> str:
    """A folder with an authority (ca), certificates of it (server, next, client), and files that are no use."""
    folder = str(tmp_path_factory.mktemp("certificates"))

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
            "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/O=The tests/CN=An authority",
            "-addext", "keyUsage=critical,keyCertSign")  # fmt: skip
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1\n"
    write_file(folder + "/names", names + "authorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\n")
    for name, subject in (("server", "/CN=localhost"), ("next", "/CN=localhost"),
                          ("client", "/C=DE/O=One, two\\+three/OU=\u00e4/CN=A client")):  # fmt: skip
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-utf8",
                "-keyout", name + ".key", "-out", name + ".csr", "-subj", subject)  # fmt: skip
        openssl("x509", "-req", "-in", name + ".csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
                "-days", "2", "-extfile", "names", "-out", name + ".pem")  # fmt: skip
        path = "%s/%s" % (folder, name)
        write_file(path + ".both", read_file(path + ".pem") + read_file(path + ".key"))
    openssl("pkey", "-in", "server.key", "-aes128", "-passout", "pass:secret", "-out", "locked.key")
    openssl("genrsa", "-out", "rsa.key", "2048")
    write_file(folder + "/nothing.pem", "no certificate")
    return folder


def start_tls(server: Running, folder: str, certificate: str = "", **options: Any) -> ssl.SSLSocket:
    """A TLS connection to the server, whose certificate is checked."""
    context = ssl.create_default_context(cafile=folder + "/ca.pem")
    if certificate:
        context.load_cert_chain(certificate)
    for name, value in options.items():
        setattr(context, name, value)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context.wrap_socket(server.connect(), server_hostname="localhost")


def ask_tls(client: ssl.SSLSocket, code: str = "", *fields: bytes) -> Answer:
    """The answer to a request for this code."""
    client.sendall(get(*fields, target=make_target(code).encode()))
    return read_answer(client)


TLS_MISTAKES = [  # the words, what the one line on stderr must hold
    ("--certfile nowhere.pem", ["cannot read nowhere.pem"]),
    ("--certfile server.pem --keyfile nowhere.key", ["cannot read nowhere.key"]),
    ("--certfile server.pem --keyfile next.key", ["cannot use server.pem", "the key is that of another certificate"]),
    ("--certfile server.pem --keyfile rsa.key", ["cannot use server.pem", "the key is that of another certificate"]),
    ("--certfile server.pem", ["cannot use server.pem", "a key"]),
    ("--certfile nothing.pem --keyfile server.key", ["cannot use nothing.pem", "certificate"]),
    ("--certfile server.pem --keyfile nothing.pem", ["server.pem with nothing.pem"]),
    ("--certfile server.pem --keyfile locked.key", ["locked", "pass phrase"]),
    ("--certfile server.both --ca-certs nothing.pem", ["cannot use nothing.pem"]),
    ("--keyfile server.key", ["need --certfile"]),
    ("--ca-certs ca.pem", ["need --certfile"]),
]


@needs_openssl
@pytest.mark.parametrize("words, holds", TLS_MISTAKES, ids=[row[0] for row in TLS_MISTAKES])
def test_a_certificate_that_cannot_be_used_is_one_clear_sentence(certificates: str, words: str, holds: Any) -> None:
    for extra in ([], ["--check"]):
        ended = run_command(certificates, "-b", "127.0.0.1:%d" % free_port(), *words.split(), *extra)
        assert ended.returncode in (1, 2) and ended.stderr.count("\n") == 1, ended.stderr
        assert all(word in ended.stderr for word in holds), ended.stderr


@needs_openssl
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_serves_over_tls(tmp_path: Any, certificates: str, version: str) -> None:
    wanted = getattr(ssl.TLSVersion, version)
    with Running(tmp_path, "--certfile", certificates + "/server.both", app=RUNS_QUERY) as server:
        assert "serving on https://" in server.errors()
        with start_tls(server, certificates, minimum_version=wanted, maximum_version=wanted) as client:
            assert client.selected_alpn_protocol() == "http/1.1"
            code = "answer = [environ.get(n) for n in ('wsgi.url_scheme', 'HTTPS', 'SSL_PROTOCOL', 'SSL_CIPHER',"
            code += " 'SSL_CLIENT_VERIFY', 'SSL_CLIENT_CERT', 'HTTP_HTTPS')]"
            answer = ask_tls(client, code, b"HTTPS: off", b"SSL_PROTOCOL: none", b"SSL-CLIENT-CERT: forged")
            protocol, cipher = version.replace("_", "."), client.cipher()
            assert answer.body.decode() == str(["https", "on", protocol, cipher[0], "NONE", None, "off"])
            assert ask_tls(client).status == ask_tls(client, "", b"Connection: close").status == 200  # persistent
            assert client.recv(1) == b""  # after close_notify: without it, an SSLEOFError


@needs_openssl
def test_tls_before_1_2_is_refused(tmp_path: Any, certificates: str) -> None:
    with Running(tmp_path, "--certfile", certificates + "/server.both", app=RUNS_QUERY) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with pytest.warns(DeprecationWarning) if sys.version_info >= (3, 10) else contextlib.nullcontext():
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionResetError)), server.connect() as sock:
            context.wrap_socket(sock)
        with start_tls(server, certificates) as client:
            assert ask_tls(client).status == 200
        assert "Traceback" not in server.errors()


@needs_openssl
def test_a_session_is_resumed_by_another_process(tmp_path: Any, certificates: str) -> None:
    with Running(tmp_path, "--certfile", certificates + "/server.both", app=RUNS_QUERY) as server:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = ssl.create_default_context(cafile=certificates + "/ca.pem")
            context.minimum_version = context.maximum_version = version
            session, pids = None, set()
            for number in range(3):
                with context.wrap_socket(server.connect(), server_hostname="localhost", session=session) as client:
                    pids.add(ask_tls(client, "", b"Connection: close").body)
                    assert client.session_reused == (number > 0)
                    session = client.session
            assert len(pids) == 3


@needs_openssl
def test_a_client_certificate_is_demanded_and_told(tmp_path: Any, certificates: str) -> None:
    words = "--certfile", certificates + "/server.both", "--ca-certs", certificates + "/ca.pem"
    with Running(tmp_path, *words, app=RUNS_QUERY) as server:
        code = "answer = '|'.join(environ.get('SSL_CLIENT_' + n, '')"
        code += " for n in ('VERIFY', 'S_DN', 'I_DN', 'M_SERIAL', 'CERT'))"
        with start_tls(server, certificates, certificate=certificates + "/client.both") as client:
            body = ask_tls(client, "answer = (%s).encode('latin-1').decode()" % code[9:]).body.decode()
            verify, subject, issuer, serial, pem = body.split("|")
            assert verify == "SUCCESS" and issuer == "CN=An authority,O=The tests"
            assert subject == "CN=A client,OU=\u00e4,O=One\\, two\\+three,C=DE"
            assert pem.strip() in read_file(certificates + "/client.pem") and re.fullmatch("[0-9A-F]+", serial)
        with pytest.raises((ssl.SSLError, ConnectionResetError)), start_tls(server, certificates) as client:
            ask_tls(client)
        assert "Traceback" not in server.errors()


@needs_openssl
def test_plain_http_on_a_port_with_tls_is_told_so(tmp_path: Any, certificates: str) -> None:
    with Running(tmp_path, "--certfile", certificates + "/server.both", app=RUNS_QUERY) as server:
        with server.send() as client:
            answer = receive_answer(client)
        assert answer.status == 400 and b"https" in answer.body and "TLS" in server.output()


@needs_openssl
def test_large_bodies_go_both_ways_over_tls(tmp_path: Any, certificates: str) -> None:
    (tmp_path / "large").write_bytes(os.urandom(1 << 16) * 320)
    code = """
        def app(environ, start_response):
            start_response("200 OK", [])
            if environ["REQUEST_METHOD"] == "PUT":
                return [b"%d" % len(environ["wsgi.input"].read())]
            return environ["wsgi.file_wrapper"](open("large", "rb"))
    """
    with Running(tmp_path, "--certfile", certificates + "/server.both", app=code) as server:
        large = (tmp_path / "large").read_bytes()
        context = ssl.create_default_context(cafile=certificates + "/ca.pem")
        connection = http.client.HTTPSConnection("localhost", server.port, timeout=PATIENCE, context=context)
        with closing(connection):
            for _ in range(2):
                connection.request("GET", "/")
                assert connection.getresponse().read() == large
                connection.request("PUT", "/", large)
                assert connection.getresponse().read() == b"%d" % len(large)


@needs_openssl
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts what is mapped only on Linux")
@pytest.mark.parametrize("tls", [False, True], ids=["tcp", "tls"])
def test_sends_a_large_block_without_a_copy_of_it(tmp_path: Any, certificates: str, tls: bool) -> None:
    words = ("--certfile", certificates + "/server.both") if tls else ()
    with Running(tmp_path, "--limit-memory", "100M", *words, app=RUNS_QUERY) as server:
        code = "class Body(list): close = None\nanswer = Body([bytes(70_000_000)])\nanswer.close = lambda: None"
        with start_tls(server, certificates) if tls else server.connect() as client:
            client.sendall(get(CLOSE, target=make_target(code).encode()))
            assert receive_answer(client).body == bytes(70_000_000)


@needs_openssl
def test_a_tls_client_that_waited_in_line_still_has_time_for_its_head(tmp_path: Any, certificates: str) -> None:
    words = "--max-children", "1", "--timeout", "1", "--certfile", certificates + "/server.both"
    code = "answer = (time.sleep(0.1) or b'x' for _ in range(15))"  # in line for longer than a head may take
    with Running(tmp_path, *words, app=RUNS_QUERY) as server, start_tls(server, certificates) as busy:
        busy.sendall(get(CLOSE, target=make_target(code).encode()))
        busy.recv(1)
        with start_tls(server, certificates) as client:
            client.sendall(GET[:9])
            time.sleep(0.1)
            client.sendall(get(CLOSE)[9:])
            assert receive_answer(client).status == 200


TLS_STALLS = [  # what the client sends over TLS and then waits; the statuses of the answers
    (b"", []),
    (GET, [200]),
    (GET[:-2], [408]),
    (post(b"Content-Length: 5", body=b"ab"), [408]),
    (get(target=make_target("time.sleep(60)").encode()), [504]),
]


@needs_openssl
def test_the_deadlines_hold_over_tls(tmp_path: Any, certificates: str) -> None:
    app = RUNS_QUERY.replace("names = {", "environ['wsgi.input'].read(); names = {")
    words = "--timeout", "1", "--keep-alive", "1", "--certfile", certificates + "/server.both"
    with Running(tmp_path, *words, app=app) as server, contextlib.ExitStack() as stack:
        clients, began = [stack.enter_context(start_tls(server, certificates)) for _ in TLS_STALLS], time.monotonic()
        for client, (data, _) in zip(clients, TLS_STALLS):
            client.sendall(data)
        for client, (data, statuses) in zip(clients, TLS_STALLS):
            assert [answer.status for answer in parse_answers(receive_all(client))] == statuses, data
        assert time.monotonic() - began < 4 + SLACK


@needs_openssl
def test_a_trouble_is_logged_once_in_a_while_whichever_process_has_it(tmp_path: Any, certificates: str) -> None:
    with Running(tmp_path, "--certfile", certificates + "/server.both", app=RUNS_QUERY) as server:
        for _ in range(4):
            with server.connect() as client:
                client.sendall(b"\x16" + 20 * b"x")
                receive_all(client)
        assert server.errors().count("handshake has failed") == 1


@needs_openssl
def test_a_handshake_that_stops_has_the_deadline_of_a_head(tmp_path: Any, certificates: str) -> None:
    words = "--timeout", "1", "--certfile", certificates + "/server.both"
    with Running(tmp_path, *words, app=RUNS_QUERY) as server, contextlib.ExitStack() as stack:
        outgoing = ssl.MemoryBIO()
        with contextlib.suppress(ssl.SSLWantReadError):
            ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="a").do_handshake()
        hello, began = outgoing.read(), time.monotonic()
        clients = [stack.enter_context(server.connect()) for _ in range(4)]
        for client, size in zip(clients, (1, 5, 100, len(hello))):
            client.sendall(hello[:size])
        for client in clients:
            receive_all(client)
        assert time.monotonic() - began < 2.5 + SLACK
        server.wait_spare()
        assert "Traceback" not in server.errors()


@needs_openssl
def test_a_record_that_comes_byte_by_byte_has_the_deadline_of_its_head(tmp_path: Any, certificates: str) -> None:
    words = "--timeout", "1", "--certfile", certificates + "/server.both"
    with Running(tmp_path, *words, app=RUNS_QUERY) as server, server.connect() as client:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = ssl.create_default_context(cafile=certificates + "/ca.pem")
        session = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        while True:
            try:
                session.do_handshake()
                break
            except ssl.SSLWantReadError:
                client.sendall(outgoing.read())
                incoming.write(client.recv(65536))
        session.write(get(b"X-Long: " + b"x" * 1000))
        began, record = time.monotonic(), outgoing.read()
        with contextlib.suppress(OSError):
            for byte in record:
                client.sendall(bytes([byte]))
                if select.select([client], [], [], 0.2)[0] and not client.recv(65536):
                    break
        assert 0.5 < time.monotonic() - began < 3 + SLACK
        assert " 504 " not in server.output(), "the parent had to interrupt it"


@needs_openssl
def test_no_tls_request_is_lost_where_others_wait_or_code_is_reloaded(tmp_path: Any, certificates: str) -> None:
    """A connection that nobody else could go on with is told so in its last answer."""
    answers: list[bool] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            with start_tls(server, certificates) as client:
                answer, answered_at = None, time.monotonic()
                while not stop.is_set() and not (answer and answer.get("Connection") == "close"):
                    asked_at = time.monotonic()
                    try:
                        answer = ask_tls(client)
                    except (AssertionError, OSError):  # it had to give way, since it was silent for a second
                        answers.append(asked_at - answered_at > 0.9)
                        break
                    answers.append(answer.status == 200)
                    answered_at = time.monotonic()

    words = "--max-children", "2", "--certfile", certificates + "/server.both"
    with Running(tmp_path, *words, app=RUNS_QUERY) as server:
        clients = [threading.Thread(target=load) for _ in range(4)]
        for client in clients:
            client.start()

        def wait_answers() -> None:
            count = len(answers)
            wait_until(lambda: len(answers) > count + 50, "answers")

        for starts in (2, 3):
            wait_answers()
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda starts=starts: server.errors().count("serving on") == starts, "the reload")
        wait_answers()
        stop.set()
        for client in clients:
            client.join(PATIENCE)
        assert all(answers) and "Traceback" not in server.errors()


@needs_openssl
def test_a_client_that_ends_the_session_hears_the_same(tmp_path: Any, certificates: str) -> None:
    with Running(tmp_path, "--certfile", certificates + "/server.both", app=RUNS_QUERY) as server:
        for is_asked in (False, True):
            client = start_tls(server, certificates)
            if is_asked:
                ask_tls(client)
            client.unwrap().close()  # would raise an SSLEOFError


@needs_openssl
def test_hostile_bytes_in_any_stage_of_tls_are_no_more_than_a_log_line(tmp_path: Any, certificates: str) -> None:
    generator = random.Random(7)
    with Running(tmp_path, "--certfile", certificates + "/server.both", app=RUNS_QUERY) as server:
        for number in range(40):
            junk = bytes(generator.randrange(256) for _ in range(200))
            if number % 3 == 0:
                client: socket.socket = server.connect()
                junk = b"\x16\x03\x01" + junk
            elif number % 3 == 1:
                client = server.connect()
            else:
                secure = start_tls(server, certificates)
                client = socket.socket(fileno=secure.detach())  # and goes on without TLS
                client.settimeout(PATIENCE)
            with client:
                client.sendall(junk)
                client.shutdown(socket.SHUT_WR)
                receive_all(client)
        with start_tls(server, certificates) as client:
            assert ask_tls(client).status == 200
        assert "Traceback" not in server.errors()


@needs_openssl
def test_an_end_without_close_notify_inside_a_body_is_a_cut(tmp_path: Any, certificates: str) -> None:
    code = """
        def app(environ, start_response):
            data = environ["wsgi.input"].read()
            open("read", "wb").write(data)
            start_response("200 OK", [])
            return []
    """
    with Running(tmp_path, "--certfile", certificates + "/server.both", app=code) as server:
        client = start_tls(server, certificates)
        client.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhalf")
        with socket.socket(fileno=client.detach()) as sock:
            sock.settimeout(PATIENCE)
            sock.shutdown(socket.SHUT_WR)
            receive_all(sock)
        wait_until(lambda: '"POST / HTTP/1.1"' in server.output(), "the log")
        assert not os.path.exists(str(tmp_path / "read"))


@needs_openssl
def test_sighup_takes_renewed_certificates_and_leaves_the_old_ones_if_they_are_broken(
    tmp_path: Any, certificates: str
) -> None:
    def find_serial() -> str:
        with start_tls(server, certificates) as client:
            return str(client.getpeercert()["serialNumber"])

    shutil.copy(certificates + "/server.both", str(tmp_path / "pair"))
    with Running(tmp_path, "--certfile", "pair", app=RUNS_QUERY) as server:
        first = find_serial()
        shutil.copy(certificates + "/next.both", str(tmp_path / "pair"))
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: server.errors().count("serving on") == 2, "the reload")
        renewed = find_serial()
        assert renewed != first
        write_file(str(tmp_path / "pair"), "broken")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_log("the new program does not start")
        assert "cannot use pair" in server.errors() and find_serial() == renewed


@needs_openssl
def test_a_tls_connection_at_rest_stays_with_its_child_and_gives_way(tmp_path: Any, certificates: str) -> None:
    words = "--max-children", "2", "--certfile", certificates + "/server.both"
    with Running(tmp_path, *words, app=RUNS_QUERY) as server:
        with start_tls(server, certificates) as first, start_tls(server, certificates) as second:
            pid = ask_tls(first).body
            time.sleep(1.5)
            assert ask_tls(first).body == pid and ask_tls(second).status == 200
            with start_tls(server, certificates) as third:
                assert ask_tls(third).status == 200
        with start_tls(server, certificates) as idle:
            ask_tls(idle)
            began = time.monotonic()
            assert server.stop() == 0 and time.monotonic() - began < 2 + SLACK
            assert idle.recv(1) == b""


# ---- 17. Proxies ------------------------------------------------------------


def forward(trusted: str, *fields: str, peer: str = "127.0.0.1") -> Any:
    """What an application is told of a request with these fields, or the status of the refusal."""
    asked = get(*(field.encode("latin-1") for field in fields), target=b"/x")
    served = serve(asked, peer=(peer, 4711) if peer else "", forwarded_allow_ips=trusted)
    return served.requests[0] if served.requests else served.answers[0].status


@rows(
    "trusted, fields, expected",
    ("127.0.0.1", ["X-Forwarded-For: 192.0.2.1"], {"REMOTE_ADDR": "192.0.2.1", "REMOTE_PORT": ""}, "one client"),
    ("127.0.0.0/8", ["X-Forwarded-For: 192.0.2.1"], {"REMOTE_ADDR": "192.0.2.1"}, "a network"),
    ("10.0.0.1 127.0.0.1", ["X-Forwarded-For: 192.0.2.1"], {"REMOTE_ADDR": "192.0.2.1"}, "a list by spaces"),
    ("127.0.0.1", ["X-Forwarded-For: 198.51.100.9, 192.0.2.1"], {"REMOTE_ADDR": "192.0.2.1"}, "from the right"),
    ("127.0.0.1", ["X-Forwarded-For: 198.51.100.9", "X-Forwarded-For: 192.0.2.1"], {"REMOTE_ADDR": "192.0.2.1"},
     "over two lines"),
    ("127.0.0.1,10.0.0.0/8", ["X-Forwarded-For: 192.0.2.1, 10.1.1.1,10.2.2.2"], {"REMOTE_ADDR": "192.0.2.1"},
     "past proxies of ours"),
    ("127.0.0.1,10.0.0.0/8", ["X-Forwarded-For: 10.3.3.3, 10.1.1.1"], {"REMOTE_ADDR": "10.3.3.3"},
     "all are proxies: the leftmost"),
    ("*", ["X-Forwarded-For: 198.51.100.9, 192.0.2.1"], {"REMOTE_ADDR": "192.0.2.1"}, "*: the rightmost"),
    ("127.0.0.1", ["X-Forwarded-For: nonsense, 192.0.2.1"], {"REMOTE_ADDR": "192.0.2.1"}, "beyond the walk"),
    ("127.0.0.1", ["X-Forwarded-For: 192.0.2.1:8080"], {"REMOTE_ADDR": "192.0.2.1"}, "with a port"),
    ("127.0.0.1", ["X-Forwarded-For: 2001:DB8::1"], {"REMOTE_ADDR": "2001:db8::1"}, "IPv6"),
    ("127.0.0.1", ["X-Forwarded-For: [2001:db8::1]:443"], {"REMOTE_ADDR": "2001:db8::1"}, "IPv6 with a port"),
    ("127.0.0.1", ["X-Forwarded-For: [2001:db8::1]"], {"REMOTE_ADDR": "2001:db8::1"}, "IPv6 in brackets"),
    ("127.0.0.1,10.0.0.0/8", ["X-Forwarded-For: 192.0.2.1, ::ffff:10.0.0.1"], {"REMOTE_ADDR": "192.0.2.1"}, "mapped"),
    ("127.0.0.1,10.0.0.0/8", ["X-Forwarded-For: 10.9.9.9", "X-Forwarded-For: 198.51.100.9,192.0.2.1,127.0.0.1",
     "X-Forwarded-For: 10.2.2.2"], {"REMOTE_ADDR": "192.0.2.1"}, "past proxies on several lines, not past a stranger"),
    ("127.0.0.1", ["X-Forwarded-For: 198.51.100.9, 2001:db8:0:5::1a2f:1a2b, 127.0.0.1"],
     {"REMOTE_ADDR": "2001:db8:0:5::1a2f:1a2b"}, "IPv6 behind IPv4"),
    ("127.0.0.1", ["X-Forwarded-For: ::11.22.33.44"], {"REMOTE_ADDR": "::b16:212c"}, "one way to write it (RFC 5952)"),
    ("127.0.0.1,192.0.2.1", ["X-Forwarded-For: 192.0.2.1"], {"REMOTE_ADDR": "192.0.2.1"}, "a client that is a proxy"),
    ("*", ["X-Forwarded-For: 192.0.2.1, \xf0\xfd, unix:, ::1"], {"REMOTE_ADDR": "::1"}, "*: nonsense left of it"),
    ("127.0.0.1", ["X-Forwarded-For: , , 192.0.2.1"], {"REMOTE_ADDR": "192.0.2.1"}, "empty hops beyond the walk"),
    ("127.0.0.1", ["x-forwarded-for: 192.0.2.1", "X-FORWARDED-PROTO: https"],
     {"REMOTE_ADDR": "192.0.2.1", "wsgi.url_scheme": "https"}, "names in any case (RFC 9110 5.1)"),
    ("127.0.0.1", ["Forwarded: for=192.0.2.1;proto=https;host=b"],
     {"REMOTE_ADDR": "127.0.0.1", "wsgi.url_scheme": "http", "HTTP_HOST": "h",
      "HTTP_FORWARDED": "for=192.0.2.1;proto=https;host=b"}, "Forwarded passes and means nothing"),
    ("127.0.0.1,10.0.0.0/8", ["X-Forwarded-For: 192.0.2.1, , 10.0.0.1"], 400, "an empty hop that the walk reaches"),
    ("127.0.0.1", ["X-Forwarded-For:  , "], 400, "nothing but a comma"),
    ("127.0.0.1", ['X-Forwarded-For: "192.0.2.1'], 400, "half a quoted string"),
    ("127.0.0.1", ["X-Forwarded-For: unknown"], 400, "no address"),
    ("127.0.0.1", ["X-Forwarded-For: "], 400, "nothing"),
    ("127.0.0.1", ["X-Forwarded-For: 192.0.2.1,"], 400, "an empty hop"),
    ("127.0.0.1", ["X-Forwarded-For: 192.0.2.999"], 400, "an address out of range"),
    ("127.0.0.1", ["X-Forwarded-For: 192.0.2.1:x"], 400, "a port that is none"),
    ("127.0.0.1", ["X-Forwarded-For: 192.0.2.1:65536"], 400, "a port out of range"),
    ("127.0.0.1", ["X-Forwarded-For: 192.0.2.1 10.0.0.1"], 400, "two without a comma"),
    ("127.0.0.1", ["X-Forwarded-Proto: https"], {"wsgi.url_scheme": "https", "HTTPS": "on", "SERVER_PORT": "443"},
     "https"),
    ("127.0.0.1", ["X-Forwarded-Proto: http"], {"wsgi.url_scheme": "http", "HTTPS": None}, "http"),
    ("127.0.0.1", ["X-Forwarded-Proto: ftp"], 400, "another scheme"),
    ("127.0.0.1", ["X-Forwarded-Proto: on"], 400, "on, which is no scheme"),
    ("127.0.0.1", ["X-Forwarded-Proto: "], 400, "no scheme"),
    ("127.0.0.1", ["X-Forwarded-Proto: https", "X-Forwarded-Proto: http"], 400, "two schemes"),
    ("127.0.0.1", ["X-Forwarded-Proto: http, http"], 400, "a list of schemes"),
    ("127.0.0.1", ["X-Forwarded-Proto: https", "X-Forwarded-Host: example.com"],
     {"HTTP_HOST": "example.com", "SERVER_PORT": "443"}, "the host"),
    ("127.0.0.1", ["X-Forwarded-Host: example.com:8080"], {"HTTP_HOST": "example.com:8080", "SERVER_PORT": "8080"},
     "the host with a port"),
    ("127.0.0.1", ["X-Forwarded-Host: [::1]:8080"], {"HTTP_HOST": "[::1]:8080", "SERVER_PORT": "8080"}, "IPv6 host"),
    ("127.0.0.1", ["X-Forwarded-Host: a/b"], 400, "an invalid host"),
    ("127.0.0.1", ["X-Forwarded-Host: a, b"], 400, "two hosts"),
    ("127.0.0.1", ['X-Forwarded-Host: "b'], 400, "a host with a quotation mark"),
    ("127.0.0.1", ["X-Forwarded-Proto: https", "X-Forwarded-Host: b", "X-Forwarded-Port: 80"],
     {"HTTP_HOST": "b:80", "SERVER_PORT": "80", "wsgi.url_scheme": "https"}, "https at the port of http"),
    ("127.0.0.1", ["X-Forwarded-Proto: http", "X-Forwarded-Host: b", "X-Forwarded-Port: 443"],
     {"HTTP_HOST": "b:443", "SERVER_PORT": "443", "wsgi.url_scheme": "http"}, "http at the port of https"),
    ("127.0.0.1", ["X-Forwarded-Host: b:8080", "X-Forwarded-Port: 8080"],
     {"HTTP_HOST": "b:8080", "SERVER_PORT": "8080"}, "the same port twice"),
    ("127.0.0.1", ["X-Forwarded-Port: 8443"], {"HTTP_HOST": "h:8443", "SERVER_PORT": "8443"}, "the port"),
    ("127.0.0.1", ["X-Forwarded-Proto: https", "X-Forwarded-Port: 443"], {"HTTP_HOST": "h", "SERVER_PORT": "443"},
     "the port of the scheme"),
    ("127.0.0.1", ["X-Forwarded-Host: b:81", "X-Forwarded-Port: 82"], 400, "two ports"),
    ("127.0.0.1", ["X-Forwarded-Port: 70000"], 400, "a port out of range"),
    ("127.0.0.1", ["X-Forwarded-Port: 80, 81"], 400, "a list of ports"),
    ("127.0.0.1", ["X-Forwarded-Prefix: /app/"], {"SCRIPT_NAME": "/app", "PATH_INFO": "/x"}, "the prefix"),
    ("127.0.0.1", ["X-Forwarded-Prefix: //evil.com"], 400, "a prefix that is a host"),
    ("127.0.0.1", ["X-Forwarded-Prefix: app"], 400, "a prefix without a slash"),
)  # fmt: skip
def test_believes_what_a_trusted_proxy_tells(trusted: str, fields: Any, expected: Any) -> None:
    seen = forward(trusted, *fields)
    if isinstance(expected, int):
        assert seen == expected
    else:
        assert {name: seen.get(name) for name in expected} == expected


@rows(
    "trusted, peer, is_believed",
    ("", "127.0.0.1", False, "nobody without the option"),
    ("10.0.0.1", "127.0.0.1", False, "not another address"),
    ("unix", "127.0.0.1", False, "unix is no address"),
    ("unix", "", True, "a unix socket"),
    ("10.0.0.1", "", False, "a unix socket must be named"),
    ("*", "", True, "everybody"),
    ("*", "192.0.2.5", True, "everybody by address"),
    ("2001:db8::/32", "2001:db8::5", True, "a network of IPv6"),
    ("2001:db8:0:5::/64", "2001:db8:0:6::5", False, "not another network of IPv6"),
    ("10.0.0.0/8", "::a00:1", False, "IPv6 that ends as an IPv4 address of the list does"),
    ("2001:db8:0:0:0:0:1.2.3.4", "2001:db8::102:304", True, "the same address written in another way"),
    ("127.0.0.0/8,10.0.0.0/8", "10.255.255.255", True, "the last of a network"),
    ("10.0.0.0/8", "11.0.0.0", False, "the next after a network"),
    ("127.0.0.1", "::ffff:127.0.0.1", True, "IPv4 through a socket for both"),
    ("fe80::/10", "fe80::1%eth0", True, "a peer on the same link, with its zone (RFC 4007)"),
)  # fmt: skip
def test_believes_only_whom_the_list_names(trusted: str, peer: str, is_believed: bool) -> None:
    fields = "X-Forwarded-For: 192.0.2.1", "X-Forwarded-Proto: https", "Forwarded: for=192.0.2.1"
    seen = forward(trusted, *fields, peer=peer)
    assert (seen["REMOTE_ADDR"] == "192.0.2.1") == (seen["wsgi.url_scheme"] == "https") == is_believed
    kept = [name for name in seen if "FORWARDED" in name]  # without the option they pass, and mean nothing
    assert len(kept) == (3 if is_believed or not trusted else 0)


def test_each_request_of_a_connection_has_a_client_of_its_own_also_in_the_log(tmp_path: Any) -> None:
    code = "answer = environ['REMOTE_ADDR']"
    with Running(tmp_path, app=RUNS_QUERY, FORWARDED_ALLOW_IPS="127.0.0.1") as server, server.connect() as client:
        for number in (1, 2, 1, 3):
            client.sendall(get(b"X-Forwarded-For: 192.0.2.%d" % number, target=make_target(code).encode()))
            assert read_answer(client).body == b"192.0.2.%d" % number
        wait_until(lambda: server.output().count("HTTP/1.1") == 4, "the log")
        assert re.findall(r"^192\.0\.2\.(\d)", server.output(), re.M) == ["1", "2", "1", "3"]


SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
V4 = socket.inet_aton("192.0.2.1") + socket.inet_aton("10.0.0.1") + b"\x12\x67\0\x50"  # from port 4711
V6 = socket.inet_pton(socket.AF_INET6, "2001:db8::1") * 2 + b"\x12\x67\0\x50"


@rows(
    "header, expected",
    (b"PROXY TCP4 192.0.2.1 10.0.0.1 4711 80\r\n", "192.0.2.1 4711", "version 1, IPv4"),
    (b"PROXY TCP6 2001:db8::1 ::1 4711 80\r\n", "2001:db8::1 4711", "version 1, IPv6"),
    (b"PROXY UNKNOWN\r\n", "127.0.0.1 1234", "version 1, unknown"),
    (b"PROXY UNKNOWN ff:: ff:: 1 2\r\n", "127.0.0.1 1234", "version 1, unknown with addresses"),
    (SIGNATURE + b"\x21\x11\0\x0c" + V4, "192.0.2.1 4711", "version 2, IPv4"),
    (SIGNATURE + b"\x21\x11\0\x12" + V4 + b"\x04\0\x03abc", "192.0.2.1 4711", "version 2 with more behind"),
    (SIGNATURE + b"\x21\x21\0\x24" + V6, "2001:db8::1 4711", "version 2, IPv6"),
    (SIGNATURE + b"\x21\x31\0\xd8" + b"/s".ljust(108, b"\0") * 2, "127.0.0.1 1234", "version 2, a unix socket"),
    (SIGNATURE + b"\x20\x00\0\0", "127.0.0.1 1234", "version 2, LOCAL"),
    (SIGNATURE + b"\x20\x11\0\x0c" + V4, "127.0.0.1 1234", "version 2, LOCAL with an address"),
    (b"", None, "none, from a peer that must send one"),
    (b"PROXY TCP4 192.0.2.1 10.0.0.1 4711\r\n", None, "a port is missing"),
    (b"PROXY TCP4 192.0.2.999 10.0.0.1 4711 80\n", None, "a bare LF"),
    (b"PROXY TCP4 x 10.0.0.1 4711 80\r\n", None, "no address"),
    (b"PROXY TCP6 2001:::1 ::1 4711 80\r\n", None, "a malformed address"),
    (b"PROXY TCP4 ::1 10.0.0.1 4711 80\r\n", None, "IPv6 as IPv4"),
    (b"PROXY TCP6 192.0.2.1 ::1 4711 80\r\n", None, "IPv4 as IPv6"),
    (b"PROXY TCP4 01.02.03.04 10.0.0.1 4711 80\r\n", None, "octal numbers"),
    (b"PROXY TCP4 192.0.2.1 10.0.0.1 99999 80\r\n", None, "a port out of range"),
    (b"PROXY TCP6 ::ffff:192.0.2.1 ::1 4711 80\r\n", "192.0.2.1 4711", "a mapped address"),
    (b"PROXY " + b"x" * 110, None, "too long"),
    (SIGNATURE + b"\x31\x11\0\x0c" + V4, None, "version 3"),
    (SIGNATURE + b"\x21\x11\0\x04" + V4[:4], None, "too short"),
    (SIGNATURE[:8] + b"GET / HTTP", None, "half a signature"),
)  # fmt: skip
def test_reads_the_proxy_protocol(header: bytes, expected: str | None) -> None:
    """Whole, byte by byte, and also after the deadline what has come in time: it has waited for a process."""
    options: dict[str, Any] = {"forwarded_allow_ips": "127.0.0.1", "proxy_protocol": True, "timeout": 5}
    for sizes, deadline in ((), None), ((1,), None), ((), time.monotonic() - 1):
        served = serve(header + get(CLOSE), *sizes, peer=("127.0.0.1", 1234), deadline=deadline, **options)
        seen = [request["REMOTE_ADDR"] + " " + request["REMOTE_PORT"] for request in served.requests]
        assert seen == ([expected] if expected else [])
        assert [answer.status for answer in served.answers] == [200 if expected else 400]


def test_the_proxy_protocol_is_refused_from_others_and_named_without_the_option(tmp_path: Any) -> None:
    header = b"PROXY TCP4 192.0.2.1 10.0.0.1 4711 80\r\n"
    for words in (["--proxy-protocol", "--forwarded-allow-ips", "10.0.0.1"], []):
        with Running(tmp_path, *words, app=RUNS_QUERY) as server:
            assert server.get().status == 200
            for data in (header, SIGNATURE + b"\x21\x11\0\x0c" + V4):
                with server.connect() as client:
                    client.sendall(data + get(b"Connection: close"))
                    answer = receive_answer(client)
                    assert answer.status == 400 and b"--proxy-protocol" in answer.body


def test_a_proxy_header_counts_for_its_connection_without_forks_too(tmp_path: Any) -> None:
    words = "--no-fork", "--proxy-protocol", "--forwarded-allow-ips", "127.0.0.1"
    ask = get(target=make_target("answer = environ['REMOTE_ADDR']").encode())
    with Running(tmp_path, *words, app=RUNS_QUERY) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(2)]
        for number, client in enumerate(clients):
            client.sendall(b"PROXY TCP4 192.0.2.%d 10.0.0.1 4711 80\r\n" % number + ask)
            assert read_answer(client).body == b"192.0.2.%d" % number
        for number, client in enumerate(clients):
            client.sendall(ask)
            assert read_answer(client).body == b"192.0.2.%d" % number


def test_what_a_proxy_header_told_is_kept_over_rest_and_reload(tmp_path: Any) -> None:
    words = "--proxy-protocol", "--forwarded-allow-ips", "127.0.0.1"
    ask = get(target=make_target("answer = environ['REMOTE_ADDR'] + environ['REMOTE_PORT']").encode())
    with Running(tmp_path, *words, app=RUNS_QUERY) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(4)]

        def ask_by(number: int, header: bytes = b"") -> None:
            clients[number].sendall(header + ask)
            assert read_answer(clients[number]).body == b"192.0.2.%d4711" % number

        for number in range(4):
            ask_by(number, b"PROXY TCP4 192.0.2.%d 10.0.0.1 4711 80\r\n" % number)
        server.wait_spare()  # all are at rest
        ask_by(0)
        ask_by(1)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: server.errors().count("serving on") == 2, "the reload")
        for number in range(4):
            ask_by(number)
        wait_until(lambda: server.output().count("HTTP/1.1") == 10, "the log")
        assert set(re.findall(r"^192\.0\.2\.(\d)", server.output(), re.M)) == {"0", "1", "2", "3"}


@on_linux
def test_a_reload_hands_over_what_thousands_of_proxy_headers_told(tmp_path: Any) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(4096, soft), hard))
    words = "--proxy-protocol", "--forwarded-allow-ips", "127.0.0.1", "--connections-per-child", "0"
    ask = get(target=make_target("answer = environ['REMOTE_ADDR']").encode())
    with Running(tmp_path, *words, app=RUNS_QUERY) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(3400)]
        name = "2001:db8:1234:5678:9abc:def0:1234:%x"  # a long one: the messages between processes have little room
        for number, client in enumerate(clients):
            client.sendall(b"PROXY TCP6 " + (name % number).encode() + b" ::1 54321 80\r\n" + ask)
        for client in clients:
            assert read_answer(client).status == 200
        wait_until(lambda: len(list_files(server.pid)) > len(clients), "the rest")
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: server.errors().count("serving on") == 2, "the reload")
        for client in clients:
            client.sendall(ask)
        for number, client in enumerate(clients):
            assert read_answer(client).body.decode() == name % number


@needs_openssl
def test_a_proxy_header_stands_before_tls(tmp_path: Any, certificates: str) -> None:
    words = "--proxy-protocol", "--forwarded-allow-ips", "127.0.0.1", "--certfile", certificates + "/server.both"
    with Running(tmp_path, *words, "--keep-alive", "0", app=RUNS_QUERY) as server, server.connect() as client:
        client.sendall(SIGNATURE + b"\x21\x11\0\x0c" + V4)
        wait_until(lambda: len(server.children()) == 2, "a process for what was sent")
        wait_until(lambda: len(server.children()) == 1, "a rest without a process", SLACK)
        time.sleep(1.5 * webserver.TICK)  # the client has HEAD_TIMEOUT for its first byte, whatever the rest may last
        context = ssl.create_default_context(cafile=certificates + "/ca.pem")
        with context.wrap_socket(client, server_hostname="localhost") as secure:
            code = "answer = environ['REMOTE_ADDR'] + environ['wsgi.url_scheme']"
            assert ask_tls(secure, code).body == b"192.0.2.1https"


def test_mounts_the_application_under_a_path(tmp_path: Any) -> None:
    code = "answer = environ['SCRIPT_NAME'] + ' ' + environ['PATH_INFO']"
    with Running(tmp_path, "--script-name", "/app/", app=RUNS_QUERY) as server:
        for path, body in (("/app/run", b"/app /run"), ("/app", b"/app "), ("/app/", b"/app /")):
            assert server.get(make_target(code, path)).body == body
        for path in ("/", "/apple", "/other/app"):
            answer = server.get(make_target("open('called', 'w')", path))
            assert answer.status == 404 and not (tmp_path / "called").exists()


# Real proxies and clients

README = os.path.join(os.path.dirname(WEBSERVER), "README.md")

TOLD = "REMOTE_ADDR", "wsgi.url_scheme", "HTTP_HOST", "SERVER_PORT", "SCRIPT_NAME", "HTTP_FORWARDED"

# Tells what a proxy has told.
TELLS = """
    def app(environ, start_response):
        start_response("200 OK", [])
        return [" ".join(environ.get(name) or "-" for name in %s).encode()]
""" % (TOLD,)

# What nginx needs around the lines of the README to run as any user.
NGINX = """
    daemon off; master_process off; pid pid; error_log stderr;
    events {}
    http {
        access_log off; client_body_temp_path body; proxy_temp_path proxy;
        fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
        %s
    }
"""

HAPROXY = """
defaults
    mode %s
    timeout connect 5s
    timeout client 20s
    timeout server 20s
frontend front
    bind 127.0.0.1:%d %s
    default_backend application
%s
"""

# A proxy is trusted, and so must not pass on what its own client says of such things.
LIES = [
    "X-Forwarded-For: 192.0.2.66", "X-Forwarded-Proto: http", "X-Forwarded-Host: evil", "X-Forwarded-Port: 1",
    "X-Forwarded-Prefix: /evil", "Forwarded: for=192.0.2.66",
]  # fmt: skip


def locate(program: str) -> str:
    """The path of a program, also of one for administrators, "" if it is missing."""
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin") or ""


def needs(*programs: str) -> Any:
    """Skip the test where a program is missing."""
    missing = [program for program in programs if not locate(program)]
    if "curl" in programs and not sys.platform.startswith("linux"):
        missing.append("address 127.0.0.2, from which curl asks")
    return pytest.mark.skipif(bool(missing), reason="no " + ", no ".join(missing))


def read_readme(pattern: str) -> str:
    """The one group of the pattern, which may go over several lines, in the README."""
    return find("(?s)" + pattern, read_file(README))


def replace(text: str, changes: dict[str, str]) -> str:
    """The text with these changes, each of which must find its place."""
    for old, new in changes.items():
        assert old in text, "no %r in the README" % old
        text = text.replace(old, new)
    return text


def curl(*words: str) -> str:
    """What curl has got from a server; it connects from another address than the proxies do."""
    command = ["curl", "-sS", "--noproxy", "*", "--max-time", "20", "--interface", "127.0.0.2", *words]
    ended = subprocess.run(command, capture_output=True, timeout=2 * PATIENCE)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.decode()


def ask_openssl(server: Running, folder: str, *words: str, data: bytes = b"") -> str:
    """What openssl s_client has printed of its connection and received on it."""
    address = "127.0.0.1:%d" % server.port
    command = ["openssl", "s_client", "-connect", address, "-CAfile", folder + "/ca.pem", "-verify_return_error"]
    options: Any = {"input": data, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "timeout": 2 * PATIENCE}
    ended = subprocess.run([*command, *(["-ign_eof"] if data else []), *words], cwd=server.folder, **options)
    return ended.stdout.decode(errors="replace")


@contextlib.contextmanager
def run_proxy(folder: Any, port: int, *command: str) -> Iterator[None]:
    """A proxy that listens at the port until the end of the block."""

    def is_up() -> bool:
        with socket.socket() as probe:
            return process.poll() is not None or probe.connect_ex(("127.0.0.1", port)) == 0

    with open(str(folder) + "/proxy.log", "wb") as log:
        process = subprocess.Popen(command, cwd=str(folder), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        wait_until(is_up, command[0])
        assert process.poll() is None, read_file(str(folder) + "/proxy.log")
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait(PATIENCE)


def run_haproxy(folder: Any, port: int, mode: str, tls: str, backend: str) -> Any:
    """A haproxy in front of this backend."""
    write_file(str(folder) + "/haproxy.cfg", HAPROXY % (mode, port, tls, backend))
    return run_proxy(folder, port, locate("haproxy"), "-db", "-f", "haproxy.cfg")


@needs_openssl
@needs("nginx", "curl")
@pytest.mark.parametrize("is_unix", [False, True], ids=["tcp", "unix"])
def test_behind_nginx_an_application_sees_the_client(tmp_path: Any, certificates: str, is_unix: bool) -> None:
    """As the README has it, with https at the front."""
    port, own_port, path = free_port(), free_port(), "unix:%s/socket" % tmp_path
    listen = "listen 127.0.0.1:%d ssl; ssl_certificate %s; ssl_certificate_key %s;"
    if is_unix:
        words = replace(read_readme("The server's side is `(.*?)`"), {"unix:/run/myapp.sock": path}).split()
    else:
        words = replace(read_readme("Over TCP it is `(.*?)`"), {"10.0.0.5": "127.0.0.1"}).split()
        words += ["--bind", "127.0.0.1:%d" % own_port]
    changes = {
        "unix:/run/myapp.sock": path if is_unix else "127.0.0.1:%d" % own_port,
        "listen 80;": listen % (port, certificates + "/server.pem", certificates + "/server.key"),
    }
    write_file(tmp_path / "nginx.conf", NGINX % replace(read_readme("```nginx\n(.*?)```"), changes))
    nginx = run_proxy(tmp_path, port, locate("nginx"), "-e", "stderr", "-p", str(tmp_path), "-c", "nginx.conf")
    with Running(tmp_path, *words, "--script-name", "/app", bind="", app=TELLS) as server, nginx:
        for lies in ([], LIES):
            fields = [word for lie in lies for word in ("-H", lie)]
            told = curl("--cacert", certificates + "/ca.pem", *fields, "https://localhost:%d/app/" % port)
            assert told == "127.0.0.2 https localhost:%d %d /app -" % (port, port)
        wait_until(lambda: server.output().count("127.0.0.2 - -") == 2, "the log")


@needs_openssl
@needs("haproxy", "curl")
def test_behind_haproxy_an_application_sees_the_client(tmp_path: Any, certificates: str) -> None:
    """As the README has it, with https at the front."""
    port = free_port()
    with Running(tmp_path, "--forwarded-allow-ips", "127.0.0.1", app=TELLS) as server:
        backend = replace(read_readme("```haproxy\n(.*?)```"), {"10.0.0.7:8000": "127.0.0.1:%d" % server.port})
        with run_haproxy(tmp_path, port, "http", "ssl crt %s/server.both" % certificates, backend):
            for lies in ([], LIES):
                fields = [word for lie in lies for word in ("-H", lie)]
                told = curl("--cacert", certificates + "/ca.pem", *fields, "https://localhost:%d/" % port)
                assert told == "127.0.0.2 https localhost:%d %d - -" % (port, port)


@needs_openssl
@needs("haproxy", "curl")
@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("version", ["send-proxy", "send-proxy-v2"])
def test_a_header_of_haproxy_tells_the_client(tmp_path: Any, certificates: str, version: str, scheme: str) -> None:
    """It passes the bytes on, those of TLS, too."""
    port = free_port()
    words = replace(read_readme("HTTP: `(--proxy-protocol.*?)`"), {"10.0.0.5": "127.0.0.1"}).split()
    words += ["--certfile", certificates + "/server.both"] if scheme == "https" else []
    with Running(tmp_path, *words, app=TELLS) as server:
        line = read_readme("in haproxy\\s`(server .*?)`")
        changes = {"10.0.0.7:8000": "127.0.0.1:%d" % server.port, "send-proxy-v2": version}
        with run_haproxy(tmp_path, port, "tcp", "", "backend application\n    " + replace(line, changes)):
            url = "%s://localhost:%d/" % (scheme, port)
            told = "127.0.0.2 %s localhost:%d %d - -" % (scheme, port, server.port)
            assert curl("--cacert", certificates + "/ca.pem", "-H", LIES[0], url, url) == told * 2


@needs_openssl
@needs("curl")
def test_curl_keeps_its_connection_over_tls(tmp_path: Any, certificates: str) -> None:
    code = """
        def app(environ, start_response):
            start_response("200 OK", [])
            return [b"%d %s;" % (len(environ["wsgi.input"].read()), environ["REMOTE_PORT"].encode())]
    """
    (tmp_path / "large").write_bytes(b"x" * 3000000)
    with Running(tmp_path, "--certfile", certificates + "/server.both", app=code) as server:
        url, path = "https://localhost:%d/" % server.port, str(tmp_path / "large")
        words = "--cacert", certificates + "/ca.pem", "-H", "Expect: 100-continue"
        for version in ("1.2", "1.3"):
            told = curl(*words, "--tls-max", version, "-w", "%{http_version} ", "-T", path, url, "-T", path, url)
            answers = re.findall(r"(\d+) (\d+);1.1 ", told)
            assert answers == [("3000000", answers[0][1])] * 2  # one connection, and no HTTP/2


@needs_openssl
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_openssl_resumes_its_session(tmp_path: Any, certificates: str, version: str) -> None:
    with Running(tmp_path, "--certfile", certificates + "/server.both", app=RUNS_QUERY) as server:
        ask = get(CLOSE, target=make_target("answer = 'pid ' + str(os.getpid())").encode())
        first = ask_openssl(server, certificates, version, "-sess_out", "session", data=ask)
        assert "New, TLSv1" in first and "Verify return code: 0 (ok)" in first, first
        then = ask_openssl(server, certificates, version, "-sess_in", "session", data=ask)
        assert "Reused, TLSv1" in then, then
        assert find(r"^pid (\d+)", first) != find(r"^pid (\d+)", then)
        if version == "-tls1_2":  # in TLS 1.3 the ticket comes after what s_client waits for
            assert ask_openssl(server, certificates, version, "-reconnect").count("Reused, TLSv1") == 5


@needs_openssl
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_openssl_shows_its_certificate(tmp_path: Any, certificates: str, version: str) -> None:
    words = "--certfile", certificates + "/server.both", "--ca-certs", certificates + "/ca.pem"
    with Running(tmp_path, *words, app=RUNS_QUERY) as server:
        ask = get(CLOSE, target=make_target("answer = 'issuer ' + environ['SSL_CLIENT_I_DN']").encode())
        pair = "-cert", certificates + "/client.pem", "-key", certificates + "/client.key"
        assert "issuer CN=An authority,O=The tests" in ask_openssl(server, certificates, version, *pair, data=ask)
        refused = ask_openssl(server, certificates, version, data=ask)
        assert "HTTP/1.1" not in refused and "alert" in refused, refused
        assert "Traceback" not in server.errors()


# ---- 18. Surroundings -------------------------------------------------------


@pytest.mark.parametrize("fault", ["stdout closed", "reader of stdout gone", "stdout full", "stdin closed"])
def test_serves_on_when_its_output_is_lost(tmp_path: Any, fault: str) -> None:
    read_end, write_end = os.pipe()

    def spoil() -> None:
        if fault.endswith("closed"):
            os.close(0 if "stdin" in fault else 1)
        else:
            os.dup2(write_end, 1)

    if fault == "stdout full":
        os.set_blocking(write_end, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(write_end, b"x" * 1000)
        os.set_blocking(write_end, True)
    app = RUNS_QUERY.replace('print("imported")', "")
    with Running(tmp_path, "-c", "4", app=app, popen={"preexec_fn": spoil}) as server:
        if fault == "reader of stdout gone":
            os.close(read_end)
        clients = [server.send("answer = 'whole'", CLOSE) for _ in range(8)]
        with closing(*clients):
            words = [receive_answer(client).body for client in clients]
        assert words == [b"whole"] * 8 and server.leaves_no_zombie()
        assert len(server.errors()) < 2000, "a flood in the log"
        assert server.stop() == 0
    for end in {read_end, write_end} - ({read_end} if fault == "reader of stdout gone" else set()):
        os.close(end)


def can_connect(server: Running) -> bool:
    """Somebody listens at the port."""
    with contextlib.suppress(ConnectionRefusedError), server.connect():
        return True
    return False


@pytest.mark.parametrize("limit, number", [("RLIMIT_NOFILE", 9), ("RLIMIT_FSIZE", 512)])
def test_a_limit_that_is_too_low_to_start_is_named_in_one_sentence(tmp_path: Any, limit: str, number: int) -> None:
    popen = {"preexec_fn": lambda: resource.setrlimit(getattr(resource, limit), (number, number))}
    ended = run_command(tmp_path, "--bind", "127.0.0.1:%d" % free_port(), popen=popen)
    assert ended.returncode == 1 and re.fullmatch("webserver.py: a limit of the system is too low.*\n", ended.stderr)


@pytest.mark.parametrize("closed", [(0,), (2,), (0, 2), (0, 1, 2)], ids=str)
def test_started_with_closed_descriptors_no_log_line_goes_astray(tmp_path: Any, closed: tuple[int, ...]) -> None:
    code = """
    file = open("data", "ab", buffering=0)
    file.write(b"data\\n")
    print("a printed line", flush=True)
    environ["wsgi.errors"].write("an error\\n")
    answer = file.fileno() > 2
    """
    options: dict[str, Any] = {"popen": {"preexec_fn": lambda: [os.close(fd) for fd in closed]}}
    with contextlib.ExitStack() as stack:
        server = Running(tmp_path, app=RUNS_QUERY.replace('print("imported")', ""), **options)
        stack.push(server)  # without waiting for what it may not be able to say
        wait_until(lambda: can_connect(server), "the start")
        assert [server.run(code) for _ in range(2)] == ["True", "True"]
        assert server.get(make_target("1 // 0")).body.startswith(b"500 Internal")
        assert server.stop() == 0 and read_file(tmp_path / "data") == "data\n" * 2


def test_a_request_that_closes_a_standard_file_costs_no_other_client_its_answer(tmp_path: Any) -> None:
    with Running(tmp_path, "--max-children", "1", "--connections-per-child", "0", app=RUNS_QUERY) as server:
        pid = server.run("os.close(1)")
        with server.send("", CLOSE) as client:
            answer = receive_answer(client)  # and no log line behind it
        assert answer.status == 200 and answer.body.decode() != pid


def test_an_import_that_closes_a_standard_file_breaks_nothing(tmp_path: Any) -> None:
    with Running(tmp_path, app="import os\nos.close(1)\n" + textwrap.dedent(ANSWERS % "here")) as server:
        assert all(server.answers("here") for _ in range(3)) and server.stop() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts what is mapped only on Linux")
def test_a_limit_of_memory_ends_the_request_that_exceeds_it(tmp_path: Any) -> None:
    """A process that eats memory touches one connection and no other."""
    with Running(tmp_path, "--limit-memory", "100M", app=RUNS_QUERY) as server:
        with server.send(HELD) as busy:
            server.wait_held()
            answer = server.get(make_target("x = bytearray(500_000_000)"))
            assert answer.status == 500 and b"memory" in answer.body
            assert server.get(make_target("x = bytearray(50_000_000)")).status == 200
            server.go()
            assert read_answer(busy).status == 200
        assert "MemoryError" in server.errors()
        assert " 500 " in server.output() and "--limit-memory" in server.output()


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts what is mapped only on Linux")
def test_a_process_that_has_used_up_its_memory_leaves(tmp_path: Any) -> None:
    with Running(tmp_path, "--limit-memory", "64M", "--connections-per-child", "0", app=RUNS_QUERY) as server:
        more = make_target("x = bytearray(40_000_000)").encode()
        with server.send("os.kept = bytearray(40_000_000)") as client:
            pid = read_answer(client).body.decode()
            client.sendall(get(target=more))
            assert receive_answer(client).status == 500
        server.wait_end(pid)
        assert server.run("x = bytearray(40_000_000)") != pid


@pytest.mark.parametrize("name", ["notify", "@webserver-test-%d" % os.getpid()])
def test_notifies_the_service_manager(tmp_path: Any, name: str) -> None:
    if name[0] == "@" and not sys.platform.startswith("linux"):
        pytest.skip("the abstract namespace is Linux's")
    path = name if name[0] == "@" else str(tmp_path / name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path.replace("@", "\0", 1))
        manager.settimeout(PATIENCE)
        with Running(tmp_path, app=ANSWERS % "0", NOTIFY_SOCKET=path) as server:
            assert b"READY=1" in manager.recv(4096).split(b"\n")
            assert server.get().status == 200  # ready is ready
            before = time.monotonic()
            server.process.send_signal(signal.SIGHUP)
            reloading = manager.recv(4096).decode()
            assert "RELOADING=1" in reloading.split("\n")
            assert before <= int(find("^MONOTONIC_USEC=([0-9]+)$", reloading)) / 1e6 <= time.monotonic()
            assert b"READY=1" in manager.recv(4096).split(b"\n")
            server.process.send_signal(signal.SIGTERM)
            assert b"STOPPING=1" in manager.recv(4096).split(b"\n")
            assert server.process.wait(PATIENCE) == 0


def test_a_service_manager_that_does_not_listen_stops_nothing(tmp_path: Any) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, socket.socket(socket.AF_UNIX, 2) as filler:
        manager.bind(path)
        filler.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                filler.sendto(b"x", path)
        with Running(tmp_path, app=ANSWERS % "old", NOTIFY_SOCKET=path) as server:
            assert server.answers("old")
            write_file(tmp_path / "app.py", ANSWERS % "new")
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda: server.answers("new"), "the new code")
            assert server.stop() == 0


# Privileges

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give privileges up")


def become_nobody() -> None:
    """Before an exec: be an unprivileged user."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


@pytest.fixture()
def public() -> Iterator[Any]:
    """A folder that everybody can read, unlike those of pytest, and a Python that everybody can run."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        shutil.copy(WEBSERVER, folder)
        for python in (sys.executable, "/usr/bin/python3"):
            test = (python, "-c", "import ctypes, sys; assert sys.version_info >= (3, 8)")
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                run_command(folder, argv=test, popen={"preexec_fn": become_nobody}).check_returncode()
                yield folder, (python, folder + "/webserver.py")
                return
        pytest.skip("an unprivileged user can run no Python here: " + sys.executable)


@as_root
@pytest.mark.parametrize("name, gid", [("nobody", None), ("nobody:daemon", "daemon")])
def test_gives_up_its_privileges_for_good(public: Any, name: str, gid: Any) -> None:
    import grp
    import pwd

    entry, (folder, argv) = pwd.getpwnam("nobody"), public
    group = grp.getgrnam(gid).gr_gid if gid else entry.pw_gid
    with Running(folder, "--user", name, app=RUNS_QUERY, argv=argv) as server:
        found = eval(server.run("answer = (*os.getresuid(), *os.getresgid(), *os.getgroups())"))
        assert set(found[:3]) == {entry.pw_uid} and set(found[3:]) == {group}
        code = "for f in (os.setuid, os.seteuid, os.setgid):\n  try: f(0); break\n  except OSError: answer = 'no'"
        assert server.run(code) == "no"
        assert set(find("Uid:(.*)", read_file("/proc/%d/status" % server.pid)).split()) == {str(entry.pw_uid)}
        assert "running as root" not in server.errors()
        write_file(folder + "/app.py", ANSWERS % "new")
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: server.answers("new"), "the new code, which an unprivileged parent loads")
        assert server.stop() == 0


@as_root
def test_advises_root_to_give_it_up(tmp_path: Any) -> None:
    with Running(tmp_path, app=RUNS_QUERY) as server:
        assert len([line for line in server.errors().splitlines() if "--user" in line]) == 1


@as_root
@pytest.mark.parametrize("popen", [{}, {"preexec_fn": become_nobody}], ids=["by root", "by anybody"])
def test_a_check_loads_as_the_user_that_would_serve(public: Any, popen: Any) -> None:
    import pwd

    folder, argv = public
    write_file(folder + "/app.py", "import os\nprint('uid', os.getuid())\n" + textwrap.dedent(ANSWERS % "ok"))
    user = "nobody" if not popen else "root"  # which only root could become, but anybody may check
    ended = run_command(folder, "--check", "--user", user, "app:app", argv=argv, popen=popen)
    assert ended.returncode == 0 and "uid %d\n" % pwd.getpwnam("nobody").pw_uid in ended.stdout


@as_root
def test_nobody_but_root_can_become_another(public: Any) -> None:
    folder, argv = public
    words = ("-b", "127.0.0.1:%d" % free_port(), "--user", "root")
    ended = run_command(folder, *words, argv=argv, popen={"preexec_fn": become_nobody})
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1 and "root" in ended.stderr


# ---- 19. Before the fork ----------------------------------------------------


@pytest.mark.parametrize("head, is_loaded", [("", "False"), ("import http\n", "True")], ids=["small", "knows HTTP"])
def test_the_codec_for_host_names_is_loaded_before_the_fork_where_it_pays(
    tmp_path: Any, head: str, is_loaded: str
) -> None:
    with Running(tmp_path, app=head + textwrap.dedent(RUNS_QUERY)) as server:
        assert server.run("import sys; answer = 'encodings.idna' in sys.modules") == is_loaded


# Loads at its first request what it keeps, and can be told to leave something open.
LAZY = """
    import os, socket, threading, time
    loaded, kept = [], []

    def app(environ, start_response):
        path = environ["PATH_INFO"]
        if not loaded:
            loaded.append(os.getpid())
        if path == "/fail":
            1 // 0
        if path == "/connect":
            kept.append(socket.create_connection(("127.0.0.1", int(environ["QUERY_STRING"]))))
        if path == "/thread":
            kept.append(threading.Thread(target=time.sleep, args=(60,), daemon=True, name="pump"))
            kept[-1].start()
        if path == "/moment":
            threading.Thread(target=time.sleep, args=(0.2,)).start()
        if path == "/hang":
            time.sleep(60)
        while path == "/swallow":
            try:
                time.sleep(60)
            except BaseException:
                pass
        fields = {"/short": [("Content-Length", "99")], "/no": [("Connection", "close")]}.get(path, [])
        status = {"/no": "404 Not Found", "/busy": "503 Busy"}.get(path, "200 OK")
        if path == "/tls" and (environ["wsgi.url_scheme"], environ.get("HTTPS")) != ("https", "on"):
            status = "301 Moved Permanently"
        start_response(status, fields)
        yield b"%s %d" % (environ["HTTP_HOST"].encode(), loaded[0])
        if path == "/large":
            yield b"x" * 10_000_000
        if path == "/late":
            raise RuntimeError("late")
"""


def test_a_warm_up_is_done_once_for_all_processes(tmp_path: Any) -> None:
    """What an application loads at its first request is loaded by the parent, before the first fork."""
    statuses = {"/large": 200, "/moment": 200, "/no": 404, "http://a.example/tls": 301, "https://a.example/tls": 200}
    words = [word for path in statuses for word in ("--warm-up", path)]
    with Running(tmp_path, *words, app=LAZY) as server:
        log = server.errors()
        for path, status in statuses.items():
            assert re.search(r"warmed up: GET %s %d in \d+ ms" % (path, status), log)
        assert log.index("warmed up") < log.index("serving on") and server.output() == ""
        for _ in range(2):
            assert server.get().body == b"127.0.0.1:%d %d" % (server.port, server.pid)


def test_a_warm_up_is_repeated_by_a_reload_and_by_its_check(tmp_path: Any) -> None:
    with Running(tmp_path, "--warm-up", "/", app=LAZY) as server:
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: server.errors().count("serving on") == 2, "the reload")
        assert server.errors().count("warmed up") == 3 and server.get().body.endswith(b" %d" % server.pid)
        write_file(str(tmp_path / "app.py"), LAZY.replace('"/fail"', '"/"'))
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_log("the new program does not start")
        assert "ZeroDivisionError" in server.errors() and server.get().status == 200


WARM_UPS_THAT_FAIL = [  # the words, what stderr must hold
    ("--warm-up /swallow --timeout 0.5", ["cannot be interrupted"]),  # takes longest, and ends without another step
    ("--warm-up /fail", ["ZeroDivisionError", "GET /fail has failed"]),
    ("--warm-up /late", ["RuntimeError: late", "GET /late has failed"]),
    ("--warm-up /short", ["99", "GET /short has failed"]),
    ("--warm-up /busy", ["GET /busy has failed", "503"]),
    ("--warm-up /hang --timeout 0.5", ["time.sleep(60)", "GET /hang has failed"]),
    ("--warm-up /connect?PORT", ["GET /connect?PORT left a connection to 127.0.0.1:PORT open", "another path"]),
    ("--warm-up /thread", ["GET /thread left a thread running", "pump"]),
]


def test_a_warm_up_that_fails_or_leaves_something_open_ends_the_start(tmp_path: Any) -> None:
    """All of them at the same time: some take seconds."""
    write_file(str(tmp_path / "app.py"), LAZY)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options = make_options(tmp_path, pipes, {})
    with socket.create_server(("127.0.0.1", 0)) as peer, contextlib.ExitStack() as stack:
        port = "%d" % peer.getsockname()[1]
        started = []
        for number, (words, holds) in enumerate(WARM_UPS_THAT_FAIL):
            for extra in ("app:app", "--check app:app"):
                command = "--bind unix:socket%d %s %s" % (number, words.replace("PORT", port), extra)
                process = stack.enter_context(subprocess.Popen([*PROGRAM, *command.split()], **options))
                stack.callback(process.kill)
                started.append((number, words, holds, process))
        for number, words, holds, process in started:
            output, errors = process.communicate(timeout=PATIENCE)
            assert process.returncode == 1 and output == "", errors
            assert all(word.replace("PORT", port) in errors for word in holds), errors
            assert "serving on" not in errors
            assert "swallow" in words or not os.path.exists("%s/socket%d" % (tmp_path, number))


def test_what_is_opened_before_the_fork_is_named(tmp_path: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as peer:
        port = peer.getsockname()[1]
        code = ANSWERS % "ok" + "    import socket, threading, time\n    pair = socket.socketpair()\n"
        code += "    kept = socket.create_connection(('127.0.0.1', %d))\n" % port
        code += "    threading.Thread(target=time.sleep, args=(60,), daemon=True, name='pump').start()\n"
        with Running(tmp_path, app=code) as server:
            log = server.errors()
            assert "the application has left a connection to 127.0.0.1:%d open" % port in log
            assert log.count("left a connection") == 1 and re.search("thread.*pump", log)
            assert server.get().body == b"ok"


def test_nothing_is_said_of_a_clean_application(tmp_path: Any) -> None:
    code = "    import threading\n    kept = threading.Thread(target=print, name='not started')\n"
    with Running(tmp_path, app=ANSWERS % "ok" + code) as server:
        assert not re.search("the application has|warmed up|thread", server.errors())


def test_a_process_that_is_forked_at_import_does_not_hold_the_port(tmp_path: Any) -> None:
    code = "import os, time\npid = os.fork()\nif pid == 0:\n    time.sleep(60)\n    os._exit(0)\n"
    app = code + textwrap.dedent(ANSWERS % "%d").replace('b"%d"', 'b"%d" % pid')
    with Running(tmp_path, app=app) as server:
        pid = int(server.get().body)
        try:
            assert server.stop() == 0 and is_alive(pid)
            socket.create_server(("127.0.0.1", server.port)).close()
        finally:
            os.kill(pid, signal.SIGKILL)


def test_a_process_that_is_forked_at_import_ends_by_its_own_exception(tmp_path: Any) -> None:
    code = "import os\nif os.fork() == 0: raise LookupError('in the fork')\nended = os.wait()[1] >> 8\n"
    app = code + textwrap.dedent(ANSWERS % "%d").replace('b"%d"', 'b"%d" % ended')
    with Running(tmp_path, app=app) as server:
        assert server.get().body == b"1" and "LookupError: in the fork" in server.errors()


def test_a_rehearsal_that_fails_neither_hangs_nor_hides_an_interrupt(monkeypatch: Any, capfd: Any) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(webserver, "show_environ", fail)
    error: BaseException = ValueError("in the page")
    thread = threading.Thread(target=webserver.rehearse, args=(2,), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive() and capfd.readouterr().err.count("ValueError: in the page") == 2
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        webserver.rehearse(1)


# ---- 20. Application --------------------------------------------------------

CHECKS = [  # the code, the name, the exit status, what it prints
    (ANSWERS % "0", "app", 0, "app"),
    (ANSWERS % "0", "app:app", 0, "app"),
    ("class Site:\n  def __call__(self, e, s): pass\ndef make(): return Site()\n", "app:make()", 0, "Site"),
    (ANSWERS % "0", "app:missing", 1, "missing"),
    ("def app(:\n", "app", 1, "SyntaxError"),
    ("1 // 0", "app", 1, "ZeroDivisionError"),
    ("", "nowhere", 1, "nowhere"),
]


def test_a_check_that_does_not_end_says_why(tmp_path: Any) -> None:
    write_file(tmp_path / "app.py", "import time\nopen('loading', 'w')\ntime.sleep(60)\n")
    pipes = make_options(tmp_path, {"stderr": subprocess.PIPE, "text": True}, {})
    with subprocess.Popen([*PROGRAM, "--check", "app"], **pipes) as process:
        wait_until(lambda: os.path.exists(str(tmp_path / "loading")), "the load")
        process.send_signal(signal.SIGALRM)  # what its own alarm sends after LOADING_IS_SLOW
        assert process.stderr and "still loading" in process.stderr.readline()
        process.kill()


@pytest.mark.parametrize("code, name, status, word", CHECKS)
def test_check_tells_what_it_finds_and_binds_nothing(
    tmp_path: Any, code: str, name: str, status: int, word: str
) -> None:
    write_file(tmp_path / "app.py", code)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = run_command(tmp_path, "--check", "-b", "127.0.0.1:%d" % taken.getsockname()[1], name)
    assert ended.returncode == status and word in (ended.stderr if status else ended.stdout)
    assert (ended.stdout if status else ended.stderr) == ""


MODULES = {
    "good": "def application(e, s): s('200 OK', []); return [b'application']\ndef other(e, s): pass\nnumber = 7",
    "short": "def app(e, s): s('200 OK', []); return [b'app']",
    "both": "def app(e, s): s('200 OK', []); return [b'app']\n"
            "def application(e, s): s('200 OK', []); return [b'application']",
    "deep/__init__": "",
    "deep/site": "class Site:\n    def __call__(self, e, s): s('200 OK', []); return [b'deep']\n"
                 "    class inner:\n        pass\nsite = Site()\nSite.inner.web = site\n"
                 "def make(): return site\ndef none(): return None",
    "syntax": "def broken(:\n    pass",
    "needs": "import a_dependency_that_is_not_there\napp = 1",
    "fails": "def helper():\n    raise RuntimeError('the fault of the user')\nhelper()",
    "factory": "def make():\n    return 1 // 0",
    "kinds": "async def coroutine(scope, receive, send): pass\n"
             "class Async:\n    async def __call__(self, scope, receive, send): pass\nasgi = Async()\n"
             "def create(): return good\ndef with_settings(settings): return good\ndef view(request): return 'x'\n"
             "def good(e, s): s('200 OK', []); return [b'good']\n"
             "class Site:\n    def __call__(self, e, s): return good(e, s)\n"
             "class Response:\n    def __init__(self, e, s): s('200 OK', [])\n    def __iter__(self): yield b'class'\n"
             "import functools\n@functools.wraps(view)\ndef wrapped(*arguments): return good(*arguments)\n"
             "part = functools.partial(lambda x, e, s: good(e, s), 1)\nmethod = Site().__call__",
    "leaves": "import sys\nsys.exit('bye')",
    "cancelled": "import asyncio\nraise asyncio.CancelledError",
    "patched": "import select\noriginal = select.select\nselect.select = lambda *a: original(*a)\ndef app(e, s): pass",
}  # fmt: skip


@pytest.fixture(scope="module")
def modules(tmp_path_factory: Any) -> str:
    """A folder with all MODULES."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "deep").mkdir()
    for name, text in MODULES.items():
        (folder / (name + ".py")).write_text(text)
    return str(folder)


FAULTS = [("syntax", "SyntaxError"), ("needs:app", "a_dependency_that_is_not_there"),
          ("fails", "the fault of the user"), ("factory:make()", "ZeroDivisionError"),
          ("leaves", "bye"), ("cancelled", "CancelledError")]  # fmt: skip


@pytest.mark.parametrize("name, word", FAULTS)
def test_a_fault_of_the_user_shows_his_traceback_without_our_frames(modules: str, name: str, word: str) -> None:
    ended = run_command(modules, "-b", "127.0.0.1:%d" % free_port(), name)
    assert ended.returncode == 1 and word in ended.stderr, ended.stderr
    assert name.partition(":")[0] + ".py" in ended.stderr
    assert not re.search(r'File ".*(webserver\.py|importlib.*)"', ended.stderr), ended.stderr


NAMES = [("good", b"application"), ("short", b"app"), ("both", b"application"), ("both:app", b"app"),
         ("deep.site:site", b"deep"), ("deep.site:make()", b"deep"), ("deep.site:Site()", b"deep"),
         ("kinds:create()", b"good"), ("kinds:Response", b"class"), ("kinds:Site()", b"good"), ("kinds:part", b"good"),
         ("kinds:method", b"good"), ("kinds:wrapped", b"good"),
         ("deep.site:Site.inner.web", b"deep"), ("wsgiref.simple_server:demo_app", b"Hello world!")]  # fmt: skip


@pytest.mark.parametrize("name, body", NAMES)
def test_finds_the_application_by_name(modules: str, name: str, body: bytes) -> None:
    with Running(modules, name) as server:
        assert server.get().body.startswith(body)


def test_the_built_in_page_shows_the_process_and_the_environ(tmp_path: Any) -> None:
    with Running(tmp_path) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        with closing(connection):
            pages = []
            for accept in ("*/*", "text/html,application/xhtml+xml,*/*;q=0.8"):
                connection.request("GET", "/a?q=<script>&amp;", headers={"Accept": accept, "X-Tag": "<b>"})
                response = connection.getresponse()
                policy = response.getheader("Content-Security-Policy")
                pages.append((response.getheader("Content-Type"), response.read().decode()))
        (plain_type, plain), (html_type, html) = pages
        assert plain_type.startswith("text/plain") and html_type.startswith("text/html")
        pid = find(r"process (\d+)", plain)
        assert pid in html and pid != str(server.pid)
        assert "<script>" in plain and "<script>" not in html and "<b>" not in html and "&lt;script&gt;" in html
        keys = re.findall(r"^\W*([A-Z_]{4,}|wsgi\.\w+)\b", plain, re.M)
        assert server.get("/favicon.ico").status == 404
        style = find(r"(?s)<style>(.*?)</style>", html).encode()
        digest = base64.b64encode(hashlib.sha256(style).digest()).decode()
        assert policy == "default-src 'none'; style-src 'sha256-%s'; base-uri 'none'; frame-ancestors 'none'" % digest
        assert re.findall("<h2>(.*?)</h2>", html) == ["Request", "Fields", "WSGI", "Server"]
        assert sorted(re.findall("<dt>(.*?)<dd>", html)) == re.findall(r"^(\S+) = ", plain, re.M)
        assert keys == sorted(keys) and {"PATH_INFO", "wsgi.input", "HTTP_X_TAG", "REMOTE_ADDR"} <= set(keys)


# ---- 21. Command line -------------------------------------------------------

MISTAKES = [  # the words, the exit status, what the one line on stderr must hold
    ("nowhere:app", 1, ["nowhere"]),
    ("nowhere.deeper:app", 1, ["nowhere"]),
    ("deep.nowhere:app", 1, ["deep.nowhere"]),
    ("good:missing", 1, ["missing", "application", "other"]),
    ("deep.site:site.missing", 1, ["missing"]),
    ("deep.site", 1, ["deep.site", "app", "make"]),
    ("good:number", 1, ["number", "callable"]),
    ("deep.site:none()", 1, ["none", "callable"]),
    ("patched", 1, ["patched the standard library", "gevent"]),
    ("good.py", 2, ["'good.py'", "write good:app"]),
    ("path/to/good.py:application", 2, ["cd to its folder", "write good:application"]),
    ("my-site:app", 2, ["'my-site:app'", "write hello:app"]),
    ("good.application", 1, ["no module 'good.application'", "write good:application"]),
    ("kinds:coroutine", 1, ["kinds:coroutine is an ASGI application"]),
    ("--check kinds:asgi", 1, ["kinds:asgi is an ASGI application"]),
    ("kinds:create", 1, ["(environ, start_response)", "write kinds:create()"]),
    ("kinds:with_settings()", 1, ["kinds:with_settings() needs arguments"]),
    ("--check kinds:view", 1, ["kinds:view cannot be called with (environ, start_response)"]),
    ("kinds:Site", 1, ["kinds:Site cannot be called", "write kinds:Site()"]),
    ("good:", (1, 2), ["good"]),
    (":app", (1, 2), [":app"]),
    ("-b 127.0.0.1:TAKEN good", 1, ["in use", "TAKEN"]),
    ("-b 127.0.0.1:99999 good", (1, 2), ["99999"]),
    ("-b 127.0.0.1:http good", (1, 2), ["http"]),
    ("-b 127.0.0.1 good", (1, 2), ["127.0.0.1"]),
    ("-b 192.0.2.1:8000 good", 1, ["192.0.2.1"]),
    ("-b no-such-host.invalid:8000 good", (1, 2), ["no-such-host.invalid"]),
    ("-b ::1:8000 good", (1, 2), ["[::1]"]),
    ("-b unix:no/such/folder/s good", 1, ["no/such/folder", "create its folder"]),
    ("-b unix: good", (1, 2), ["unix:"]),
    ("-b unix:%s good" % ("x" * 200), 1, ["unix:xxx", "too long"]),
    ("-b unix:good.py good", 1, ["in use", "good.py", "a file has that path"]),  # a file that is no socket stays
    ("-b fd:77 good", 1, ["77"]),
    ("-b fd:x good", (1, 2), ["fd:"]),
    ("-b fd:0 good", 1, ["0"]),
    ("--workers 4 good", 2, ["--workers", "--max-children"]),
    ("-w 4 good", 2, ["-w", "--max-children"]),
    ("--threads 4 good", 2, ["--threads"]),
    ("--unknown good", 2, ["--unknown is unknown"]),
    ("--unknown=good good", 2, ["--unknown is unknown"]),
    ("--access-logfile - good", 2, ["--access-logfile: ", "stdout"]),
    ("--log-level debug good", 2, ["--log-level: ", "stderr"]),
    ("--chdir /srv good", 2, ["--chdir: ", "cd"]),
    ("--env-file .env good", 2, ["--env-file: ", "env NAME=value"]),
    ("--factory good", 2, ["--factory: ", "module:factory()"]),
    ("--preload good", 2, ["--preload: ", "--warm-up"]),
    ("--uds s good", 2, ["--uds: ", "unix:PATH"]),
    ("--keepalive 5 good", 2, ["--keepalive: ", "--keep-alive"]),
    ("--reload-dir src good", 2, ["--reload-dir: "]),
    ("--limit-request-body 5X good", 2, ["'5X'", "100M"]),
    ("--warm-up login good", 2, ["--warm-up is 'login'", "/login"]),
    ("--warm-up /a#b good", 2, ["--warm-up is"]),
    ("-D", 2, ["service manager"]),
    ("--check -b 99999 good", 2, ["'99999'", "HOST:PORT"]),
    ("--check -t 0 good", 2, ["timeout"]),
    ("--daemon good", 2, ["service manager"]),
    ("-c 0 good", 2, ["max-children"]),
    ("-c 99999999999 good", 2, ["max-children", "65536"]),
    ("-c x good", 2, ["x"]),
    ("-t -1 good", 2, ["timeout"]),
    ("-t nan good", 2, ["nan"]),
    ("--keep-alive 1e9 good", 2, ["keep-alive"]),
    ("--keep-alive 1000000000 good", 2, ["keep-alive"]),
    ("--graceful-timeout %s good" % ("9" * 400), 2, ["graceful-timeout"]),
    ("--limit-request-body %s good" % ("9" * 30), 2, ["limit-request-body"]),
    ("--connections-per-child 99999999999 good", 2, ["connections-per-child"]),
    ("--access-log loud good", 2, ["loud", "combined", "json", "off"]),
    ("good extra", 2, ["extra"]),
    ("--socket-mode rw good", 2, ["--socket-mode is 'rw'"]),
    ("--script-name app good", 2, ["--script-name is 'app'"]),
    ("--user=no-such-user good", (1, 2), ["no-such-user"]),
    ("--user=nobody:no-such-group good", (1, 2), ["nobody:no-such-group"]),
    ("--proxy-protocol good", 2, ["--forwarded-allow-ips"]),
    *(("--forwarded-allow-ips %s good" % words, 2, ["--forwarded-allow-ips"]) for words in (
        "10.0.0.1/40", "localhost", "10.0.0", "unix:/x", "!10.0.0.1", "10.0.0.1-10.0.0.9", "::ffff:10.0.0.0/104",
    )),
]  # fmt: skip


@pytest.mark.parametrize("words, status, holds", MISTAKES, ids=[row[0][:60] for row in MISTAKES])
def test_a_mistake_is_one_clear_sentence(modules: str, words: str, status: Any, holds: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        bind = [] if "-b" in words else ["-b", "127.0.0.1:%d" % free_port()]
        ended = run_command(modules, *bind, *words.replace("TAKEN", port).split())
    assert ended.returncode in (status if isinstance(status, tuple) else (status,)), ended.stderr
    assert ended.stdout == "" and not re.search("Traceback|None", ended.stderr)
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert all(word.replace("TAKEN", port) in ended.stderr for word in holds), ended.stderr


def test_a_working_directory_that_was_removed_is_one_clear_sentence(tmp_path: Any) -> None:
    remove = "import os, sys; os.rmdir(os.getcwd()); os.execv(sys.executable, [sys.executable, %r])" % WEBSERVER
    ended = run_command(tmp_path, argv=(sys.executable, "-c", remove))
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1 and "working directory" in ended.stderr


def test_a_check_needs_no_reader_of_its_output(modules: str) -> None:
    command = '"$0" -u "$1" --check good > /dev/full'
    ended = run_command(modules, argv=("sh", "-c", command, sys.executable, WEBSERVER))
    assert (ended.returncode, ended.stderr) == (0, "")


def test_options_may_come_from_the_environment(modules: str) -> None:
    words = "--check --access-log json  --limit-request-body 2k --bind 'unix:a file' --warm-up \"/x?y\""
    ended = run_command(modules, "--access-log", "off", "good", WEBSERVER_OPTIONS=words)
    assert ended.returncode == 0 and "the application loads" in ended.stdout and "GET /x?y" in ended.stderr
    ended = run_command(modules, "good", WEBSERVER_OPTIONS="--bind 'unix:a file")
    assert ended.returncode == 2 and re.search("WEBSERVER_OPTIONS.*\n$", ended.stderr)


@pytest.mark.parametrize("words, value", [("7", 7), ("5k", 5 << 10), ("3M", 3 << 20), ("2G", 2 << 30), ("0", 0)])
def test_a_size_may_have_a_suffix(words: str, value: int) -> None:
    for name in ("limit_request_body", "limit_memory", "buffer_chunked"):
        option = "--" + name.replace("_", "-")
        _, options = webserver.parse_command_line([option, words])
        assert getattr(options, name) == value


@pytest.mark.parametrize("port", ["99999", "http", "-1"])
def test_a_bad_port_in_the_environment_is_one_clear_sentence(modules: str, port: str) -> None:
    ended = run_command(modules, "good", PORT=port)
    assert ended.returncode == 2 and "PORT" in ended.stderr and port in ended.stderr and ended.stderr.count("\n") == 1
    assert run_command(modules, "--check", "-b", "127.0.0.1:8000", "good", PORT=port).returncode == 0  # unread


def test_a_port_without_permission_is_one_clear_sentence(modules: str) -> None:
    with contextlib.suppress(PermissionError), socket.socket() as probe:
        probe.bind(("127.0.0.1", 79))
        pytest.skip("every port is permitted here, as to root")
    ended = run_command(modules, "-b", "127.0.0.1:79", "good")
    assert ended.returncode == 1 and "permi" in ended.stderr.lower() and ended.stderr.count("\n") == 1


def test_tells_its_version_and_explains_its_options(modules: str) -> None:
    version, ended = run_command(modules, "--version"), run_command(modules, "--help")
    assert version.returncode == 0 and re.fullmatch(r"webserver(\.py)?[ /]\d+\.\d+\S*\n", version.stdout)
    for option in ("--bind", "--max-children", "--timeout", "--keep-alive", "--graceful-timeout", "--access-log",
                   "--connections-per-child", "--limit-request-body", "--no-fork", "--version", "--help", "PORT",
                   "module:app", "unix:PATH"):  # fmt: skip
        assert option in ended.stdout, option
    assert ended.returncode == 0 and max(map(len, ended.stdout.splitlines())) <= 100


def test_no_fork_serves_in_one_process_and_ends_by_control_c(tmp_path: Any) -> None:
    with Running(tmp_path, "--no-fork", app=RUNS_QUERY) as server:
        assert [server.run(""), server.run("answer = environ['wsgi.multiprocess']")] == [str(server.pid), "False"]
        assert server.get(make_target("1 // 0")).status == 500
        assert server.get(make_target("import sys; sys.exit()")).status == 500
        assert server.children() == []
        clients, began = [server.connect() for _ in range(4)], time.monotonic()
        with closing(*clients):
            for client in clients * 2:  # no client that keeps its connection holds up another
                client.sendall(GET)
                assert read_answer(client).status == 200
        assert time.monotonic() - began < 4 * webserver.TICK
        server.stop(signal.SIGINT)
        assert "KeyboardInterrupt" not in server.errors()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_without_fork_a_profiler_saves_what_it_has_found(tmp_path: Any, signum: int) -> None:
    argv = (sys.executable, "-m", "cProfile", "-o", "profile", WEBSERVER)
    with Running(tmp_path, "--no-fork", app=ANSWERS % "ok", argv=argv) as server:
        assert server.get().body == b"ok"
        server.stop(signum)
        assert os.path.exists(str(tmp_path / "profile"))


def test_without_fork_the_signals_of_a_request_hold_up_nobody(tmp_path: Any) -> None:
    """The pipe in which signals are noted has room for less than 300, and nobody reads it in a request."""
    many = "for _ in range(1000): os.kill(os.getpid(), %d)" % signal.SIGCHLD
    with Running(tmp_path, "--no-fork", app=RUNS_QUERY) as server, server.send(many) as client:
        assert read_answer(client).status == 200
        assert server.get().status == 200
        assert server.stop() == 0


def test_without_fork_a_process_of_the_application_leaves_the_server_alone(tmp_path: Any) -> None:
    path = "/tmp/webserver-test-%d.sock" % os.getpid()
    ends = ("sys.exit(3)", 3), ("raise LookupError('in the fork')", 1)
    with Running(tmp_path, "--no-fork", app=RUNS_QUERY, bind="unix:" + path) as server:
        for end, status in ends:
            code = "import sys\nif os.fork() == 0: %s\nanswer = os.wait()[1] >> 8" % end
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(PATIENCE)
                client.connect(path)
                client.sendall(get(CLOSE, target=make_target(code).encode()))
                assert receive_answer(client).body == b"%d" % status
        server.process.send_signal(signal.SIGHUP)  # without a terminal it is no stop
        assert server.stop() == 0 and server.errors().count("Traceback") == 1
        assert "LookupError: in the fork" in server.errors()


def test_serves_from_python(tmp_path: Any) -> None:
    port = free_port()
    code = """\
    import webserver

    def app(environ, start_response):
        start_response("200 OK", [])
        return [b"from Python"]

    webserver.serve(app, bind="127.0.0.1:%d", max_children=5, timeout=5, access_log="off")
    import atexit, os, sys
    atexit.register(print, "handler", flush=True)
    if os.fork() == 0: sys.exit()
    os.wait()
    """
    argv = (sys.executable, "-c", textwrap.dedent(code % port))
    with Running(tmp_path, argv=argv, bind="", port=port, PYTHONPATH=os.path.dirname(WEBSERVER)) as server:
        assert [server.get().body for _ in range(3)] == [b"from Python"] * 3
        assert server.stop() == 0 and server.output() == "handler\n" * 2  # and on, as any program


@pytest.mark.parametrize("name, value", [
    ("timeout", -1.0), ("max_children", 0.0), ("keep_alive", 1e9), ("graceful_timeout", -0.1),
    ("access_log", "loud"), ("access_log", None), ("timeout", "30"), ("max_children", None),
    ("max_children", 1.5), ("limit_memory", 1.5e8), ("bind", 8000), ("socket_mode", 0o660), ("warm_up", None),
    ("forwarded_allow_ips", ["127.0.0.1"]),
])  # fmt: skip
def test_refuses_options_out_of_bounds_from_python(name: str, value: Any) -> None:
    with pytest.raises(webserver.StartError, match=name.replace("_", "-")) as raised:
        webserver.serve(hello, **{"bind": "unix:no/such/folder", name: value})
    assert raised.value.status == 2


def test_serve_wants_an_application_and_not_its_name() -> None:
    name: Any = "hello:app"
    with pytest.raises(webserver.StartError, match="is no application"):
        webserver.serve(name, bind="127.0.0.1:%d" % free_port())


def test_serve_outside_the_main_thread_is_one_clear_sentence() -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            webserver.serve(hello, bind="127.0.0.1:%d" % free_port())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(PATIENCE)
    assert [type(error) for error in errors] == [webserver.StartError] and "main thread" in str(errors[0])


def test_importing_has_no_effect(tmp_path: Any) -> None:
    code = """\
    import atexit, os, signal, sys, threading
    def look():
        handlers = [signal.getsignal(number) for number in signal.Signals]
        return handlers, os.listdir("/dev/fd"), threading.active_count(), sys.path[:], sys.excepthook, os.umask(0o22)
    os.umask(0o22)
    before = look()
    import webserver
    assert look() == before
    """
    argv = (sys.executable, "-c", textwrap.dedent(code))
    ended = run_command(tmp_path, argv=argv, PYTHONPATH=os.path.dirname(WEBSERVER))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@on_linux
def test_needs_the_standard_library_alone_and_no_writable_disk(tmp_path: Any) -> None:
    """-I and -S leave nothing else to import; in /proc nobody can create a file, and TMPDIR is none."""
    argv = (sys.executable, "-I", "-S", WEBSERVER)
    with Running(tmp_path, argv=argv, popen={"cwd": "/proc"}, TMPDIR="/nowhere", HOME="/nowhere") as server:
        assert server.get().status == 200 and server.stop() == 0, server.errors()


# The text


def test_the_promises_name_tests_that_there_are() -> None:
    named = set(re.findall(r"\btest_\w+", __doc__ or ""))
    assert len(named) > 20 and named <= set(globals())


def test_the_tours_of_the_readme_name_what_there_is() -> None:
    with open(os.path.join(os.path.dirname(WEBSERVER), "README.md")) as file:
        tours = file.read().partition("## Read it")[2].partition("## How fast")[0]
    owners = [webserver, *(value for value in vars(webserver).values() if isinstance(value, type))]
    named = set(re.findall(r"`([A-Z]\w+\.\w+|[a-z]+_\w+)`", tours)) - {"exc_info", "start_response"}
    for name in named:
        owner, _, attribute = name.rpartition(".")
        assert any(hasattr(getattr(webserver, owner) if owner else any_owner, attribute) for any_owner in owners), name
    assert len(named) > 25

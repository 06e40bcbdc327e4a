#!/usr/bin/env python3
"""A WSGI server in one file: every connection is served by a process of its own, forked one ahead.

    python3 webserver.py                      a page that shows what an application sees, on 127.0.0.1:8000
    python3 webserver.py module:app           the application `app` of `module`; `module:factory()` calls a factory
    python3 webserver.py --help               the options

It needs CPython 3.8 or later on a POSIX system, and no package. It writes nothing to disk and runs as any user,
also as PID 1 of a container. A request that crashes, hangs or exits takes down its own connection and no other.

How to read it. The file has two halves that meet in one line of `start`, where one callable is handed over. The upper
half (sections 2 to 9) knows HTTP and WSGI and never heard of fork; the lower half (section 10) knows processes and
never heard of HTTP. Each unfolds in the order of a life, the headline function of a section first:

    bytes -> Stream -> Request -> environ -> application -> Response -> bytes       the life of a request
    bind -> fork -> accept -> serve -> exit -> reap                                 the life of a process

`grep '^# ----' webserver.py` prints the table of contents.

What it refuses to be: HTTP/2, WebSocket, ASGI, a server of static files, a daemon, Windows (which has no fork). The
first and the fourth are the work of a proxy in front.

Sources, cited where a rule is enforced: RFC 9110 (HTTP semantics), RFC 9112 (HTTP/1.1), RFC 3986 (URI), PEP 3333
(WSGI), and the man pages waitpid(2), signal(7), socket(7), tcp(7), sd_listen_fds(3) and sd_notify(3).
"""

# ---- 1. Imports -------------------------------------------------------------
# Nothing heavy: what is imported here is copied by every fork. What few processes need is imported where it is used.
from __future__ import annotations

import argparse
import atexit
import errno
import faulthandler
import gc
import io
import mmap
import os
import re
import select
import signal
import socket
import stat
import struct
import sys
import time
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any, Callable, Dict, Iterable, Iterator, NamedTuple, NoReturn

if not hasattr(os, "fork"):
    raise SystemExit("webserver.py needs a POSIX system: this one has no fork")

__version__ = "1.0"
PRODUCT = "webserver.py/" + __version__

Environ = Dict[str, Any]
Write = Callable[[bytes], None]
StartResponse = Callable[..., Write]
Application = Callable[[Environ, StartResponse], Iterable[bytes]]
Service = Callable[[socket.SocketType, Any, "Activity"], None]


# ---- 2. Limits --------------------------------------------------------------
# Every limit and deadline that no option sets, with its reason and the status that answers an excess. Sizes are in
# bytes, times in seconds.

MAX_REQUEST_LINE = 8190  # 414; as Apache's LimitRequestLine. RFC 9112 §3 asks for 8000 at least
MAX_FIELD_LINE = 8190  # 431; as Apache's LimitRequestFieldSize
MAX_FIELDS = 100  # 431; as Apache's LimitRequestFields; the same for a trailer section
MAX_HEAD = 65536  # 431; the request-line, all field lines and the empty line
MAX_CHUNK_LINE = 4096  # 400; a chunk-size with its extensions
MAX_CHUNK_EXTENSIONS = 16384  # 400; of all chunks together: else 1 byte of data could cost 4096 to parse
MAX_COLLECTED = 1 << 20  # a chunked body up to this size gets a CONTENT_LENGTH, a larger one is streamed
MAX_DRAINED = 65536  # what a server reads of a body that the application left unread, to keep the connection

HEAD_TIMEOUT = 10.0  # 408; from a head's first byte to its last, or to the first byte of a connection: that is silent
LINGER_TIMEOUT = 30.0  # to read and drop what a refused client still sends, as nginx's lingering_time
LINGER_SILENCE = 2.0  # and how long it may send nothing meanwhile
LAST_CALL = 0.05  # what an idle connection is given, when it must go, for a request that may be under way
KILL_AFTER = 5.0  # from the deadline of a request to the signal that nothing survives
TICK = 1.0  # how often parent and waiting children look around unasked: the price of a wake-up that was missed
ALARM_SLACK = 0.25  # a client's silence ends at the deadline, an application's so much later: 408 and 504 never race
CHECK_TIMEOUT = 30.0  # for new code to load before a reload
MAX_LOGGED = (2000, 600, 60)  # to which of these a client's text is cut: the first that leaves its log line whole
QUIET = 60.0  # between two log lines about the same trouble

RECEIVE_SIZE = 65536  # one recv
JOIN_SIZE = 16384  # up to here copying blocks together is cheaper than sendmsg
FILE_BLOCK_SIZE = 1 << 18  # what is read of a file at once
BACKLOG = 1024  # connections that the kernel may hold for us; it caps the number at net.core.somaxconn


class Options(NamedTuple):
    """What can be set, by the options of the same names or in a call of `serve`. Times are in seconds."""

    bind: str = ""  # an address as `open_listener` takes it; else all addresses at $PORT, else 127.0.0.1:8000
    max_connections: int = 256
    timeout: float = 30.0
    keep_alive: float = 15.0
    graceful_timeout: float = 30.0
    connections_per_child: int = 1
    limit_request_body: int = 1 << 30
    user: str = ""  # NAME[:GROUP]
    access_log: str = "combined"  # or json, or off
    reload: bool = False
    check: bool = False
    no_fork: bool = False


REASONS = {
    400: "Bad Request", 408: "Request Timeout", 413: "Content Too Large", 414: "URI Too Long",
    417: "Expectation Failed", 431: "Request Header Fields Too Large", 500: "Internal Server Error",
    501: "Not Implemented", 504: "Gateway Timeout", 505: "HTTP Version Not Supported",
}  # fmt: skip


class HTTPError(Exception):
    """An exchange that ends in an error: the status code, and a detail for the client and the log."""


class ClientGoneError(Exception):
    """The client has closed, was cut off, or does not read: there is nobody left to answer."""


class Overdue(BaseException):
    """The deadline of the request has passed; no Exception, so that an application's `except Exception` lets it by."""


# ---- 3. Grammar -------------------------------------------------------------
# The ABNF rule in a comment, under it the pattern of the same name, to be used with fullmatch. What these patterns do
# not match is refused, never repaired: each repair is a message that two servers understand in two ways.

# token = 1*tchar (RFC 9110 §5.6.2)
token = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
TOKEN = re.compile(token)

# quoted-string = DQUOTE *( qdtext / quoted-pair ) DQUOTE (RFC 9110 §5.6.4)
quoted_string = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*"'

# request-line = method SP request-target SP HTTP-version (RFC 9112 §3); a target is visible US-ASCII
REQUEST_LINE = re.compile(rb"(%s) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])" % token)

# origin-form = absolute-path [ "?" query ], or absolute-form with a scheme that comes over HTTP (RFC 9112 §3.2);
# browsers send more characters than RFC 3986 allows, but never a fragment
TARGET = re.compile(rb"(?:(?i:https?)://([^/?#]*))?(/[^?#]*)?(?:\?([^#]*))?")

# pct-encoded = "%" HEXDIG HEXDIG (RFC 3986 §2.1); the two digits are missing in one that is broken
PCT_ENCODED = re.compile(rb"%([0-9A-Fa-f]{2})?")

# Host = uri-host [ ":" port ] (RFC 9110 §7.2); IP-literal / IPv4address / reg-name (RFC 3986 §3.2.2)
HOST = re.compile(rb"(?:\[([0-9A-Fa-f:.]+)\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+)(?::[0-9]*)?")

# field-value = *( VCHAR / obs-text / SP / HTAB ) (RFC 9110 §5.5); neither CR, LF, NUL nor any other control
FIELD_VALUE = re.compile(rb"[\t \x21-\x7e\x80-\xff]*")

# chunk-size [ chunk-ext ] (RFC 9112 §7.1); 16 digits are 2^64 - 1
CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,16})((?:[ \t]*;[ \t]*%b(?:[ \t]*=[ \t]*(?:%b|%b))?)*)" % (token, token, quoted_string)
)

# A byte that no head may hold, wherever its end will be: a control, a bare LF, a bare CR (RFC 9112 §2.2)
BAD_HEAD_BYTE = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?=[^\n])")

# Fields that a message can have but once; to join two of them would be to choose one (RFC 9110 §5.3)
SINGLETON_FIELDS = frozenset((
    "authorization", "content-type", "date", "from", "host", "if-modified-since", "if-range", "if-unmodified-since",
    "max-forwards", "proxy-authorization", "range", "referer", "user-agent",
))  # fmt: skip

# status-line's status-code SP [ reason-phrase ] as PEP 3333 writes it; an application sends no interim status
STATUS = re.compile(r"[2-9][0-9][0-9](?: [\t\x20-\x7e\x80-\xff]*)?")
RESPONSE_FIELD_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")

# Fields that belong to the connection and so to the server alone (RFC 9110 §7.6.1; PEP 3333, "Other HTTP Features")
HOP_BY_HOP_FIELDS = frozenset((
    "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer", "trailers",
    "transfer-encoding", "upgrade",
))  # fmt: skip


# ---- 4. Stream --------------------------------------------------------------
# The connected socket, and the bytes that were received but not consumed. Nothing else in the upper half receives or
# sends. Deadlines of waiting are the kernel's: SO_RCVTIMEO and SO_SNDTIMEO (socket(7)) cost nothing where bytes flow.

SPARE = b"\x7f" * 8  # what is in a slot while its process waits for a connection: no row of times contains it
ACCEPTING = struct.unpack("d", SPARE)[0]  # the same as a time, beyond all others
FREE = 0.0  # the time in a slot without a process
WANTED = -1  # the last slot is nobody's: it is not FREE while newcomers wait for a child to be forked
NOTE = struct.Struct("=QQ44s196s")  # connections and requests so far, the client, the first bytes of the head
NOTE_SIZE = NOTE.size


give_way = getattr(os, "sched_yield", lambda: None)  # sched_yield(2), which not every system has


class Activity:
    """Owns one slot in the memory that processes share: since when this one waits or works, for whom, at what.

    The time is ACCEPTING while the process waits for a connection, negative while that is idle, positive while a
    request is in hand. It is one aligned double, written and read in one piece, without a lock.
    """

    __slots__ = ("client", "connections", "head", "is_finishing", "notes", "pid", "requests", "slot", "sock", "times")

    def __init__(self, times: memoryview[float], notes: memoryview, slot: int) -> None:
        self.times, self.notes, self.slot = times, notes, slot
        self.sock: socket.SocketType | None = None
        self.client = self.head = b""  # the head is that of the request in hand, or the last one
        self.connections = self.requests = 0
        self.is_finishing = False  # the process was asked to close its connection as soon as it may
        self.pid = os.getpid()  # of the process that serves; another one was forked from it by the application

    def connect(self, sock: socket.SocketType, client: str) -> None:
        """A connection has come."""
        self.sock, self.client = sock, client.encode("ascii", "replace")
        self.connections += 1
        NOTE.pack_into(self.notes, self.slot * NOTE_SIZE, self.connections, self.requests, self.client, b"")
        self.rest()

    def rest(self) -> None:
        """The connection waits for a request; when the processor is short, newcomers and the parent come first."""
        self.times[self.slot] = -time.monotonic()
        if self.times[WANTED]:
            give_way()

    def work(self, head: bytes) -> float:
        """A request is in hand; return the time."""
        self.head = head
        self.requests += 1
        NOTE.pack_into(self.notes, self.slot * NOTE_SIZE, self.connections, self.requests, self.client, head)
        now = self.times[self.slot] = time.monotonic()
        return now

    def renew(self) -> None:
        """The request in hand has made progress."""
        self.times[self.slot] = time.monotonic()


class Stream:
    """Owns a connected socket and the bytes received from it but not yet consumed.

    What it does with the socket raises ClientGoneError when there is no client any more; what receives raises
    TimeoutError when nothing comes within the time that set_patience gave.
    """

    __slots__ = ("activity", "patience", "pending", "sock", "timeout")

    def __init__(self, sock: socket.SocketType, activity: Activity, timeout: float) -> None:
        self.sock, self.activity, self.timeout = sock, activity, timeout
        self.pending = b""  # received, not consumed
        self.patience = 0.0  # seconds, as last set
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, make_timeval(timeout))

    def set_patience(self, seconds: float) -> None:
        """Let a receive wait so long at most."""
        if seconds != self.patience or self.activity.is_finishing:  # a signal may have shortened it meanwhile
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, make_timeval(seconds))
            self.patience = seconds

    def receive(self) -> bytes:
        """Return the next bytes from the client, b"" when it has closed."""
        try:
            return self.sock.recv(RECEIVE_SIZE)
        except BlockingIOError:
            raise TimeoutError from None
        except OSError as error:
            raise ClientGoneError from error

    def receive_into(self, view: memoryview) -> int:
        """Fill the view with bytes not consumed yet, or else with new ones; return their number, 0 at the end."""
        if self.pending:
            taken, self.pending = self.pending[: len(view)], self.pending[len(view) :]
            view[: len(taken)] = taken
            return len(taken)
        self.activity.renew()  # from here on it is the client that is waited for
        try:
            received = self.sock.recv_into(view)
        except BlockingIOError:
            raise TimeoutError from None
        except OSError as error:
            raise ClientGoneError from error
        self.activity.renew()
        return received

    def read_line(self, limit: int) -> bytes:
        """Return the next line without its CRLF (RFC 9112 §2.2); HTTPError if it is too long or ends in a bare LF."""
        while b"\n" not in self.pending and len(self.pending) <= limit + 1:
            self.activity.renew()  # as above
            if not (received := self.receive()):
                raise HTTPError(400, "the client closed inside the chunked body")
            self.pending += received
            self.activity.renew()
        line, newline, self.pending = self.pending.partition(b"\n")
        if not newline or len(line) > limit + 1:
            raise HTTPError(400, "too long a line in the chunked body")
        if not line.endswith(b"\r"):
            raise HTTPError(400, "a bare LF in the chunked body")
        return line[:-1]

    def send(self, data: bytes, *more: bytes) -> None:
        """Send all the data, large parts of it without a copy; to have it is progress."""
        self.activity.renew()
        try:
            sent = self.sock.sendmsg((data, *more)) if more else self.sock.send(data)
            if more and sent < len(data) + sum(map(len, more)):
                data = b"".join((data, *more))
            while sent < len(data):  # each send takes at least a part, or fails after SO_SNDTIMEO
                self.activity.renew()
                sent += self.sock.send(memoryview(data)[sent:])
        except OSError as error:
            raise ClientGoneError from error

    def linger(self) -> None:
        """End our side, then drop what still comes: to close with bytes unread resets the answer (RFC 9112 §9.6)."""
        self.activity.rest()  # nothing is in hand any more: like an idle connection, it gives way to others
        with suppress(OSError):  # silent or gone: either way it is over
            self.sock.shutdown(socket.SHUT_WR)
            self.set_patience(LAST_CALL if self.activity.is_finishing else LINGER_SILENCE)
            waste = bytearray(RECEIVE_SIZE)
            deadline = time.monotonic() + LINGER_TIMEOUT
            while self.sock.recv_into(waste) and time.monotonic() < deadline and not self.activity.is_finishing:
                pass

    def reset(self) -> None:
        """Close with a reset, where a plain close would mean the end of the response (socket(7), SO_LINGER)."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
        self.sock.close()


@lru_cache(maxsize=16)
def make_timeval(seconds: float) -> bytes:
    """Return the struct timeval of socket(7); 0 would mean "no timeout", so nothing is as short as that."""
    return struct.pack("@ll", int(seconds), max(int(seconds % 1 * 1e6), 1))


# ---- 5. Request -------------------------------------------------------------
# In go the bytes of a head, out comes a Request that keeps every rule, or HTTPError. The parsers are pure functions of
# bytes and so can remember: clients repeat their heads, or all lines of them but one. What is remembered was checked
# and is bounded, and bytes hash with a secret, so that a client can neither grow it nor make it collide.
# RFC 9112 §2 to §6 and §9.3, RFC 9110 §5, §7 and §10.1.1.


class Request(NamedTuple):
    """The head of a request, checked. As it is without values, it stands for a head that could not be read."""

    method: str = ""
    target: str = ""  # as it was received
    path: str = ""  # percent-decoded, each byte as the latin-1 character that PEP 3333 wants
    query: str = ""  # raw
    version: str = "HTTP/1.1"
    fields: dict[str, str] = {}  # names in lower case, each once
    length: int | None = 0  # of the message body; None if it is chunked
    is_persistent: bool = False
    expects_continue: bool = False


NO_REQUEST = Request()


def read_head(stream: Stream, patience: float) -> bytes:
    """Return the bytes of the next head with its empty line, b"" if the client sends none within its patience.

    The common case is one recv. Only a head that arrives in pieces pays for a look at the clock.
    """
    stream.set_patience(patience)
    if stream.activity.is_finishing:  # already; a signal from here on shortens the wait itself
        stream.set_patience(LAST_CALL)
    try:
        data = stream.pending or stream.receive()
        if data == stream.activity.head:  # the same once more: 10 % faster than to search it and hash it again
            stream.pending = b""
            return stream.activity.head
        while data in (b"\r", b"\r\n"):  # the line end that old clients send behind a body begins no request
            received = stream.receive()
            data = received and data + received
    except (TimeoutError, ClientGoneError):
        data = b""
    end = data.find(b"\r\n\r\n") + 4
    if data and end < 4:
        data = read_rest_of_head(stream, data, time.monotonic() + min(HEAD_TIMEOUT, stream.timeout))
        end = data.find(b"\r\n\r\n") + 4
    stream.pending = data[end:]
    return data[:end]


def read_rest_of_head(stream: Stream, data: bytes, deadline: float) -> bytes:
    """Return the data with what still had to come for a whole head; HTTPError if it does not come by the deadline."""
    checked = 0
    stream.activity.renew()  # no longer idle: it does not give way
    while b"\r\n\r\n" not in data:
        stream.pending = data  # for the log, should it be refused
        check_partial_head(data, checked)
        checked = len(data) - 1
        try:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            stream.set_patience(left)
            received = stream.receive()
        except TimeoutError:
            raise HTTPError(408, "the head was not complete in time") from None
        if not received:
            raise HTTPError(400, "the client closed inside the head")
        data += received
    return data


def check_partial_head(data: bytes, checked: int) -> None:
    """Refuse at once, and not at the deadline, what no further byte can mend; so many bytes were checked before."""
    if data.startswith(b"\x16\x03"):
        raise HTTPError(400, "a TLS handshake on a port without TLS")
    if BAD_HEAD_BYTE.search(data, checked):
        raise HTTPError(400, "a control byte or a bare CR or LF in the head")
    if len(data) > MAX_REQUEST_LINE + 3 and b"\r\n" not in data[2 : MAX_REQUEST_LINE + 4]:
        raise HTTPError(414, "a request-line that does not end")
    if len(data) > MAX_HEAD:
        raise HTTPError(431, "a head that does not end")


def parse_head(head: bytes) -> Request:
    """Return the request that these bytes are, from the request-line to the empty line."""
    if len(head) > MAX_HEAD:
        raise HTTPError(431, "too large a head")
    start = 2 if head.startswith(b"\r\n") else 0  # one empty line before a request-line is tolerated (RFC 9112 §2.2)
    line, *lines = head[start:-4].split(b"\r\n")
    method, target, authority, path, query, version = parse_request_line(line)
    fields = parse_fields(lines)
    if "host" in fields:
        check_host(fields["host"].encode("latin-1"), "an invalid Host")
    elif version != "HTTP/1.0":
        raise HTTPError(400, "no Host")
    if authority is not None:
        fields["host"] = authority  # RFC 9112 §3.2.2
    length = parse_framing(version, fields)
    if "content-length" in fields:
        fields["content-length"] = str(length)  # repeats of it become one
    options = parse_list(fields["connection"]) if "connection" in fields else ()
    is_persistent = "close" not in options and (version != "HTTP/1.0" or "keep-alive" in options)
    expects_continue = "expect" in fields and parse_expect(version, fields["expect"])
    return Request(method, target, path, query, version, fields, length, is_persistent, expects_continue)


@lru_cache(maxsize=256)
def parse_request_line(line: bytes) -> tuple[str, str, str | None, str, str, str]:
    """Return the method, the target as it came, its authority, path and query, and the version (RFC 9112 §3)."""
    if len(line) > MAX_REQUEST_LINE:
        raise HTTPError(414, "too long a request-line")
    if not (match := REQUEST_LINE.fullmatch(line)):
        raise HTTPError(400, "a malformed request-line")
    method, target, major, minor = match.groups()
    if major != b"1":
        raise HTTPError(505, "not a version of HTTP/1")
    if method == b"CONNECT":
        raise HTTPError(501, "CONNECT is for proxies")
    version = "HTTP/1.0" if minor == b"0" else "HTTP/1.1"  # a higher minor version is answered as 1.1 (RFC 9110 §2.5)
    return (method.decode(), target.decode(), *parse_target(method, target), version)


def parse_target(method: bytes, target: bytes) -> tuple[str | None, str, str]:
    """Return the authority, the path and the query of a request-target in one of its forms (RFC 9112 §3.2)."""
    if target == b"*" and method == b"OPTIONS":
        return None, "", ""
    match = TARGET.fullmatch(target)
    if not match or match.groups()[:2] == (None, None):
        raise HTTPError(400, "a malformed request-target")
    authority, path, query = match.groups()
    if authority is not None:
        check_host(authority, "an invalid authority in the request-target")
        authority = authority.decode()
    path = path or (b"" if method == b"OPTIONS" else b"/")  # RFC 9112 §3.2.4
    return authority, PCT_ENCODED.sub(decode_octet, path).decode("latin-1"), (query or b"").decode()


def decode_octet(match: re.Match[bytes]) -> bytes:
    """Return the octet that was percent-encoded; urllib.parse could do it, but brings what every fork would copy."""
    if not match[1]:
        raise HTTPError(400, "a broken percent-escape in the path")
    return bytes([int(match[1], 16)])


def parse_fields(lines: list[bytes]) -> dict[str, str]:
    """Return the fields by name, repeated ones joined (RFC 9110 §5.3)."""
    if len(lines) > MAX_FIELDS:
        raise HTTPError(431, "too many field lines")
    fields: dict[str, str] = {}
    for name, value in map(parse_field_line, lines):
        if "_" in name:
            continue  # in the environ it would pass for the name with a hyphen
        if name in fields and name in SINGLETON_FIELDS:
            raise HTTPError(400, "a second " + name.title())
        fields[name] = fields[name] + ("; " if name == "cookie" else ", ") + value if name in fields else value
    return fields


@lru_cache(maxsize=1024)
def parse_field_line(line: bytes) -> tuple[str, str]:
    """Return the name in lower case and the value of a field line (RFC 9112 §5)."""
    if len(line) > MAX_FIELD_LINE:
        raise HTTPError(431, "too long a field line")
    name, colon, value = line.partition(b":")
    value = value.strip(b" \t")
    if not colon:
        raise HTTPError(400, "a field line without a colon")
    if not TOKEN.fullmatch(name):
        raise HTTPError(400, "a malformed field name")
    if not FIELD_VALUE.fullmatch(value):
        raise HTTPError(400, "a control byte in a field value")
    return name.decode().lower(), value.decode("latin-1")


def parse_list(value: str) -> list[str]:
    """Return the members of a list, in lower case and without the empty ones (RFC 9110 §5.6.1)."""
    return list(filter(None, [member.strip(" \t") for member in value.lower().split(",")]))


def check_host(host: bytes, detail: str) -> None:
    """Refuse what is not uri-host [ ":" port ]; an http URI has no empty host (RFC 9110 §4.2.1)."""
    match = HOST.fullmatch(host)
    with suppress(OSError):
        if match and (not match[1] or socket.inet_pton(socket.AF_INET6, match[1].decode())):
            return
    raise HTTPError(400, detail)


def parse_framing(version: str, fields: dict[str, str]) -> int | None:
    """Return the length of the message body, None if it is chunked: decided here once (RFC 9112 §6.3).

    A front server that decides otherwise would let one request smuggle another: whatever is ambiguous is refused.
    """
    coding, length = fields.get("transfer-encoding"), fields.get("content-length")
    if coding is None:
        return 0 if length is None else parse_content_length(length)
    if length is not None:
        raise HTTPError(400, "Content-Length together with Transfer-Encoding")
    if version == "HTTP/1.0":
        raise HTTPError(400, "Transfer-Encoding in HTTP/1.0")
    if coding.lower() == "chunked":
        return None
    codings = parse_list(coding)
    if not codings or "chunked" in codings[:-1] or not all(TOKEN.fullmatch(c.encode("latin-1")) for c in codings):
        raise HTTPError(400, "a malformed Transfer-Encoding")
    raise HTTPError(501, "a transfer coding other than chunked")


def parse_content_length(value: str) -> int:
    """Return the Content-Length, whose repeats must agree (RFC 9110 §8.6)."""
    digits, *repeats = (part.strip(" \t") for part in value.split(","))
    if not (digits.isascii() and digits.isdigit()) or any(repeat != digits for repeat in repeats):  # not int(): + - _
        raise HTTPError(400, "an invalid Content-Length")
    digits = digits.lstrip("0") or "0"
    if len(digits) > 18:
        raise HTTPError(413, "a Content-Length beyond all bounds")
    return int(digits)


def parse_expect(version: str, value: str) -> bool:
    """Return whether the client waits for a 100 (Continue); HTTP/1.0 knows none (RFC 9110 §10.1.1)."""
    expectations = set(parse_list(value))
    if expectations - {"100-continue"}:
        raise HTTPError(417, "an expectation other than 100-continue")
    return bool(expectations) and version != "HTTP/1.0"


# ---- 6. Body ----------------------------------------------------------------
# Exactly the bytes of one message body, and not one of the request behind it. An io.RawIOBase: the standard library's
# io.BufferedReader makes read, readline, readlines and iteration of it, as PEP 3333 asks of wsgi.input.


class Body(io.RawIOBase):
    """Owns the framing of one message body (RFC 9112 §6 and §7).

    A sized body is one piece of known length, a chunked one a row of such pieces. Reading raises HTTPError when the
    client breaks the framing, is silent too long or exceeds the limit, and the failure stays in `failure`: the
    application may have swallowed it, but its answer would be made from half a body.
    """

    def __init__(self, stream: Stream, request: Request, limit: int) -> None:
        self.stream = stream
        self.is_chunked = request.length is None  # until the last chunk
        self.remaining = request.length or 0  # of the body, or of the chunk in hand
        self.limit = limit - self.remaining  # what further chunks may hold
        self.awaits_continue = request.expects_continue  # until we send anything or the client does
        self.ahead = b""  # what `collect` has read, for the application to read first
        self.failure: HTTPError | None = None
        self.extensions = 0  # bytes of chunk extensions so far
        self.is_behind_chunk = False  # the line end behind a chunk is still to come
        if self.limit < 0:
            raise HTTPError(413, "a Content-Length over the limit")

    def readable(self) -> bool:
        """Of RawIOBase."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Of RawIOBase: fill the buffer with the next bytes, return their number, 0 at the end of the body."""
        if self.ahead:
            taken, self.ahead = self.ahead[: len(buffer)], self.ahead[len(buffer) :]
            buffer[: len(taken)] = taken
            return len(taken)
        if not self.failure:
            try:
                return self.receive_into(buffer)
            except TimeoutError:
                self.failure = HTTPError(408, "the message body did not arrive in time")
            except HTTPError as failure:
                self.failure = failure
        raise self.failure

    def readall(self) -> bytes:
        """Of RawIOBase, whose own reads 8 KiB at a time."""
        return b"".join(iter(partial(self.read, RECEIVE_SIZE), b""))

    def receive_into(self, buffer: Any) -> int:
        """Fill the buffer from the stream; return 0 at the end of the body."""
        if self.awaits_continue:
            self.awaits_continue = False
            if not self.stream.pending:  # else its body comes already (RFC 9110 §10.1.1)
                self.stream.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self.is_chunked and not self.remaining:
            self.read_chunk_line()
        if not self.remaining:
            return 0
        received = self.stream.receive_into(memoryview(buffer)[: self.remaining])
        if not received:
            raise HTTPError(400, "the client closed inside the message body")
        self.remaining -= received
        return received

    def read_chunk_line(self) -> None:
        """Read the end of the chunk before and the line before the next (RFC 9112 §7.1)."""
        if self.is_behind_chunk and self.stream.read_line(MAX_CHUNK_LINE):
            raise HTTPError(400, "a chunk longer than its chunk-size")
        if not (match := CHUNK_LINE.fullmatch(self.stream.read_line(MAX_CHUNK_LINE))):
            raise HTTPError(400, "a malformed chunk-size or chunk extension")
        self.is_behind_chunk = True
        self.remaining = int(match.group(1), 16)
        self.extensions += len(match.group(2))
        self.limit -= self.remaining
        if self.extensions > MAX_CHUNK_EXTENSIONS:
            raise HTTPError(400, "too many chunk extensions")
        if self.limit < 0:
            raise HTTPError(413, "a chunked body over the limit")
        if not self.remaining:
            self.read_trailer_section()
            self.is_chunked = False

    def read_trailer_section(self) -> None:
        """Read, check and drop the fields behind the last chunk: no rule lets them join the head's (RFC 9110 §6.5)."""
        for _ in range(MAX_FIELDS + 1):
            if not (line := self.stream.read_line(MAX_FIELD_LINE)):
                return
            parse_field_line(line)
        raise HTTPError(431, "too many trailer fields")

    def collect(self) -> bytes | None:
        """Return a whole chunked body of up to MAX_COLLECTED bytes; None for a larger one, which then is streamed."""
        content = bytearray()
        while piece := self.read(RECEIVE_SIZE):
            content += piece
            if len(content) > MAX_COLLECTED:
                self.ahead = bytes(content)
                return None
        return bytes(content)

    def drain(self) -> bool:
        """Read what the application left; return whether that was the end, so that a next request can follow."""
        if self.awaits_continue or self.failure:
            return False
        left, waste = MAX_DRAINED, bytearray(RECEIVE_SIZE)
        with suppress(HTTPError, TimeoutError):  # the response is out and was right; the close tells the rest
            while left >= self.remaining:
                if not (received := self.receive_into(waste)):
                    return True
                left -= received
        return False


# ---- 7. Environ -------------------------------------------------------------
# Request -> the dict of PEP 3333 ("environ Variables"). One part is made for each connection and one for each head;
# the environ is a copy of both, which the application may change as it likes.


def make_connection_environ(sock: socket.SocketType, address: Any, is_multiprocess: bool) -> Environ:
    """Return what all requests of a connection share."""
    name = sock.getsockname()  # like the client's address, a str for a Unix socket
    server, port = name[:2] if isinstance(name, tuple) else ("localhost", 80)
    client, client_port = address[:2] if isinstance(address, tuple) else ("", "")
    return {
        "webserver.request": 0,  # its number on the connection
        "SERVER_NAME": strip_mapping(server),
        "SERVER_PORT": str(port),
        "REMOTE_ADDR": strip_mapping(client),
        "REMOTE_PORT": str(client_port),
        "wsgi.errors": sys.stderr,
        "wsgi.multiprocess": is_multiprocess,
    }


def strip_mapping(address: str) -> str:
    """Return an IPv4 address that came through a socket for both families as what it is (RFC 4291 §2.5.5.2)."""
    return address[7:] if address.startswith("::ffff:") else address


def make_request_environ(request: Request) -> Environ:
    """Return what the head tells, the CGI variables and every field as HTTP_*, and what is always the same."""
    environ = {"HTTP_" + name.upper().replace("-", "_"): value for name, value in request.fields.items()}
    environ.pop("HTTP_TRANSFER_ENCODING", None)  # undone here; Bottle would undo it once more
    for name in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        if "HTTP_" + name in environ:
            environ[name] = environ.pop("HTTP_" + name)
    return {
        **environ,
        "REQUEST_METHOD": request.method,
        "REQUEST_URI": request.target,
        "SCRIPT_NAME": "",
        "PATH_INFO": request.path,
        "QUERY_STRING": request.query,
        "SERVER_PROTOCOL": request.version,
        "SERVER_SOFTWARE": PRODUCT,
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.multithread": False,
        "wsgi.run_once": False,
        "wsgi.input_terminated": True,
        "wsgi.file_wrapper": FileWrapper,
    }


def add_input(environ: Environ, body: Body) -> None:
    """Set wsgi.input, and CONTENT_LENGTH for a chunked body that is small enough to be collected.

    Django and Bottle read what CONTENT_LENGTH announces and take a body without it for none. A larger body is left to
    those that know wsgi.input_terminated, as Flask, Falcon and Pyramid do.
    """
    content = body.collect() if body.is_chunked else None
    if content is None:
        environ["wsgi.input"] = io.BufferedReader(body, RECEIVE_SIZE)
    else:
        environ["wsgi.input"] = io.BytesIO(content)
        environ["CONTENT_LENGTH"] = str(len(content))


# ---- 8. Response ------------------------------------------------------------
# What the application gives -> bytes. The head goes out with the first block that is not empty, in one send (but for
# a file's); the framing is decided then. PEP 3333; RFC 9110 §6.4 and §8.6, RFC 9112 §6 and §7.


def run_application(application: Application, environ: Environ, response: Response) -> None:
    """Call the application and send what it gives (PEP 3333, "Specification Details")."""
    blocks = application(environ, make_start_response(response))
    try:
        if isinstance(blocks, (list, tuple)):
            response.send(b"".join(blocks), is_last=True)  # all there is: its length can be told
            return
        if not (isinstance(blocks, FileWrapper) and response.send_file(blocks)):
            for block in blocks:  # each at once (PEP 3333, "Buffering and Streaming")
                response.write(block)
                if response.is_full:
                    break
        response.send(b"", is_last=True)
    finally:
        if hasattr(blocks, "close"):
            blocks.close()


def make_start_response(response: Response) -> StartResponse:
    """Return the start_response of one request (PEP 3333, "The start_response() Callable")."""

    def start_response(status: str, response_headers: list[tuple[str, str]], exc_info: Any = None) -> Write:
        """Take over the head; with exc_info in place of an earlier one, if that was not sent."""
        try:
            if exc_info and response.is_head_sent:
                raise exc_info[1].with_traceback(exc_info[2])
            if response.head and not exc_info:
                raise AssertionError("start_response was called a second time without exc_info")
        finally:
            exc_info = None  # it refers to this frame: a circle that only the garbage collector could break
        try:
            if not isinstance(response_headers, list):
                raise TypeError
            response.head = parse_response_head(status, tuple(response_headers))
        except TypeError:
            raise TypeError("not a status and a list of (name, value): %r, %r" % (status, response_headers)) from None
        return response.write

    return start_response


UNBOUNDED = float("inf")  # the length of a body that nothing tells beforehand


class ResponseHead(NamedTuple):
    """Status and headers of an application, checked, as lines but for what the server decides."""

    status: int
    lines: bytes
    length: int | None  # the Content-Length
    is_closing: bool  # by Connection: close
    has_date: bool


class Response:
    """Owns the response to one request: its head until the first block, and how much of its body was sent."""

    __slots__ = (
        "body", "head", "is_chunked", "is_closing", "is_complete", "is_full", "is_head_sent", "left", "request", "sent",
        "stream",
    )  # fmt: skip

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.request = NO_REQUEST
        self.body: Body | None = None
        self.head: ResponseHead | None = None  # what start_response was told
        self.is_head_sent = False
        self.sent = 0  # bytes of the body
        self.left = UNBOUNDED  # how many may follow
        self.is_chunked = False
        self.is_closing = False  # the connection ends with this response
        self.is_full = False  # further blocks are dropped
        self.is_complete = False

    def write(self, block: bytes) -> None:
        """Send a block of the body (PEP 3333, "The write() Callable")."""
        if self.is_complete:
            raise AssertionError("write() was called after the end of the response")
        self.send(block)
        if block:
            self.stream.activity.renew()  # to have sent it is progress

    def send(self, block: bytes, is_last: bool = False) -> None:
        """Send a block of the body, with the head before the first, and with what ends the body behind the last."""
        if not isinstance(block, bytes):
            raise TypeError("a block of the body is not bytes: %.100r" % (block,))
        head = end = b""
        if not self.is_head_sent:
            if not (block or is_last):
                return
            head = self.make_head(len(block) if is_last else None)
        if len(block) > self.left:
            if not self.is_full:
                log_error("the body is longer than its Content-Length of %d: cut there" % (self.sent + self.left))
            block, self.is_full = block[: int(self.left)], True
        if self.is_chunked:
            head, end = (head + b"%x\r\n" % len(block), b"\r\n") if block else (head, b"")
            end += b"0\r\n\r\n" if is_last else b""
        if len(block) > JOIN_SIZE and (head or end):
            self.stream.send(head, block, end)
        elif head or block or end:
            self.stream.send(head + block + end)
        self.sent += len(block)
        self.left -= len(block)
        if is_last:
            self.is_complete = True
            if 0 < self.left < UNBOUNDED:
                raise ValueError("the body has %d bytes, %d less than its Content-Length" % (self.sent, self.left))

    def send_file(self, wrapper: FileWrapper) -> bool:
        """Send a regular file in large blocks; return whether it could be sent so."""
        found = wrapper.find_regular_file() if self.head and not self.is_head_sent else None
        if found is None:
            return False
        fd, offset, size = found
        self.stream.send(self.make_head(size))
        # To read and send was 1.4 times as fast as sendfile(2) over loopback on Linux 6.18, and took less processor.
        while self.left and (block := os.pread(fd, int(min(self.left, FILE_BLOCK_SIZE)), offset + self.sent)):
            self.stream.send(block)
            self.sent += len(block)
            self.left -= len(block)
        return True

    def make_head(self, size: int | None) -> bytes:
        """Return the head for a body of this size, if known, and take it for sent."""
        if self.head is None:
            raise AssertionError("the application did not call start_response")
        if self.body:
            if self.body.failure:
                raise self.body.failure
            if self.body.awaits_continue:  # it may come now or never
                self.is_closing, self.body.awaits_continue = True, False
        is_closing = self.is_closing or self.stream.activity.is_finishing
        method, version, second = self.request.method, self.request.version, int(time.time())
        framing = frame_response(self.head, method, version, size, is_closing, second)
        head, self.left, self.is_full, self.is_chunked, self.is_closing = framing
        self.is_head_sent = True
        return head


@lru_cache(maxsize=64)
def frame_response(
    head: ResponseHead, method: str, version: str, size: int | None, is_closing: bool, second: int
) -> tuple[bytes, float, bool, bool, bool]:
    """Return the bytes of a head, how many of a body may follow, if none may, if it is chunked, if the end closes.

    The size is that of the body, if it is known from elsewhere than its Content-Length. A response that repeats within
    a second takes one look-up (RFC 9112 §6.3).
    """
    lines, length, is_old = head.lines, head.length, version == "HTTP/1.0"
    has_body = method != "HEAD" and head.status not in (204, 304)  # RFC 9110 §6.4.1
    if length is None and (size or has_body):
        length = size
    is_chunked = length is None and has_body and not is_old
    is_closing = is_closing or head.is_closing or (is_old and has_body and length is None)
    if is_chunked:
        lines += b"Transfer-Encoding: chunked\r\n"
    elif length is not None and head.status != 204:  # RFC 9110 §8.6
        lines += b"Content-Length: %d\r\n" % length
    if is_closing or is_old:
        lines += b"Connection: close\r\n" if is_closing else b"Connection: keep-alive\r\n"
    if not head.has_date:
        lines += make_date_line(second)
    left = 0 if not has_body else UNBOUNDED if length is None else length
    return lines + b"\r\n", left, not has_body, is_chunked, is_closing


@lru_cache(maxsize=64)
def parse_response_head(status: str, response_headers: tuple[tuple[str, str], ...]) -> ResponseHead:
    """Return status and headers after checks that name the culprit: one look-up for a response that repeats.

    What passes here reaches the client byte for byte: a CR LF in it would split the response in two.
    """
    if not isinstance(status, str) or not STATUS.fullmatch(status):
        raise ValueError("not a status such as '200 OK': %r" % (status,))
    lines, length, names = ["HTTP/1.1 %s\r\n" % (status if " " in status else status + " ")], None, set()
    for header in response_headers:
        name, value = check_header(header)
        names.add(name)
        if name == "content-length":
            if length is not None:
                raise ValueError("a second Content-Length: %r" % (value,))
            length = int(value)
        elif name != "connection":
            lines.append("%s: %s\r\n" % (header[0], value))
    if "server" not in names:
        lines.append("Server: %s\r\n" % PRODUCT)
    text = "".join(lines).encode("latin-1")
    length = 0 if status.startswith("205") else length  # RFC 9110 §15.3.6
    return ResponseHead(int(status[:3]), text, length, "connection" in names, "date" in names)


def check_header(header: tuple[str, str]) -> tuple[str, str]:
    """Return the name of a header in lower case and its value, if an application may send it."""
    if not (isinstance(header, tuple) and len(header) == 2 and all(isinstance(part, str) for part in header)):
        raise TypeError
    name, value = header[0].lower(), header[1].strip(" \t")
    if not TOKEN.fullmatch(name.encode("utf-8")):
        raise ValueError("not a field name: %r" % header[0])
    if not RESPONSE_FIELD_VALUE.fullmatch(value):
        raise ValueError("a character that no field value may have in %s: %r" % header)
    if name in HOP_BY_HOP_FIELDS or (name == "connection" and value.lower() != "close"):
        raise ValueError("a field of the connection is the server's to set: %s: %s" % header)
    if name == "content-length" and not (value.isascii() and value.isdigit() and len(value) < 19):
        raise ValueError("not a Content-Length: %r" % value)
    return name, value


DAYS = b"Mon Tue Wed Thu Fri Sat Sun".split()
MONTHS = b"- Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()


def make_date_line(second: int) -> bytes:
    """Return the Date field line (RFC 9110 §6.6.1): email.utils brings 20 modules, and strftime obeys the locale."""
    year, month, day, hour, minute, second, weekday = time.gmtime(second)[:7]
    date = (DAYS[weekday], day, MONTHS[month], year, hour, minute, second)
    return b"Date: %b, %02d %b %d %02d:%02d:%02d GMT\r\n" % date


class FileWrapper:
    """wsgi.file_wrapper (PEP 3333, "Optional Platform-Specific File Handling"): a file as an iterable of blocks."""

    def __init__(self, file: Any, block_size: int = RECEIVE_SIZE) -> None:
        self.file = file
        self.block_size = block_size

    def __iter__(self) -> Iterator[bytes]:
        return iter(partial(self.file.read, self.block_size), b"")

    def close(self) -> None:
        """Close the file, if it can be closed."""
        if hasattr(self.file, "close"):
            self.file.close()

    def find_regular_file(self) -> tuple[int, int, int] | None:
        """Return the descriptor, offset and remaining size of a file whose bytes may be taken straight from the disk.

        Only where Python would read the same bytes: not from a GzipFile, which has a descriptor, too, nor from a
        class with a read() of its own, nor from /proc, whose files have no blocks and tell no size.
        """
        file, raw = self.file, getattr(self.file, "raw", self.file)
        if type(file) not in (io.FileIO, io.BufferedReader, io.BufferedRandom) or type(raw) is not io.FileIO:
            return None
        status = os.fstat(file.fileno())
        if not (file.readable() and stat.S_ISREG(status.st_mode) and status.st_blocks):
            return None
        offset = file.tell()
        return file.fileno(), offset, max(status.st_size - offset, 0)


# ---- 9. Connection ----------------------------------------------------------
# One connection: its requests in order, until somebody says close. Whatever goes wrong with a request ends up in
# serve_request: it is answered there, or cut off, and logged, and nothing behind it is interpreted.


def serve_connection(
    application: Application, options: Options, sock: socket.SocketType, address: Any, activity: Activity
) -> None:
    """Serve all requests of a connection, then close it."""
    try:
        stream = Stream(sock, activity, options.timeout)
        environ = make_connection_environ(sock, address, not options.no_fork)
        patience = min(HEAD_TIMEOUT, options.timeout)
        while serve_request(application, options, stream, environ, patience):
            activity.rest()
            patience = options.keep_alive
        sock.shutdown(socket.SHUT_WR)  # the end for the client, also if a process of the application holds a copy
    except (ClientGoneError, OSError):
        pass  # OSError: it was reset before we first looked at it
    finally:
        sock.close()


def serve_request(
    application: Application, options: Options, stream: Stream, connection: Environ, patience: float
) -> bool:
    """Serve the next request, if it comes within the patience; return whether another may follow (RFC 9112 §9.3)."""
    response, head, detail, began = Response(stream), b"", "", 0.0
    try:
        if not (head := read_head(stream, patience)):
            return False
        began = stream.activity.work(head)
        request, variables = interpret_head(head)
        response.request = request
        response.is_closing = not (request.is_persistent and options.keep_alive)
        connection["webserver.request"] += 1
        environ = {**variables, **connection, "wsgi.input": io.BytesIO()}
        if request.length != 0:
            stream.set_patience(options.timeout)
            response.body = Body(stream, request, options.limit_request_body)
            add_input(environ, response.body)
        run_application(application, environ, response)
    except BaseException as error:  # SystemExit in an application is an error like any other
        if stream.activity.pid != os.getpid() or (options.no_fork and isinstance(error, KeyboardInterrupt)):
            raise
        detail = recover(response, head or stream.pending, error)
    if options.access_log != "off":
        log_access(options.access_log, response, connection, head or stream.pending, began, detail)
    body = response.body
    if not (detail or response.is_closing) and (body is None or body.drain()):
        return True
    # Only a client that wanted the close itself and whose bytes were all read needs no time for what it may still send.
    if detail or stream.pending or response.request.is_persistent or (body and (body.is_chunked or body.remaining)):
        stream.linger()
    return False


@lru_cache(maxsize=64)
def interpret_head(head: bytes) -> tuple[Request, Environ]:
    """Return the request that the head is, and its part of the environ: one look-up for a head that repeats."""
    request = parse_head(head)
    return request, make_request_environ(request)


def recover(response: Response, head: bytes, error: BaseException) -> str:
    """Answer what went wrong, or cut the response off so that the client can tell; return the detail for the log."""
    if isinstance(error, ClientGoneError):
        return "the client has gone"
    if isinstance(error, HTTPError):
        status, detail = error.args
    else:
        log_exception(error, head)
        overdue = isinstance(error, Overdue)
        status, detail = (504, "the application took too long") if overdue else (500, "the application failed")
    with suppress(ClientGoneError):  # the log line says what it would have been told
        if not response.is_head_sent:
            send_error(response, head, "%d %s" % (status, REASONS[status]), detail)
        elif response.left == UNBOUNDED and not (response.is_complete or response.is_chunked):
            response.stream.reset()  # only the close would tell that the body is complete
    return str(detail)


def send_error(response: Response, head: bytes, status: str, detail: str) -> None:
    """Answer with the status and the detail, and end the connection."""
    if response.request is NO_REQUEST and head.lstrip(b"\r\n").startswith(b"HEAD "):
        response.request = NO_REQUEST._replace(method="HEAD")
    response.body = None
    response.is_closing = True
    response.head = parse_response_head(status, (("Content-Type", "text/plain; charset=utf-8"),))
    response.send(("%s: %s\n" % (status, detail)).encode(), is_last=True)


def log_access(style: str, response: Response, connection: Environ, head: bytes, began: float, detail: str) -> None:
    """Log a request that has ended: in the combined format with the seconds taken and what went wrong, or as JSON."""
    facts = {
        "client": connection["REMOTE_ADDR"] or "-",
        "time": make_log_time(int(time.time())),
        "request": head.lstrip(b"\r\n").partition(b"\r\n")[0].decode("latin-1"),
        "status": response.head.status if response.head else 0,  # 0: the client went before it was answered
        "bytes": response.sent,
        "referer": response.request.fields.get("referer", "-"),
        "user_agent": response.request.fields.get("user-agent", "-"),
        "seconds": round(time.monotonic() - began, 6) if began else 0.0,
        "detail": detail,
    }
    for length in MAX_LOGGED:
        cut = {key: value[:length] if isinstance(value, str) else value for key, value in facts.items()}
        if style == "json":
            import json

            line = json.dumps(cut)
        else:
            safe = {key: escape(value) if isinstance(value, str) else value for key, value in cut.items()}
            line = (COMBINED + ' "%(detail)s"' if detail else COMBINED) % safe
        if len(line) < select.PIPE_BUF:
            break
    write_line(1, line)


COMBINED = '%(client)s - - [%(time)s] "%(request)s" %(status)d %(bytes)d "%(referer)s" "%(user_agent)s" %(seconds).6f'


@lru_cache(maxsize=1)
def make_log_time(second: int) -> str:
    """Return the time of a log line, in UTC."""
    year, month, day, hour, minute, second = time.gmtime(second)[:6]
    return "%02d/%s/%d:%02d:%02d:%02d +0000" % (day, MONTHS[month].decode(), year, hour, minute, second)


UNSAFE = re.compile(r'[^ !#-\[\]-~]')


def escape(text: str) -> str:
    r"""Return the text in visible ASCII, the rest as \xNN: what a client sent must not forge a line or a quote."""
    return UNSAFE.sub(lambda match: "\\x%02x" % ord(match.group()), text)


def write_line(fd: int, line: str) -> None:
    """Write one line of a log, whole or not at all: a log that nobody takes any more must not stop the service.

    One write(2) of up to PIPE_BUF bytes is never mixed with another's, and does not block where select(2) says so, but
    for the moment in which another process was faster.
    """
    data = line.encode("utf-8", "backslashreplace")[: select.PIPE_BUF - 1] + b"\n"
    try:
        if select.select([], [fd], [], 0)[1]:
            os.write(fd, data)
    except OSError:
        pass  # it was closed: there is nowhere to complain


def log_error(text: str) -> None:
    """Write to stderr, every line with the pid in front, so that none can be forged by what it quotes."""
    for line in text.splitlines():
        write_line(2, "[%d] %s" % (os.getpid(), "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)))


def log_exception(error: BaseException, head: bytes = b"") -> None:
    """Write the traceback to stderr, from the first frame on that is neither the server's nor the import system's."""
    import traceback

    trace = error.__traceback__
    while trace and (trace.tb_frame.f_globals is globals() or "importlib" in trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    if head:
        log_error('error in "%s"' % escape(head.lstrip(b"\r\n").partition(b"\r\n")[0].decode("latin-1")))
    log_error("".join(traceback.format_exception(type(error), error, trace)))


# ---- 10. Processes ----------------------------------------------------------
# The parent binds, forks, reaps and watches; it never touches a connection. A child accepts one connection (or more,
# by --connections-per-child), serves it and exits. All children share the listening socket; one of them always waits
# in accept(), forked ahead, so that the fork is off the way of the client. fork(2), waitpid(2), signal(7).
#
# What parent and children share is the scoreboard: a row of times, one slot for each child, in anonymous memory. A
# slot has one writer at a time: the child while it lives, the parent before the fork, after the reaping, and when the
# child is stuck. From it alone the parent knows whether a child is spare, who is idle, and whose request is overdue.

SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM)
LISTEN_FD = 3  # where sd_listen_fds(3) has the first socket
IT_LOADS = 93  # the exit status of a check that got as far as to serve
OWN_SOCKET = "webserver.py"  # its name, if it was this program that opened it, before a reload


class Server:
    """Owns the listening socket, the scoreboard and the children; in a child, what of these is its own."""

    serve: Service

    def __init__(self, listener: socket.socket, options: Options) -> None:
        self.listener, self.options = listener, options
        self.family = int(listener.family)
        self.pid = os.getpid()  # the parent's
        self.child_pid = self.pid if options.no_fork else 0  # in a child, its own
        self.board, self.times, self.notes = make_scoreboard(options.max_connections + 1)
        self.free_slots = list(range(options.max_connections))[::-1]  # low ones first, where `has_spare` finds them
        self.elder_slot = options.max_connections  # of all that were left by a reload, and of the process of --no-fork
        self.elders_by = time.monotonic() + options.graceful_timeout  # when those must have finished
        self.children = dict.fromkeys(map(int, os.environ.pop("WEBSERVER_CHILDREN", "").split()), self.elder_slot)
        self.asked = set(self.children)  # children that were asked to finish
        self.activity = Activity(self.times, self.notes, self.elder_slot)  # a child's; its slot is set before the fork
        self.wake_read, self.wake_write = os.pipe()
        self.signals: list[int] = []  # that came and were not obeyed yet
        self.is_hearing = False  # signals are caught
        self.is_forking = False  # a child of ours is being born
        self.masks: list[Any] = []  # of the signals that were blocked before other forks under way
        self.suspects: set[int] = set()  # spare children that had not taken a newcomer at the last TICK
        self.deaths = 0  # of children in a row that no connection had reached
        self.next_fork = self.next_ask = self.next_tick = 0.0  # not before these times
        self.stop_by: float | None = None  # when the children must have finished; None while serving
        self.checker = 0  # the pid of the process that tries new code, 0 if there is none
        self.check_by = 0.0  # when it must have finished
        self.wants_check = False  # something has changed meanwhile
        self.socket_path = os.path.abspath(options.bind[5:]) if options.bind.startswith("unix:") else ""
        self.socket_file = identify_file(self.socket_path)
        self.sources: dict[str, int] = {}  # the source files and when they were changed, under --reload
        self.totals = {"connections": 0, "forks": 0, "reaped": 0, "timeouts": 0, "crashes": 0}
        self.last_said: dict[str, float] = {}

    def run(self, serve: Service) -> None:
        """The parent's life: keep a child spare, sleep until something happens, and look after what did."""
        self.serve = serve
        self.sources = list_sources() if self.options.reload else {}
        notify("READY=1")
        if self.options.no_fork:
            self.serve_connections()
            return
        while self.is_listening() or self.children:
            self.keep_spare()
            self.sleep()
            self.obey()
            self.reap()
            self.watch(time.monotonic())

    # Signals are data: the handler notes the number, a byte in the wake-up pipe ends the sleep, and the loop does what
    # was asked. So nothing happens between two lines of the parent that is not written there (signal(7)).

    def catch_signals(self) -> None:
        """Have signals noted from now on; a reload has kept them blocked until here.

        Once more when the application is loaded: it may have set handlers, or blocked signals, that are the server's.
        """
        os.set_blocking(self.wake_read, False)
        os.set_blocking(self.wake_write, False)
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        for signum in SIGNALS:
            if signum != signal.SIGINT or not self.options.no_fork:  # there it is for the debugger
                signal.signal(signum, self.on_signal)
        if not self.is_hearing:
            self.is_hearing = True
            hooks = {"after_in_parent": self.unblock_signals, "after_in_child": self.disown}
            os.register_at_fork(before=self.block_signals, **hooks)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def on_signal(self, signum: int, frame: Any) -> None:
        """Handle a signal: the parent notes it, in a child it concerns the connection."""
        if self.child_pid:
            since = self.times[self.activity.slot]
            if signum == signal.SIGTERM:
                self.finish()
            elif signum == signal.SIGALRM and FREE < since < time.monotonic() - self.options.timeout and not self.masks:
                raise Overdue  # else the request was done when the signal came, or a fork is under way
        else:
            self.signals.append(signum)

    # CPython drops a signal that comes between fork(2) and the return of os.fork(). A child of ours hears it again at
    # the next TICK. Around a fork of the application signals wait, and the new process loses what it never asked for.

    def block_signals(self) -> None:
        """Let signals wait; forks in several threads may be under way."""
        if not self.is_forking:
            self.masks.append(())  # from here on no request is interrupted
            self.masks[-1] = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def unblock_signals(self) -> None:
        """Let them come as before."""
        if not self.is_forking:
            signal.pthread_sigmask(signal.SIG_SETMASK, self.masks[-1])
            self.masks.pop()

    def disown(self) -> None:
        """Give up, in a process of the application, what is the server's: it must neither answer nor hold the port."""
        if not self.is_forking:
            signal.set_wakeup_fd(-1)
            self.board, self.times, self.notes = make_scoreboard(1)  # of its own
            self.activity.times, self.activity.notes, self.activity.slot = self.times, self.notes, 0
            self.listener.close()
            if self.activity.sock:
                self.activity.sock.close()
            for signum in SIGNALS:
                if signal.getsignal(signum) == self.on_signal:
                    signal.signal(signum, signal.SIG_DFL)
            self.unblock_signals()

    def fork(self) -> int:
        """Return the pid of a new child, 0 in the child; -1 if the system is short of memory or processes."""
        self.is_forking = True
        try:
            pid = os.fork()
        except OSError as error:  # EAGAIN, ENOMEM
            self.say("cannot fork: %s" % error.strerror)
            pid = -1
        if pid == 0:
            signal.set_wakeup_fd(-1)
            self.child_pid = self.activity.pid = os.getpid()
        self.is_forking = False
        return pid

    def sleep(self) -> None:
        """Return when a signal, a child or, at the cap, a newcomer asks for something; after a TICK at most."""
        now = time.monotonic()
        pause = TICK if self.stop_by is None and not self.sources else TICK / 4
        for when in (self.next_ask, self.next_fork):
            if now < when:
                pause = min(pause, when - now)
        awaited = [self.wake_read]
        if self.stop_by is None and self.is_full() and now >= self.next_ask:
            awaited.append(self.listener.fileno())
        wait_readable(awaited, pause)
        try:
            os.read(self.wake_read, 256)
        except BlockingIOError:
            pass  # nobody rang

    def obey(self) -> None:
        """Do what the signals ask; SIGCHLD only ends the sleep."""
        while self.signals:
            signum = self.signals.pop(0)
            if signum in (signal.SIGTERM, signal.SIGINT):
                self.stop()
            elif signum == signal.SIGHUP:
                self.reload()
            elif signum == signal.SIGUSR1:
                self.report()

    # Birth

    def is_listening(self) -> bool:
        """Return whether the listening socket is still open."""
        return self.listener.fileno() >= 0

    def has_spare(self) -> bool:
        """Return whether a child waits in accept()."""
        return self.board.find(SPARE, 0, self.times.nbytes) >= 0  # much faster than to look at each

    def has_room(self) -> bool:
        """Return whether the cap allows one more child."""
        return len(self.children) < self.options.max_connections

    def is_full(self) -> bool:
        """Return whether for who knocks now somebody would have to leave."""
        return not self.has_room() and not self.has_spare()

    def keep_spare(self) -> None:
        """Fork a child if none waits in accept() and the cap allows one more."""
        may_fork = self.has_room() and self.is_listening() and time.monotonic() >= self.next_fork
        if self.has_spare() or not may_fork:  # asked once: a child may come back to accept() at any time
            self.times[WANTED] = FREE
            return
        slot = self.activity.slot = self.free_slots.pop()
        self.activity.is_finishing = self.stop_by is not None
        self.times[slot] = ACCEPTING
        pid = self.fork()
        if pid == 0:
            self.live()
        elif pid > 0:
            self.children[pid] = slot
            self.totals["forks"] += 1
        else:
            self.free_slot(slot)
            self.next_fork = time.monotonic() + TICK

    # Death

    def reap(self) -> None:
        """Collect every child that has ended: until then it is a zombie, a pid and a wait status in the kernel.

        SIGCHLD says that some have, not how many: signals merge. So this asks until there is none, and does not block
        for those that live (waitpid(2)). A pid that is not ours was orphaned and given to us, as to any PID 1.
        """
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self.totals["reaped"] += 1
            if pid == self.checker:
                self.end_check(status)
            elif pid in self.children:
                self.bury(pid, self.children.pop(pid), status)

    def bury(self, pid: int, slot: int, status: int) -> None:
        """Free the slot of a child that was reaped, and say so if it did not end by itself."""
        was_asked, was_accepting = pid in self.asked, self.times[slot] == ACCEPTING
        self.totals["connections"] += NOTE.unpack_from(self.notes, slot * NOTE_SIZE)[0]
        if status:
            self.totals["crashes"] += 1
            _, _, client, line = self.read_note(slot)
            doing = "waiting" if was_accepting else 'serving %s "%s"' % (client, line)
            log_error("child %d %s while %s" % (pid, describe_end(status), doing))
        if was_asked:
            self.next_ask = 0.0  # it has made room: the next newcomer need not wait longer
        self.asked.discard(pid)
        self.free_slot(slot)
        if not was_accepting:
            self.deaths = 0
        elif not was_asked:  # back off, or children that cannot live would be a fork storm
            self.deaths += 1
            self.next_fork = time.monotonic() + min(0.01 * 2 ** min(self.deaths, 7), TICK)

    def free_slot(self, slot: int) -> None:
        """Take back a slot."""
        if slot != self.elder_slot:
            NOTE.pack_into(self.notes, slot * NOTE_SIZE, 0, 0, b"", b"")
            self.times[slot] = FREE
            self.free_slots.append(slot)

    def read_note(self, slot: int) -> tuple[int, int, str, str]:
        """Return what the child in the slot noted: connections and requests so far, client and request-line."""
        connections, requests, client, head = NOTE.unpack_from(self.notes, slot * NOTE_SIZE)
        client, line = client.partition(b"\0")[0], re.split(b"[\r\0]", head.lstrip(b"\r\n"))[0]
        return connections, requests, escape(client.decode("latin-1")), escape(line.decode("latin-1"))

    # Watch

    def watch(self, now: float) -> None:
        """Enforce what time enforces."""
        if self.stop_by is not None:
            self.go_on_stopping(now, self.stop_by)
        elif now >= self.next_ask and self.is_full() and self.has_newcomers():
            self.make_room(now)
        if now >= self.next_tick:
            self.next_tick = now + TICK
            self.enforce_deadlines(now)
            self.look_after_spares()
            for pid in self.asked:  # again: a child may have been too young to hear it, or just about to wait
                self.ask(pid)
        if self.options.reload and not self.checker and (sources := list_sources()) != self.sources:
            self.sources = sources
            self.reload()

    def has_newcomers(self) -> bool:
        """Return whether a connection waits in the kernel's queue."""
        return wait_readable([self.listener.fileno()], 0)

    def make_room(self, now: float) -> None:
        """Ask the connection that has been idle longest to give way, else the busy one of the oldest request."""
        self.say("all %d connections are taken: idle ones give way" % self.options.max_connections)
        self.next_ask = now + 2 * LAST_CALL
        present = [(self.times[slot], pid) for pid, slot in self.children.items() if pid not in self.asked]
        idle = [entry for entry in present if entry[0] < FREE]
        busy = [entry for entry in present if FREE < entry[0] < ACCEPTING]
        if idle or busy:
            self.ask(max(idle)[1] if idle else min(busy)[1])

    def look_after_spares(self) -> None:
        """Ask a quarter of the spare children beyond the one to leave: a burst is forgotten in some seconds.

        One that has let a newcomer wait for two TICKs in a row is stuck, or was stopped: it counts as spare no more.
        """
        spare = {pid for pid, slot in self.children.items() if self.times[slot] == ACCEPTING and pid not in self.asked}
        for pid in list(spare)[: (len(spare) + 2) // 4]:
            self.ask(pid)
        has_newcomers = self.is_listening() and self.has_newcomers()
        for pid in spare & self.suspects if has_newcomers else ():
            if self.times[self.children[pid]] == ACCEPTING:
                self.times[self.children[pid]] = FREE
        self.suspects = spare if has_newcomers else set()

    def ask(self, pid: int) -> None:
        """Ask a child to finish: to answer the request in hand and close, at once if it is idle."""
        self.asked.add(pid)
        os.kill(pid, signal.SIGTERM)  # until it is reaped, the pid cannot be anybody else's

    def enforce_deadlines(self, now: float) -> None:
        """Interrupt requests that made no progress for too long; kill what takes no notice."""
        for pid, slot in self.children.items():
            since = self.times[slot]  # read once: it changes under our eyes
            overdue = now - since - self.options.timeout
            if FREE < since < ACCEPTING and overdue > ALARM_SLACK:
                self.totals["timeouts"] += overdue <= ALARM_SLACK + TICK
                os.kill(pid, signal.SIGALRM if overdue < KILL_AFTER else signal.SIGKILL)
        if self.checker and now >= self.check_by:
            os.kill(self.checker, signal.SIGKILL)
        if now >= self.elders_by:
            self.kill_all([pid for pid, slot in self.children.items() if slot == self.elder_slot])

    def kill_all(self, pids: list[int]) -> None:
        """End those that have had their time to finish."""
        if pids:
            log_error("children that have not finished and are killed: %d" % len(pids))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def say(self, text: str) -> None:
        """Log a trouble, once in a while if it lasts."""
        now = time.monotonic()
        if now - self.last_said.get(text, -QUIET) >= QUIET:
            self.last_said[text] = now
            log_error(text)

    def report(self) -> None:
        """Print who does what to stderr."""
        now = time.monotonic()
        rows = [(pid, self.times[slot], *self.read_note(slot)) for pid, slot in sorted(self.children.items())]
        log_error("%7s %-8s %8s %8s  %s" % ("pid", "state", "age", "requests", "client and request"))
        for pid, since, _, requests, client, line in rows:
            state = {ACCEPTING: "waiting", FREE: "leaving"}.get(since, "idle" if since < FREE else "busy")
            age = "%.1f s" % (now - abs(since)) if state in ("idle", "busy") else "-"
            log_error("%7d %-8s %8s %8d  %s %s" % (pid, state, age, requests, client, line))
        totals = {**self.totals, "connections": self.totals["connections"] + sum(row[2] for row in rows)}
        log_error("in all: " + ", ".join("%d %s" % (number, name) for name, number in totals.items()))

    # Stop

    def stop(self) -> None:
        """Stop gracefully; at the second request, at once."""
        if self.stop_by is not None:
            self.stop_by = 0.0
            return
        notify("STOPPING=1")
        self.stop_by = time.monotonic() + self.options.graceful_timeout
        if self.checker:
            os.kill(self.checker, signal.SIGKILL)
        for pid in self.children:
            self.ask(pid)
        if not self.options.bind.startswith("fd:"):  # that is somebody else's, who may want it back
            self.listener.listen(0)  # the kernel takes no more for us; those that it has are served before the end

    def go_on_stopping(self, now: float, stop_by: float) -> None:
        """Close the listening socket when its queue is empty, let the children finish, kill what is left at the end."""
        if self.is_listening() and (now >= stop_by - self.options.graceful_timeout / 2 or not self.has_newcomers()):
            self.listener.close()
            if self.socket_file and identify_file(self.socket_path) == self.socket_file:
                with suppress(OSError):  # we may no more
                    os.unlink(self.socket_path)
            for pid in self.children.keys() - self.asked:
                self.ask(pid)
        if now >= stop_by:
            self.kill_all(list(self.children))

    # Reload

    def reload(self) -> None:
        """Try the code as it is now in a fresh interpreter; only if it loads there, `replace` follows."""
        self.wants_check = bool(self.checker)  # then once more when that has ended
        if self.checker or self.stop_by is not None:
            return
        self.check_by = time.monotonic() + CHECK_TIMEOUT
        pid = self.fork()
        if pid == 0:
            start_again(WEBSERVER_CHECK="1")
        self.checker = max(pid, 0)
        if pid < 0:
            self.end_check(1)

    def end_check(self, status: int) -> None:
        """Hear what became of the check."""
        self.checker = 0
        if self.wants_check:
            self.reload()
        elif os.WIFEXITED(status) and os.WEXITSTATUS(status) == IT_LOADS:
            self.replace()
        elif self.stop_by is None:
            log_error("the new code does not load: the old code goes on")
            notify_reloading()
            notify("READY=1")  # else the manager would wait for the end of the reload that it has asked for

    def replace(self) -> None:
        """Become the new program, with the same pid and the same socket, which it gets as systemd would hand it over.

        Who connects meanwhile waits in the kernel's queue. The children finish, and are reaped by the new program.
        Signals stay blocked until it can hear them (sd_listen_fds(3), execve(2)).
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self.obey()
        if self.stop_by is not None or self.checker:  # that was asked for just now
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            return
        notify_reloading()
        for pid in self.children:
            self.ask(pid)
        os.dup2(self.listener.fileno(), LISTEN_FD)
        os.set_inheritable(LISTEN_FD, True)
        name = "" if self.options.bind.startswith("fd:") else OWN_SOCKET
        children = " ".join(map(str, self.children))
        start_again(LISTEN_FDS="1", LISTEN_PID=str(self.pid), LISTEN_FDNAMES=name, WEBSERVER_CHILDREN=children)

    # In the child

    def live(self) -> NoReturn:
        """The child's life, from fork to exit: nothing returns from here into the code of the parent."""
        status = 1
        try:
            os.close(self.wake_read)
            atexit._clear()  # what the parent registered is the parent's to run
            self.serve_connections()
            self.activity.renew()  # the exit, too, has a deadline
            status = 0
        except SystemExit as error:  # of a process that the application has forked
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException as error:
            log_exception(error)
        finally:
            exit_child(status)

    def serve_connections(self) -> None:
        """Accept connections and serve them one by one, as many as this process may."""
        self.times[WANTED] = FREE
        left = self.options.connections_per_child  # 0 never comes to 0 again
        while accepted := self.accept():
            sock, address = accepted
            left -= 1
            self.activity.connect(sock, str(address[0]) if isinstance(address, tuple) else "unix")
            try:
                if not self.has_spare():
                    self.times[WANTED] = 1.0
                    os.write(self.wake_write, b"\0")
            except OSError:
                pass  # the pipe is full of reasons to wake up, or nobody is left to read them
            if left == 0:  # close what is needed no more, before an application can hand it on
                self.listener.close()
                os.close(self.wake_write)
            self.serve(sock, address, self.activity)
            if left == 0:
                return
            self.times[self.activity.slot] = ACCEPTING

    def accept(self) -> tuple[socket.SocketType, Any] | None:
        """Return the next connection; None when there will be none for this child.

        This is what listener.accept() does, but for two enumerations and a layer of methods around the socket that
        nobody here needs: without them a child takes 40 % more connections in a second.
        """
        listener: Any = self.listener  # for its type knows no _accept
        while self.pid in (os.getppid(), self.child_pid):  # our parent lives, or this is it; else free the port
            try:
                fd, address = listener._accept()
                sock = socket.SocketType(self.family, socket.SOCK_STREAM, 0, fd)
                sock.setblocking(True)  # whatever an application has made the default: else SO_RCVTIMEO means nothing
                return sock, address
            except (BlockingIOError, ConnectionAbortedError):
                pass  # nobody came within a TICK, or somebody has gone again
            except OSError as error:
                if error.errno == errno.EBADF:  # `finish` has closed the listener
                    return None
                self.say("cannot accept: %s" % error.strerror)  # EMFILE, ENFILE, ENOBUFS, ENOMEM
                time.sleep(TICK)
        return None

    def finish(self) -> None:
        """Accept no more, answer the request in hand and close; when idle, after LAST_CALL.

        To close the listener makes accept() fail if it is under way, and harms nothing if it has just returned: an
        exception raised from here would lose the connection. Likewise a shorter timeout ends the wait for a request
        and does not lose one that has just come.
        """
        activity = self.activity
        activity.is_finishing = True
        self.listener.close()
        since = self.times[activity.slot]
        if activity.sock and since < FREE:
            waited = time.monotonic() + since  # which is negative: it is idle
            with suppress(OSError):  # closed already
                patience = make_timeval(max(LAST_CALL - waited, 0))
                activity.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)


# How this program was started, for a reload to start it again. Not as it is now: an application may have changed all.
STARTED_IN, STARTED_WITH = os.getcwd(), dict(os.environ)
STARTED_AS = [sys.executable, *getattr(sys, "orig_argv", [sys.executable, *sys.argv])[1:]]


def describe_end(status: int) -> str:
    """Return how a process has ended by its wait status (waitpid(2))."""
    if not os.WIFSIGNALED(status):
        return "exited with %d" % os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    return "died of " + ("signal %d" % number if number not in set(signal.Signals) else signal.Signals(number).name)


def wait_readable(fds: list[int], seconds: float) -> bool:
    """Wait until one of the descriptors has something to read, so many seconds at most; return whether one has."""
    poller = select.poll()  # not select(2): that ends at descriptor 1023
    for fd in fds:
        poller.register(fd, select.POLLIN)
    return bool(poller.poll(seconds * 1000))


def start_again(**environ: str) -> NoReturn:
    """Replace this process by the program as it was started, with these variables in its environment (execve(2))."""
    try:
        os.chdir(STARTED_IN)
        os.execve(sys.executable, STARTED_AS, {**STARTED_WITH, **environ})
    except OSError as error:
        log_error("cannot start %s again: %s" % (sys.executable, error.strerror))
    finally:
        os._exit(1)


def identify_file(path: str) -> tuple[int, int] | None:
    """Return what no other file has in common with this one; None if there is none."""
    with suppress(OSError):
        status = os.stat(path)
        return status.st_dev, status.st_ino
    return None


def list_sources() -> dict[str, int]:
    """Return when the sources were changed, also those never imported: one of them may be what breaks an import."""
    files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
    folders = {os.path.dirname(os.path.abspath(file)) for file in files if file.endswith(".py")}
    installed = re.compile("%s/|.*/(site|dist)-packages/" % re.escape(os.path.dirname(os.__file__)))
    times = {}
    for folder in (folder for folder in folders if not installed.match(folder + "/")):
        with suppress(OSError):  # the folder went while we looked
            for path in (os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".py")):
                with suppress(OSError):  # the file did, or is a link that leads nowhere
                    times[path] = os.stat(path).st_mtime_ns
    return times


def notify(state: str) -> None:
    """Tell the service manager that started us, if it asked to be told (sd_notify(3))."""
    if path := os.environ.get("NOTIFY_SOCKET", ""):
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)  # it may not be listening any more
                sock.sendto(state.encode(), "\0" + path[1:] if path[0] == "@" else path)
        except OSError as error:
            log_error("cannot notify %s: %s" % (path, error.strerror or error))


def notify_reloading() -> None:
    """Tell it that a reload has begun; READY=1 ends it."""
    notify("RELOADING=1\nMONOTONIC_USEC=%d" % (time.monotonic() * 1e6))


def make_scoreboard(slots: int) -> tuple[mmap.mmap, memoryview[float], memoryview]:
    """Return memory that stays shared over fork (mmap(2), MAP_SHARED), and in it the times and notes of the slots."""
    slots += 1  # WANTED
    board = mmap.mmap(-1, slots * (8 + NOTE_SIZE))
    return board, memoryview(board)[: slots * 8].cast("d"), memoryview(board)[slots * 8 :]


def exit_child(status: int) -> NoReturn:
    """End the process as the interpreter would (threads, exit handlers, buffers), with no way back to the caller."""
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        atexit._run_exitfuncs()
        flush_output()
    finally:
        os._exit(status)


def flush_output() -> None:
    """Write out what the streams of Python hold."""
    for file in (sys.stdout, sys.stderr):
        try:
            file.flush()
        except (AttributeError, OSError, ValueError):
            pass  # there is none, or nobody reads it, or it was closed


# ---- 11. Command line -------------------------------------------------------
# Words -> options, an application and a listening socket. Every mistake of the user is one sentence that says what to
# do; only a fault inside the user's own module shows a traceback, and only the user's part of it.


class StartError(Exception):
    """One sentence for the person at the command line, and the exit status: 2 for usage, else 1."""

    def __init__(self, sentence: str, status: int = 1) -> None:
        super().__init__(sentence)
        self.status = status


def main() -> int:
    """Run the command line; return the exit status."""
    name, options = parse_command_line(sys.argv[1:])
    sys.path.insert(0, os.getcwd())
    try:
        start(partial(load_application, name), options)
    except StartError as reason:
        write_line(2, "webserver.py: %s" % reason)
        return reason.status
    except KeyboardInterrupt:  # before the loop, or with --no-fork
        return 130
    return 0


def serve(application: Application, **options: Any) -> None:
    """Serve the application until SIGTERM or SIGINT; the options are the fields of Options. Raises StartError."""
    start(lambda: application, Options(**options))


def start(load: Callable[[], Application], options: Options) -> None:
    """Bind, drop privileges, load, and serve.

    Here the two halves meet: the server gets one callable, and does not know what it says to the client.
    """
    options = check_options(options)
    open_standard_files()
    if options.check:
        print("the application loads: %r" % (load(),))
        return
    if "WEBSERVER_CHECK" in os.environ:
        load()
        raise SystemExit(IT_LOADS)
    listener = inherit_listener()
    if listener and os.environ.pop("LISTEN_FDNAMES", "") != OWN_SOCKET:
        options = options._replace(bind="fd:%d" % LISTEN_FD)
    listener = listener or open_listener(options.bind)
    if options.user:
        drop_privileges(options.user)
    is_reload = "WEBSERVER_CHILDREN" in os.environ
    server = Server(listener, options)
    if is_reload:
        server.catch_signals()  # at a first start, not before the application is loaded: Ctrl-C ends that as anything
    try:
        application = load()
    except StartError:
        if is_reload:  # it did load when it was checked
            time.sleep(TICK)
            server.replace()  # try again; it comes back only if the server is to stop
        raise
    server.catch_signals()
    prepare_to_fork()
    if os.geteuid() == 0:
        log_error("running as root: let --user NAME give that up once the address is bound")
    log_error("serving on %s, pid %d" % (describe_address(listener), os.getpid()))
    server.run(partial(serve_connection, application, options))


def open_standard_files() -> None:
    """See that descriptors 0 to 2 are open: else a connection would get one of them, and with it what is logged."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stderr = sys.stderr or io.TextIOWrapper(io.FileIO(2, "w", closefd=False), line_buffering=True)
    faulthandler.enable(2)  # the Python stack of a segfault


def prepare_to_fork() -> None:
    """Leave nothing behind that a fork would double, lose or copy for no use."""
    if (threading := sys.modules.get("threading")) and threading.active_count() > 1:
        names = ", ".join(thread.name for thread in threading.enumerate()[1:])
        log_error("the application has started threads, which no child will have (%s)" % names)
    warm_up()
    flush_output()  # else each child would flush a copy
    gc.collect()
    gc.freeze()  # a collection in a child would write to, and so copy, all that it inherited


def warm_up() -> None:
    """Serve some requests to ourselves, before the first fork.

    What the interpreter learns from them, specialised bytecode and filled caches, every child inherits, and need not
    learn on pages of its own: 9 % more connections in a second.
    """
    options = Options(access_log="off", max_connections=1, connections_per_child=12, no_fork=True)
    with suppress(OSError), socket.socket(socket.AF_UNIX) as listener:  # no such sockets, or short of descriptors
        listener.bind("")
        listener.listen(options.connections_per_child)
        clients = [socket.socket(socket.AF_UNIX) for _ in range(options.connections_per_child + 3)]
        for _ in range(3):
            clients.pop().close()  # so many are free for the pipe of the server and for one connection
        for client in clients:
            client.connect(listener.getsockname())
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\nConnection: close\r\n\r\n")
        server = Server(listener, options)
        server.serve = partial(serve_connection, show_environ, options)
        server.serve_connections()
        os.close(server.wake_read)


def parse_command_line(words: list[str]) -> tuple[str, Options]:
    """Return the name of the application, "" if there is none, and the options; exit with 2 on a mistake."""
    parser = argparse.ArgumentParser(
        prog="webserver.py", usage=argparse.SUPPRESS, allow_abbrev=False, description=USAGE, epilog=ENVIRONMENT,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=80),  # else it imports shutil
    )  # fmt: skip
    parser.add_argument("application", nargs="?", default="", help=argparse.SUPPRESS)
    for flags, metavar, convert, text in OWN_OPTIONS:
        if convert is bool:
            parser.add_argument(flags, action="store_true", help=text)
            continue
        default = getattr(Options(), flags.split()[-1][2:].replace("-", "_"))
        text += " (%(default)s)" if default else ""
        parser.add_argument(*flags.split(), metavar=metavar, type=convert, default=default, help=text)
    parser.add_argument("--version", action="version", version=PRODUCT)
    for flags, text in FOREIGN_OPTIONS:
        refuse, hide = partial(refuse_option, text), argparse.SUPPRESS
        parser.add_argument(*flags.split(), nargs="?", const="", type=refuse, default=hide, help=hide)
    values = vars(parser.parse_args(words))
    return values.pop("application"), Options(**values)


def parse_value(pattern: str, convert: Callable[[str], Any], complaint: str, text: str) -> Any:
    """Return the value of an option whose text the pattern matches."""
    if not re.fullmatch(pattern, text):
        raise argparse.ArgumentTypeError(complaint % text)
    return convert(text)


def refuse_option(sentence: str, _: str) -> NoReturn:
    """Say what to do instead of an option that other servers have."""
    raise argparse.ArgumentTypeError(sentence)


USAGE = """webserver.py [options] [module:app | module:factory()]

A WSGI server: every connection is served by a process of its own. Without an
application it shows a page with the environ that an application would see."""

ENVIRONMENT = """environment: PORT serves on all addresses at this port; LISTEN_FDS with LISTEN_PID,
and NOTIFY_SOCKET, as systemd sets them."""

LOG_STYLES = ("combined", "json", "off")
NUMBER = partial(parse_value, "[0-9]+", int, "not a whole number: %r")
SECONDS = partial(parse_value, r"[0-9]+(\.[0-9]*)?|\.[0-9]+", float, "not a number of seconds: %r")

OWN_OPTIONS: tuple[tuple[str, str, Callable[[str], Any], str], ...] = (
    ("-b --bind", "ADDRESS", str, "HOST:PORT, [::1]:PORT, :PORT (all addresses), unix:PATH, fd:N (127.0.0.1:8000)"),
    ("-c --max-connections", "N", NUMBER, "connections at one time, each of them a process"),
    ("-t --timeout", "S", SECONDS, "seconds that a request may take without progress"),
    ("--keep-alive", "S", SECONDS, "seconds to wait for the next request on a connection, 0 for none"),
    ("--graceful-timeout", "S", SECONDS, "seconds for the requests in hand when the server stops or reloads"),
    ("--connections-per-child", "N", NUMBER, "connections that a process serves, one by one, 0 without end"),
    ("--limit-request-body", "BYTES", NUMBER, "the largest body of a request"),
    ("--user", "NAME[:GROUP]", str, "run as this user once the address is bound"),
    ("--access-log", "FORMAT", str, "combined, json or off, on stdout"),
    ("--reload", "", bool, "reload when a source file changes"),
    ("--check", "", bool, "load the application, say what was found, and exit with 0 or 1"),
    ("--no-fork", "", bool, "one process, one connection at a time, for a debugger"),
)

FOREIGN_OPTIONS = (
    ("-w --workers", "there are none to count: every connection has a process; see --max-connections"),
    ("--threads --worker-connections -k --worker-class", "every connection has a process; see --max-connections"),
    ("-p --port --host", "give the address as --bind HOST:PORT"),
    ("--max-requests", "a process ends with its connection; see --connections-per-child"),
    ("-D --daemon --pid", "let the service manager do that"),
)


BOUNDS = (
    ("max_connections", 1, 65536), ("timeout", 0.1, 1e6), ("keep_alive", 0, 1e6), ("graceful_timeout", 0, 1e6),
    ("connections_per_child", 0, 1e9), ("limit_request_body", 0, 1e18),
)  # fmt: skip


def check_options(options: Options) -> Options:
    """Return the options with what follows from the environment and from each other; refuse what cannot work."""
    for name, low, high in BOUNDS:
        if not low <= getattr(options, name) <= high:
            raise StartError("--%s must be from %g to %g" % (name.replace("_", "-"), low, high), 2)
    if options.access_log not in LOG_STYLES:
        raise StartError("--access-log is %r, not one of %s" % (options.access_log, ", ".join(LOG_STYLES)), 2)
    bind = options.bind or (":" + os.environ["PORT"] if os.environ.get("PORT") else "127.0.0.1:8000")
    return options._replace(bind=bind, connections_per_child=0 if options.no_fork else options.connections_per_child)


def drop_privileges(name: str) -> None:
    """Become another user for good: supplementary groups, group, user, in the order that each step still may."""
    import grp
    import pwd

    user, _, group = name.partition(":")
    try:
        entry = pwd.getpwnam(user)
        gid = grp.getgrnam(group).gr_gid if group else entry.pw_gid
        if os.geteuid() != entry.pw_uid:  # else a reload: it is done
            os.initgroups(user, gid)
            os.setgid(gid)
            os.setuid(entry.pw_uid)
    except KeyError:
        raise StartError("there is no user or group %r" % name) from None
    except OSError as error:
        raise StartError("cannot become %r: %s; only root can" % (name, error.strerror)) from None


# The application


def load_application(name: str) -> Application:
    """Return the application of a name such as `module:app`, `package.module` or `module:make_app()`."""
    import importlib

    module_name, colon, path = name.partition(":")
    if not name:
        return show_environ
    if module_name.endswith(".py") or not all(part.isidentifier() for part in module_name.split(".")):
        raise StartError("not the name of a module: %r; write module:app, without .py or /" % module_name, 2)
    try:
        module = importlib.import_module(module_name)
        return find_application(module, path if colon else "application" if hasattr(module, "application") else "app")
    except StartError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and (module_name + ".").startswith(error.name + "."):
            where = "%s and the installed ones" % os.getcwd()
            raise StartError("there is no module %r: looked in %s" % (module_name, where)) from None
        log_exception(error)
        raise StartError("%s does not load: see the traceback above" % name) from None


def find_application(module: Any, path: str) -> Application:
    """Return what the dotted path leads to; with `()` at its end, what that returns."""
    found = module
    for attribute in (path[:-2] if path.endswith("()") else path).split("."):
        if not hasattr(found, attribute):
            raise StartError("%s has no %r; it has %s" % (module.__name__, attribute, list_callables(module)))
        found = getattr(found, attribute)
    if path.endswith("()") and callable(found):
        found = found()
    if not callable(found):
        raise StartError("%s:%s is not callable; there are %s" % (module.__name__, path, list_callables(module)))
    application: Application = found
    return application


def list_callables(module: Any) -> str:
    """Return the names of the module that could be meant."""
    found = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
    own = [n for n in found if getattr(vars(module)[n], "__module__", module.__name__) == module.__name__]
    return "these callables: " + ", ".join((own or found)[:12]) if found else "no callables"


# The address


def inherit_listener() -> socket.socket | None:
    """Return the socket that a service manager, or a reload, has opened for us, if any (sd_listen_fds(3))."""
    number, pid = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    if pid != str(os.getpid()):
        return None
    if number != "1":
        raise StartError("LISTEN_FDS is %s: pass one socket" % number)
    return open_listener("fd:%d" % LISTEN_FD)


def open_listener(bind: str) -> socket.socket:
    """Return the listening socket for an address: HOST:PORT, :PORT, unix:PATH or fd:N."""
    kind, _, rest = bind.partition(":")
    if kind == "unix" and not rest or kind == "fd" and not rest.isdigit():
        raise StartError("not an address: %r; write unix:PATH or fd:N" % bind, 2)
    try:
        if kind == "unix":
            listener = bind_unix(rest)
        elif kind == "fd":
            listener = socket.socket(fileno=int(rest))
            listener.set_inheritable(False)
        else:
            listener = bind_tcp(bind)
        if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            listener.listen(BACKLOG)
    except OSError as error:
        advice = ADVICE.get(error.errno or 0, "")
        raise StartError("cannot listen on %s: %s%s" % (bind, error.strerror or error, advice)) from None
    listener.setblocking(True)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, make_timeval(TICK))  # accept() returns to look around
    if listener.family != socket.AF_UNIX:
        # Inherited by connections: else a small block waits 40 ms for the acknowledgement of the one before (tcp(7)).
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_DEFER_ACCEPT"):  # a connection that a browser opens on speculation costs no process
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, int(HEAD_TIMEOUT))
    return listener


ADVICE = {
    errno.EADDRINUSE: "; another program listens there: stop it, or choose another address with --bind",
    errno.EACCES: "; choose a port from 1024 on, or a path that you may write to",
    errno.EADDRNOTAVAIL: "; this machine has no such address",
    errno.ENOTSOCK: "; what was inherited there is no socket",
    errno.EBADF: "; nothing was inherited there",
}


def bind_tcp(bind: str) -> socket.socket:
    """Return a socket bound to HOST:PORT; without a host, to all addresses of both families."""
    match = re.fullmatch(r"(\[[^\[\]]+\]|[^\[\]:]*):([0-9]{1,5})", bind, re.ASCII)
    if not match or int(match.group(2)) > 65535:
        raise StartError("not an address: %r; write HOST:PORT, [::1]:PORT, :PORT, unix:PATH or fd:N" % bind, 2)
    host, port = match.group(1).strip("[]"), int(match.group(2))
    is_dual = not host and socket.has_dualstack_ipv6()
    try:
        found = socket.getaddrinfo("::" if is_dual else host or "0.0.0.0", port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise StartError("there is no host %r; choose an address of this machine" % host, 2) from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    # A port where connections of a former server are still in TIME_WAIT is free for us (socket(7)).
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if is_dual else 1)
    listener.bind(address)
    return listener


def bind_unix(path: str) -> socket.socket:
    """Return a socket bound to a path; a socket file that nobody listens at any more is replaced (unix(7))."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(TICK)
            if probe.connect_ex(path) == errno.ECONNREFUSED:  # else somebody may listen: let bind say what is wrong
                os.unlink(path)
    listener.bind(path)
    return listener


def describe_address(listener: socket.socket) -> str:
    """Return the address as one that a person can click."""
    if listener.family == socket.AF_UNIX:
        return "unix:%s" % listener.getsockname()
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        return "http://localhost:%d/ (all addresses)" % port
    return "http://%s:%d/" % ("[%s]" % host if ":" in host else host, port)


# The page without an application


def show_environ(environ: Environ, start_response: StartResponse) -> list[bytes]:
    """The application that is served when none is named: who answered, and what an application sees."""
    facts = "%s, process %d, request %d on this connection" % (PRODUCT, os.getpid(), environ["webserver.request"])
    rows = [(key, repr(value)) for key, value in sorted(environ.items())]
    if "text/html" in environ.get("HTTP_ACCEPT", ""):
        from html import escape as escape_html

        table = "\n".join("<tr><th>%s<td>%s" % (escape_html(key), escape_html(value)) for key, value in rows)
        kind, text = "text/html", PAGE % (escape_html(facts), table)
    else:
        kind, text = "text/plain", "%s\n\n%s\n" % (facts, "\n".join("%s = %s" % row for row in rows))
    start_response("200 OK", [("Content-Type", kind + "; charset=utf-8")])
    return [text.encode("utf-8", "backslashreplace")]


PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>It works</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 3rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100%%; font: 14px/1.6 ui-monospace, monospace }
th { text-align: left; padding-right: 1.5rem; vertical-align: top; white-space: nowrap }
td { overflow-wrap: anywhere } tr { border-top: 1px solid #ddd }
</style>
<h1>It works</h1>
<p>%s. An application would have seen this environ:</p>
<table>
%s
</table>
</html>
"""

if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""A WSGI server in one file: a connection at work has a process of its own, a connection at rest costs a descriptor.

    python3 webserver.py                      a page that shows what an application sees, on 127.0.0.1:8000
    python3 webserver.py module:app           the application `app` of `module`; `module:factory()` calls a factory
    python3 webserver.py --help               the options

It needs CPython 3.8 or later on a POSIX system. It needs no package and, on Linux, no writable disk. It runs as any
user, also as PID 1 of a container. A request that crashes, hangs or exits takes down its own connection and no other.

How to read it. Part one knows HTTP and WSGI and never forks. Part two knows processes, leaves HTTP to part one, and
calls `serve_connection` and `is_worth_reading`. Both use Slot, through which a process reports its state and sees its
orders. Part three adds what a server in production needs. In each section the main class or function comes first. An
exception that a docstring names is raised by the function. Three life cycles:

    bytes -> Stream -> Request -> environ -> application -> Response -> bytes        the life of a request
    accept -> rest -> a whole head -> queue -> child: requests -> silence -> rest    the life of a connection
    fork -> receive a connection -> serve -> exit -> reap                            the life of a child

`grep '^# ----' webserver.py` prints the table of contents. The functions `start` and `run`, near the end, are the
summary. Not supported: HTTP/2 and static files (the work of a proxy in front), WebSocket, ASGI, daemons, Windows.

Sources, cited where a rule is enforced: RFC 9110 (HTTP semantics), RFC 9112 (HTTP/1.1), RFC 3986 (URI), PEP 3333
(WSGI), and the man pages waitpid(2), signal(7), socket(7), tcp(7), unix(7), sd_listen_fds(3) and sd_notify(3).
"""

# A module that few processes need is imported where it is used: every fork would copy it.
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
import resource
import select
import selectors
import signal
import socket
import stat
import struct
import sys
import time
import types
from collections import Counter, deque
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache, partial
from _thread import get_ident  # threading.get_ident, without the import of threading
from typing import Any, Callable, Dict, Iterable, Iterator, NamedTuple, NoReturn, Sequence

__version__ = "1.1"
PRODUCT = "webserver.py/" + __version__

Environ = Dict[str, Any]
Write = Callable[[bytes], None]
StartResponse = Callable[..., Write]
Application = Callable[[Environ, StartResponse], Iterable[bytes]]


# ---- Part one: HTTP and WSGI ------------------------------------------------
# ---- 1. Options and limits --------------------------------------------------
# The options, and the limits of part one: the reason, the status code that answers an excess; in bytes and seconds.


# One entry for each field of Options, in their order, for the command line and the check of the options: the metavar,
# the help, the allowed values (the least and the greatest number, or the words; None: any), the short form
OPTIONS: list[tuple[str, str, Any, str]] = []


def option(default: Any, metavar: str, help: str, allowed: Any = None, short: str = "") -> Any:
    """Record the facts about the next field of Options, and return its default."""
    OPTIONS.append((metavar, help, allowed, short))
    return default


class Options(NamedTuple):
    """The options: given on the command line, or by these names as keyword arguments of `serve`."""

    bind: str = option("", "ADDRESS", "HOST:PORT, [::1]:PORT, :PORT, unix:PATH, fd:N (127.0.0.1:8000)", short="-b")
    max_children: int = option(256, "N", "processes at work at one time", (1, 65536), "-c")
    max_connections: int = option(10000, "N", "connections that wait, at rest or for a process", (1, 1e6))
    timeout: float = option(30.0, "S", "seconds that a request may take without progress", (0.1, 1e6), "-t")
    keep_alive: float = option(75.0, "S", "seconds to wait for the next request on a connection, 0 for none", (0, 1e6))
    graceful_timeout: float = option(30.0, "S", "seconds for requests in hand at a stop or a reload", (0, 1e6))
    drain_delay: float = option(0.0, "S", "seconds to go on accepting once the server is to stop", (0, 1e6))
    connections_per_child: int = option(1, "N", "connections that a process serves one by one, 0 without end", (0, 1e9))
    limit_request_body: int = option(1 << 30, "BYTES", "the largest body of a request, as 512K or 1G (1G)", (0, 1e18))
    limit_memory: int = option(0, "BYTES", "what a process may allocate beyond what it inherits, 0 for any", (0, 1e18))
    buffer_chunked: int = option(1 << 20, "BYTES", "up to this size a chunked body gets CONTENT_LENGTH (1M)", (0, 1e18))
    warm_up: Sequence[str] = option((), "PATH", "GET this path, or URL, before the first fork; may be given again")
    certfile: str = option("", "FILE", "serve TLS with the certificate in this file, which may hold the key, too")
    keyfile: str = option("", "FILE", "the key of the certificate")
    ca_certs: str = option("", "FILE", "demand a client certificate from one of the authorities in this file")
    forwarded_allow_ips: str = option("", "LIST", "addresses, networks, unix, *: X-Forwarded-* from these is believed")
    proxy_protocol: bool = option(False, "", "these peers begin a connection with a PROXY header")
    script_name: str = option("", "PATH", "mount the application under this path, which the requests carry")
    socket_mode: str = option("", "MODE", "the mode of the file of a unix socket, such as 660")
    user: str = option("", "NAME[:GROUP]", "run as this user once the address is bound")
    access_log: str = option("combined", "FORMAT", "combined, json or off, on stdout", ("combined", "json", "off"))
    reload: bool = option(False, "", "reload when a source file changes")
    check: bool = option(False, "", "check the options, load and warm up the application, and exit")
    no_fork: bool = option(False, "", "serve in one process, one request at a time, for a debugger")


MAX_REQUEST_LINE = 8190  # 414; as Apache's LimitRequestLine. RFC 9112 §3 asks for 8000 at least
MAX_FIELD_LINE = 8190  # 431, in a trailer section 400; as Apache's LimitRequestFieldSize
MAX_FIELDS = 100  # 431; as Apache's LimitRequestFields; the same for a trailer section
MAX_HEAD = 65536  # 431; the request-line, all field lines and the empty line
MAX_LENGTH_DIGITS = 18  # 413; of a Content-Length: it fits a signed number of 64 bits
MAX_CHUNK_LINE = 4096  # 400; a chunk-size with its extensions
MAX_CHUNK_EXTENSIONS = 16384  # 400; in all chunks of a body: else each byte of data could cost 4096 to parse
MAX_DRAINED = 65536  # the server reads up to this of a body that the application left unread, to keep the connection
MAX_REMEMBERED = 2048  # a larger head is parsed without the caches, and so are its lines: they could fill the memory
TICK = 1.0  # a process that waits checks its deadlines and its orders once in this time
HEAD_TIMEOUT = 10.0  # from the first byte of a head to its last: 408; from the accept to the first byte: a close
MIN_RATE = 500  # 408; bytes a second that a client must send or take on average, as Apache's mod_reqtimeout wants
MIN_RATE_GRACE = 20.0  # the average counts once the waits for the client add up to more than this, in one request
MIN_RATE_PRESSED = 32768  # the same in each second while PRESSED; an honest client on a slow line takes 3 times that
LINGER_TIMEOUT = 30.0  # to drop what a client still sends, up to its first silent second; as nginx's lingering_time
RECEIVE_SIZE = 65536  # one recv
JOIN_SIZE = 16384  # a block up to this size is copied behind its head, which is cheaper than sendmsg
FILE_BLOCK_SIZE = 1 << 18  # one read of a file
UNBOUNDED = float("inf")  # a length that is unknown when the head is sent; no deadline
REASONS = {
    400: "Bad Request", 404: "Not Found", 408: "Request Timeout", 413: "Content Too Large", 414: "URI Too Long",
    417: "Expectation Failed", 431: "Request Header Fields Too Large", 500: "Internal Server Error",
    501: "Not Implemented", 504: "Gateway Timeout", 505: "HTTP Version Not Supported",
}  # fmt: skip


class HTTPError(Exception):
    """The request ends in an error. Arguments: the status code, and a detail for the client and the log."""


class StartError(Exception):
    """The server cannot start: one sentence that tells the user why, and the exit status, 2 for usage, else 1."""

    def __init__(self, sentence: str, status: int = 1) -> None:
        super().__init__(sentence)
        self.status = status


class ClientGoneError(Exception):
    """The client has closed, was cut off or does not read: no answer reaches it. Argument: bytes that `send` sent."""


class ClientSilentError(Exception):
    """The server has waited for the client, which has sent or taken nothing, or too little."""


class Overdue(BaseException):
    """The deadline of the request has passed. A BaseException, which `except Exception` in an application misses."""


def require(condition: Any, status: int, detail: str) -> None:
    """Refuse the request with the status and the detail unless the condition holds."""
    if not condition:
        raise HTTPError(status, detail)


# ---- 2. Grammar -------------------------------------------------------------
# Above a pattern stands its ABNF rule, if it has one. All but PCT_ENCODED and BAD_HEAD_BYTE are used with fullmatch.
# Text that does not match is refused, never repaired: two servers could understand a repaired message in two ways.

# token = 1*tchar (RFC 9110 §5.6.2)
token = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
TOKEN = re.compile(token)
# quoted-string = DQUOTE *( qdtext / quoted-pair ) DQUOTE (RFC 9110 §5.6.4)
quoted_string = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*"'
# request-line = method SP request-target SP HTTP-version (RFC 9112 §3); a target is visible US-ASCII
REQUEST_LINE = re.compile(rb"(%s) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])" % token)
# origin-form = absolute-path [ "?" query ], or absolute-form with the scheme http or https (RFC 9112 §3.2);
# browsers send characters that RFC 3986 does not allow, but never a fragment
TARGET = re.compile(rb"(?:(?i:https?)://([^/?#]*))?(/[^?#]*)?(?:\?([^#]*))?")
# pct-encoded = "%" HEXDIG HEXDIG (RFC 3986 §2.1)
PCT_ENCODED = re.compile(rb"%([0-9A-Fa-f]{2})")
# Host = uri-host [ ":" port ] (RFC 9110 §7.2); IP-literal / IPv4address / reg-name (RFC 3986 §3.2.2)
HOST = re.compile(
    rb"(?:\[(?:([0-9A-Fa-f:.]+)|[vV][0-9A-Fa-f]+\.[A-Za-z0-9._~!$&'()*+,;=:-]+)\]"
    rb"|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+)(?::[0-9]*)?"
)
# field-value = *( VCHAR / obs-text / SP / HTAB ) (RFC 9110 §5.5); no control but HTAB
FIELD_VALUE = re.compile(rb"[\t \x21-\x7e\x80-\xff]*")
# chunk-size [ chunk-ext ] (RFC 9112 §7.1); 16 digits go up to 2^64 - 1
CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,16})((?:[ \t]*;[ \t]*%b(?:[ \t]*=[ \t]*(?:%b|%b))?)*)" % (token, token, quoted_string)
)
# A byte that no head may hold, even one that is not whole yet: a control, a bare LF, a bare CR (RFC 9112 §2.2)
BAD_HEAD_BYTE = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?=[^\n])")
# Fields that a message may have only once: the values of two such lines cannot be joined to a list (RFC 9110 §5.3)
SINGLETON_FIELDS = frozenset((
    "authorization", "content-type", "date", "from", "host", "if-modified-since", "if-range", "if-unmodified-since",
    "max-forwards", "proxy-authorization", "range", "referer", "user-agent",
))  # fmt: skip
# status-code SP reason-phrase (PEP 3333), which may be missing; no 1xx: an application sends no interim response
STATUS = re.compile(r"[2-9][0-9][0-9](?: [\t\x20-\x7e\x80-\xff]*)?")
RESPONSE_FIELD_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")  # FIELD_VALUE, of a str
# Fields of the connection, which only the server may set (RFC 9110 §7.6.1; PEP 3333, "Other HTTP Features")
HOP_BY_HOP_FIELDS = frozenset((
    "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer", "trailers",
    "transfer-encoding", "upgrade",
))  # fmt: skip


# ---- 3. Stream --------------------------------------------------------------
# In part one, only Stream receives and sends. The kernel ends every wait after a second (SO_RCVTIMEO, SO_SNDTIMEO,
# socket(7)), which costs nothing while bytes flow. Then the process checks the deadline and its orders (section 11).

ONE_SECOND = struct.pack("@ll", 1, 0)  # a struct timeval
# As plain numbers: a member of an enumeration costs each fork some copied pages
DONT_WAIT, STREAM = int(socket.MSG_DONTWAIT), int(socket.SOCK_STREAM)


class Stream:
    """Owns a connected socket and the bytes received from it but not yet consumed."""

    # A method that receives raises ClientGoneError if the connection was reset, and ClientSilentError if the client
    # sends nothing for the timeout, or for a second while requests wait for a process, or less than `Pace` asks for;
    # `receive_at_rest` and `receive_by` differ. A method that sends raises ClientGoneError for all of these.
    __slots__ = ("buffer", "pace", "preface", "previous_head", "rest_timeout", "slot", "sock", "timeout")

    def __init__(self, sock: Any, slot: Slot, timeout: float) -> None:
        self.sock, self.slot, self.timeout = sock, slot, timeout
        self.preface: Callable[[float | None], float | None] | None = None  # receives what precedes HTTP, if anything
        self.rest_timeout = 0.0  # seconds that a connection at rest stays in this process; 0 if the parent can hold it
        self.buffer = b""  # bytes received and not consumed yet
        self.previous_head = b""  # clients repeat their heads
        self.pace: Pace | None = None  # of the request in hand; None before the first wait for its client

    def receive_at_rest(self, deadline: float | None) -> None:
        """Receive the first bytes of a request; ClientGoneError if the client has closed, OSError for a reset.

        BlockingIOError if none come in a second; over TLS, if none come by the deadline, or this process may not wait.
        """
        self.pace = None
        while True:
            try:
                received = self.sock.recv(RECEIVE_SIZE)
                break
            except BlockingIOError:  # a second has passed
                now = self.slot.mark_silent()
                deadline = deadline or now + self.rest_timeout - TICK
                if not self.rest_timeout or now >= deadline or not self.slot.may_keep():
                    raise
        if not received:
            raise ClientGoneError(0)
        self.buffer += received

    def receive_more(self, deadline: float | None = None) -> bool:
        """Append the next bytes of the client to the buffer; return False if the client has ended its side."""
        began = self.slot.mark_silent()  # from here on the server waits for the client
        while True:
            try:
                received = self.sock.recv(RECEIVE_SIZE)
                break
            except BlockingIOError:
                if self.slot.is_told(PRESSED) or time.monotonic() >= (deadline or began + self.timeout):
                    raise ClientSilentError from None
            except OSError as error:
                raise ClientGoneError(0) from error
        self.pace = self.pace or Pace()
        self.pace.add(self.slot.mark_progress() - began, len(received), self.slot.is_told(PRESSED))
        self.buffer += received
        return bool(received)

    def receive_by(self, deadline: float, what: str) -> None:
        """Receive more of the part named `what`, due by the deadline; HTTPError if the client is late or has closed."""
        try:
            if time.monotonic() >= deadline:  # a byte now and then would keep receive_more from this check
                raise ClientSilentError
            require(self.receive_more(deadline), 400, "the client closed inside the " + what)
        except ClientSilentError:
            raise HTTPError(408, "the %s was not complete in time" % what) from None

    def read_line(self, limit: int, excess: str = "too long a line in the chunked body") -> bytes:
        """Return the next line of a chunked body without its CRLF; HTTPError as soon as it is too long or lacks CR."""
        while (end := self.buffer.find(b"\n", 0, limit + 2)) < 0:
            require(self.buffer[limit : limit + 2] in (b"", b"\r"), 400, excess)  # at most `limit` bytes and a CR
            require(self.receive_more(), 400, "the client closed inside the chunked body")
        line, self.buffer = self.buffer[:end], self.buffer[end + 1 :]
        require(line.endswith(b"\r"), 400, "a bare LF in the chunked body")
        return line[:-1]

    def send(self, data: bytes, *more: bytes) -> None:
        """Send all the parts; ClientGoneError if the client has gone."""
        sent, size = 0, len(data) + (sum(map(len, more)) if more else 0)
        try:
            sent = self.sock.sendmsg((data, *more), (), DONT_WAIT) if more else self.sock.send(data, DONT_WAIT)
        except BlockingIOError:
            pass  # the kernel takes nothing now
        except OSError as error:
            raise ClientGoneError(0) from error
        if sent < size:
            self.send_rest((data, *more), sent)

    def send_rest(self, parts: tuple[bytes, ...], sent: int) -> None:
        """Send the parts from this byte on; ClientGoneError if the client has gone, takes nothing, or too little."""
        # The acknowledged bytes tell what the client takes (SIOCOUTQ, in Python TIOCOUTQ). send(2) does not: it blocks
        # until a third of a large buffer is free, which takes a slow client more than a second.
        unacknowledged, end, deadline = count_unacknowledged(self.sock), 0, time.monotonic() + self.timeout
        self.pace = pace = self.pace or Pace()
        try:
            for part in [memoryview(part) for part in parts]:  # to join large ones would need their memory again
                end += len(part)
                while sent < end:
                    began, taken_before = self.slot.mark_silent(), sent - unacknowledged
                    with suppress(BlockingIOError):
                        sent += self.sock.send(part[sent - end :])  # the last `end - sent` bytes of the part
                    unacknowledged = count_unacknowledged(self.sock)
                    taken, now = sent - unacknowledged - taken_before, self.slot.mark_progress()
                    if taken > 0:
                        deadline = now + self.timeout
                    elif now >= deadline:
                        raise ClientSilentError
                    pace.add(now - began, taken, self.slot.is_told(PRESSED))
        except ClientSilentError as error:
            self.reset_on_close(True)  # else the kernel would hold for minutes what the client has not taken
            raise ClientGoneError(sent) from error
        except OSError as error:
            raise ClientGoneError(sent) from error

    def linger(self) -> None:
        """End our side, then drop what still comes: a close with unread bytes may lose the response (RFC 9112 §9.6)."""
        until = time.monotonic() + LINGER_TIMEOUT
        with suppress(OSError, ClientSilentError):  # the client has gone, or is silent; `Child.on_signal`
            self.sock.shutdown(socket.SHUT_WR)
            while self.slot.mark_silent() < until:
                is_hasty = self.slot.is_told(STOPPING | PRESSED)  # then drop only what is here already
                if not self.sock.recv(RECEIVE_SIZE, DONT_WAIT if is_hasty else 0):
                    return

    def reset_on_close(self, is_wanted: bool) -> None:
        """Set whether the close of the socket, also by an exit, resets the connection (SO_LINGER of 0 seconds)."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", is_wanted, 0))  # a struct linger


class Pace:
    """Owns the pace of the client in one request: seconds that the server waited for it, bytes that it sent or took."""

    seconds = recent_seconds = 0.0
    count = recent_count = 0

    def add(self, seconds: float, count: int, is_pressed: bool) -> None:
        """Add a wait of so many seconds, in which so many bytes passed; ClientSilentError if the client is too slow."""
        # The average decides, so that a client may be slow at times. Under pressure each second decides, too.
        self.seconds, self.count = self.seconds + seconds, self.count + count
        self.recent_seconds, self.recent_count = self.recent_seconds + seconds, self.recent_count + count
        if self.recent_seconds >= TICK:
            is_slow = is_pressed and self.recent_count < MIN_RATE_PRESSED * self.recent_seconds
            if is_slow or (self.seconds > MIN_RATE_GRACE and self.count < MIN_RATE * self.seconds):
                raise ClientSilentError
            self.recent_seconds, self.recent_count = 0.0, 0


def count_unacknowledged(sock: socket.SocketType) -> int:
    """Return the bytes sent that the client has not acknowledged, at a unix socket with overhead; 0 if unknown."""
    import fcntl
    import termios

    with suppress(OSError):
        held = int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        return held - int(getattr(sock, "pushed", 0))  # minus the TLS records of data that does not count as sent yet
    return 0


# ---- 4. Request -------------------------------------------------------------
# Bytes -> a Request that keeps every rule, or HTTPError: RFC 9112 §2 to §6 and §9.3, RFC 9110 §5, §7 and §10.1.1.
# The parsers cache what they return, since clients repeat their heads, or all lines but one. They cache no error. The
# caches are bounded in number and size, and bytes hash with a secret: a client cannot grow them or make keys collide.


class Request(NamedTuple):
    """The checked head of a request. Of a head that could not be read: only `line`, and `method` if that is HEAD."""

    method: str = ""
    target: str = ""  # as it was received
    path: str = ""  # percent-decoded, each byte as the latin-1 character that PEP 3333 wants
    query: str = ""  # raw
    version: str = "HTTP/1.1"
    fields: dict[str, str] = {}  # names in lower case, each once
    length: int | None = 0  # of the message body; None if it is chunked
    is_persistent: bool = False
    expects_continue: bool = False
    line: bytes = b""  # the request-line, for the logs: unchecked if the head could not be read


def read_head(stream: Stream, deadline: float | None) -> bytes:
    """Return the next head with its empty line; HTTPError if it is none, or late; the errors of `receive_at_rest`."""
    if stream.preface:
        deadline = stream.preface(deadline)
    if not stream.buffer:
        stream.receive_at_rest(deadline)
        if stream.buffer == stream.previous_head:  # the old object: 10 % faster than to search and hash the new one
            stream.buffer = b""
            return stream.previous_head
    checked = 0
    while (end := stream.buffer.find(b"\r\n\r\n", max(checked - 3, 0))) < 0:  # it may have come in two parts
        if stream.buffer == b"\r\n":  # old clients send it after a body, and may rest behind it (RFC 9112 §2.2)
            stream.receive_at_rest(deadline)
            continue
        deadline = deadline or time.monotonic() + min(HEAD_TIMEOUT, stream.timeout)
        check_partial_head(stream.buffer, checked)
        checked = len(stream.buffer)
        stream.receive_by(deadline, "head")
    stream.previous_head, stream.buffer = stream.buffer[: end + 4], stream.buffer[end + 4 :]
    return stream.previous_head


def check_partial_head(data: bytes, checked: int) -> None:
    """Refuse now, not at the deadline, bytes that cannot become a head; `checked` of them were checked before."""
    require(not data.startswith(b"\x16\x03"), 400, "a TLS handshake on a port without TLS")
    require(not BAD_HEAD_BYTE.search(data, max(checked - 1, 0)), 400, "a control byte or a bare CR or LF in the head")
    most = MAX_REQUEST_LINE + 4  # with its CRLF, and an empty line before it, which `data[2:]` skips
    require(len(data) < most or b"\r\n" in data[2:most], 414, "a request-line that does not end")
    require(len(data) <= MAX_HEAD, 431, "a head that does not end")


def is_worth_reading(data: bytes, checked: int) -> bool:
    """Return whether the bytes begin with a whole head or cannot become one; `checked` of them were checked before."""
    end = data.find(b"\r\n\r\n", max(checked - 3, 0))
    with suppress(Exception):  # the process that reads the head meets the same error, and answers
        if end < 0:
            check_partial_head(data, checked)
            return False  # the parent goes on holding the connection
        if end + 4 <= MAX_REMEMBERED:
            parse_head(data[: end + 4])  # children that are forked from now on inherit the cached result
    return True


@lru_cache(maxsize=64)
def parse_head(head: bytes) -> tuple[Request, Environ]:
    """Return the request in a head, and its part of the environ."""
    require(len(head) <= MAX_HEAD, 431, "too large a head")
    start = 2 if head.startswith(b"\r\n") else 0  # one empty line before a request-line is tolerated (RFC 9112 §2.2)
    line, *lines = head[start:-4].split(b"\r\n")
    is_small = len(head) <= MAX_REMEMBERED
    parse_line = parse_request_line if is_small else parse_request_line.__wrapped__
    method, target, authority, path, query, version = parse_line(line)
    fields = parse_fields(lines, parse_field_line if is_small else parse_field_line.__wrapped__)
    if "host" in fields:
        check_host(fields["host"].encode("latin-1"), "an invalid Host")
    else:
        require(version == "HTTP/1.0", 400, "no Host")
    if authority is not None:
        fields["host"] = authority  # RFC 9112 §3.2.2
    length = parse_framing(version, fields)
    if "content-length" in fields:
        fields["content-length"] = str(length)  # equal repeats become one
    connection = parse_list(fields["connection"]) if "connection" in fields else ()
    is_persistent = "close" not in connection and (version != "HTTP/1.0" or "keep-alive" in connection)
    expectations = parse_list(fields["expect"]) if "expect" in fields else ()
    require({*expectations} <= {"100-continue"}, 417, "an expectation other than 100-continue")
    expects_continue = bool(expectations) and version != "HTTP/1.0"  # 1.0 knows none (RFC 9110 §10.1.1)
    request = Request(method, target, path, query, version, fields, length, is_persistent, expects_continue, line)
    return request, make_request_environ(request)


@lru_cache(maxsize=256)
def parse_request_line(line: bytes) -> tuple[str, str, str | None, str, str, str]:
    """Return the method, the target as received, its authority or None, path, query, and the version (RFC 9112 §3)."""
    require(len(line) <= MAX_REQUEST_LINE, 414, "too long a request-line")
    if not (match := REQUEST_LINE.fullmatch(line)):
        is_proxy_header = not line or line.startswith(b"PROXY ")  # an empty line begins version 2
        hint = ", as of a PROXY header: see --proxy-protocol" if is_proxy_header else ""
        raise HTTPError(400, "a malformed request-line" + hint)
    method, target, major, minor = match.groups()
    require(major == b"1", 505, "not a version of HTTP/1")
    require(method != b"CONNECT", 501, "CONNECT is for proxies")
    version = "HTTP/1.0" if minor == b"0" else "HTTP/1.1"  # a higher minor version is answered as 1.1 (RFC 9110 §2.5)
    authority = path = query = None
    if method != b"OPTIONS" or target != b"*":  # it is in origin-form or absolute-form (RFC 9112 §3.2)
        if not (match := TARGET.fullmatch(target)) or match.groups()[:2] == (None, None):  # TARGET matches ?q alone
            raise HTTPError(400, "a malformed request-target")
        authority, path, query = match.groups()
    if authority is not None:
        check_host(authority, "an invalid authority in the request-target")
        authority = authority.decode()
    path = path or (b"" if method == b"OPTIONS" else b"/")  # RFC 9112 §3.2.4
    if escapes := path.count(b"%"):  # urllib.parse could decode them, but every fork would copy it
        path, count = PCT_ENCODED.subn(lambda octet: bytes([int(octet[1], 16)]), path)
        require(count == escapes, 400, "a broken percent-escape in the path")
    return method.decode(), target.decode(), authority, path.decode("latin-1"), (query or b"").decode(), version


def parse_fields(lines: list[bytes], parse_line: Callable[[bytes], tuple[str, str]]) -> dict[str, str]:
    """Return the fields by name, repeated ones joined (RFC 9110 §5.3)."""
    require(len(lines) <= MAX_FIELDS, 431, "too many field lines")
    fields: dict[str, str] = {}
    for name, value in map(parse_line, lines):
        if "_" in name:  # in the environ, X_Y would pass for X-Y
            log_throttled("a field with an underscore in its name is dropped: send its name with a hyphen")
            continue
        if name in fields:
            require(name not in SINGLETON_FIELDS, 400, "a second " + name.title())
            value = fields[name] + ("; " if name == "cookie" else ", ") + value
        fields[name] = value
    return fields


@lru_cache(maxsize=512)
def parse_field_line(line: bytes) -> tuple[str, str]:
    """Return the name in lower case and the value of a field line (RFC 9112 §5)."""
    require(len(line) <= MAX_FIELD_LINE, 431, "too long a field line")
    name, colon, value = line.partition(b":")
    value = value.strip(b" \t")
    require(colon, 400, "a field line without a colon")
    require(TOKEN.fullmatch(name), 400, "a malformed field name")
    require(FIELD_VALUE.fullmatch(value), 400, "a control byte in a field value")
    return name.decode().lower(), value.decode("latin-1")


def parse_list(value: str) -> list[str]:
    """Return the members of a list, in lower case and without the empty ones (RFC 9110 §5.6.1)."""
    return [member.strip(" \t") for member in value.lower().split(",") if member.strip(" \t")]


def check_host(host: bytes, detail: str) -> None:
    """Refuse a host that is not uri-host [ ":" port ], or is empty (RFC 9110 §4.2.1)."""
    with suppress(OSError):  # not an IPv6 address
        if (match := HOST.fullmatch(host)) and (not match[1] or socket.inet_pton(socket.AF_INET6, match[1].decode())):
            return
    raise HTTPError(400, detail)


def parse_framing(version: str, fields: dict[str, str]) -> int | None:
    """Return the length of the message body, None if it is chunked; nothing else decides it (RFC 9112 §6.3)."""
    # If a server in front decided otherwise, one request could smuggle another: an ambiguous length is refused.
    coding, length = fields.get("transfer-encoding"), fields.get("content-length")
    if coding is None:
        if length is None:
            return 0
        digits, *repeats = (part.strip(" \t") for part in length.split(","))  # all must agree (RFC 9110 §8.6)
        # int alone would accept +1, -1 and 1_0.
        require(digits.isascii() and digits.isdigit() and {*repeats} <= {digits}, 400, "an invalid Content-Length")
        digits = digits.lstrip("0") or "0"
        require(len(digits) <= MAX_LENGTH_DIGITS, 413, "a Content-Length beyond all bounds")
        return int(digits)
    require(length is None, 400, "Content-Length together with Transfer-Encoding")
    require(version != "HTTP/1.0", 400, "Transfer-Encoding in HTTP/1.0")
    if coding.lower() == "chunked":
        return None
    codings = parse_list(coding)
    is_sound = codings and all(TOKEN.fullmatch(c.encode("latin-1")) for c in codings) and "chunked" not in codings[:-1]
    require(is_sound, 400, "a malformed Transfer-Encoding")
    raise HTTPError(501, "a transfer coding other than chunked")


# ---- 5. Body ----------------------------------------------------------------
# Bytes -> the message body and no byte more. Body is an io.RawIOBase; an io.BufferedReader around it is wsgi.input
# (PEP 3333, "Input and Error Streams"). A read raises HTTPError if the client breaks the framing, is silent too long or
# sends too much. Body keeps this `failure`: an application that swallows it would answer from half a body.


class Body(io.RawIOBase):
    """Owns the framing of one message body (RFC 9112 §6 and §7); HTTPError if it is announced as too large."""

    def __init__(self, stream: Stream, request: Request, limit: int, buffer_limit: int) -> None:
        self.stream, self.buffer_limit = stream, buffer_limit
        self.has_more_chunks = request.length is None
        self.remaining = request.length or 0  # bytes to come of the body, or of the chunk in hand
        self.limit = limit - self.remaining  # bytes that further chunks may hold
        self.awaits_continue = request.expects_continue  # until the body is read or the response begins
        self.collected = memoryview(b"")  # the beginning of a chunked body that is too large to be buffered whole
        self.failure: tuple[int, str] | None = None  # not the exception, whose frames refer to this body
        self.extensions = 0  # bytes of chunk extensions so far
        self.is_behind_chunk = False  # the CRLF that ends the chunk in hand is still to come
        require(self.limit >= 0, 413, "a Content-Length over the limit")

    def readable(self) -> bool:
        """Return True, which io.BufferedReader asks for."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Copy the next bytes into the buffer, for io.RawIOBase; return their number, 0 at the end; HTTPError."""
        if self.collected:
            count = min(len(self.collected), len(buffer))
            buffer[:count], self.collected = self.collected[:count], self.collected[count:]
            return count
        if self.failure:
            raise HTTPError(*self.failure)
        try:
            if self.awaits_continue:
                self.awaits_continue = False
                if not self.stream.buffer:  # else the body comes already (RFC 9110 §10.1.1)
                    self.stream.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            if self.has_more_chunks and not self.remaining:
                self.read_chunk_line()
            if not self.remaining:
                return 0
            require(self.stream.buffer or self.stream.receive_more(), 400, "the client closed inside the message body")
            count = min(len(self.stream.buffer), len(buffer), self.remaining)
            buffer[:count], self.stream.buffer = self.stream.buffer[:count], self.stream.buffer[count:]
            self.remaining -= count
            return count
        except ClientSilentError:
            self.failure = (408, "the message body did not arrive in time")
        except HTTPError as error:
            self.failure = error.args
        raise HTTPError(*self.failure)

    def read_chunk_line(self) -> None:
        """Read the CRLF of one chunk and the line of the next; after the last, the trailer section (RFC 9112 §7.1)."""
        if self.is_behind_chunk:
            self.stream.read_line(0, "a chunk longer than its chunk-size")
        if not (match := CHUNK_LINE.fullmatch(self.stream.read_line(MAX_CHUNK_LINE))):
            raise HTTPError(400, "a malformed chunk-size or chunk extension")
        self.is_behind_chunk = True
        self.remaining = int(match.group(1), 16)
        self.extensions += len(match.group(2))
        self.limit -= self.remaining
        require(self.extensions <= MAX_CHUNK_EXTENSIONS, 400, "too many chunk extensions")
        require(self.limit >= 0, 413, "a chunked body over the limit")
        if not self.remaining:  # the trailer section, up to an empty line, is checked and dropped (RFC 9110 §6.5)
            for count, line in enumerate(iter(partial(self.stream.read_line, MAX_FIELD_LINE), b"")):
                require(count < MAX_FIELDS, 431, "too many trailer fields")
                parse_field_line.__wrapped__(line)
            self.has_more_chunks = False

    def add_input(self, environ: Environ) -> None:
        """Set wsgi.input, and CONTENT_LENGTH for a chunked body that is small enough to be buffered; HTTPError."""
        # Django, Bottle and most of Falcon read no body without CONTENT_LENGTH. A body larger than --buffer-chunked is
        # left to applications that know wsgi.input_terminated, as those of Flask and Pyramid do.
        was_chunked, content = self.has_more_chunks, bytearray()
        while self.has_more_chunks and len(content) <= self.buffer_limit:
            content += self.read(RECEIVE_SIZE)
        if was_chunked and not self.has_more_chunks:
            environ["wsgi.input"], environ["CONTENT_LENGTH"] = io.BytesIO(content), str(len(content))
            return
        environ["wsgi.input"] = io.BufferedReader(self, RECEIVE_SIZE)
        self.collected = memoryview(content)

    def log_unread(self) -> None:
        """Log advice if the application has ended and has read nothing of a streamed chunked body."""
        if len(self.collected) > self.buffer_limit:  # all of it: one read of the BufferedReader leaves less
            size = "a chunked body of more than %d bytes" % self.buffer_limit
            log_throttled("the application has read nothing of %s: raise --buffer-chunked for it" % size)

    def drain(self) -> bool:
        """Drop what the application left unread; return whether the body has ended and a next request can follow."""
        self.collected, left, waste = memoryview(b""), MAX_DRAINED, bytearray(RECEIVE_SIZE)
        with suppress(HTTPError):  # the response is already sent: only the close follows
            while left >= self.remaining:
                if not (received := self.readinto(waste)):
                    return True
                left -= received
        return False


# ---- 6. Environ -------------------------------------------------------------
# Request -> the dict that an application gets (PEP 3333, "environ Variables"). One part is made for each connection and
# one for each head. The environ is a copy of both, which the application may change.


def make_connection_environ(sock: socket.SocketType, address: Any, is_multiprocess: bool) -> Environ:
    """Return the part of the environ that all requests of a connection share."""
    name = sock.getsockname()  # like the client's address, a str for a unix socket
    server, port = name[:2] if isinstance(name, tuple) else ("localhost", 80)
    server = strip_mapping(server)
    client, client_port = address[:2] if isinstance(address, tuple) else ("", "")
    return {
        "SERVER_NAME": "[%s]" % server if ":" in server else server, "SERVER_PORT": str(port),  # RFC 3875 §4.1.14
        "REMOTE_ADDR": strip_mapping(client), "REMOTE_PORT": str(client_port),
        "wsgi.errors": sys.stderr, "wsgi.multiprocess": is_multiprocess,
    }  # fmt: skip


def strip_mapping(address: str) -> str:
    """Return the IPv4 address in an IPv4-mapped IPv6 address, any other as it is (RFC 4291 §2.5.5.2)."""
    return address[7:] if address.startswith("::ffff:") else address


def make_request_environ(request: Request) -> Environ:
    """Return the part of the environ that depends on the head alone, and what is always the same."""
    environ = {"HTTP_" + name.upper().replace("-", "_"): value for name, value in request.fields.items()}
    environ.pop("HTTP_TRANSFER_ENCODING", None)  # Body decodes the chunks; Bottle would do it again
    for name in ("HTTP_CONTENT_TYPE", "HTTP_CONTENT_LENGTH"):
        if name in environ:
            environ[name[5:]] = environ.pop(name)
    return {
        **environ, "REQUEST_METHOD": request.method, "REQUEST_URI": request.target,
        "SCRIPT_NAME": "", "PATH_INFO": request.path, "QUERY_STRING": request.query,
        "SERVER_PROTOCOL": request.version, "SERVER_SOFTWARE": PRODUCT,
        "wsgi.version": (1, 0), "wsgi.url_scheme": "http", "wsgi.multithread": False, "wsgi.run_once": False,
        "wsgi.input_terminated": True, "wsgi.file_wrapper": FileWrapper,
    }  # fmt: skip


# ---- 7. Response ------------------------------------------------------------
# The application's status, headers and blocks -> bytes (PEP 3333; RFC 9110 §6.4 and §8.6, RFC 9112 §6 and §7). One send
# takes the head and the first block that is not empty. What breaks PEP 3333 is AssertionError, TypeError or ValueError.

DATE = "Date: {weekday}, {day} {month} {year} {clock} GMT\r\n\r\n"  # with the empty line behind it (RFC 9110 §6.6.1)
PLAIN_KINDS = [(kind, io.FileIO) for kind in (io.FileIO, io.BufferedReader, io.BufferedRandom)]  # file, its `raw`


def run_application(application: Application, environ: Environ, response: Response) -> None:
    """Call the application and send the blocks that it returns (PEP 3333, "Specification Details")."""

    def start_response(status: str, response_headers: list[tuple[str, str]], exc_info: Any = None) -> Write:
        """Set the head; with exc_info, replace one that was not sent (PEP 3333, "The start_response() Callable")."""
        try:
            if exc_info and response.framing:
                raise exc_info[1].with_traceback(exc_info[2])
            if response.head and not exc_info:
                raise AssertionError("start_response was called a second time without exc_info")
        finally:
            exc_info = None  # its traceback may refer to this frame: only the garbage collector could free the cycle
        try:
            if not isinstance(response_headers, list):
                raise TypeError
            response.head = parse_response_head(status, tuple(response_headers))
        except TypeError:
            raise TypeError("not a status and a list of (name, value): %r, %r" % (status, response_headers)) from None
        return response.send  # (PEP 3333, "The write() Callable")

    blocks = application(environ, start_response)
    try:
        if isinstance(blocks, (list, tuple)):
            response.send(b"".join(blocks), is_last=True)  # the whole body: its length is known
        elif blocks is None or isinstance(blocks, (str, bytes)):  # the items of these are not blocks
            raise TypeError("the application returned a %s: return a list of bytes" % type(blocks).__name__)
        else:
            if not (isinstance(blocks, FileWrapper) and response.send_file(blocks.file)):
                for block in blocks:  # each is sent at once (PEP 3333, "Buffering and Streaming")
                    response.send(block)
                    if response.drops_rest:
                        break
            response.send(b"", is_last=True)
    finally:
        if hasattr(blocks, "close"):
            blocks.close()
    if response.body:
        response.body.log_unread()


class ResponseHead(NamedTuple):
    """The checked status and headers of an application, as lines without those that the server decides."""

    status: int
    lines: bytes
    length: int | None  # the Content-Length
    is_closing: bool  # the application has set Connection: close
    has_date: bool


class Framing(NamedTuple):
    """How a response is framed: decided once, when its head is sent (RFC 9112 §6.3)."""

    head: bytes  # from the status-line to the empty line
    length: float  # of the body, in bytes; UNBOUNDED if only its end will tell
    has_body: bool  # else the application's blocks are dropped
    is_chunked: bool
    is_closing: bool  # the connection ends with this response
    is_ended_by_close: bool  # only the close tells the client that the body is complete


class Response:
    """Owns the response to one request: its head until the first block, and how much of its body was sent."""

    __slots__ = (
        "body", "drops_rest", "framing", "head", "is_broken", "is_closing", "is_complete", "request", "sent", "stream",
    )  # fmt: skip

    def __init__(self, stream: Stream, request: Request, is_closing: bool) -> None:
        self.stream, self.request, self.is_closing = stream, request, is_closing
        self.body: Body | None = None  # of the request
        self.head: ResponseHead | None = None  # what start_response was told
        self.framing: Framing | None = None  # None until the head is sent
        self.sent = 0  # bytes of the body
        self.drops_rest = False  # further blocks are dropped: the response has no body, or the body is too long
        self.is_complete = self.is_broken = False  # is_broken: the client has not taken all that was to be sent

    def send(self, block: bytes, is_last: bool = False) -> None:
        """Send a block: the first with the head, the last with the end; ClientGoneError; the errors of `frame`."""
        if self.is_complete:
            raise AssertionError("write() was called after the end of the response")
        if not isinstance(block, bytes):
            raise TypeError("a block of the body is not bytes: %.100r" % (block,))
        if self.is_broken:  # the application has caught the exception: nothing may follow behind the gap
            raise ClientGoneError(0)
        before, behind, framing = b"", b"", self.framing
        if framing is None:
            if not (block or is_last):
                return
            framing = self.frame(len(block) if is_last else None)
            before = framing.head
        room = framing.length - self.sent
        if len(block) > room:
            block = self.trim(block, int(room))
        size = len(block)
        if framing.is_chunked:
            if block:
                before, behind = before + b"%x\r\n" % size, b"\r\n"
            if is_last:
                behind += b"0\r\n\r\n"
        try:
            if size > JOIN_SIZE and (before or behind):
                self.stream.send(before, block, behind)
            elif before or block or behind:
                self.stream.send(before + block + behind)
        except ClientGoneError as gone:
            self.sent, self.is_broken = self.sent + min(max(gone.args[0] - len(before), 0), size), True
            raise
        self.sent += size
        if is_last:
            self.is_complete = True
            if framing.is_ended_by_close:
                self.stream.reset_on_close(False)
            elif size < room < UNBOUNDED:
                raise ValueError("the body has %d bytes, its Content-Length is %d" % (self.sent, framing.length))
        elif block:
            self.stream.slot.mark_progress()

    def trim(self, block: bytes, room: int) -> bytes:
        """Return what of a block has room; log the first surplus (PEP 3333, "Handling the Content-Length Header")."""
        if not self.drops_rest:
            self.drops_rest = True
            log("the body is longer than its Content-Length of %d: cut there" % (self.sent + room))
        return block[:room]

    def send_file(self, file: Any) -> bool:
        """Send a regular file in large blocks; return False, with nothing sent, if its descriptor cannot be used."""
        # The descriptor must hold the bytes that read() would return. That of a GzipFile does not, and that of a class
        # with a read() of its own may not. A file in /proc has no blocks and tells no size.
        kinds = type(file), type(getattr(file, "raw", file))
        if self.framing or not self.head or kinds not in PLAIN_KINDS or not file.readable():
            return False
        file.flush()  # what was written to a BufferedRandom may be in its buffer alone
        fd, found = file.fileno(), os.fstat(file.fileno())
        if not (stat.S_ISREG(found.st_mode) and found.st_blocks):
            return False
        offset = file.tell()
        framing = self.frame(max(found.st_size - offset, 0))
        self.stream.send(framing.head)
        # pread and send were 1.4 times as fast as sendfile(2) over loopback on Linux 6.18, with less processor time.
        while block := os.pread(fd, int(min(framing.length - self.sent, FILE_BLOCK_SIZE)), offset + self.sent):
            self.send(block)
        return True

    def frame(self, size: int | None) -> Framing:
        """Decide the framing, for a body of this size (None: unknown); HTTPError if the request's body has failed."""
        if self.head is None:
            raise AssertionError("the application did not call start_response")
        if self.body:
            if self.body.failure:
                raise HTTPError(*self.body.failure)
            self.is_closing |= self.body.awaits_continue  # the client may send the body or not
            self.body.awaits_continue = False
            self.is_closing |= self.body.has_more_chunks or self.body.remaining > MAX_DRAINED  # `drain` may give up
        slot = self.stream.slot
        if slot.orders[0] & (STOPPING | PRESSED):
            # Under pressure, a client that has sent further requests already must connect again for them.
            self.is_closing |= slot.is_told(STOPPING) or bool(self.stream.buffer and not self.body)
        if self.stream.rest_timeout:  # no other process can go on with this connection
            self.is_closing |= slot.is_told(PRESSED) or slot.must_leave(time.monotonic())
        second = int(time.time())
        framing = make_framing(self.head, self.request.method, self.request.version, size, self.is_closing, second)
        self.framing, self.is_closing, self.drops_rest = framing, framing.is_closing, not framing.has_body
        if framing.is_ended_by_close:
            self.stream.reset_on_close(True)
        return framing


@lru_cache(maxsize=64)
def make_framing(
    head: ResponseHead, method: str, version: str, size: int | None, is_closing: bool, second: int
) -> Framing:
    """Return the framing of a response whose body has this size (None: unknown), with a Date of this second."""
    lines, length, is_http10 = head.lines, head.length, version == "HTTP/1.0"
    has_body = method != "HEAD" and head.status not in (204, 205, 304)  # RFC 9110 §6.4.1 and §15.3.6
    if length is None and (size or has_body):  # an empty list for HEAD or 304 tells no length
        length = size
    is_chunked = length is None and has_body and not is_http10
    is_closing = is_closing or head.is_closing or (is_http10 and has_body and length is None)
    if is_chunked:
        lines += b"Transfer-Encoding: chunked\r\n"
    elif length is not None and head.status != 204:  # which must not have one (RFC 9110 §8.6)
        lines += b"Content-Length: %d\r\n" % length
    if is_closing or is_http10:
        lines += b"Connection: close\r\n" if is_closing else b"Connection: keep-alive\r\n"
    lines += b"\r\n" if head.has_date else format_time(DATE, second).encode()
    bound = (UNBOUNDED if length is None else length) if has_body else 0
    return Framing(lines, bound, has_body, is_chunked, is_closing, bound == UNBOUNDED and not is_chunked)


@lru_cache(maxsize=64)
def parse_response_head(status: str, response_headers: tuple[tuple[str, str], ...]) -> ResponseHead:
    """Return the checked head; ValueError quotes what is wrong; TypeError: the headers are not pairs of str."""
    # What passes here reaches the client byte for byte: a CR LF in it would split the response in two.
    if not isinstance(status, str) or not STATUS.fullmatch(status):
        raise ValueError("not a status such as '200 OK': %r" % (status,))
    # What was checked is sent, also of a subclass of str: join, str.lower and str.strip do not call its methods.
    lines, length, names = ["HTTP/1.1 ", status, "\r\n" if " " in status else " \r\n"], None, set()
    for header in response_headers:
        if not (isinstance(header, tuple) and len(header) == 2 and all(isinstance(part, str) for part in header)):
            raise TypeError
        name, value = str.lower(header[0]), str.strip(header[1], " \t")
        if not TOKEN.fullmatch(name.encode("utf-8")):
            raise ValueError("not a field name: %r" % header[0])
        if not RESPONSE_FIELD_VALUE.fullmatch(value):
            raise ValueError("a character that no field value may have in %s: %r" % header)
        if name in HOP_BY_HOP_FIELDS or (name == "connection" and value.lower() != "close"):
            raise ValueError("a field of the connection is the server's to set: %s: %s" % header)
        names.add(name)
        if name == "content-length":
            if not (length is None and value.isascii() and value.isdigit() and len(value) <= MAX_LENGTH_DIGITS):
                raise ValueError("not a Content-Length, or a second one: %r" % value)
            length = int(value)
        elif name != "connection":
            lines += header[0], ": ", value, "\r\n"
    if "server" not in names:
        lines.append("Server: %s\r\n" % PRODUCT)
    code, text = int(status[:3]), "".join(lines).encode("latin-1")
    length = 0 if code == 205 else length  # a 205 has no content (RFC 9110 §15.3.6)
    return ResponseHead(code, text, length, "connection" in names, "date" in names)


class FileWrapper:
    """wsgi.file_wrapper (PEP 3333, "Optional Platform-Specific File Handling"): a file as an iterable of blocks."""

    def __init__(self, file: Any, block_size: int = RECEIVE_SIZE) -> None:
        self.file, self.block_size = file, block_size
        self.close = getattr(file, "close", lambda: None)

    def __iter__(self) -> Iterator[bytes]:
        return iter(partial(self.file.read, self.block_size), b"")


# ---- 8. Connection ----------------------------------------------------------
# One connection: its requests in order, until the client is silent or one side wants a close. serve_request handles all
# errors of a request: it answers, or cuts the response off, and logs. After an error it interprets no further byte.


def serve_connection(
    application: Application, options: Options, sock: socket.SocketType, address: Any, slot: Slot,
    deadline: float | None = None, transport: Transport | None = None,
) -> bool:  # fmt: skip
    """Serve the requests of a connection, the first head by the deadline; return True if it is at rest afterwards."""
    stream = Stream(sock, slot, options.timeout)
    try:
        environ = make_connection_environ(sock, address, not options.no_fork)
        if transport:
            stream.preface = partial(transport.open, stream, environ)
        slot.mark_silent()
        while serve_request(application, options, stream, environ, deadline):
            deadline = None
            if not (slot.end_request() or stream.buffer or stream.rest_timeout):
                return True  # the parent wants the connection back, or this process must leave
    except (ClientSilentError, BlockingIOError):
        if stream.sock is sock:  # else it is a TLS session, with which no other process can go on
            return True
    except (ClientGoneError, OSError):
        pass
    with suppress(OSError):  # the client has gone
        stream.sock.shutdown(socket.SHUT_WR)  # a close ends nothing if a process of the application has a copy
    sock.close()
    return False


def serve_request(
    application: Application, options: Options, stream: Stream, shared: Environ, deadline: float | None
) -> bool:
    """Serve a request; return whether another may follow. ClientSilentError, ClientGoneError, OSError: none came."""
    slot, environ, head, began, detail = stream.slot, shared, b"", 0.0, ""
    response: Response | None = None
    try:
        # Step 1: read the head, and on a new connection what precedes HTTP; interpret the head.
        head = read_head(stream, deadline)
        request, variables = (parse_head if len(head) <= MAX_REMEMBERED else parse_head.__wrapped__)(head)
        # Step 2: make the environ. A chunked body is buffered here, up to a limit; the application reads any other.
        began = slot.mark_busy(request.line)
        response = Response(stream, request, not (request.is_persistent and options.keep_alive))
        environ = {**variables, **shared, "webserver.requests": slot.requests[slot.index], "wsgi.input": io.BytesIO()}
        if request.length != 0:
            response.body = Body(stream, request, options.limit_request_body, options.buffer_chunked)
            response.body.add_input(environ)
        # Step 3: call the application and send what it gives.
        run_application(application, environ, response)
    except BaseException as error:  # SystemExit in an application is an error like any other
        if slot.pid != os.getpid() or (options.no_fork and isinstance(error, KeyboardInterrupt)):
            raise  # in a process that the application has forked, or to the debugger
        if not response:
            if isinstance(error, (ClientSilentError, ClientGoneError, OSError)):
                raise  # there is no request that could be answered
            line = (head or stream.buffer).lstrip(b"\r\n").partition(b"\r\n")[0]
            response = Response(stream, Request("HEAD" if line.startswith(b"HEAD ") else "", line=line), True)
        # Step 4: answer with the error.
        detail = recover(response, error)
    # Step 5: log the request, then make the connection ready for the next one, or end it.
    if options.access_log != "off":
        log_access(options.access_log, response, environ, began, detail)
    body = response.body
    if not (detail or response.is_closing) and (body is None or body.drain()):
        return True
    if detail or may_be_reset(response):
        stream.linger()
    return False


def may_be_reset(response: Response) -> bool:
    """Return whether the client may send more bytes, which would reset away what the kernel has not sent yet."""
    stream, body = response.stream, response.body
    # A client that wants the close itself sends no more, but over TLS its close_notify, and some old ones a CRLF.
    if response.request.is_persistent or stream.rest_timeout or stream.buffer:
        return True
    has_body_left = body is not None and bool(body.has_more_chunks or body.remaining)
    return has_body_left or (response.sent > JOIN_SIZE and count_unacknowledged(stream.sock) > 0)


def recover(response: Response, error: BaseException) -> str:
    """Answer with the error, or cut the response off so that the client notices; return the detail for the log."""
    causes: dict[type[BaseException], Any] = {
        HTTPError: error.args, ClientGoneError: (0, "the client has gone"),
        Overdue: (504, "the application took too long"),
        MemoryError: (500, "the application wanted more memory than it may have (--limit-memory)"),
    }  # fmt: skip
    status, detail = next((causes[kind] for kind in causes if isinstance(error, kind)), (500, "the application failed"))
    with suppress(ClientGoneError):  # then the log has the status that the client would have got
        if response.framing is None and status:
            line = "%d %s" % (status, REASONS[status])
            response.body, response.is_closing = None, True
            response.head = parse_response_head(line, (("Content-Type", "text/plain; charset=utf-8"),))
            response.send(("%s: %s\n" % (line, detail)).encode(), is_last=True)
        elif response.framing and response.framing.is_ended_by_close and not response.is_complete:
            response.stream.sock.close()  # a reset (SO_LINGER): a plain end would mean a complete body
    if isinstance(error, MemoryError):
        response.stream.slot.retire()  # the memory of this process would not shrink
    if not isinstance(error, (HTTPError, ClientGoneError)):  # last: formatting may take long, or fail
        response.stream.slot.mark_progress()
        log('error in "%s"' % escape(response.request.line.decode("latin-1")))
        log_exception(error)
    return str(detail)


# ---- 9. Log -----------------------------------------------------------------
# Events -> lines of text, each written by one write(2). Text that a client has sent is escaped.

MAX_LOGGED = (2000, 600, 60)  # characters of each text in an access log line: the first that lets the line fit PIPE_BUF
MAX_TRACEBACK = 16384  # characters; a longer one loses its middle
QUIET = 60.0  # seconds between two log lines about the same problem
LAST_LOGGED = memoryview(mmap.mmap(-1, 8192)).cast("d")  # by the hash of a text: when a process has logged it
UNSAFE = re.compile(r"[^ !#-\[\]-~]")  # not visible ASCII, or a quote, or a backslash
COMBINED = '%(client)s - - [%(time)s] "%(request)s" %(status)d %(bytes)d "%(referer)s" "%(user_agent)s" %(seconds).6f'


def log_access(style: str, response: Response, environ: Environ, began: float, detail: str) -> None:
    """Log a request that has ended: in the combined format with the seconds taken and what went wrong, or as JSON."""
    request = response.request
    facts = {
        "client": str(environ.get("REMOTE_ADDR") or "-"),
        "time": format_time("{day}/{month}/{year}:{clock} +0000", int(time.time())),
        "request": request.line.decode("latin-1"), "bytes": response.sent,
        "status": response.head.status if response.head else 0,  # 0: the client went before it was answered
        "referer": request.fields.get("referer", "-"), "user_agent": request.fields.get("user-agent", "-"),
        "seconds": round(time.monotonic() - began, 6) if began else 0.0, "detail": detail,
    }  # fmt: skip
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


@lru_cache(maxsize=2)
def format_time(template: str, second: int) -> str:
    """Return the time in UTC; the template names parts of asctime(3), since strftime(3) depends on the locale."""
    weekday, month, day, clock, year = time.asctime(time.gmtime(second)).split()
    return template.format(weekday=weekday, month=month, day=day.zfill(2), clock=clock, year=year)


def escape(text: str) -> str:
    r"""Return the text in visible ASCII, the rest as \xNN: what a client sent must not forge a line or a quote."""
    return UNSAFE.sub(lambda match: "\\x%02x" % ord(match.group()), text)


def write_line(fd: int, line: str) -> None:
    """Write one log line, cut to PIPE_BUF, or drop it: a log that no process reads must not stop the service."""
    # A write(2) of up to PIPE_BUF bytes never mixes with another (pipe(7)). After select(2) has found room, it blocks
    # only if another process fills the pipe in between.
    data = line.encode("utf-8", "backslashreplace")[: select.PIPE_BUF - 1]
    data = data.decode("utf-8", "ignore").encode()  # cut between two characters
    with suppress(OSError):  # the log was closed
        if select.select([], [fd], [], 0)[1]:
            os.write(fd, data + b"\n")


def log(text: str) -> None:
    """Write the text to stderr with the pid in front of each line, so that no quoted text can forge a line."""
    for line in text.splitlines():
        write_line(2, "[%d] %s" % (os.getpid(), "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)))


def log_throttled(text: str) -> None:
    """Log a problem that may last, at most once in QUIET seconds, whichever process has it."""
    now, key = time.monotonic(), hash(text) % len(LAST_LOGGED)
    if not LAST_LOGGED[key] or now - LAST_LOGGED[key] >= QUIET:
        LAST_LOGGED[key] = now
        log(text)


def log_exception(error: BaseException) -> None:
    """Write the traceback to stderr, without the server's and the import system's frames at its beginning."""
    try:
        import traceback

        trace = error.__traceback__
        while trace and (trace.tb_frame.f_globals is globals() or "importlib" in trace.tb_frame.f_code.co_filename):
            trace = trace.tb_next
        text = "".join(traceback.format_exception(type(error), error, trace))
        if len(text) > MAX_TRACEBACK:
            text = "%s\n[...]\n%s" % (text[: MAX_TRACEBACK // 2], text[-MAX_TRACEBACK // 2 :])
        log(text)
    except BaseException as failure:  # the methods of an exception class may raise anything
        names = object.__repr__(error).split()[0][1:], object.__repr__(failure).split()[0][1:]
        log("%s, whose traceback cannot be formatted: %s" % names)


# ---- Part two: processes ----------------------------------------------------
# The parent accepts connections and holds those that no child works at. When the next head of a connection is there,
# the parent puts the connection into the queue. A child that waits there takes it, serves it, and gives it back when
# the client is silent for a second. The parent consumes no byte of a client; once it serves, it calls no application.
#
# ---- 10. Listening socket ---------------------------------------------------
# An address -> a socket that listens: opened here, or inherited from a service manager (socket(7), sd_listen_fds(3)).

BACKLOG = 1024  # connections that the kernel holds until they are accepted; it caps the number at net.core.somaxconn
ADDRESS = re.compile(r"unix:(.+)|fd:([0-9]{1,9})|(\[[^\[\]]+\]|[^\[\]:]*):([0-9]{1,5})", re.DOTALL)
ADVICE = {
    errno.EADDRINUSE: "; another program listens there, or a file has that path: choose another address with --bind",
    errno.EACCES: "; choose a port from 1024 on, or a path that you may write to",
    errno.ENOENT: "; create its folder first",
    errno.EADDRNOTAVAIL: "; this machine has no such address",
    errno.ENOTSOCK: "; what was inherited there is no socket",
    errno.EBADF: "; nothing was inherited there",
}


class Listener:
    """Owns the listening socket, and the file of a unix socket that was bound here."""

    def __init__(self, fd: int, bind: str) -> None:
        # Without the enumerations and the wrapper class of `socket`, accept is faster: 40 % more connections a second.
        self.sock: Any = socket.SocketType(fileno=fd)
        self.family, self.is_unix = self.sock.family, self.sock.family == socket.AF_UNIX
        self.is_foreign = bind.startswith("fd:")  # inherited: the service manager may go on to use it
        self.path = os.path.abspath(self.sock.getsockname()) if self.is_unix and not self.is_foreign else ""
        self.file_stat = os.stat(self.path) if os.path.exists(self.path) else None
        self.sock.setblocking(False)
        limit_waits(self.sock)
        if not self.is_unix:  # a TCP connection inherits that limit, and these options (tcp(7))
            # Without TCP_NODELAY, a small block waits 40 ms for the acknowledgement of the block before it.
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_DEFER_ACCEPT"):  # accepted with its first bytes, mostly a whole head
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, int(HEAD_TIMEOUT))

    def accept(self) -> socket.SocketType:
        """Return the next connection; OSError as from accept(2), BlockingIOError if there is none."""
        sock = adopt(self.family, self.sock._accept()[0])  # `_accept` is private to CPython, and the same since 3.0
        if self.is_unix:
            limit_waits(sock)
        return sock

    def close(self) -> None:
        """Stop listening, and remove the socket file unless another server has put its own file there."""
        self.sock.close()
        with suppress(OSError):  # the file is gone, or this user may not remove it
            if self.file_stat and os.path.samestat(self.file_stat, os.stat(self.path)):
                os.unlink(self.path)
        self.file_stat = None  # a second call must not remove the file of a successor with the same inode


def adopt(family: int, fd: int) -> socket.SocketType:
    """Return a socket for the descriptor of a connection; it blocks, since `limit_waits` bounds only such a wait."""
    sock = socket.SocketType(family, STREAM, 0, fd)
    sock.setblocking(True)  # an application may set a default timeout; on BSD it inherits O_NONBLOCK from the listener
    return sock


def limit_waits(sock: socket.SocketType) -> None:
    """Have each wait on the socket end after a second."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, ONE_SECOND)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, ONE_SECOND)


def find_inherited_address() -> str:
    """Return the address of the socket from a service manager, "" if none; StartError if several (sd_listen_fds(3))."""
    number, pid, _ = (os.environ.pop(name, "") for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()):
        return ""
    if number != "1":
        raise StartError("LISTEN_FDS is %s: pass one socket" % number)
    return "fd:3"


def open_listener(bind: str, mode: str) -> int:
    """Return a descriptor that listens on the address; a unix socket's file gets the mode. StartError if that fails."""
    path, fd, host, port = parse_address(bind)
    try:
        if path:
            listener = bind_unix(path, mode)
        elif fd:
            listener = socket.socket(fileno=int(fd))
            listener.set_inheritable(False)
        else:
            listener = bind_tcp(host.strip("[]"), int(port))
        listener.listen(BACKLOG)
    except OSError as error:
        advice = ADVICE.get(error.errno or 0, "")
        raise StartError("cannot listen on %s: %s%s" % (bind, error.strerror or error, advice)) from None
    return listener.detach()


def parse_address(bind: str) -> Sequence[Any]:
    """Return the path, descriptor, host and port of an address, None for what it lacks; StartError if malformed."""
    if not (match := ADDRESS.fullmatch(bind)) or int(match[4] or 0) > 65535:
        raise StartError("not an address: %r; write HOST:PORT, [::1]:PORT, :PORT, unix:PATH or fd:N" % bind, 2)
    return match.groups()


def bind_tcp(host: str, port: int) -> socket.socket:
    """Return a socket bound to this address; without a host, to all addresses of both families; StartError; OSError."""
    is_dual = not host and socket.has_dualstack_ipv6()
    name = "::" if is_dual else host or "0.0.0.0"
    try:  # bytes: for a str, getaddrinfo imports the idna codec, which each fork would copy: 4 % more page faults
        found = socket.getaddrinfo(name.encode() if name.isascii() else name, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise StartError("there is no host %r; choose an address of this machine" % host, 2) from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    # Without SO_REUSEADDR, bind(2) fails while connections of a former server are in TIME_WAIT (socket(7)).
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not is_dual)
    listener.bind(address)
    return listener


def bind_unix(path: str, mode: str) -> socket.socket:
    """Return a socket bound to a path; replace a file on which no server listens any more (unix(7)); OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(TICK)
            if probe.connect_ex(path) == errno.ECONNREFUSED:  # else a server may listen: bind(2) tells the error
                os.unlink(path)
    listener.bind(path)
    if mode:  # before it listens, and so before the first client can connect
        os.chmod(path, int(mode, 8))
    return listener


def describe_address(listener: socket.SocketType, scheme: str) -> str:
    """Return the URL of the server, or unix:PATH."""
    if listener.family == socket.AF_UNIX:
        return "unix:" + os.fsdecode(listener.getsockname()).replace("\0", "@")
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        return "%s://localhost:%d/ (bound to %s)" % (scheme, port, host)
    return "%s://%s:%d/" % (scheme, "[%s]" % host if ":" in host else host, port)


# ---- 11. Scoreboard ---------------------------------------------------------
# Memory that the parent and the children share, with a slot for each child. It has no lock: each number but `leave_by`
# and `waiting` has one writer at a time. State and time are one aligned double: no reader sees one without the other.
# A text may be read half written; nothing but the order of requests and the logs depends on it.

STOPPING, PRESSED = 1, 2  # orders: the server is to stop; requests wait, and no process may be added
WANTED, LATE = 4, 8  # a request waits until the parent has forked; it has waited for longer than LATE_AFTER
FIRST_SLOT, TEXTS = 8, 56  # offsets in bytes: of slot 0, behind the orders; of the texts of slot 0, behind its numbers
RECORD = struct.Struct("=44s196s")  # the client, and the request-line
SLOT_SIZE = 36 * 8  # six numbers and a record; small, so that the first slots share one page of memory
give_way = getattr(os, "sched_yield", lambda: None)  # sched_yield(2), which not every system has


class Scoreboard:
    """Owns the shared memory (mmap(2), MAP_SHARED): the orders to all children, and an array of each kind of number.

    The parent writes `pids` (0: no child). Parent and child write `leave_by` (when the child must have left; 0: it may
    stay). The child writes the counts of connections `taken` and of `requests`, the texts, `waiting` (1 while it waits
    at the queue) and `since` (monotonic seconds: positive while a request is in hand, negative while the child waits
    for the client, 0 without a connection). Before and after the life of a child, the parent writes all of them. It
    also clears `waiting` of a child that is stuck.
    """

    def __init__(self, slots: int, fd: int = -1) -> None:
        """Map the memory of the descriptor, whose size tells the number of slots; without one, map new memory."""
        self.fd = fd
        self.memory = memoryview(mmap.mmap(fd, FIRST_SLOT + slots * SLOT_SIZE if fd < 0 else 0))
        doubles, numbers, stride = self.memory.cast("d"), self.memory.cast("q"), SLOT_SIZE // 8
        # The first number holds the orders. Each slot: waiting, since, leave_by, pid, taken, requests, and its texts.
        self.orders, self.waiting, self.pids = numbers[:1], numbers[1::stride], numbers[4::stride]
        self.since, self.leave_by = doubles[2::stride], doubles[3::stride]
        self.taken, self.requests = numbers[5::stride], numbers[6::stride]
        self.children = {pid: slot for slot, pid in enumerate(self.pids) if pid}  # after a reload, the old ones
        self.used = max(self.children.values(), default=-1) + 1  # from this slot on, all are free

    def order(self, order: int, is_wanted: bool) -> None:
        """Give this order to all children, or withdraw it."""
        self.orders[0] = self.orders[0] | order if is_wanted else self.orders[0] & ~order

    def retire(self, deadline: float) -> None:
        """Tell all present children to leave, by this time at the latest (monotonic seconds)."""
        for slot in self.children.values():
            self.leave_by[slot] = min(self.leave_by[slot] or deadline, deadline)

    def allot(self) -> int:
        """Return a free slot for a child that is about to be forked; it counts as waiting from now on."""
        slot = self.pids[: self.used + 1].tolist().index(0)  # the lowest, so that `used` stays small
        self.used = max(self.used, slot + 1)
        self.waiting[slot] = 1
        return slot

    def clear(self, slot: int) -> None:
        """Free the slot: set all its bytes to 0."""
        first = FIRST_SLOT + slot * SLOT_SIZE
        self.memory[first : first + SLOT_SIZE] = bytes(SLOT_SIZE)

    def read_text(self, slot: int, number: int) -> str:
        """Return the client (0) or the request-line (1) of the child in the slot, escaped for a log."""
        text: bytes = RECORD.unpack_from(self.memory, TEXTS + slot * SLOT_SIZE)[number]
        return escape(text.rstrip(b"\0").decode("latin-1"))

    def describe(self, slot: int) -> str:
        """Return what the child in the slot does."""
        doing = "serving" if self.since[slot] > 0 else "waiting for"
        texts = doing, self.read_text(slot, 0), self.read_text(slot, 1)
        return '%s %s "%s"' % texts if self.since[slot] and texts[1] else "waiting"


class Slot:
    """Owns one slot of the scoreboard, in which a serving process writes what it does."""

    def __init__(self, board: Scoreboard) -> None:
        self.client, self.line = b"", b""  # as last written
        self.check_at = 0.0  # when to look again at the parent and `leave_by`; 0: after each request
        self.memo = b""  # what a PROXY header has told of the connection in hand
        self.attach(board, 0, os.getpid())

    def attach(self, board: Scoreboard, index: int, pid: int) -> None:
        """Write into the slot with this index from now on, for the process with this pid."""
        self.board, self.index = board, index
        self.write = partial(RECORD.pack_into, board.memory, TEXTS + index * SLOT_SIZE)
        self.since, self.leave_by = board.since, board.leave_by
        self.orders, self.requests = board.orders, board.requests
        self.pid, self.parent = pid, os.getppid()

    def mark_waiting(self, is_waiting: bool, taken: int = 0) -> None:
        """Note whether the child waits at the queue, and how many connections it has just taken."""
        self.since[self.index] = 0.0
        self.board.waiting[self.index] = is_waiting
        self.board.taken[self.index] += taken

    def mark_client(self, client: bytes) -> None:
        """Note the client of the connection in hand."""
        self.client, self.line = client, b""
        self.write(client, b"")

    def mark_silent(self) -> float:
        """Note that the child waits for the client; return the time."""
        now = time.monotonic()
        self.since[self.index] = -now
        return now

    def mark_busy(self, line: bytes) -> float:
        """Note that a request is in hand; return the time."""
        self.requests[self.index] += 1
        if line is not self.line:  # a repeated head has the same object: it is written already
            self.line = line
            self.write(self.client, line)
        return self.mark_progress()

    def mark_progress(self) -> float:
        """Note that the request in hand has made progress; return the time."""
        now = self.since[self.index] = time.monotonic()
        return now

    def retire(self, deadline: float = UNBOUNDED) -> None:
        """Have this process leave after its connection, by this time at the latest."""
        self.check_at = 0.0
        self.leave_by[self.index] = min(self.leave_by[self.index] or deadline, deadline)

    def is_told(self, order: int) -> bool:
        """Return whether the parent has given this order."""
        return bool(self.orders[0] & order)

    def must_leave(self, now: float) -> bool:
        """Return whether this process must leave, because it was told so or because its parent is dead."""
        if now > self.check_at:
            self.check_at = now + TICK
            if os.getppid() != self.parent:
                self.retire(now)
        if self.leave_by[self.index]:
            self.check_at = 0.0
            return True
        return False

    def may_keep(self) -> bool:
        """Return whether a TLS connection at rest may stay, also in a reload: no other process can take it over."""
        now = time.monotonic()
        if not self.must_leave(now):
            return not self.is_told(PRESSED)
        is_in_time = now + TICK < self.leave_by[self.index] < UNBOUNDED  # set by a reload, a stop or SIGTERM
        return is_in_time and not self.is_told(PRESSED | STOPPING)

    def end_request(self) -> bool:
        """Note that a request is done, step back for a parent that must fork; return whether to wait for the next."""
        orders, now = self.orders[0], self.mark_silent()
        if not orders and now <= self.check_at:  # what follows would cost 5 % after each request
            return True
        if orders & WANTED:
            self.step_back()
        return not (orders & PRESSED or self.must_leave(now))

    def step_back(self) -> None:
        """Leave the processor to the parent, which must fork: for a moment, or under the order LATE for up to 63 ms."""
        # The parent has one of many equal shares of the processor: beside 200 busy children, a fork took 20 ms.
        give_way()
        for pause in (0.001, 0.002, 0.004, 0.008, 0.016, 0.032):
            if self.is_told(LATE):
                time.sleep(pause)


# ---- 12. Child --------------------------------------------------------------
# A process that serves one connection, or several, and exits (fork(2), unix(7)).
#
#     parent --- queue: a descriptor, by when its head must be complete, its memo; "leave" ----> any child that waits
#     parent <--- mailbox: a descriptor that comes back, "free", or the number of a signal --- any child, and the parent
#
# WARNING: a descriptor in a message is a copy. The sender closes its own, and the connection lives on in the receiver.

Service = Callable[[socket.SocketType, Any, Slot, "float | None"], bool]  # serve_connection, the application given
DEADLINE, DESCRIPTOR = struct.Struct("d"), struct.Struct("i")
IDLE_AFTER = 0.005  # seconds without a request until a new child rehearses: the processor is idle then
BACK = b"back\n"  # behind it, a line with the memo of each descriptor that is given back
MAX_DESCRIPTORS = 253  # in one message: SCM_MAX_FD of Linux
RIGHTS = socket.SOL_SOCKET, socket.SCM_RIGHTS
# macOS has no SOCK_SEQPACKET, but its datagrams between two sockets stay in order, too.
MESSAGES = socket.SOCK_DGRAM if sys.platform == "darwin" else socket.SOCK_SEQPACKET
CLOSE_ON_EXEC, CUT_OFF = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0)), int(socket.MSG_CTRUNC)


class Channel:
    """Owns a pair of sockets, new or inherited, through which processes send messages, with descriptors or without."""

    def __init__(self, *fds: int) -> None:
        ends = [socket.socket(fileno=fd) for fd in fds] or socket.socketpair(socket.AF_UNIX, MESSAGES)
        self.receiver, self.sender = ends
        self.receiver.setblocking(True)
        self.sender.setblocking(False)
        limit_waits(self.receiver)

    def send(self, message: bytes, *fds: int) -> None:
        """Send a message at once; BlockingIOError if there is no room for it, another OSError as from sendmsg(2)."""
        self.sender.sendmsg((message,), [(*RIGHTS, b"".join(map(DESCRIPTOR.pack, fds)))] if fds else [])

    def receive(self, flags: int = 0, space: int = socket.CMSG_SPACE(4), size: int = 128) -> tuple[bytes, bytes]:
        """Return the next message and its packed descriptors, b"" at the end; BlockingIOError if a second passes."""
        message, rights, result, _ = self.receiver.recvmsg(size, space, flags | CLOSE_ON_EXEC)
        if result & CUT_OFF:  # the kernel has closed the descriptors beyond the limit of this process
            log_throttled("connections are lost: %s" % os.strerror(errno.EMFILE))
        return message, rights[0][2] if rights else b""

    def close(self) -> None:
        """Close both ends."""
        self.receiver.close()
        self.sender.close()


def wait_readable(sock: socket.SocketType, seconds: float) -> bool:
    """Wait until the socket is readable, for these seconds at most; return whether it is."""
    poller = select.poll()  # not select(2), which ends at descriptor 1023
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(seconds * 1000))


class Child:
    """Owns the life of a serving process, from fork to exit. The parent makes it, and each fork has a copy of it."""

    def __init__(self, service: Service, family: int, mailbox: Channel, board: Scoreboard, options: Options) -> None:
        self.service, self.family, self.queue, self.mailbox = service, family, Channel(), mailbox
        self.options = options
        self.left = options.connections_per_child  # if there is no limit, it is negative from the first connection on
        self.slot = Slot(board)
        if options.no_fork:  # the only process: if it waited for one client, all other clients would wait, too
            self.slot.retire()
        self.sock: socket.SocketType | None = None  # the connection in hand
        self.interrupted = 0.0  # the `since` at the last SIGALRM

    def run(self, index: int, give_up: Callable[[], None]) -> NoReturn:
        """Give up what is the parent's, serve as the child in this slot, and exit: the parent's code must not go on."""
        failure: BaseException | None = None
        try:
            self.slot.attach(self.slot.board, index, os.getpid())  # first: `give_up` may fail, and a signal may come
            give_up()
            self.serve_connections()
        except BaseException as error:
            failure = error
        finally:
            self.slot.mark_silent()  # the exit has a deadline, too; `mark_progress` would tell of a request in hand
            give_way()  # else a client on this processor waits a millisecond more: the exit takes that long
            exit_child(failure)

    def serve_connections(self) -> None:
        """Serve connections from the queue, up to --connections-per-child, or until this child is to leave."""
        if not (self.slot.is_told(WANTED) or wait_readable(self.queue.receiver, IDLE_AFTER)):
            # The first write to a page that is shared with the parent copies the page. Done before the first request,
            # these copies are no part of its time, of which they would be a third. In a rehearsal, a request is there.
            rehearse(1)
        while taken := self.receive_connection():
            self.serve(*taken)
            self.left -= 1
            if self.left == 0 or self.slot.must_leave(time.monotonic()):
                break
            self.slot.mark_waiting(True)
            if self.slot.is_told(PRESSED):  # the parent may have a request for this child, and sleep
                with suppress(OSError):  # the mailbox is full: the parent is awake
                    self.mailbox.send(b"free")
        self.slot.mark_waiting(False)  # else `record_exit` would take this for a child that died unused

    def receive_connection(self) -> tuple[socket.SocketType, float, bytes] | None:
        """Return the next connection, by when its head must be complete, its memo; None if this child is to leave."""
        while True:
            try:
                message, rights = self.queue.receive()
                break
            except BlockingIOError:  # a second has passed
                if self.slot.must_leave(time.monotonic()):
                    return None
            except OSError:  # `detach` has closed the queue: a process that the application has forked
                return None
        if not rights:  # asked to leave, or the end of the queue
            return None
        self.slot.mark_waiting(False, taken=1)
        sock, memo = adopt(self.family, *DESCRIPTOR.unpack(rights)), message[DEADLINE.size :]
        if sock.fileno() <= 2:  # the application has closed a standard file: this client would get the log lines
            self.slot.memo = memo
            self.give_back(sock)  # to the parent, for another process
            return None
        return sock, DEADLINE.unpack_from(message)[0], memo

    def serve(self, sock: socket.SocketType, deadline: float | None, memo: bytes) -> None:
        """Serve a connection until it ends, or until it is at rest and the parent has it back."""
        self.sock, self.slot.memo = sock, memo
        try:
            address = sock.getpeername()
        except OSError:  # the client has reset the connection
            sock.close()
            return
        self.slot.mark_client(strip_mapping(address[0]).encode() if isinstance(address, tuple) else b"unix")
        while self.service(sock, address, self.slot, deadline) and not self.give_back(sock):
            deadline = None  # the mailbox is full: wait for the client once more

    def give_back(self, sock: socket.SocketType) -> bool:
        """Send a connection at rest to the parent, and close it here; return False if the mailbox is full."""
        self.slot.mark_waiting(self.left != 1)  # before the message: the parent then counts who waits
        try:
            self.mailbox.send(BACK + self.slot.memo, sock.fileno())
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS):
                log_throttled("cannot give a connection at rest back: %s" % error.strerror)
                self.slot.mark_waiting(False)
                return False
        sock.close()  # it lives on in the parent; if that is dead, it ends here
        return True

    def on_signal(self, signum: int) -> None:
        """Handle a signal, but not SIGINT, which a terminal sends to children, too; Overdue; ClientSilentError."""
        if signum == signal.SIGTERM:
            self.slot.retire(time.monotonic() + self.options.graceful_timeout)
        elif signum == signal.SIGALRM:
            since = self.slot.since[self.slot.index]
            if since == 0.0 or time.monotonic() - abs(since) <= self.options.timeout:
                return  # the request was done when the signal came
            # An application is interrupted once. A wait for the client, which other signals have restarted again and
            # again, ends only at the second signal: at the first, a request that has just come would be lost.
            is_first, self.interrupted = since != self.interrupted, since
            if since > 0 and is_first:
                raise Overdue
            if since < 0 and not is_first:
                raise ClientSilentError

    def detach(self) -> None:
        """Give up what is the server's, in a process that the application has forked: only the child may answer."""
        self.slot.attach(Scoreboard(1), 0, self.slot.pid)  # the child's pid: by it `serve_request` sees the difference
        for sock in (self.sock, self.queue.receiver, self.mailbox.sender):
            if sock:
                sock.close()


@contextmanager
def contain_forks() -> Iterator[None]:
    """End a process that the application forks in the block, where it would return into the code of the server."""
    pid = os.getpid()
    try:
        yield
    except BaseException as error:
        if os.getpid() == pid:
            raise
        exit_child(error)
    if os.getpid() != pid:
        exit_child(None)


def exit_child(failure: BaseException | None) -> NoReturn:
    """End the process as the interpreter would (traceback, threads, exit handlers, buffers), with no way back."""
    status = 1
    try:
        if isinstance(failure, SystemExit):  # in a process that the application has forked
            status = failure.code if isinstance(failure.code, int) else int(failure.code is not None)
        elif failure:
            log_exception(failure)
        else:
            status = 0
        with suppress(ClientSilentError):  # from `Child.on_signal`, after the timeout
            if threading := sys.modules.get("threading"):
                threading._shutdown()  # what CPython itself calls at its end; there is no public name
        run_exit_handlers()
        flush_output()
    finally:
        os._exit(status)  # even if an exit handler has raised


# ---- 13. Reactor ------------------------------------------------------------
# The connections that no child works at: accepted, at rest, ready for a child, given back, expired. One selector
# watches them, the listener and the mailbox. The parent peeks at received bytes (MSG_PEEK, recv(2)).

PEEK = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)
ACCEPT_AT_ONCE = 64  # connections, before other events have their turn


class Connection:
    """Owns a connection that no child works at: its socket, and until when it may rest, or its head be incomplete."""

    __slots__ = ("deadline", "group", "memo", "seen", "sock")

    def __init__(self, sock: socket.SocketType, deadline: float, memo: bytes = b"") -> None:
        self.sock, self.deadline = sock, deadline
        self.memo = memo  # what a child has noted; the parent does not read it
        self.seen = 0  # bytes received of a head that is not complete
        self.group: Any = None  # identifies the client, once `sort_fairly` has needed it


def find_group(host: str) -> Any:
    """Return what identifies a client: its IPv4 address, or the /64 of its IPv6 address, all of which it may use."""
    host = strip_mapping(host)
    with suppress(OSError):  # a part of an address, which its child is just writing to the scoreboard: None
        return socket.inet_pton(socket.AF_INET6, host.partition("%")[0])[:8] if ":" in host else host


def sort_fairly(ready: Iterable[Connection], board: Scoreboard) -> deque[Connection]:
    """Return the connections, sorted by the number of connections of the same peer at work or ahead in line."""
    ahead = Counter(find_group(board.read_text(slot, 0)) for slot in range(board.used) if board.since[slot])
    ranked: list[tuple[int, Connection]] = []
    for connection in ready:
        if connection.group is None:
            with suppress(OSError):  # the client has reset it
                address = connection.sock.getpeername()
                connection.group = find_group(address[0]) if isinstance(address, tuple) else "unix"
        ahead[connection.group] += 1
        ranked.append((ahead[connection.group], connection))
    return deque(connection for _, connection in sorted(ranked, key=lambda pair: pair[0]))


class Reactor:
    """Owns the connections that no child works at. It lives in the parent."""

    def __init__(self, listener: Listener, mailbox: Channel, options: Options) -> None:
        self.listener, self.mailbox, self.options = listener, mailbox, options
        self.head_timeout = min(HEAD_TIMEOUT, options.timeout)
        # No wait for a whole head: unix sockets have no SO_RCVLOWAT, and only a child reads TLS and PROXY headers.
        self.is_opaque = bool(listener.is_unix or options.certfile or options.proxy_protocol)
        self.resting: dict[int, Connection] = {}  # by descriptor, the longest at rest first
        self.ready: deque[Connection] = deque()  # in line for a child
        self.is_paused = False  # there was no room for the next connection
        self.peeked = memoryview(bytearray(MAX_HEAD + 4))  # enough to see that a head is too large
        self.selector: Any = selectors.DefaultSelector()
        self.selector.register(mailbox.receiver, selectors.EVENT_READ, self.take_back)
        self.selector.register(listener.sock, selectors.EVENT_READ, self.accept)

    def wait(self, seconds: float) -> None:
        """Sleep until there are events, for these seconds at most, and handle them."""
        for key, _ in self.selector.select(seconds):
            if key.data:
                key.data()  # take_back or accept
            elif connection := self.resting.get(key.fd):  # else an earlier event has closed it to make room
                self.look_at(connection)

    def accept(self) -> bool:
        """Accept connections from the kernel's queue; return whether there is room: else pause until `look_after`."""
        deadline = time.monotonic() + self.head_timeout
        for _ in range(ACCEPT_AT_ONCE):
            # A new connection may take the place of the one longest at rest, but not of one in line for a child.
            if not (has_room := bool(self.resting) or len(self.ready) < self.options.max_connections):
                break
            try:
                connection = Connection(self.listener.accept(), deadline)
            except (BlockingIOError, ConnectionAbortedError):
                break  # the kernel's queue is empty, or a client has gone again
            except OSError as error:  # EMFILE, ENFILE, ENOBUFS, ENOMEM
                log_throttled("cannot accept: %s" % error.strerror)
                has_room = self.close_longest_at_rest()
                break
            self.make_room()
            self.look_at(connection)
        if not has_room:
            self.is_paused = True
            with suppress(KeyError):  # it is not watched
                self.selector.unregister(self.listener.sock)
        return has_room

    def make_room(self) -> None:
        """Close the connection longest at rest if no more may be held."""
        if len(self.resting) + len(self.ready) >= self.options.max_connections:
            log_throttled("%d connections are held (--max-connections)" % self.options.max_connections)
            self.close_longest_at_rest()

    def close_longest_at_rest(self) -> bool:
        """Close the connection that has been at rest for the longest time; return whether there was one."""
        if connection := next(iter(self.resting.values()), None):
            self.drop(connection)
        return connection is not None

    def drop(self, connection: Connection) -> None:
        """Close a connection."""
        self.forget(connection)
        connection.sock.close()

    def look_at(self, connection: Connection) -> None:
        """Look at what the client has sent: line the connection up for a child, let it rest, or close it."""
        seen = connection.seen
        try:
            count = connection.sock.recv_into(self.peeked, 0, PEEK)
        except BlockingIOError:
            self.rest(connection)
            return
        except OSError:
            count = 0  # a reset
        if count == 0:
            self.drop(connection)
            return
        if not seen:  # the first bytes of the head set its deadline; more bytes do not extend it
            connection.deadline = time.monotonic() + self.head_timeout
        # Readable, but with no byte more than before: the client has ended its side inside the head.
        if self.is_opaque or count == seen or is_worth_reading(bytes(self.peeked[:count]), seen):
            self.make_ready(connection)
        else:
            # The selector reports the connection only when more bytes are there (SO_RCVLOWAT, socket(7)).
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count + 1)
            connection.seen = count
            self.rest(connection)

    def rest(self, connection: Connection) -> None:
        """Hold a connection until bytes come, or its deadline."""
        if connection.sock.fileno() not in self.resting:
            self.resting[connection.sock.fileno()] = connection
            self.selector.register(connection.sock, selectors.EVENT_READ)

    def make_ready(self, connection: Connection) -> None:
        """Line a connection up for a child."""
        self.forget(connection)
        if connection.seen:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        self.ready.append(connection)

    def forget(self, connection: Connection) -> None:
        """Stop watching a connection, always before its close: else the kernel would watch the children's copies."""
        if self.resting.pop(connection.sock.fileno(), None):
            self.selector.unregister(connection.sock)

    def take_back(self) -> None:
        """Receive messages until the mailbox is empty or holds the number of a signal; "free" only ends the sleep."""
        with suppress(BlockingIOError):  # it is empty
            while len((received := self.mailbox.receive(DONT_WAIT))[0]) > 1:
                self.hold(*received)

    def hold(self, message: bytes, rights: bytes, least: float = 0.0) -> None:
        """Hold the connections in a message for --keep-alive, less the TICK that has passed, at least for `least`."""
        rest = max(self.options.keep_alive - TICK, least)
        deadline = time.monotonic() + (self.head_timeout if self.options.certfile else rest)  # TLS has not begun yet
        for (fd,), memo in zip(DESCRIPTOR.iter_unpack(rights), message.split(b"\n")[1:]):
            self.make_room()
            self.rest(Connection(adopt(self.listener.family, fd), deadline, memo))

    def look_after(self, now: float) -> None:
        """Resume accepting; close connections past their deadline, but let a child answer 408 to an incomplete head."""
        with suppress(KeyError, OSError):  # it is watched already, or was closed
            self.listener.sock.setblocking(False)  # another process with this socket may have made it block
            self.selector.register(self.listener.sock, selectors.EVENT_READ, self.accept)
        self.is_paused = False
        for connection in [c for c in self.resting.values() if now >= c.deadline]:
            # A look, since bytes that came while this process was stopped have caused no event yet.
            (self.make_ready if connection.seen else self.look_at)(connection)
            if now >= connection.deadline and connection.sock.fileno() in self.resting:
                self.drop(connection)

    def stop_listening(self, is_late: bool) -> bool:
        """Accept the kernel's queue; close the listener if none is left, or it is late; return whether it is closed."""
        if not self.listener.is_foreign:
            self.listener.sock.listen(0)  # the kernel's queue takes one newcomer at most: the loop below ends
        while (are_left := wait_readable(self.listener.sock, 0)) and self.accept():
            pass
        if are_left and not (is_late or self.listener.is_foreign):
            return False
        with suppress(KeyError):  # it is not watched
            self.selector.unregister(self.listener.sock)
        self.listener.close()
        return True

    def close_copies(self) -> None:
        """Close the copies that a forked process has of what is held here: the connections live on in the parent."""
        self.listener.sock.close()
        if self.resting or self.ready:
            close_all([*self.resting, *(connection.sock.fileno() for connection in self.ready)])


def close_all(fds: list[int]) -> None:
    """Close these descriptors, each run of them by one call: a call for each of 9,000 takes 4 ms."""
    first = end = -1  # of the run in hand
    for fd in [*sorted(fds), -1]:
        if fd != end:
            if first >= 0:
                os.closerange(first, end)
            first = fd
        end = fd + 1


# ---- 14. Parent -------------------------------------------------------------
# One loop, which sleeps in one place. It hands requests to children, forks, watches and reaps children, and handles
# signals (fork(2), waitpid(2), signal(7)).

KILL_AFTER = 5.0  # seconds from the SIGALRM that interrupts a request to the SIGKILL that ends its child
ALARM_SLACK = 0.25  # seconds beyond the timeout until the parent interrupts a request
CLIENT_SLACK = 3.0  # the same for a wait for the client, which a child ends by itself, but looks only once in a TICK
LAST_CALL = 1.0  # seconds from a stop to the close of connections at rest, whose next request may be under way
FORK_DELAY = 0.01  # seconds without a spare child until the next fork; a child that is reaped ends the delay
LATE_AFTER = 0.05  # seconds between two checks; a request that both find in the queue makes children step back
SORT_EVERY = 0.05  # seconds between two sorts of the requests that wait: each reads the whole scoreboard
ADVICE_AFTER, EXPENSIVE, FEW_REQUESTS = 100, 20.0, 4  # processes reaped; per process: ms of processor, requests
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD, signal.SIGALRM)  # SIGINT first


class Signals:
    """Owns the signal handlers of the server, and the numbers of the signals that were not handled yet (signal(7)).

    The handler notes the number, a byte in the mailbox ends the sleep, and the parent's loop acts. In a child, or while
    the application loads, `Child.on_signal` or `on_loading_signal` acts at once. WARNING: CPython forgets signals that
    come to a child between fork(2) and the return of os.fork(). The server's children lose nothing: their orders are on
    the scoreboard. But an application may terminate a process that it has just forked: so `block` delays signals.
    """

    def __init__(self, wakeup: socket.socket) -> None:
        self.wakeup = wakeup
        self.pending: list[int] = []
        self.act: Callable[[int], Any] = self.pending.append  # what a handler does
        self.former: dict[int, Any] = {}  # by signal: the handler before ours
        self.has_terminal = os.isatty(2)  # stderr is a terminal
        self.detach: Callable[[], None] | None = None  # called in a process that the application has forked
        self.masks: dict[int, Any] = {}  # by the thread in which the application forks: the signal mask before
        os.register_at_fork(before=self.block, after_in_parent=self.unblock, after_in_child=self.leave_server)

    def catch(self, *signums: int) -> None:
        """Handle these signals, whatever the application has set or blocked; StartError outside the main thread."""
        try:
            for signum in signums:
                self.former.setdefault(signum, signal.signal(signum, self.on_signal))
            self.former.setdefault(signal.SIGPIPE, signal.signal(signal.SIGPIPE, signal.SIG_IGN))
            signal.set_wakeup_fd(self.wakeup.fileno(), warn_on_full_buffer=False)
        except ValueError:
            raise StartError("serve() must run in the main thread, which is where signals arrive") from None
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signums)

    def on_signal(self, signum: int, _: Any) -> None:
        """Note a signal; but drop SIGALRM, which raises an exception, during a fork: the parent sends it again."""
        if not (self.masks and signum == signal.SIGALRM):
            self.act(signum)

    def means_stop(self, signum: int) -> bool:
        """Return whether a signal asks for a stop: SIGTERM, SIGINT, and SIGHUP if the terminal at stderr was closed."""
        is_closed = self.has_terminal and not os.isatty(2)
        return signum in (signal.SIGTERM, signal.SIGINT) or (signum == signal.SIGHUP and is_closed)

    def release(self) -> None:
        """Restore the handlers that were set before `catch`."""
        if self.former:  # else nothing was caught, perhaps since this is not the main thread
            signal.set_wakeup_fd(-1)
        for signum, handler in self.former.items():
            if signal.getsignal(signum) in (self.on_signal, signal.SIG_IGN):
                signal.signal(signum, handler or signal.SIG_DFL)
        self.detach = None
        PARENTS.discard(os.getpid())

    def block(self) -> None:
        """Block the signals before the application forks."""
        if self.detach:
            self.masks[get_ident()] = None  # from here on `on_signal` raises nothing
            self.masks[get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def unblock(self) -> None:
        """Restore the signal mask after the fork."""
        if (mask := self.masks.get(get_ident())) is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # a SIGALRM that was blocked comes here, and is dropped
        self.masks.pop(get_ident(), None)

    def leave_server(self) -> None:
        """Give up what is the server's, in the process that the application has forked."""
        if self.detach:
            self.detach()
            self.release()
            self.unblock()
            self.masks.clear()


class Queue:
    """Owns the parent's end of the queue: how many requests are in it, and how many children wait for one."""

    def __init__(self, channel: Channel, board: Scoreboard) -> None:
        self.channel, self.board = channel, board
        self.put_in = 0  # connections, since the start of this program
        self.taken_before = -sum(board.taken)  # by children that are reaped, less those taken before a reload
        self.fair_at = 0.0  # when the requests that wait are sorted again
        self.late_at, self.put_in_then = 0.0, 0  # when `order_late` is due; `put_in` at the last one
        self.least_spare = 0  # the fewest spare children since the last TICK
        self.uncounted = 0  # at the last TICK: connections that have left the queue and that no child has counted
        self.stuck_spares: set[int] = set()  # slots of children that waited at the last TICK beside a request in line

    def fill(self, reactor: Reactor, now: float, spare: int, forks: int) -> int:
        """Put in a request for each child that is spare and for each fork allowed; return how many remain spare."""
        if spare + forks < len(reactor.ready) and now >= self.fair_at:
            self.fair_at = now + SORT_EVERY
            reactor.ready = sort_fairly(reactor.ready, self.board)
        before = self.put_in
        while reactor.ready and spare + forks > 0:
            connection = reactor.ready[0]
            try:
                self.channel.send(DEADLINE.pack(connection.deadline) + connection.memo, connection.sock.fileno())
            except OSError as error:  # the queue is full; ETOOMANYREFS: it holds too many descriptors
                if error.errno == errno.EPIPE:  # a stop has ended the queue: these connections came too late
                    reactor.ready.clear()
                elif error.errno not in (errno.EAGAIN, errno.ENOBUFS):
                    log_throttled("cannot hand over a connection: %s" % error.strerror)
                break
            reactor.ready.popleft()
            connection.sock.close()
            self.put_in, spare = self.put_in + 1, spare - 1
        if reactor.is_paused and self.put_in > before:  # there is room now
            reactor.look_after(now)
        if reactor.ready and spare + forks <= 0:
            log_throttled("all processes are at work: requests wait (--max-children)")
            if not self.board.orders[0] & PRESSED:
                self.board.order(PRESSED, True)  # from here on, a child that becomes spare sends a message
                return self.fill(reactor, now, self.count_spare(), forks)
        return spare

    def count_taken(self) -> int:
        """Return how many connections the children have taken out."""
        return self.taken_before + sum(self.board.taken[: self.board.used])

    def order_late(self, now: float) -> None:
        """Give LATE if a request that was put in before the last check is still in the queue, else withdraw it."""
        if now >= self.late_at:
            self.board.order(LATE, self.count_taken() < self.put_in_then)
            self.late_at, self.put_in_then = now + LATE_AFTER, self.put_in

    def count_spare(self) -> int:
        """Return how many more children wait than the queue has requests, below 0 if they are fewer; note the least."""
        spare = sum(self.board.waiting[: self.board.used]) - self.put_in + self.count_taken()
        self.least_spare = min(self.least_spare, spare)
        return spare

    def look_after(self) -> None:
        """Withdraw PRESSED; correct the counts; of the children that were spare since the last call, let one stay."""
        self.board.order(PRESSED, False)  # until `fill` gives the order again
        waiting = {slot for slot, is_waiting in enumerate(self.board.waiting[: self.board.used]) if is_waiting}
        if wait_readable(self.channel.receiver, 0):
            for slot in waiting & self.stuck_spares:  # stuck or stopped: they do not count as spare
                self.board.waiting[slot] = 0
            self.stuck_spares = waiting
            return
        self.stuck_spares = set()
        uncounted = self.put_in - self.count_taken()  # taken just now, or by a child that died before it counted
        self.taken_before += min(uncounted, self.uncounted)
        self.uncounted = uncounted
        with suppress(OSError):  # the queue is full
            for _ in range(self.least_spare - 1):
                self.channel.send(b"leave")
        self.least_spare = len(waiting)

    def end(self) -> list[tuple[int, bytes]]:
        """End the queue for the children that wait; return the connections that none has taken, with their memos."""
        untaken: list[tuple[int, bytes]] = []
        with suppress(BlockingIOError):
            while (received := self.channel.receive(DONT_WAIT))[0]:
                untaken += [(fd, received[0][DEADLINE.size :]) for (fd,) in DESCRIPTOR.iter_unpack(received[1])]
        with suppress(OSError):
            self.channel.sender.shutdown(socket.SHUT_WR)
        return untaken


class Parent:
    """Owns the children and the loop that forks, watches and reaps them. It lives in the process that was started."""

    def __init__(self, child: Child, reactor: Reactor, signals: Signals, options: Options) -> None:
        self.child, self.reactor, self.signals, self.options = child, reactor, signals, options
        self.board, self.queue = child.slot.board, Queue(child.queue, child.slot.board)
        self.reload = Reload(options, signals, reactor, self.queue)
        signals.detach = None  # from here on, this process forks only children; `give_up` sets it in each
        PARENTS.add(os.getpid())
        # A reload keeps the size of the scoreboard. The cap falls below `most` while the system refuses more processes.
        self.most = self.cap = min(options.max_children, len(self.board.pids))
        self.fork_at = 0.0  # when to fork the next child; 0: at once, and no new delay; UNBOUNDED: no fork is due
        self.ahead = 0  # how many requests had been put in when the delay began: it lasts until they are taken
        self.fork_again_at = self.fork_pause = 0.0  # no fork before this; the pause after children that died unused
        self.tick_at, self.stop_at = time.monotonic(), 0.0  # when `watch` is due; when listening ends, 0 before a stop
        self.grace = options.graceful_timeout  # seconds from `stop_at` on for the requests in hand
        self.has_advised = False  # what to do about expensive processes was logged
        self.is_over = False  # the server has stopped, and the last child is reaped
        self.interrupted: dict[int, tuple[float, float]] = {}  # by slot: the `since` that was interrupted, and when
        self.totals: dict[str, float] = {"forks": 0, "reaped": 0, "crashes": 0, "timeouts": 0}
        self.totals.update({"requests": -sum(self.board.requests), "ms of processor": -count_processor()})

    def run(self) -> None:
        """Serve until the server is stopped and the last child is reaped."""
        for ended in find_ended([*self.board.children]):  # after a reload
            self.record_exit(*ended)
        while not self.is_over:
            now, spare = time.monotonic(), self.queue.count_spare()
            # Step 1: put requests into the queue, one for each child that is spare or may be forked.
            if self.reactor.ready:
                spare = self.queue.fill(self.reactor, now, spare, self.cap - len(self.board.children))
            # Step 2: keep one child spare, so that no client has to wait for a fork.
            until = self.keep_spare(now, spare)
            # Step 3: let children at work run first; then sleep until an event, a signal, or the next thing is due.
            give_way()
            self.reactor.wait(max(min(until, self.tick_at) - now, 0.0))
            # Step 4: handle the signals that have come.
            while self.signals.pending:
                self.handle_signal(self.signals.pending.pop(0))
            # Step 5: do what is due in each TICK.
            if (now := time.monotonic()) >= self.tick_at:
                self.watch(now)

    def keep_spare(self, now: float, spare: int) -> float:
        """Fork a child soon after the last spare one got work, or at once for a request; return `fork_at`."""
        # The delay leaves the processor to the child that answers. If children serve several connections, a request
        # waits for it, too; then the delay starts anew if all requests that were put in before it have been taken.
        is_enough = spare > 0 or len(self.board.children) >= self.cap
        if is_enough or (self.stop_at and (spare == 0 or now >= self.stop_at + self.grace)):  # in a stop: no spare one
            self.fork_at = UNBOUNDED
            self.board.order(WANTED | LATE, False)
            if spare < 0:  # the system has refused a fork for which a request was put in already
                self.board.order(PRESSED, True)
            return self.fork_at
        if spare < 0 and self.options.connections_per_child == 1:
            self.fork_at = now
        elif self.fork_at == UNBOUNDED or (spare < 0 < self.fork_at <= now and self.queue.count_taken() >= self.ahead):
            self.fork_at, self.ahead = now + FORK_DELAY, self.queue.put_in
        self.fork_at = max(self.fork_at, self.fork_again_at)
        self.board.order(WANTED, spare < 0 and now >= self.fork_at)
        if now >= self.fork_at:
            self.queue.order_late(now)
            self.fork()
            # `spare` was counted before this fork, which has left requests, none, or a spare child.
            self.fork_at = now if spare < -1 else now + FORK_DELAY if spare < 0 else UNBOUNDED
        return self.fork_at

    def fork(self) -> None:
        """Fork a child that waits at the queue. If the system refuses, the present number is the cap until `watch`."""
        slot = self.board.allot()
        format_time(DATE, int(time.time()))  # the child inherits the cached field line
        try:
            pid = os.fork()
        except OSError as error:  # EAGAIN: a limit of processes, ENOMEM
            self.board.clear(slot)
            self.cap = len(self.board.children)
            log_throttled("cannot fork: %s; %d processes are the limit of the system" % (error.strerror, self.cap))
            return
        if pid == 0:
            self.child.run(slot, partial(give_up, self.child, self.reactor, self.signals))
        self.board.pids[slot], self.board.children[pid] = pid, slot
        self.totals["forks"] += 1

    def handle_signal(self, signum: int) -> None:
        """Do what a signal asks for."""
        if signum == signal.SIGCHLD:
            self.reap()
        elif signum == signal.SIGUSR1:
            report(self.queue, self.reactor, self.totals)
        elif self.signals.means_stop(signum):
            self.stop()
        elif signum == signal.SIGHUP and not self.stop_at:
            self.reload.begin()

    def reap(self) -> None:
        """Reap every child that has ended: until then it is a zombie, a pid and a wait status in the kernel."""
        # One SIGCHLD may stand for several children: signals merge. So this repeats until no zombie is left, and does
        # not wait for living children (waitpid(2)). An unknown pid is a check of a reload, or an orphan given to PID 1.
        with suppress(ChildProcessError):  # there is no child at all
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:  # 0: there are other children, but none has ended
                if ended[0] in self.board.children:
                    self.record_exit(*ended)
                else:
                    self.reload.end_check(*ended)
        if self.stop_at or self.reload.has_passed:  # then `watch` acts at once
            self.tick_at = time.monotonic()

    def record_exit(self, pid: int, status: int) -> None:
        """Free the slot of a child that was reaped; log its end if the status is not 0, or a request was in hand."""
        slot = self.board.children.pop(pid)
        self.totals["reaped"] += 1
        self.totals["requests"] += self.board.requests[slot]
        if self.totals["reaped"] % ADVICE_AFTER == 0 and not self.has_advised:
            self.has_advised = give_advice(self.totals)
        if status or self.board.since[slot] > 0:  # the application may have called os._exit(0), or an exec function
            self.totals["crashes"] += 1
            log("child %d %s while %s" % (pid, describe_end(status), self.board.describe(slot)))
        # Without the pause, children that die before they serve would cause a fork storm.
        self.fork_pause = min(2 * self.fork_pause + FORK_DELAY, TICK) if self.board.waiting[slot] else 0.0
        self.fork_again_at = time.monotonic() + self.fork_pause
        self.fork_at = 0.0  # it was spare, or has made room for another
        self.queue.taken_before += self.board.taken[slot]
        self.board.clear(slot)

    def watch(self, now: float) -> None:
        """Do what is due in each TICK, and four times as often during a stop or with --reload."""
        was_paused = now > self.tick_at + TICK  # as by `docker pause`: then the children were, too
        self.cap = self.most  # the system may allow more again
        self.reactor.look_after(now)
        self.queue.look_after()
        if not self.stop_at:
            self.reload.watch(now)
        elif now >= self.stop_at:
            self.is_over = end_service(now, self.stop_at, self.stop_at + self.grace, self.reactor, self.queue)
        if not was_paused:  # else the children have another TICK, to see what has come meanwhile
            self.totals["timeouts"] += enforce_deadlines(now, self.options.timeout, self.board, self.interrupted)
        # Only now: the time that all this takes, as for a look at many source files, is no pause.
        self.tick_at = time.monotonic() + (TICK / 4 if self.stop_at or self.options.reload else TICK)

    def stop(self) -> None:
        """Begin a graceful stop; if one has begun, stop at once."""
        if self.stop_at:
            self.stop_at, self.grace = time.monotonic(), 0.0
        else:
            self.stop_at = time.monotonic() + self.options.drain_delay
            log("stopping")
            notify("STOPPING=1")
            self.board.order(STOPPING, True)
            self.reload.cancel()
        self.tick_at = time.monotonic()


def find_ended(pids: list[int]) -> Iterator[tuple[int, int]]:
    """Yield the pid and the wait status of each child that has ended, 0 if the application reaped it in its load."""
    for pid in pids:
        try:
            ended = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            ended = pid, 0
        if ended[0]:
            yield ended


def give_up(child: Child, reactor: Reactor, signals: Signals) -> None:
    """Close what is the parent's, in a new child. The sender of the mailbox stays: `give_back` and signals use it."""
    child.queue.sender.close()
    child.mailbox.receiver.close()
    reactor.close_copies()
    signals.act, signals.detach = child.on_signal, child.detach
    become_child()


def end_service(now: float, stop_at: float, kill_at: float, reactor: Reactor, queue: Queue) -> bool:
    """Stop listening; after LAST_CALL, close what is at rest and let children finish; return whether all is over."""
    children, is_late = queue.board.children, now >= kill_at
    is_listening = reactor.listener.sock.fileno() >= 0 and not reactor.stop_listening(is_late)
    is_busy = reactor.resting or reactor.ready or queue.count_spare() != len(children)  # one is at work
    if not is_busy or now >= min(stop_at + LAST_CALL, (stop_at + kill_at) / 2):  # at most half of the grace
        while reactor.close_longest_at_rest():
            pass
        queue.board.retire(max(kill_at, now + TICK / 4))  # time to leave, also without any grace
        if is_late:
            reactor.ready.clear()
        if is_late or not (is_listening or reactor.ready or wait_readable(queue.channel.receiver, 0)):
            for fd, _ in queue.end():
                os.close(fd)
    return not (children or reactor.resting or reactor.ready) and (is_late or queue.count_spare() >= 0)


def enforce_deadlines(
    now: float, timeout: float, board: Scoreboard, interrupted: dict[int, tuple[float, float]]
) -> int:
    """Interrupt children without progress; kill those that go on, or miss `leave_by`; return the number interrupted."""
    count = late = 0
    for pid, slot in board.children.items():
        since = board.since[slot]  # read once: the child may change it meanwhile
        if since and now - abs(since) > timeout + (ALARM_SLACK if since > 0 else CLIENT_SLACK):
            if interrupted.get(slot, (0.0, 0.0))[0] != since:
                interrupted[slot] = since, now
                count += 1
            send_signal(pid, signal.SIGKILL if now - interrupted[slot][1] >= KILL_AFTER else signal.SIGALRM)
        if 0 < board.leave_by[slot] <= now:
            late += 1
            send_signal(pid, signal.SIGKILL)
    if late:
        log_throttled("children that have not finished and are killed: %d" % late)
    return count


def send_signal(pid: int, signum: int) -> None:
    """Send a signal to a child, which may have become another user (kill(2))."""
    try:
        os.kill(pid, signum)  # until the child is reaped, no other process gets its pid
    except PermissionError:
        log_throttled("may not send a signal to process %d, which has become another user" % pid)


def describe_end(status: int) -> str:
    """Return how a process has ended, from its wait status (waitpid(2))."""
    names = {int(signum): signum.name for signum in signal.Signals}
    number = os.WTERMSIG(status)  # 0: no signal
    return "died of " + names.get(number, "signal %d" % number) if number else "exited with %d" % os.WEXITSTATUS(status)


def give_advice(totals: dict[str, float]) -> bool:
    """Log what to do if processes cost much and serve few requests; return whether they do."""
    cost = (totals["ms of processor"] + count_processor()) / totals["reaped"]
    requests = totals["requests"] / totals["reaped"]
    if is_expensive := cost > EXPENSIVE and requests < FEW_REQUESTS:
        advice = "--warm-up PATH loads once for all what first requests load, --connections-per-child N keeps processes"
        log("a process takes %d ms of processor and serves %.1f requests: %s" % (cost, requests, advice))
    return is_expensive


def count_processor() -> float:
    """Return the milliseconds of processor time that all processes reaped so far have used (times(2))."""
    return sum(os.times()[2:4]) * 1000  # children_user and children_system


def report(queue: Queue, reactor: Reactor, totals: dict[str, float]) -> None:
    """Log what each child does, how many connections are held, and the totals since the start or the last reload."""
    board, now = queue.board, time.monotonic()
    log("%7s %-8s %8s %8s  %s" % ("pid", "state", "age", "requests", "client and request"))
    for pid, slot in sorted(board.children.items()):
        since = board.since[slot]
        state = "busy" if since > 0 else "idle" if since < 0 else "waiting" if board.waiting[slot] else "leaving"
        age, doing = ("%.1f s" % max(now - abs(since), 0.0), board.describe(slot)) if since else ("-", "")
        log("%7d %-8s %8s %8d  %s" % (pid, state, age, board.requests[slot], doing))
    log("connections at rest: %d, waiting for a process: %d" % (len(reactor.resting), len(reactor.ready)))
    numbers = {"connections": queue.count_taken(), **totals}
    numbers["requests"] += sum(board.requests)
    numbers["ms of processor"] += count_processor()
    log("in all: " + ", ".join("%d %s" % (number, name) for name, number in numbers.items()))


def serve_alone(child: Child, reactor: Reactor, signals: Signals) -> None:
    """Serve without other processes (--no-fork), one request at a time, until the server is stopped."""
    while not (signals.pending and signals.means_stop(signals.pending.pop(0))):
        signal.set_wakeup_fd(signals.wakeup.fileno(), warn_on_full_buffer=False)
        reactor.wait(0.0 if reactor.ready or signals.pending else TICK)
        signal.set_wakeup_fd(-1)  # the signals of a request would fill the mailbox, which only `wait` empties
        reactor.look_after(time.monotonic())
        if reactor.ready:
            connection = reactor.ready.popleft()
            with contain_forks():
                child.serve(connection.sock, connection.deadline, connection.memo)
    log("stopping")
    while reactor.close_longest_at_rest():
        pass
    reactor.ready.clear()


# ---- Part three: what production adds ---------------------------------------
# ---- 15. Reload -------------------------------------------------------------
# New code without a lost request, a closed connection or a new pid. WARNING: each step relies on the one before.
#
#     1. SIGHUP            the check: a new process runs the program with WEBSERVER_CHECK, only to load the application
#     2. check passed      the parent tells its children to leave; the connections that no child has go into a channel
#     3. execve(2)         the parent becomes the new program; WEBSERVER_RELOAD names the descriptors that it keeps:
#                          the memory of the scoreboard, the listening socket, the mailbox, that channel
#     4. load              new clients wait in the kernel's queue; the old children put connections into the mailbox
#     5. serve             the parent also reaps the old children, whose deadlines are on the scoreboard

CHECK_TIMEOUT = 30.0  # seconds for new code to load
LOADING_IS_SLOW = 10  # seconds until the log says:
STILL_LOADING = "the application is still loading: does its module run a server, as by app.run()? Then it never ends"
CHECK_PASSED = 93  # the exit status of a passed check; not 0, with which a module may end the process while it loads
SPACE, MEMOS = socket.CMSG_SPACE(MAX_DESCRIPTORS * DESCRIPTOR.size), MAX_DESCRIPTORS * 64  # bytes of a full message

# How this program was started, to start it again: noted now, because the application may change all of it.
STARTED_WITH = dict(os.environ)
STARTED_AS = [sys.executable, *getattr(sys, "orig_argv", [sys.executable, *sys.argv])[1:]]
try:
    STARTED_IN = os.getcwd()
except FileNotFoundError:
    raise SystemExit("webserver.py: the working directory was removed: change to another one") from None
with suppress(KeyError, OSError):  # PWD has the symbolic links, one of which may lead to a new release later
    if os.path.isabs(os.environ["PWD"]) and os.path.samefile(os.environ["PWD"], STARTED_IN):
        STARTED_IN = os.environ["PWD"]


class Reload:
    """Owns the check of new code, and the replacement of the program after it. It lives in the parent."""

    def __init__(self, options: Options, signals: Signals, reactor: Reactor, queue: Queue) -> None:
        self.options, self.signals, self.reactor, self.queue = options, signals, reactor, queue
        self.checker, self.check_by = 0, 0.0  # the pid of the check, 0 for none, and its deadline
        self.is_wanted_again = self.has_passed = False  # a reload was asked for during the check; the check has passed
        self.sources = list_sources() if options.reload else {}

    def begin(self) -> None:
        """Check the present code in a new process; if a check is under way, do so once that has ended."""
        self.is_wanted_again = bool(self.checker)
        if self.checker or self.has_passed:  # `replace` will load the present code in any case
            return
        self.check_by = time.monotonic() + bound_loading(self.options)
        try:
            self.checker = os.fork()
        except OSError as error:
            self.refuse("cannot fork to try the new code: %s" % error.strerror)
            return
        if self.checker == 0:
            start_again(WEBSERVER_CHECK="%d %s" % (os.getpid(), PRODUCT))

    def cancel(self) -> None:
        """Kill the process of a check that is under way; `end_check` then ignores its end."""
        if self.checker:
            send_signal(self.checker, signal.SIGKILL)
        self.checker = 0

    def end_check(self, pid: int, status: int) -> None:
        """Act on the result of the check, if the process that was reaped is that of the check."""
        if pid != self.checker:
            return
        self.checker = 0
        if self.is_wanted_again:
            self.begin()
        elif os.WIFEXITED(status) and os.WEXITSTATUS(status) == CHECK_PASSED:
            self.has_passed = True
        else:
            self.refuse("the new program does not start")

    def refuse(self, reason: str) -> None:
        """Log that there is no reload, and tell the service manager, which may wait for the end of one."""
        log("%s: the old code goes on" % reason)
        notify("RELOADING=1")
        notify("READY=1")

    def watch(self, now: float) -> None:
        """Kill a check that is late, begin one if a source has changed, replace the program if one has passed."""
        if self.checker and now >= self.check_by:
            send_signal(self.checker, signal.SIGKILL)
        if self.options.reload and (sources := list_sources()) != self.sources:
            self.sources = sources
            self.begin()
        if self.has_passed:
            self.replace()

    def replace(self) -> None:
        """Become the new program; return if that is refused, or if a signal is pending, which must be handled first."""
        try:
            carried = Channel()  # for the connections that no child has
            carried.sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)  # if the system allows
        except OSError as error:  # EMFILE
            self.has_passed = False
            self.refuse("cannot hand over the connections: %s" % error.strerror)
            return
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        if self.signals.pending:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            return
        notify("RELOADING=1")
        board, mailbox = self.queue.board, self.reactor.mailbox
        board.retire(time.monotonic() + self.options.graceful_timeout)
        board.order(WANTED | LATE, False)
        for connection in [*self.reactor.resting.values()]:
            self.reactor.make_ready(connection)
        held = [(connection.sock.fileno(), connection.memo) for connection in self.reactor.ready] + self.queue.end()
        for first in range(0, len(held), MAX_DESCRIPTORS):
            fds, memos = zip(*held[first : first + MAX_DESCRIPTORS])
            try:
                carried.send(BACK + b"\n".join(memos), *fds)
            except OSError as error:  # more than there is room for, or than the user may have in messages (unix(7))
                log("connections at rest are lost in the reload: %s" % error.strerror)
        sockets = self.reactor.listener.sock, mailbox.receiver, mailbox.sender, carried.receiver, carried.sender
        # execve(2) runs no exit handler: what the old code has started would go on.
        end_application(partial(replace_program, [board.fd, *(sock.fileno() for sock in sockets)]))


def bound_loading(options: Options) -> float:
    """Return the seconds that new code may take to load and to warm up, in the check and once more in the reload."""
    return CHECK_TIMEOUT + options.timeout * len(options.warm_up)


def replace_program(kept: list[int]) -> NoReturn:
    """Start the program again in this process with these descriptors open; it unblocks signals once it catches them."""
    for fd in kept:
        os.set_inheritable(fd, True)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    # A script may start processes before it calls `serve`, which would inherit the mask. But the kernel drops a signal
    # that is not blocked and has no handler, if it is for PID 1.
    if __name__ != "__main__" and os.getpid() != 1:
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_DFL)  # ours would note it for a loop that no longer runs
        for signum in (signal.SIGHUP, signal.SIGUSR1):
            signal.signal(signum, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    start_again(WEBSERVER_RELOAD=" ".join(map(str, (os.getpid(), *kept))))


def find_kept() -> list[int]:
    """Return the descriptors that `Reload.replace` has kept for this process; none if the variable has another pid."""
    pid, *kept = map(int, os.environ.pop("WEBSERVER_RELOAD", "0").split())
    if pid != os.getpid():
        return []
    for fd in kept:
        os.set_inheritable(fd, False)
    return kept


def on_loading_signal(signals: Signals, listener: Listener, is_reload: bool, signum: int) -> None:
    """Handle a signal while the application loads: one to stop ends the process, in a reload only the second time."""
    # No loop runs yet. But in a reload, old children still serve: as PID 1, this process would take them along.
    if signum == signal.SIGALRM:
        log(STILL_LOADING)
        if is_reload:
            os._exit(1)
    elif signals.means_stop(signum) and (not is_reload or any(map(signals.means_stop, signals.pending))):
        listener.close()
        os._exit(0)
    else:
        signals.pending.append(signum)


def start_again(**environ: str) -> NoReturn:
    """Replace this process by the program as it was started, with these variables in its environment (execve(2))."""
    try:
        os.chdir(STARTED_IN)
        set_limit("RLIMIT_NOFILE")
        os.execve(STARTED_AS[0], STARTED_AS, {**STARTED_WITH, **environ})
    except (OSError, ValueError) as error:  # ValueError: Python does not know its own path
        log("cannot start %r again: %s" % (STARTED_AS[0], error))
    finally:
        os._exit(1)


def list_sources() -> dict[str, int]:
    """Return the mtime of each .py file beside a loaded module: one not loaded may be why an import fails."""
    files = [getattr(module, "__dict__", {}).get("__file__") for module in list(sys.modules.values())]
    folders = {os.path.dirname(os.path.abspath(f)) for f in files if isinstance(f, str) and f.endswith(".py")}
    installed = re.compile("%s/|.*/(site|dist)-packages/" % re.escape(os.path.dirname(os.__file__)))
    times = {}
    for folder in (folder for folder in folders if not installed.match(folder + "/")):
        with suppress(OSError):  # the folder was removed meanwhile
            for path in (os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".py")):
                with suppress(OSError):  # the file was removed, or is a dangling link
                    times[path] = os.stat(path).st_mtime_ns
    return times


# ---- 16. TLS ----------------------------------------------------------------
# A filter between Stream and the socket, made of memory BIOs: the socket of SSLContext.wrap_socket repeats a wait that
# SO_RCVTIMEO has ended, and so undoes every deadline. The context precedes the fork: any child can resume a session.

SHORT_NAMES = {  # of attributes in a distinguished name (RFC 4514 §3)
    "commonName": "CN", "localityName": "L", "stateOrProvinceName": "ST", "organizationName": "O",
    "organizationalUnitName": "OU", "countryName": "C", "streetAddress": "STREET", "domainComponent": "DC",
    "userId": "UID",
}  # fmt: skip
SPECIAL = re.compile(r'([,+"\\<>;]|^[ #]| $)')  # characters that are escaped in the value of one (RFC 4514 §2.4)


def make_tls_context(options: Options) -> Any:
    """Return the ssl.SSLContext of the server, None without --certfile; StartError says what is wrong with a file."""
    if not options.certfile:
        if options.keyfile or options.ca_certs:
            raise StartError("--keyfile and --ca-certs need --certfile", 2)
        return None
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)  # of TLS 1.2: it costs the server more than the client
    context.set_alpn_protocols(["http/1.1"])
    try:
        for path in filter(None, (options.certfile, options.keyfile, options.ca_certs)):
            open(path, "rb").close()  # ssl would not say which file it cannot read
        path = " with ".join(filter(None, (options.certfile, options.keyfile)))
        context.load_cert_chain(options.certfile, options.keyfile or None, "")  # no pass phrase: nobody can be asked
        if options.ca_certs:
            path, context.verify_mode = options.ca_certs, ssl.CERT_REQUIRED
            context.load_verify_locations(path)
    except ssl.SSLError as error:
        reason = "a certificate or a key is missing, as PEM, or the key is locked by a pass phrase"
        if error.reason in ("KEY_VALUES_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):  # the second: one of another kind
            reason = "the key is that of another certificate"
        raise StartError("cannot use %s: %s" % (path, reason)) from None
    except OSError as error:
        raise StartError("cannot read %s: %s" % (path, error.strerror)) from None
    return context


def accept_tls(context: Any, stream: Stream, deadline: float) -> TLSSocket:
    """Return the TLS session of a connection; ClientGoneError if the handshake fails, HTTPError for HTTP; OSError."""
    if not stream.buffer:
        stream.receive_at_rest(deadline)
    if not stream.buffer.startswith(b"\x16"):  # the type of a handshake record (RFC 8446 §5.1)
        raise HTTPError(400, "plain HTTP on a port with TLS: the address begins with https")
    records, stream.buffer = stream.buffer, b""
    session, began = TLSSocket(context, stream.sock, records), time.monotonic()
    try:
        while True:
            with suppress(BlockingIOError):
                session.attempt(session.session.do_handshake)
                return session
            if stream.slot.mark_silent() >= (began + TICK if stream.slot.is_told(PRESSED) else deadline):
                raise ClientGoneError(0)
    except OSError as error:
        log_throttled("a TLS handshake has failed: %s" % (getattr(error, "reason", None) or error))
        raise ClientGoneError(0) from None


class TLSSocket:
    """Owns the TLS session on a connected socket. It has the methods of a socket that Stream uses."""

    def __init__(self, context: Any, sock: socket.SocketType, records: bytes) -> None:
        import ssl

        self.sock, self.is_ended = sock, False
        self.want_read, self.incoming, self.outgoing = ssl.SSLWantReadError, ssl.MemoryBIO(), ssl.MemoryBIO()
        self.incoming.write(records)
        self.session = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self.unsent = b""  # records that the kernel has not taken yet
        self.encrypted = self.pushed = 0  # bytes: data that `send` has not reported yet; records that the kernel took

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute of the socket."""
        return getattr(self.sock, name)

    def attempt(self, step: Callable[[], Any]) -> Any:
        """Repeat a step of the session until it has its records; return its result; BlockingIOError after a second."""
        until = time.monotonic() + TICK  # else a record that comes byte by byte would extend the wait
        while True:
            if len(self.unsent) > RECEIVE_SIZE:  # of TLS 1.3, which the client may ask for without end
                raise ConnectionResetError("the client does not read the answers to its updates of the keys")
            if not self.incoming.pending:
                if not (records := self.sock.recv(RECEIVE_SIZE)):  # maybe a truncation (RFC 8446 §6.1)
                    raise ConnectionResetError("the client has closed without close_notify")
                self.incoming.write(records)
            try:
                return step()
            except self.want_read:  # the record is incomplete
                if time.monotonic() >= until:
                    raise BlockingIOError from None
            finally:
                with suppress(OSError):  # a message of the handshake, an alert, or the answer to an update of the keys
                    self.push(DONT_WAIT)

    def push(self, flags: int = 0) -> None:
        """Send the records that are to be sent; BlockingIOError if the kernel does not take all of them."""
        self.unsent += self.outgoing.read()
        if self.unsent:
            sent = self.sock.send(self.unsent, flags)
            self.unsent, self.pushed = self.unsent[sent:], self.pushed + sent
            if self.unsent:
                raise BlockingIOError

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Receive data, as recv(2) does; b"" after close_notify."""
        if self.is_ended:
            return self.sock.recv(size, flags)  # records, which `Stream.linger` drops
        return bytes(self.attempt(partial(self.session.read, size)))

    def send(self, data: Any, flags: int = 0) -> int:
        """Encrypt and send the beginning of the data; return its size. After BlockingIOError, repeat the call."""
        self.encrypted = self.encrypted or self.session.write(data[:FILE_BLOCK_SIZE])
        self.push(flags)
        sent, self.encrypted, self.pushed = self.encrypted, 0, 0
        return sent

    def sendmsg(self, blocks: Iterable[bytes], _: Any, flags: int) -> int:
        """Encrypt and send the beginning of the blocks; return its size."""
        # `send` takes the first FILE_BLOCK_SIZE bytes of all: what is cut here, and what follows it, is not among them.
        return self.send(b"".join(block[:FILE_BLOCK_SIZE] for block in blocks), flags)

    def shutdown(self, how: int) -> None:
        """End our side and tell the client by close_notify; what it still sends is not decrypted."""
        self.is_ended = True
        with suppress(OSError):  # the client's own close_notify is not waited for
            self.session.unwrap()
        with suppress(OSError):  # the kernel takes nothing now, or the client has gone
            self.push(DONT_WAIT)
        self.sock.shutdown(how)

    def make_environ(self) -> Environ:
        """Return what an application may know of the session, by the names of Apache's mod_ssl."""
        import ssl

        environ = {
            "wsgi.url_scheme": "https", "HTTPS": "on", "SSL_PROTOCOL": self.session.version(),
            "SSL_CIPHER": self.session.cipher()[0], "SSL_CLIENT_VERIFY": "NONE",
        }  # fmt: skip
        if certificate := self.session.getpeercert():
            pem = ssl.DER_cert_to_PEM_cert(self.session.getpeercert(True))
            environ.update(SSL_CLIENT_VERIFY="SUCCESS", SSL_CLIENT_CERT=pem)
            environ["SSL_CLIENT_M_SERIAL"] = certificate["serialNumber"]
            environ["SSL_CLIENT_S_DN"] = write_name(certificate["subject"])
            environ["SSL_CLIENT_I_DN"] = write_name(certificate["issuer"])
        return environ


def write_name(name: Any) -> str:
    """Return a distinguished name as RFC 4514 writes it, as the latin-1 characters that PEP 3333 wants."""
    parts = []
    for attributes in reversed(name):
        pairs = [(SHORT_NAMES.get(key, key), SPECIAL.sub(r"\\\1", text)) for key, text in attributes]
        parts.append("+".join("%s=%s" % pair for pair in pairs))
    return ",".join(parts).replace("\0", "\\00").encode().decode("latin-1")


# ---- 17. Proxies ------------------------------------------------------------
# What a proxy in front tells of its client, in X-Forwarded-* fields or by the PROXY protocol of haproxy, versions 1 and
# 2 (proxy-protocol.txt). Any client can send either, so both are believed only from peers in --forwarded-allow-ips.

DEFAULT_PORTS = {"http": "80", "https": "443"}
FORWARDED = ["HTTP_X_FORWARDED_" + name for name in ("FOR", "PROTO", "HOST", "PORT", "PREFIX")]
# address [ ":" port ]; an IPv6 address with a port is in brackets
HOP = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+))(?::([0-9]{1,5}))?|([0-9A-Fa-f:.]+)")
# a path where an application is mounted: segments without "%", which a server in front might decode
MOUNT = re.compile(r"(?:/[!\"$&-.0->@-~]+)*/?")
# PROXY SP ( UNKNOWN / ( TCP4 / TCP6 ) SP source SP destination SP port SP port ) CRLF
PROXY_LINE = re.compile(
    rb"PROXY (?:UNKNOWN[^\r\n]*|TCP(?:4 ([0-9.]+)|6 ([0-9A-Fa-f:]*:[0-9A-Fa-f:.]+))"
    rb" [0-9A-Fa-f:.]+ ([0-9]{1,5}) [0-9]{1,5})\r\n"
)
PROXY_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"  # what a header of version 2 begins with
MAX_PROXY_LINE = 107  # bytes of a header of version 1, its CRLF included


class Transport:
    """Owns what lies between a connection and the application: the PROXY protocol, TLS, X-Forwarded-* fields."""

    def __init__(self, options: Options) -> None:
        """Read the files that the options name; StartError if an option or a file is wrong."""
        if options.proxy_protocol and not options.forwarded_allow_ips:
            raise StartError("--proxy-protocol needs --forwarded-allow-ips: name the peers that send the header", 2)
        self.trust = Trust(options.forwarded_allow_ips) if options.forwarded_allow_ips else None
        self.options, self.mount, self.context = options, options.script_name, make_tls_context(options)

    def wrap(self, application: Application) -> Application:
        """Return the application, wrapped if proxies are believed or if it is mounted under --script-name."""

        def wrapped(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
            """Set what a proxy tells of its client and the path below SCRIPT_NAME; call the application; HTTPError."""
            if self.trust:
                believe_proxy(environ, self.trust)
            if self.mount:
                require((environ["PATH_INFO"] + "/").startswith(self.mount + "/"), 404, "nothing is here")
                environ["SCRIPT_NAME"] += self.mount
                environ["PATH_INFO"] = environ["PATH_INFO"][len(self.mount) :]
            return application(environ, start_response)

        return wrapped if self.trust or self.mount else application

    def open(self, stream: Stream, shared: Environ, deadline: float | None) -> float | None:
        """Receive what precedes HTTP; note what it tells in the environ of all requests; return the head's deadline."""
        stream.preface, slot = None, stream.slot
        until = deadline or time.monotonic() + min(HEAD_TIMEOUT, stream.timeout)
        if self.options.proxy_protocol and self.trust and not slot.memo and self.trust.covers(shared["REMOTE_ADDR"]):
            slot.memo = read_proxy_header(stream, until).encode()
        if slot.memo not in (b"", b"-"):
            shared["REMOTE_ADDR"], shared["REMOTE_PORT"] = slot.memo.decode().split()
            slot.mark_client(slot.memo.split()[0])
        if self.context:
            stream.sock = accept_tls(self.context, stream, until)
            shared.update(stream.sock.make_environ())
            stream.rest_timeout = max(self.options.keep_alive, TICK)
            deadline = max(until, time.monotonic() + TICK)  # the client could not send the head while it was in line
        return deadline


class Trust:
    """Owns the list of the peers that are believed; StartError if one is malformed."""

    def __init__(self, words: str) -> None:
        import ipaddress

        self.words = set(filter(None, re.split("[, ]+", words)))
        try:
            self.networks = [ipaddress.ip_network(name, strict=False) for name in self.words - {"unix", "*"}]
            for network in self.networks:  # a peer with such an address is known by its IPv4 address
                if getattr(network.network_address, "ipv4_mapped", None):
                    raise ValueError("%s is IPv4 mapped to IPv6: write it as IPv4" % network)
        except ValueError as error:
            raise StartError("--forwarded-allow-ips: %s" % error, 2) from None

    def covers(self, address: str) -> bool:
        """Return whether a peer with this address, "" at a unix socket, is believed."""
        if "*" in self.words:
            return True
        if not address:
            return "unix" in self.words
        parsed = parse_ip(address.partition("%")[0])  # without the zone of a peer on the same link
        return any(parsed in network for network in self.networks)

    def find_client(self, hops: str) -> str:
        """Return the client in X-Forwarded-For: first hop from the right not listed, else the leftmost; HTTPError."""
        client: Any = ""
        for hop in reversed(hops.split(",")):  # the client can forge all that stands left of its address
            match = HOP.fullmatch(hop.strip(" \t"))
            try:
                if not match or int(match[3] or 0) > 65535:
                    raise ValueError
                client = parse_ip(match[1] or match[2] or match[4])
                if not any(client in network for network in self.networks):
                    break
            except ValueError:
                raise HTTPError(400, "an invalid X-Forwarded-For") from None
        return str(client)


@lru_cache(maxsize=256)
def parse_ip(address: Any) -> Any:
    """Return the IP address in a text or in bytes, an IPv4-mapped one as IPv4 (RFC 4291 §2.5.5.2); ValueError."""
    import ipaddress

    parsed = ipaddress.ip_address(address)
    return getattr(parsed, "ipv4_mapped", None) or parsed


def believe_proxy(environ: Environ, trust: Trust) -> None:
    """Set what a proxy tells of its client, or drop it if the peer is not believed; HTTPError if a field is invalid."""
    if not trust.covers(environ["REMOTE_ADDR"]):
        for name in (*FORWARDED, "HTTP_FORWARDED"):
            environ.pop(name, None)
    hops, scheme, host, port, prefix = map(environ.get, FORWARDED)
    if hops is not None:
        environ["REMOTE_ADDR"], environ["REMOTE_PORT"] = trust.find_client(hops), ""
    if scheme is not None:
        require(scheme in DEFAULT_PORTS, 400, "an invalid X-Forwarded-Proto")
        environ["wsgi.url_scheme"] = scheme
        environ.pop("HTTPS", None)
        if scheme == "https":
            environ["HTTPS"] = "on"
    if (scheme, host, port) != (None, None, None):
        environ["HTTP_HOST"], environ["SERVER_PORT"] = find_authority(environ, host, port)
    if prefix is not None:
        require(MOUNT.fullmatch(prefix), 400, "an invalid X-Forwarded-Prefix")
        environ["SCRIPT_NAME"] = prefix.rstrip("/")


def find_authority(environ: Environ, host: str | None, port: str | None) -> tuple[str, str]:
    """Return the Host, and the port, that the client has asked the proxy for; HTTPError if one is invalid."""
    authority: str = host if host is not None else environ.get("HTTP_HOST") or environ["SERVER_NAME"]
    check_host(authority.encode("latin-1"), "an invalid X-Forwarded-Host")
    name, _, own_port = authority.rpartition(":") if re.search(":[0-9]*$", authority) else (authority, "", "")
    default = DEFAULT_PORTS[environ["wsgi.url_scheme"]]
    if port is None:
        return authority, own_port or default
    require(re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65536, 400, "an invalid X-Forwarded-Port")
    require(host is None or own_port in ("", port), 400, "two ports, in X-Forwarded-Host and X-Forwarded-Port")
    return name if port == default else "%s:%s" % (name, port), port


def read_proxy_header(stream: Stream, deadline: float) -> str:
    """Read the PROXY header of a connection; return its client, "-" for none; HTTPError."""
    if not stream.buffer:
        stream.receive_at_rest(deadline)  # what is there is read first, however long it has waited for a process
    while not (found := parse_proxy_header(stream.buffer)):
        stream.receive_by(deadline, "PROXY header")
    stream.buffer = stream.buffer[found[0] :]
    return found[1]


def parse_proxy_header(data: bytes) -> tuple[int, str] | None:
    """Return the length of a PROXY header and its client, "-" for none; None if it is incomplete; HTTPError."""
    if not data.startswith(b"P"):
        return parse_binary_proxy_header(data)
    end = data.find(b"\n", 0, MAX_PROXY_LINE) + 1
    if not end and len(data) < MAX_PROXY_LINE:
        return None
    if not (match := PROXY_LINE.fullmatch(data[:end])):
        raise HTTPError(400, "a malformed PROXY header")
    return end, (note_client((match[1] or match[2]).decode(), int(match[3])) if match[3] else "-")  # UNKNOWN


def parse_binary_proxy_header(data: bytes) -> tuple[int, str] | None:
    """Return the same as `parse_proxy_header` for version 2; the extensions (TLVs) behind the addresses are skipped."""
    require(data[:12] == PROXY_SIGNATURE[: len(data)], 400, "no PROXY header")
    if len(data) < 16:
        return None
    command, kind, size = struct.unpack_from(">BBH", data, 12)
    require(command in (0x20, 0x21), 400, "a PROXY header of an unknown version")
    if len(data) < 16 + size:
        return None
    length = {0x11: 4, 0x21: 16}.get(kind, 0)
    if command == 0x20 or not length:  # LOCAL, or not TCP over IPv4 or IPv6
        return 16 + size, "-"
    require(size >= 2 * length + 4, 400, "a PROXY header that is too short")
    return 16 + size, note_client(data[16 : 16 + length], *struct.unpack_from(">H", data, 16 + 2 * length))


def note_client(address: str | bytes, port: int) -> str:
    """Return the address and the port of a client as one text; HTTPError if one is invalid."""
    with suppress(ValueError):
        if port < 65536:
            return "%s %d" % (parse_ip(address), port)
    raise HTTPError(400, "a PROXY header with an invalid address")


# ---- 18. Surroundings -------------------------------------------------------
# What depends on the system: descriptors, users, limits, exit handlers, the service manager, shared memory.

OTHER_DESCRIPTORS = 64  # that the parent needs besides those of connections
EXIT_TIMEOUT = 5.0  # seconds for the exit handlers of the application, at the end of the server or in a reload
PARENTS: set[int] = set()  # the pid of the process whose forks are children
KEPT: list[Any] = []  # all objects from before the first fork: some only an exit handler has, which a child drops
LIMITS: dict[str, int] = {}  # soft limits of a child: of descriptors, as at the start; of data, with what it inherits


def open_standard_files() -> None:
    """Open descriptors 0 to 2 if closed (else a connection gets one, and its client the log); enable faulthandler."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:  # closed: open(2) returns it, as the lowest that is free
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stderr = sys.stderr or io.TextIOWrapper(io.FileIO(2, "w", closefd=False), line_buffering=True)
    if not faulthandler.is_enabled():
        faulthandler.enable(2)  # a segfault then prints the Python stack


def drop_exit_handlers() -> None:
    """Drop the parent's exit handlers in a new child: they are for the process that has registered them."""
    if os.getppid() not in PARENTS:
        return
    atexit._clear()  # no public function clears them
    if (weakref := sys.modules.get("weakref")) and weakref.finalize._registered_with_atexit:  # finalizers likewise
        for finalizer in list(weakref.finalize._registry):
            finalizer.atexit = False
        weakref.finalize._registered_with_atexit = False  # the next one registers anew


os.register_at_fork(after_in_child=drop_exit_handlers)  # before the hooks of the application, which may register others


def become_child() -> None:
    """Set a child's limits and OOM score."""
    for name in LIMITS:
        set_limit(name)
    with suppress(OSError):  # not Linux, or no /proc
        # The OOM killer takes the largest process, the parent: 500 adds half of all memory to a child (proc(5)).
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
        os.write(fd, b"500")
        os.close(fd)


def drop_privileges(name: str) -> None:
    """Become another user for good, its groups first: only root may set them (setuid(2), setgid(2)); StartError."""
    import grp
    import pwd

    user, _, group = name.partition(":")
    try:
        entry = pwd.getpwnam(user)
        uid, gid = entry.pw_uid, grp.getgrnam(group).gr_gid if group else entry.pw_gid
        if (os.getuid(), os.geteuid(), os.getgid(), os.getegid()) != (uid, uid, gid, gid):  # equal after a reload
            os.initgroups(user, gid)
            os.setgid(gid)
            os.setuid(uid)
            with suppress(Exception):  # else root would own /proc/self (proc(5)); only Linux has prctl
                import ctypes

                ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE (prctl(2))
    except KeyError:
        raise StartError("there is no user or group %r" % name) from None
    except OSError as error:
        raise StartError("cannot become %r: %s; only root can" % (name, error.strerror)) from None


def raise_descriptor_limit(connections: int) -> int:
    """Raise the soft limit for these connections, as far as allowed; return how many may be held (getrlimit(2))."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + OTHER_DESCRIPTORS
    if 0 <= soft < wanted:
        wanted = min(wanted, hard) if hard >= 0 else wanted
        LIMITS["RLIMIT_NOFILE"] = soft  # children get it back: an application may rely on it
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(wanted - OTHER_DESCRIPTORS, 1)


def set_limit(name: str) -> None:
    """Set a soft limit to its value in LIMITS, if there is one, or to the hard limit if that is lower."""
    if name in LIMITS:
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (min(LIMITS[name], hard) if hard >= 0 else LIMITS[name], hard))


def run_exit_handlers() -> None:
    """Run the handlers of atexit and weakref.finalize (temporary folders); end daemon processes of multiprocessing."""
    with suppress(Exception, Overdue):  # a pool is broken, or at work for too long
        if pools := sys.modules.get("concurrent.futures.process"):
            pools._python_exit()  # CPython calls it first: else `multiprocessing` would wait for processes at work
    with suppress(Exception, SystemExit):  # atexit has printed the traceback
        atexit._run_exitfuncs()
    if util := sys.modules.get("multiprocessing.util"):
        util._run_finalizers(0)  # pools and managers, but none of another process; there is no public name
    multiprocessing = sys.modules.get("multiprocessing.process")
    for process in multiprocessing.active_children() if multiprocessing else ():
        with suppress(AssertionError):  # is_alive raises it for a process that the parent has started
            if process.is_alive() and process.daemon:
                process.terminate()
                process.join()


def end_application(last_step: Callable[[], NoReturn]) -> NoReturn:
    """Run the exit handlers, for EXIT_TIMEOUT, flush the output, and do the last step, which ends the program."""
    # Without a wait for the threads of the application, which may run for ever.
    with suppress(Overdue), limit_time(EXIT_TIMEOUT, "an exit handler", last_step):
        run_exit_handlers()
    flush_output()
    last_step()


@contextmanager
def limit_time(seconds: float, what: str, last_step: Callable[[], NoReturn]) -> Iterator[None]:
    """Raise Overdue in the block after these seconds and then in each TICK; KILL_AFTER later, do the last step."""
    deadline = time.monotonic() + seconds + KILL_AFTER

    def interrupt(*_: Any) -> None:
        """Raise Overdue, or do the last step."""
        if time.monotonic() < deadline:
            raise Overdue
        write_line(2, "webserver.py: %s takes too long and cannot be interrupted" % what)
        last_step()

    former = signal.signal(signal.SIGALRM, interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    signal.setitimer(signal.ITIMER_REAL, seconds, TICK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former or signal.SIG_DFL)


def flush_output() -> None:
    """Flush the buffers of sys.stdout and sys.stderr, as far as possible."""
    for file in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # the stream is None, has no reader, or is closed
            file.flush()


def notify(state: str) -> None:
    """Tell the service manager a state, if it has set NOTIFY_SOCKET (sd_notify(3))."""
    if path := os.environ.get("NOTIFY_SOCKET", ""):
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)  # a manager that reads no more must not stop the server
                message = "%s\nMONOTONIC_USEC=%d" % (state, time.monotonic() * 1e6)  # RELOADING=1 requires it
                sock.sendto(message.encode(), "\0" + path[1:] if path[0] == "@" else path)
        except OSError as error:
            log("cannot notify %s: %s" % (path, error.strerror or error))


def make_shared_file(size: int) -> int:
    """Return a descriptor of memory that outlives execve(2): memfd_create(2), or a file without a name."""
    try:
        fd = os.memfd_create("webserver.py")
    except (AttributeError, OSError):  # not Linux, or forbidden
        import tempfile

        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd


# ---- 19. Before the fork ----------------------------------------------------
# What all processes inherit: an application that is loaded and warm, and nothing that a fork would double or lose.

REHEARSAL = b"GET %s HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\nConnection: close\r\n\r\n"
REHEARSALS = 12  # requests; then the interpreter has specialised the code that serves a request (PEP 659)
LEFT_CONNECTION = "left a connection to %s open, which all processes share, and whose answers get mixed up: close it"
LEFT_THREAD = "left a thread running, which only this process has, and no child (%s): start and end it in the request"


def load_service(load: Callable[[], Application], options: Options) -> partial[bool]:
    """Read certificates, drop privileges, load and warm up the application; return the service; StartError."""
    transport = Transport(options)
    if options.user and not (options.check and os.geteuid()):  # anybody may check what root is to start
        drop_privileges(options.user)
    with contain_forks():
        before, application = select.select, transport.wrap(load())
        if select.select != before:  # the selector, too, would wait for greenlets of the parent
            raise StartError("the application has patched the standard library, as gevent does: leave that out")
        if not options.no_fork:  # else no process inherits what was opened
            for _, trouble in sorted(find_opened()):
                log("the application has " + trouble)
            for target in options.warm_up:
                warm_up(application, options, target)
    has_preface = options.certfile or options.proxy_protocol  # else nothing precedes HTTP on a connection
    return partial(serve_connection, application, options, transport=transport if has_preface else None)


def warm_up(application: Application, options: Options, target: str) -> None:
    """Serve a GET of this path or URL to ourselves; StartError if it fails or leaves something open."""

    def served(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Call the application with the scheme of the URL: it may only redirect a client that comes without TLS."""
        if target.startswith("https:"):
            environ.update({"wsgi.url_scheme": "https", "HTTPS": "on"})
        return application(environ, start_response)

    before, began = find_opened(), time.monotonic()
    sock: Any = WarmUpSocket(REHEARSAL % target.encode())
    with limit_time(options.timeout, "the warm-up", partial(os._exit, 1)):
        serve_connection(served, options._replace(access_log="off"), sock, ("127.0.0.1", 0), Slot(Scoreboard(1)))
    ended = time.monotonic()
    if sock.has_failed or sock.status >= 500:
        reason = "its status is %d, and a traceback, if there is one, stands above" % sock.status
        raise StartError("GET %s has failed while warming up: %s" % (target, reason))
    while left := sorted(find_opened() - before):
        if time.monotonic() > ended + TICK:
            raise StartError("GET %s %s, or warm up another path" % (target, left[0][1]))
        gc.collect()
        time.sleep(TICK / 20)  # a thread may need a moment to end
    log("warmed up: GET %s %d in %d ms" % (target, sock.status, (ended - began) * 1000))


class WarmUpSocket:
    """Owns the request of a warm-up and the status of its response. It has the methods of a socket that Stream uses."""

    def __init__(self, request: bytes) -> None:
        self.request, self.status, self.has_failed = request, 0, False

    def fileno(self) -> int:
        """Raise OSError: there is no descriptor."""
        raise OSError

    def recv(self, *_: int) -> bytes:
        """Return the request. Only `Stream.linger` calls again, behind the answer to an error: note that."""
        request, self.request, self.has_failed = self.request, b"", not self.request
        return request

    def sendmsg(self, blocks: Sequence[bytes], *_: Any) -> int:
        """Drop the blocks, but note the status; return their size."""
        self.status = self.status or int(blocks[0][9:12])
        return sum(map(len, blocks))

    def send(self, data: bytes, *_: int) -> int:
        """Drop the data, but note the status; return the size."""
        return self.sendmsg((data,))

    def close(self, *_: Any) -> None:
        """Do nothing: there is no connection."""

    shutdown = setsockopt = getsockname = close  # without a name, as a unix socket has none


def find_opened() -> set[tuple[int, str]]:
    """Return a number and a text for each connection to a named peer and for each thread but the main one."""
    opened, timeout = set(), socket.getdefaulttimeout()
    socket.setdefaulttimeout(None)  # socket.socket would set it for sockets that are only looked at
    with suppress(OSError):  # there is no /dev/fd
        for fd in map(int, os.listdir("/dev/fd")):
            with suppress(OSError), ExitStack() as cleanup:  # not a socket, or one without a peer
                sock = socket.socket(fileno=fd)
                cleanup.callback(sock.detach)
                peer, is_log = sock.getpeername(), (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_DGRAM)
                if fd > 2 and peer and not is_log:  # processes may share a log: of syslog, or of systemd at stderr
                    name = "%s:%s" % peer[:2] if isinstance(peer, tuple) else peer
                    opened.add((fd, LEFT_CONNECTION % name))
    socket.setdefaulttimeout(timeout)
    if threading := sys.modules.get("threading"):
        others = set(threading.enumerate()) - {threading.main_thread()}
        opened |= {(thread.ident or 0, LEFT_THREAD % thread.name) for thread in others}
    return opened


def rehearse(times: int) -> None:
    """Serve the built-in page to ourselves, the way that a child serves: before the forks, or in an idle new child."""
    # Children inherit what the interpreter learns here (5 % fewer page faults). The memo marks the message in a strace.
    options = Options(access_log="off", no_fork=True)  # one connection each time; Ctrl-C ends the start
    service = partial(serve_connection, show_environ, options)
    with suppress(OSError, MemoryError):  # a limit of descriptors, in flight or not (unix(7)), or of memory
        child = Child(service, int(socket.AF_UNIX), Channel(), Scoreboard(1), options)
        for _ in range(times):
            client, server = socket.socketpair()
            client.sendall(REHEARSAL % b"/")
            client.shutdown(socket.SHUT_WR)  # else an error would be followed by a wait for the client
            child.queue.send(DEADLINE.pack(UNBOUNDED) + b"rehearsal", server.fileno())
            server.close()
            child.slot.attach(child.slot.board, 0, os.getpid())
            child.serve_connections()
            client.close()
        child.queue.close()
        child.mailbox.close()


def prepare_to_fork(options: Options) -> None:
    """Keep all objects, note the memory limit, load a codec, flush, and freeze, once for all children; StartError."""
    KEPT[:] = gc.get_objects()
    if options.limit_memory:  # what is allowed beyond what a child inherits (getrlimit(2), RLIMIT_DATA)
        try:
            with open("/proc/self/status", "rb") as file:
                inherited = int(re.findall(rb"VmData:\s*(\d+) kB", file.read())[0]) * 1024
        except (OSError, IndexError):
            raise StartError("--limit-memory needs /proc/self/status of Linux: leave it out here") from None
        LIMITS["RLIMIT_DATA"] = inherited + options.limit_memory
    if "http" in sys.modules:  # a framework or a client of others: they encode host names, often in each request
        "localhost".encode("idna")  # loads the codec once for all: 1.5 times as many connections a second with Flask
    flush_output()  # else each child would flush a copy
    # Without this, a collection in a child would write to all that the child has inherited, and so copy it. There is no
    # gc.collect() before it: each child would write to the memory that it frees, and so copy it (5 % of page faults).
    gc.freeze()


# ---- 20. Application --------------------------------------------------------
# The name of an application -> a callable; and the application that is served when none is named.

HAS_VARARGS, IS_ASYNC = 0x04, 0x80 | 0x200  # inspect.CO_VARARGS; CO_COROUTINE, CO_ASYNC_GENERATOR
PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>It works</title><style>%s</style>
<main><h1>It works</h1><p>%s.</p>
<p>Next: put an application into <code>hello.py</code>, and serve it: <code>python3 webserver.py hello:app</code></p>
<p>Here it would have seen this environ:</p>
%s</main></html>
"""
STYLE = """
:root { color-scheme: light dark; --line: #8883 }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 }
main { max-width: 60rem; margin: auto; padding: 2rem 1rem }
h1, dd { margin: 0 } h2 { font-size: 1rem; margin: 2rem 0 .25rem }
code, dl { font: 14px/1.6 ui-monospace, monospace; overflow-wrap: anywhere }
code { background: var(--line); padding: .1em .3em }
dl { display: grid; grid-template-columns: minmax(17rem, max-content) 1fr; margin: 0 }
dt, dd { border-top: 1px solid var(--line); padding: .1rem 0 } dt { padding-right: 1.5rem; opacity: .7 }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr } dd { border: 0; padding-left: 1rem } }
"""
GROUPS = (  # of the keys in an environ, in the order of the page: a title, and how the keys begin
    ("Request", ("REQUEST_", "SCRIPT_", "PATH_", "QUERY_", "CONTENT_", "REMOTE_", "SERVER_PROTOCOL")),
    ("Fields", ("HTTP_",)), ("WSGI", ("wsgi.",)), ("Server", ("",)),
)  # fmt: skip


def load_application(name: str) -> Application:
    """Return the application of a name such as `module:app`, `package.module` or `module:make_app()`; StartError."""
    import importlib

    module_name, colon, path = name.partition(":")
    if not name:
        return show_environ
    if module_name.endswith(".py") or not all(part.isidentifier() for part in module_name.split(".")):
        stem = os.path.basename(module_name).partition(".")[0]
        example = "%s:%s" % (stem, path or "app") if stem.isidentifier() else "hello:app for `app` in hello.py"
        raise StartError("%r names no module: cd to its folder, and write %s" % (name, example), 2)
    try:
        module = importlib.import_module(module_name)
        path = path if colon else "application" if hasattr(module, "application") else "app"
        return check_application(find_application(module, path), "%s:%s" % (module_name, path))
    except (StartError, KeyboardInterrupt):
        raise
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and error.name and (module_name + ".").startswith(error.name + "."):
            raise StartError(describe_missing_module(module_name, colon)) from None
        log_exception(error)
        raise StartError("%s does not load: see the traceback above" % name) from None


def describe_missing_module(name: str, colon: str) -> str:
    """Return a sentence that says why the module may be missing; without a colon, its last part may be an attribute."""
    package, _, attribute = name.rpartition(".")
    hint = "looked in %s and the installed ones" % os.getcwd()
    if package and not colon:
        hint = "if %r is the application in %r, write %s:%s" % (attribute, package, package, attribute)
    elif not os.access(os.getcwd(), os.R_OK | os.X_OK):
        hint = "this user may not read %s, where it is looked for" % os.getcwd()
    return "there is no module %r: %s" % (name, hint)


def find_application(module: Any, path: str) -> Any:
    """Return the object at a dotted path in a module; with `()` at its end, what a call of it returns; StartError."""
    found = module
    for attribute in (path[:-2] if path.endswith("()") else path).split("."):
        if not hasattr(found, attribute):
            raise StartError("%s has no %r; it has %s" % (module.__name__, attribute, list_callables(module)))
        found = getattr(found, attribute)
    if path.endswith("()") and callable(found):
        if not accepts(found, 0):
            raise StartError("%s:%s needs arguments: write a function that needs none" % (module.__name__, path))
        found = found()
    if not callable(found):
        raise StartError("%s:%s is not callable; there are %s" % (module.__name__, path, list_callables(module)))
    return found


def check_application(application: Application, name: str) -> Application:
    """Return the object if it can be called as PEP 3333 demands; else StartError says what to do."""
    if not callable(application):
        raise StartError("%s is no application, but a %s" % (name, type(application).__name__))
    if (code := getattr(find_function(application), "__code__", None)) and code.co_flags & IS_ASYNC:
        raise StartError("%s is an ASGI application: it needs an ASGI server, such as uvicorn; this speaks WSGI" % name)
    is_class = isinstance(application, type) and not hasattr(application, "__iter__")  # else a call makes a response
    if is_class or not accepts(application, 2):
        advice = "if it makes the application, write %s()" % name
        raise StartError("%s cannot be called with (environ, start_response): %s" % (name, advice))
    return application


def accepts(found: Any, count: int) -> bool:
    """Return whether a callable takes this number of arguments; True for a callable in C, which does not tell."""
    function = find_function(found)  # `inspect` could tell, but each fork would copy that module
    if not (code := getattr(function, "__code__", None)):
        return True
    most = code.co_argcount - hasattr(function, "__self__")
    least = most - len(function.__defaults__ or ())
    has_all_names = code.co_kwonlyargcount == len(function.__kwdefaults__ or ())
    return has_all_names and least <= count and bool(count <= most or code.co_flags & HAS_VARARGS)


def find_function(found: Any) -> Any:
    """Return the function or method that a call of the object runs."""
    if issubclass(type(found), type):  # isinstance would tell mypy that `__init__` is that of an instance
        return types.MethodType(found.__init__, found)
    return found if isinstance(found, (types.FunctionType, types.MethodType)) else found.__call__


def list_callables(module: Any) -> str:
    """Return the public callables of a module, as a part of a sentence."""
    found = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    return "these callables: " + ", ".join(found[:12]) if found else "no callables"


def show_environ(environ: Environ, start_response: StartResponse) -> list[bytes]:
    """Show the process that answers and the environ: the application that is served when none is named."""
    if environ["PATH_INFO"] == "/favicon.ico":
        start_response("404 Not Found", [])
        return []
    facts = "%s, process %d, its request number %d" % (PRODUCT, os.getpid(), environ["webserver.requests"])
    rows = [(key, repr(value)) for key, value in sorted(environ.items())]
    if "text/html" in environ.get("HTTP_ACCEPT", ""):
        return [make_page(facts, rows, start_response)]
    text = "%s\n\n%s\n" % (facts, "\n".join("%s = %s" % row for row in rows))
    start_response("200 OK", [("Content-Type", "text/plain; charset=utf-8")])
    return [text.encode("utf-8", "backslashreplace")]


def make_page(facts: str, rows: list[tuple[str, str]], start_response: StartResponse) -> bytes:
    """Return all that as an HTML page, whose Content-Security-Policy allows its own style sheet and nothing else."""
    from base64 import b64encode
    from hashlib import sha256
    from html import escape as escape_html

    blocks, left = [], rows
    for title, beginnings in GROUPS:
        group = [row for row in left if row[0].startswith(beginnings)]
        left = [row for row in left if row not in group]
        items = "\n".join("<dt>%s<dd>%s" % (escape_html(key), escape_html(value)) for key, value in group)
        blocks.append("<h2>%s</h2><dl>\n%s\n</dl>" % (title, items))
    digest = b64encode(sha256(STYLE.encode()).digest()).decode()
    policy = "default-src 'none'; style-src 'sha256-%s'; base-uri 'none'; frame-ancestors 'none'" % digest
    start_response("200 OK", [("Content-Type", "text/html; charset=utf-8"), ("Content-Security-Policy", policy)])
    return (PAGE % (STYLE, escape_html(facts), "\n".join(blocks))).encode("utf-8", "backslashreplace")


# ---- 21. Command line -------------------------------------------------------
# Words -> options, an application and a listening socket. A mistake of the user is answered by one sentence that says
# what to do. Only an error inside the user's module shows a traceback, and only the user's part of it.

USAGE = """webserver.py [options] [module:app | module:factory()]

A WSGI server: a connection at work has a process of its own, a connection at
rest costs a descriptor. Without an application it shows a page with the
environ that an application would see."""
ENVIRONMENT = """environment: WEBSERVER_OPTIONS holds options that come before those of the
command line; PORT serves on all addresses at this port; FORWARDED_ALLOW_IPS and
SCRIPT_NAME as the options; LISTEN_FDS with LISTEN_PID, and NOTIFY_SOCKET, as
systemd sets them."""

FOREIGN_OPTIONS = (  # of gunicorn, waitress, uvicorn and others, and what does the same here
    ("-w --workers --threads --worker-connections -k --worker-class", "processes come as needed; see --max-children"),
    ("-p --port --host --listen --uds --unix-socket", "give the address as --bind HOST:PORT or --bind unix:PATH"),
    ("--max-requests --max-requests-jitter", "a process ends with its connection; see --connections-per-child"),
    ("-D --daemon --pid", "let the service manager do that"),
    ("--access-logfile --error-logfile --log-file --log-level --log-config --no-access-log --access-logformat",
     "the logs go to stdout and stderr; see --access-log"),
    ("--chdir --app-dir --pythonpath", "change to the folder first, with cd, or set PYTHONPATH"),
    ("--env-file -e --env", "set the environment before the start, as in env NAME=value python3 webserver.py"),
    ("--factory --call", "write module:factory() for what makes the application"),
    ("--preload", "the application is always loaded before the fork; see --warm-up"),
    ("--keepalive --timeout-keep-alive", "see --keep-alive"),
    ("--reload-dir --reload-extra-file --reload-engine", "--reload watches the folders of all modules in use"),
    ("--ssl-keyfile --ssl-certfile --ssl-ca-certs", "see --certfile, --keyfile and --ca-certs"),
    ("--proxy-headers --trusted-proxy", "see --forwarded-allow-ips"),
    ("--root-path --url-prefix --umask", "see --script-name and --socket-mode"),
    ("--backlog --limit-request-line --limit-request-fields", "that limit is fixed; the README has a table"),
)  # fmt: skip


def parse_command_line(words: list[str], preset: str = "") -> tuple[str, Options]:
    """Return the application's name, or "", and the options, of which some may be preset; exit with 2 on a mistake."""
    parser = argparse.ArgumentParser(
        prog="webserver.py", usage=argparse.SUPPRESS, allow_abbrev=False, description=USAGE, epilog=ENVIRONMENT,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=80),  # without a width it imports shutil
    )  # fmt: skip
    parser.add_argument("application", nargs="?", default="", help=argparse.SUPPRESS)
    for name, default, (metavar, text, _, short) in zip(Options._fields, Options(), OPTIONS):
        how: dict[str, Any] = {"metavar": metavar, "default": default, "type": type(default)}
        if isinstance(default, bool):
            how = {"action": "store_true"}
        elif isinstance(default, tuple):
            how = {"metavar": metavar, "default": [], "action": "append"}
        elif metavar == "BYTES":
            how["type"] = parse_size
        elif default != "":
            text += " (%(default)s)"
        parser.add_argument(*filter(None, (short, "--" + name.replace("_", "-"))), help=text, **how)
    parser.add_argument("--version", action="version", version=PRODUCT)
    if preset:
        import shlex

        try:
            words = shlex.split(preset) + words
        except ValueError as error:
            parser.error("WEBSERVER_OPTIONS: %s" % error)
    found, unknown = parser.parse_known_args(words)
    if unknown:
        word = min(unknown, key=lambda word: word[:1] != "-")  # the first option; another word may be its value
        name, foreign = word.partition("=")[0], {f: text for flags, text in FOREIGN_OPTIONS for f in flags.split()}
        advice = foreign.get(name) or foreign.get(word[:2])  # as in -w4
        parser.error("%s: %s" % (name, advice) if advice else "%s is unknown: see --help" % name)
    values = vars(found)
    return values.pop("application"), Options(**values)


def parse_size(text: str) -> int:
    """Return the number of bytes in a text such as 512K; K, M and G are powers of 1024."""
    if not (match := re.fullmatch("([0-9]+)([KMGkmg]?)", text)):
        raise argparse.ArgumentTypeError("%r is not a size such as 1048576, 512K, 100M or 1G" % text)
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2].upper()]


def check_options(options: Options) -> Options:
    """Return the options, with PORT, FORWARDED_ALLOW_IPS and SCRIPT_NAME for those not set; StartError."""
    kinds = {float: (int, float), tuple: (tuple, list)}
    for field, value, default, (_, _, allowed, _) in zip(Options._fields, options, Options(), OPTIONS):
        name, is_word = "--" + field.replace("_", "-"), isinstance(default, str)
        if not isinstance(value, kinds.get(type(default), type(default))):  # as an argument of `serve`
            raise StartError("%s is %r: its type must be %s" % (name, value, type(default).__name__), 2)
        if allowed and not (value in allowed if is_word else allowed[0] <= value <= allowed[1]):
            wanted = "one of " + ", ".join(allowed) if is_word else "a number from %g to %g" % allowed
            raise StartError("%s is %s: it must be %s" % (name, value, wanted), 2)
    for target in options.warm_up:
        if not re.fullmatch(r'(https?:/)?/[!"$-~]*', target):  # visible US-ASCII, and no fragment
            raise StartError("--warm-up is %r: it must be a path, such as /login, or a URL" % target, 2)
    port = os.environ.get("PORT", "")
    if not (options.bind or (re.fullmatch("[0-9]{0,5}", port) and int(port or 0) < 65536)):
        raise StartError("PORT in the environment is %r: it must be a number up to 65535" % port, 2)
    options = options._replace(
        bind=options.bind or (":" + port if port else "127.0.0.1:8000"),
        forwarded_allow_ips=options.forwarded_allow_ips or os.environ.get("FORWARDED_ALLOW_IPS", ""),
        script_name=(options.script_name or os.environ.get("SCRIPT_NAME", "")).rstrip("/"),
    )
    parse_address(options.bind)
    if not MOUNT.fullmatch(options.script_name):
        raise StartError("--script-name is %r: it must be a path such as /app" % options.script_name, 2)
    if not re.fullmatch("[0-7]{0,4}", options.socket_mode):
        raise StartError("--socket-mode is %r: it must be octal, such as 660" % options.socket_mode, 2)
    return options


def serve(application: Application, **options: Any) -> None:
    """Serve the application until SIGTERM or SIGINT; the options are the fields of Options. Raises StartError."""
    start(partial(check_application, application, "the application"), Options(**options))


def start(load: Callable[[], Application], options: Options) -> None:
    """Check the options, bind, load the application, and serve; StartError."""
    # Step 1: what needs no listening socket.
    options = check_options(options)
    open_standard_files()
    pid, _, running = os.environ.get("WEBSERVER_CHECK", "").partition(" ")  # set by a reload
    if options.check or pid == str(os.getpid()):
        if running not in ("", PRODUCT):
            raise StartError("%s cannot take over from %s: restart the server" % (PRODUCT, running))
        signal.signal(signal.SIGALRM, lambda *_: log(STILL_LOADING))
        signal.alarm(LOADING_IS_SLOW)
        service = load_service(load, options)
        if options.check:
            write_line(1, "the application loads: %r" % (service.args[0],))
        end_application(partial(os._exit, 0 if options.check else CHECK_PASSED))
    # Step 2: the sockets, opened or kept in a reload.
    kept = find_kept()
    options = options._replace(bind=find_inherited_address() or options.bind)
    rehearse(REHEARSALS)
    listener = Listener(kept[1] if kept else open_listener(options.bind, options.socket_mode), options.bind)
    mailbox = Channel(*kept[2:4])
    signals, held = Signals(mailbox.sender), ExitStack()  # what a process that the application forks must give up
    signals.detach = held.close
    held.callback(listener.sock.close)
    held.callback(mailbox.close)
    try:
        # Step 3: the application, and the loop.
        service = load_guarded(load, options, listener, signals, kept)
        run(service, options, listener, mailbox, signals, held, kept)
    finally:
        signals.release()
        held.close()
        listener.close()


def load_guarded(
    load: Callable[[], Application], options: Options, listener: Listener, signals: Signals, kept: list[int]
) -> partial[bool]:
    """Return the loaded service, while `on_loading_signal` handles signals; StartError, but a reload is tried again."""
    signals.act = partial(on_loading_signal, signals, listener, bool(kept))
    signals.catch(*(SIGNALS if kept else SIGNALS[1:]))  # SIGINT ends a first load by KeyboardInterrupt
    signal.alarm(int(bound_loading(options)) if kept else LOADING_IS_SLOW)  # until a warm-up sets its own deadline
    try:
        return load_service(load, options)
    except StartError as reason:
        if not kept:
            raise
        log("the reload fails and is tried again: %s" % reason)  # although the check has passed
    finally:
        signal.alarm(0)
    time.sleep(TICK)
    if any(map(signals.means_stop, signals.pending)):
        listener.close()
        os._exit(0)
    replace_program(kept)


def run(
    service: Service, options: Options, listener: Listener, mailbox: Channel, signals: Signals, held: ExitStack,
    kept: list[int],
) -> None:  # fmt: skip
    """Serve with children, or without, until a signal stops the server; StartError if a limit is too low for that."""
    signals.act = signals.pending.append
    signals.catch(*(SIGNALS[1:] if options.no_fork else SIGNALS))  # SIGINT is the debugger's
    open_standard_files()  # once more: the application may have closed one
    options = options._replace(max_connections=raise_descriptor_limit(options.max_connections))
    try:
        board = Scoreboard(0, kept[0] if kept else make_shared_file(FIRST_SLOT + options.max_children * SLOT_SIZE))
        reactor, child = Reactor(listener, mailbox, options), Child(service, listener.family, mailbox, board, options)
    except OSError as error:  # of descriptors or of files; or there is neither memfd_create nor a writable folder
        raise StartError("a limit of the system is too low (ulimit -n, ulimit -f): %s" % error) from None
    for close_copy in (child.detach, reactor.close_copies, child.queue.sender.close, reactor.selector.close):
        held.callback(close_copy)
    held.callback(os.close, board.fd)
    if kept:  # while it loaded, children may have ended; the channel has the connections that no child had before
        signals.pending.append(signal.SIGCHLD)
        carried = Channel(*kept[4:])
        with suppress(BlockingIOError):
            while True:
                reactor.hold(*carried.receive(DONT_WAIT, SPACE, MEMOS), least=reactor.head_timeout)
        carried.close()
    prepare_to_fork(options)
    if os.geteuid() == 0:
        log("running as root: let --user NAME give that up once the address is bound")
    address = describe_address(listener.sock, "https" if options.certfile else "http")
    log("%sserving on %s, pid %d" % ("reloaded: " if kept else "", address, os.getpid()))
    notify("READY=1")
    serve_alone(child, reactor, signals) if options.no_fork else Parent(child, reactor, signals, options).run()
    log("stopped")


def main() -> NoReturn:
    """Run the command line, and exit."""
    sys.path.insert(0, os.getcwd())
    name, options = parse_command_line(sys.argv[1:], os.environ.get("WEBSERVER_OPTIONS", ""))
    status = 0
    try:
        start(partial(load_application, name), options)
    except StartError as reason:
        write_line(2, "webserver.py: %s" % reason)
        status = reason.status
    except KeyboardInterrupt:  # before the loop, or with --no-fork
        status = 130
    if options.no_fork:
        sys.exit(status)  # a profiler, or coverage, which may run this program, then saves what it has found
    end_application(partial(os._exit, status))


if __name__ == "__main__":
    main()

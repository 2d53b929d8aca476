"""A man in the middle: TLS with the client, TLS with the server, and in between whatever can go wrong.

It knows lines from literals (RFC 9051 section 4.3) in both directions and commands from their answers, so a
fault can be put at an exact point of an exact command. Everything runs in one thread; what a test calls has
taken effect when it returns.
"""

import asyncio
import contextlib
import fcntl
import re
import socket
import ssl
import struct
import termios
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from imaplib import IMAP4_SSL
from typing import Literal

from tests.support.servers.account import DEADLINE, Endpoint, ImapAccount
from tests.support.servers.hiding import Hidden
from tests.support.servers.intermediary import Intermediary
from tests.support.servers.loop import (
    BUFFER,
    abort,
    accept_tls,
    server_context,
    tell_when_sent,
)

Edit = Callable[[bytes], bytes | None]
"""Given a line of the server with its line end: what to send in its place (any number of lines), None to
send nothing. A literal is not part of a line; what follows it is a line again."""

Point = Literal["connect", "greeting", "command", "upload", "answer", "literal"]
"""Where a fault strikes.

connect: the connection was accepted, TLS has not begun. greeting: before the greeting is passed on. command:
before the command is passed on. upload: in a literal of the command. literal: in a literal of its answer.
answer: the server has carried the command out, all but the tagged line was passed on.
"""

Action = Literal["cut", "close", "half-close", "corrupt", "stall", "drop"] | bytes
"""What a fault does.

cut: RST. close: an orderly end, of TLS and of TCP. half-close: FIN without an end of TLS, the other direction
goes on. corrupt: bytes that are no TLS record. stall: this connection stands still until `Proxy.resume`.
drop: the command, or the tagged line of the answer, vanishes.

Bytes are said in place of the answer, without tag, such as ``b"NO [LIMIT] Slow down"``; at "command" the
server never sees the command. At "greeting" they replace the greeting; at "connect" they are sent in place
of TLS, and the connection is closed.
"""

_MARKER = re.compile(rb"\{(\d+)(\+?)\}\r?\n\Z")
_GARBAGE = b"\x17\x03\x03\x00\x20" + bytes(32)
_POISON = b" )\r\n"
_PATIENCE = 1.0
"""Seconds for the client to take what it was sent, or to end its side, before the connection ends anyway."""


class Fault:
    """One rule of `Proxy.fault`."""

    def __init__(
        self,
        changed: threading.Condition,
        when: bytes | Callable[[bytes], bool],
        action: Action,
        at: Point,
        nth: int,
        times: int | None,
        after: int,
        unless: bytes | None,
    ) -> None:
        self.action = action
        self.at = at
        self.after = after
        self.hits = 0
        """How often it has struck."""
        self._changed = changed
        self._matches = _matcher(when) if isinstance(when, bytes) else when
        self._excuses = _matcher(unless) if unless is not None else None
        self._skip = nth - 1
        self._left = times

    def wait_hit(self, count: int = 1, deadline: float = DEADLINE) -> None:
        """Wait until it has struck ``count`` times in all. Raises TimeoutError after ``deadline`` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.hits >= count, deadline):
                raise TimeoutError(f"the fault struck {self.hits} times, not {count}")

    def cancel(self) -> None:
        """Let it strike no more."""
        with self._changed:
            self._left = 0

    def takes(self, command: bytes, earlier: Iterable[bytes]) -> bool:
        """Tell whether it shall strike at this command, and count it.

        ``earlier`` are the first words of those before it on this connection.
        """
        with self._changed:
            if self._left == 0 or not self._matches(command):
                return False
            if self._excuses is not None and any(map(self._excuses, earlier)):
                return False
            if self._skip:
                self._skip -= 1
                return False
            if self._left is not None:
                self._left -= 1
            return True

    def struck(self) -> None:
        """Tell who waits that it has struck."""
        with self._changed:
            self.hits += 1
            self._changed.notify_all()


@dataclass(frozen=True)
class ProxiedAccount:
    """An account as it is seen through a proxy; for everything else there is the account itself."""

    account: ImapAccount
    server: "Proxy"

    @property
    def name(self) -> str:
        """Return the user's name."""
        return self.account.name

    @property
    def password(self) -> str:
        """Return the user's password."""
        return self.account.password

    @contextlib.contextmanager
    def client(self) -> Iterator[IMAP4_SSL]:
        """Log in through the proxy; see `ImapAccount.client`."""
        with self.account.client(via=self.server) as client:
            yield client


class Proxy(Intermediary):
    """Stands before ``server`` while the ``with`` block lasts.

    ``hide`` are extensions that are neither announced nor understood, see `Hidden`; COMPRESS is always
    hidden. Each of ``edits`` is applied to what those before it made of a line.

    ``rephrase`` is applied to the first line of each command, without its tag, on its way to the server;
    `commands` and faults see it as the client said it. ``alter`` is applied to each message that a client
    appends by a literal without waiting (LITERAL+), as servers do that store something else than what they
    were given; not where a fault strikes in its bytes.

    ``latency`` (seconds, one way) and ``bandwidth`` (bytes per second in each direction, None for no limit)
    may be changed at any time and hold for what is sent from then on. Where ``server`` starts again on
    another port, new connections go there.
    """

    thread_name = "proxy"

    def __init__(
        self,
        server: Endpoint,
        *,
        hide: Iterable[str] = (),
        edits: Iterable[Edit] = (),
        rephrase: Callable[[bytes], bytes] | None = None,
        alter: Callable[[bytes], bytes] | None = None,
        latency: float = 0.0,
        bandwidth: int | None = None,
    ) -> None:
        super().__init__(server.authority)
        self.server = server
        self.latency = latency
        self.bandwidth = bandwidth
        self.hidden = Hidden([*hide, "COMPRESS"])
        self.edits = list(edits)
        self.rephrase = rephrase
        self.alter = alter
        self.towards_client = server_context(self.authority.issue())
        self.towards_server = ssl.create_default_context(cafile=self.authority.certificate)
        self.flowing = asyncio.Event()
        self.flowing.set()
        self._changed = threading.Condition()
        self._faults: list[Fault] = []
        self._commands: list[bytes] = []
        self._connections: dict[_Connection, asyncio.Task[None]] = {}

    def account(self, account: ImapAccount) -> ProxiedAccount:
        """Return ``account`` as it is seen through the proxy."""
        return ProxiedAccount(account, self)

    def fault(
        self,
        when: bytes | Callable[[bytes], bool],
        action: Action,
        *,
        at: Point = "command",
        nth: int = 1,
        times: int | None = 1,
        after: int = 0,
        unless: bytes | None = None,
    ) -> Fault:
        """Make ``action`` happen at the point ``at`` of the ``nth`` command from now on that is ``when``.

        ``when`` is a regular expression (matched from the start, whatever the case) or a function; it is
        given the first line of a command without its tag, and b"" at "connect" and "greeting". It goes on to
        happen at the matches that follow, ``times`` in all, None for ever. ``after`` is a number of bytes
        that are passed on first, of the first literal (at "upload", "literal") that is longer than that. It
        does not happen on a connection that has sent a command before whose first word matches ``unless``.

        Of several faults that match at the same point the first happens; the others do not count it.
        """
        if action == "drop" and at not in ("command", "answer"):
            raise ValueError(f"nothing can be dropped at {at!r}")
        if isinstance(action, bytes) and at in ("upload", "literal"):
            raise ValueError(f"nothing can be said at {at!r}")
        made = Fault(self._changed, when, action, at, nth, times, after, unless)
        with self._changed:
            self._faults.append(made)
        return made

    def commands(self) -> list[bytes]:
        """Return the commands seen so far, in order, without tag; of a literal only its ``{size}`` is kept.

        Also those that were refused or met a fault. What follows IDLE or AUTHENTICATE is no command.
        """
        with self._changed:
            return list(self._commands)

    def forget_commands(self) -> None:
        """Begin the record of `commands` again."""
        with self._changed:
            self._commands.clear()

    def wait_for_command(self, pattern: bytes, count: int = 1, deadline: float = DEADLINE) -> None:
        """Wait until ``count`` of `commands` match; see `fault` for ``pattern``.

        Raises TimeoutError after ``deadline`` seconds.
        """
        matches = _matcher(pattern)
        with self._changed:
            if not self._changed.wait_for(
                lambda: sum(1 for command in self._commands if matches(command)) >= count, deadline
            ):
                raise TimeoutError(f"not seen {count} times: {pattern!r}; last seen: {self._commands[-5:]}")

    def connections(self) -> int:
        """Return how many connections there are."""
        with self._changed:
            return len(self._connections)

    def wait_for_connections(self, count: int, deadline: float = DEADLINE) -> None:
        """Wait until there are exactly ``count``. Raises TimeoutError after ``deadline`` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._connections) == count, deadline):
                raise TimeoutError(f"{len(self._connections)} connections, not {count}")

    def cut_all(self, *, forget: bool = False) -> None:
        """Reset every connection there is; with ``forget``, also forget their commands."""
        self._thread.run(self._cut_all(forget))

    def stall(self) -> None:
        """Let nothing through in either direction, until `resume`; connections are accepted, and stand."""
        self._thread.run(self._set_flowing(False))

    def resume(self) -> None:
        """End what `stall` and the faults that stall have begun; nothing was lost."""
        self._thread.run(self._set_flowing(True))

    def take(self, at: Point, command: bytes = b"", earlier: Iterable[bytes] = ()) -> Fault | None:
        """Return the fault that shall strike at this point of this command; see `Fault.takes`."""
        return next(
            (fault for fault in self._faults if fault.at == at and fault.takes(command, earlier)), None
        )

    def record(self, command: bytes) -> int:
        """Add to `commands` and return the place there."""
        with self._changed:
            self._commands.append(command)
            self._changed.notify_all()
            return len(self._commands) - 1

    def amend(self, place: int, command: bytes) -> None:
        """Put more of a command into `commands`, unless that was forgotten meanwhile."""
        with self._changed:
            if place < len(self._commands) and command.startswith(self._commands[place]):
                self._commands[place] = command
                self._changed.notify_all()

    def visible(self, line: bytes) -> bytes | None:
        """Return what the client gets for a line of the server."""
        seen = self.hidden.visible(line)
        for edit in self.edits:
            if seen is None:
                break
            seen = edit(seen)
        return seen

    async def _cut_all(self, forget: bool) -> None:
        connections = dict(self._connections)
        for connection, task in connections.items():
            connection.reset_at_end = True
            task.cancel()
        if forget:
            self.forget_commands()
        await asyncio.gather(*connections.values(), return_exceptions=True)

    async def _set_flowing(self, flowing: bool) -> None:
        if flowing:
            self.flowing.set()
            for connection in self._connections:
                connection.flowing.set()
        else:
            self.flowing.clear()

    def _serve(self, accepted: socket.socket) -> None:
        connection = _Connection(self, accepted)
        task = self._thread.spawn(connection.run(), owned=accepted)
        with self._changed:
            self._connections[connection] = task
            self._changed.notify_all()
        task.add_done_callback(lambda _: self._forget(connection))

    def _forget(self, connection: "_Connection") -> None:
        with self._changed:
            del self._connections[connection]
            self._changed.notify_all()


def _matcher(pattern: bytes) -> Callable[[bytes], bool]:
    compiled = re.compile(pattern, re.IGNORECASE | re.DOTALL)
    return lambda command: compiled.match(command) is not None


class _Over(Exception):
    """The connection has come to its end."""


@dataclass(eq=False)
class _Command:
    """A command whose tagged answer has not been seen."""

    tag: bytes
    first_line: bytes
    faults: dict[Point, Fault] = field(default_factory=dict)


class _Source:
    """One direction as it comes in. What has been made of it is pushed on before it waits for more."""

    def __init__(self, reader: asyncio.StreamReader, sink: "_Sink") -> None:
        self._reader = reader
        self._sink = sink
        self._data = b""
        self._at = 0

    async def line(self) -> bytes:
        """Return the next line with its line end."""
        while not (end := self._data.find(b"\n", self._at) + 1):
            await self._read()
        line = self._data[self._at : end]
        self._at = end
        return line

    async def literal(self, size: int) -> AsyncIterator[bytes]:
        """Return the next ``size`` bytes piece by piece."""
        while size:
            if self._at == len(self._data):
                await self._read()
            piece = self._data[self._at : self._at + size]
            self._at += len(piece)
            size -= len(piece)
            yield piece

    async def _read(self) -> None:
        await self._sink.push()
        data = await self._reader.read(BUFFER)
        if not data:
            raise _Over
        self._data = self._data[self._at :] + data
        self._at = 0


class _Sink:
    """One direction as it goes out, with the latency and the bandwidth of the proxy."""

    def __init__(self, connection: "_Connection", writer: asyncio.StreamWriter) -> None:
        self._connection = connection
        self._writer = writer
        self._parts: list[bytes] = []
        self._size = 0
        self._queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)
        tell_when_sent(writer.transport)

    async def add(self, data: bytes) -> None:
        """Send ``data`` with the next `push`, or now where that would be much."""
        self._parts.append(data)
        self._size += len(data)
        if self._size > BUFFER:
            await self.push()

    async def push(self) -> None:
        """Send what was added."""
        if self._parts:
            due = asyncio.get_running_loop().time() + self._connection.proxy.latency
            data = b"".join(self._parts)
            self._parts.clear()
            self._size = 0
            await self._queue.put((due, data))

    async def flush(self) -> None:
        """Send what was added and wait until it was sent."""
        await self.push()
        await self._queue.join()

    async def run(self) -> None:
        """Do the sending; ends by an error or by being cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due, data = await self._queue.get()
            if (early := due - loop.time()) > 0:
                await asyncio.sleep(early)
            rest = memoryview(data)
            while rest:
                await self._connection.flow()
                bandwidth = self._connection.proxy.bandwidth
                slice_ = rest if bandwidth is None else rest[: max(1, bandwidth // 50)]
                if self._writer.transport.is_closing():
                    raise _Over
                self._writer.write(slice_)
                await self._writer.drain()
                rest = rest[len(slice_) :]
                if bandwidth is not None:
                    await asyncio.sleep(len(slice_) / bandwidth)
            self._queue.task_done()


class _Connection:
    """One client and its connection to the server."""

    def __init__(self, proxy: Proxy, accepted: socket.socket) -> None:
        self.proxy = proxy
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.reset_at_end = False
        self._socket = accepted
        self._pending: dict[bytes, _Command] = {}
        self._verbs: set[bytes] = set()
        """The first words of the commands so far."""
        self._said_by_client: Literal["commands", "IDLE", "AUTHENTICATE"] = "commands"
        self._go_ahead: tuple[bytes, asyncio.Future[bool]] | None = None
        # Held within a response, so that no answer of the proxy's own gets into the middle of it.
        self._within_response = asyncio.Lock()
        self._muted = False

    async def flow(self) -> None:
        """Wait while the proxy or this connection is stalled."""
        while not (self.flowing.is_set() and self.proxy.flowing.is_set()):
            await self.flowing.wait()
            await self.proxy.flowing.wait()

    async def run(self) -> None:
        """Serve the client until either side ends or a fault does."""
        with self._socket:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                await self._before_tls()
                reader, self._to_client = await accept_tls(self._socket, self.proxy.towards_client)
            except (_Over, OSError):
                return
            finally:
                if self.reset_at_end:
                    self._reset_on_close()
            try:
                await self._serve(reader)
            finally:
                if self.reset_at_end:
                    self._reset_on_close()
                await abort(self._to_client)

    async def _before_tls(self) -> None:
        await self.flow()
        if (fault := self.proxy.take("connect")) is None:
            return
        match fault.action:
            case "stall":
                self.flowing.clear()
                fault.struck()
                await self.flow()
                return
            case "half-close":
                self._socket.shutdown(socket.SHUT_WR)
                fault.struck()
                return
            case "cut":
                self._reset_on_close()
            case bytes() | "corrupt" as said:
                self._socket.send(_GARBAGE if said == "corrupt" else said)
                self._socket.shutdown(socket.SHUT_WR)
        self._socket.close()
        fault.struck()
        raise _Over

    async def _serve(self, reader: asyncio.StreamReader) -> None:
        server = self.proxy.server
        try:
            server_reader, to_server = await asyncio.open_connection(
                server.host, server.port, ssl=self.proxy.towards_server, limit=BUFFER
            )
        except OSError:
            self.reset_at_end = True
            return
        try:
            self._up = _Sink(self, to_server)
            self._down = _Sink(self, self._to_client)
            self._client = _Source(reader, self._up)
            self._server = _Source(server_reader, self._down)
            tasks = [
                asyncio.create_task(part)
                for part in (self._upward(), self._downward(), self._up.run(), self._down.run())
            ]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                ends = await asyncio.gather(*tasks, return_exceptions=True)
            for end in ends:
                if isinstance(end, OSError):
                    self.reset_at_end = True
                elif isinstance(end, Exception) and not isinstance(end, _Over):
                    raise end
        finally:
            await abort(to_server)

    async def _upward(self) -> None:
        try:
            while True:
                line = await self._client.line()
                if self._said_by_client == "commands":
                    await self._command(line)
                else:
                    if self._said_by_client == "IDLE" and line.strip().upper() == b"DONE":
                        self._said_by_client = "commands"
                    await self._up.add(line)
        except _Over:
            await self._up.flush()
            await self.flow()
            raise

    async def _command(self, line: bytes) -> None:
        tag, _, rest = line.partition(b" ")
        text = rest.rstrip(b"\r\n")
        place = self.proxy.record(text)
        command = _Command(tag, text)
        earlier = frozenset(self._verbs)
        self._verbs.add(text.partition(b" ")[0])
        fault = self.proxy.take("command", text, earlier)
        if fault and fault.action != "drop" and not isinstance(fault.action, bytes):
            await self._strike(fault)
        elif fault or self.proxy.hidden.refuses(text):
            await self._swallow(rest)
            if fault is None:
                await self._answer(tag, b"BAD Unknown command or argument")
            elif isinstance(fault.action, bytes):
                await self._answer(tag, fault.action)
            if fault:
                fault.struck()
            return
        for at in ("upload", "answer", "literal"):
            if taken := self.proxy.take(at, text, earlier):
                command.faults[at] = taken
        self._pending[tag] = command
        verb = text.partition(b" ")[0].upper()
        if verb in (b"IDLE", b"AUTHENTICATE"):
            self._said_by_client = "IDLE" if verb == b"IDLE" else "AUTHENTICATE"
        if self.proxy.rephrase is not None:
            line = tag + b" " + self.proxy.rephrase(rest)
        await self._pass_on(command, line, text, place)

    async def _pass_on(self, command: _Command, line: bytes, text: bytes, place: int) -> None:
        alter = self.proxy.alter if text[:7].upper() == b"APPEND " else None
        while marker := _MARKER.search(line):
            if marker[2] and alter is not None and "upload" not in command.faults:
                given = b"".join([piece async for piece in self._client.literal(int(marker[1]))])
                stored = alter(given)
                await self._up.add(line[: marker.start()] + b"{%d+}\r\n" % len(stored) + stored)
                line = await self._client.line()
                text += line.rstrip(b"\r\n")
                self.proxy.amend(place, text)
                continue
            if not marker[2]:
                answer = asyncio.get_running_loop().create_future()
                self._go_ahead = (command.tag, answer)
                await self._up.add(line)
                await self._up.push()
                if not await answer:
                    return
            else:
                await self._up.add(line)
            size = int(marker[1])
            fault = command.faults.get("upload")
            if fault and size > fault.after:
                del command.faults["upload"]
                async for piece in self._client.literal(fault.after):
                    await self._up.add(piece)
                await self._up.flush()
                await self._strike(fault)
                size -= fault.after
            async for piece in self._client.literal(size):
                await self._up.add(piece)
            line = await self._client.line()
            text += line.rstrip(b"\r\n")
            self.proxy.amend(place, text)
            if self.proxy.hidden.refuses(text):
                # The server is within the command already. It shall find the command malformed there.
                await self._up.add(_POISON)
                await self._swallow(line)
                return
        await self._up.add(line)

    async def _swallow(self, line: bytes) -> None:
        """Read the rest of a command; a synchronising literal is not sent before it was asked for."""
        while (marker := _MARKER.search(line)) and marker[2]:
            async for _ in self._client.literal(int(marker[1])):
                pass
            line = await self._client.line()

    async def _answer(self, tag: bytes, text: bytes) -> None:
        async with self._within_response:
            await self._say(tag + b" " + text + b"\r\n")
            await self._down.push()

    async def _say(self, data: bytes) -> None:
        if not self._muted:
            await self._down.add(data)

    async def _downward(self) -> None:
        try:
            greeting = await self._server.line()
            if fault := self.proxy.take("greeting"):
                if isinstance(fault.action, bytes):
                    greeting = fault.action + b"\r\n"
                    fault.struck()
                else:
                    await self._strike(fault)
            await self._response(greeting)
            while True:
                line = await self._server.line()
                async with self._within_response:
                    await self._response(line)
        except _Over:
            await self._end_client()
            raise

    async def _response(self, line: bytes) -> None:
        if line.startswith(b"+"):
            await self._say(line)
            if self._go_ahead:
                self._go_ahead[1].set_result(True)
                self._go_ahead = None
            return
        if not line.startswith(b"* "):
            tagged = await self._tagged(line)
            if tagged is None:
                return
            line = tagged
        hidden = (seen := self.proxy.visible(line)) is None
        await self._say(seen or b"")
        while marker := _MARKER.search(line):
            size = int(marker[1])
            fault = self._literal_fault(size)
            if fault:
                async for piece in self._server.literal(fault.after):
                    await self._say(piece)
                await self._strike(fault)
                size -= fault.after
            async for piece in self._server.literal(size):
                if not hidden:
                    await self._say(piece)
            line = await self._server.line()
            if not hidden:
                await self._say(self.proxy.visible(line) or b"")

    async def _tagged(self, line: bytes) -> bytes | None:
        """Return the tagged line that the client shall get, None for none."""
        tag = line.partition(b" ")[0]
        command = self._pending.pop(tag, None)
        if command is None:
            return line
        if self._go_ahead and self._go_ahead[0] == tag:
            self._go_ahead[1].set_result(False)
            self._go_ahead = None
        if command.first_line.upper().startswith((b"IDLE", b"AUTHENTICATE")):
            self._said_by_client = "commands"
        fault = command.faults.get("answer")
        if fault is None:
            return line
        if fault.action == "drop" or isinstance(fault.action, bytes):
            fault.struck()
            return None if fault.action == "drop" else tag + b" " + fault.action + b"\r\n"
        await self._strike(fault)
        return line

    def _literal_fault(self, size: int) -> Fault | None:
        # Commands are answered in their order, so a literal belongs to the first that waits for its answer.
        command = next(iter(self._pending.values()), None)
        if command and (fault := command.faults.get("literal")) and size > fault.after:
            return command.faults.pop("literal")
        return None

    async def _strike(self, fault: Fault) -> None:
        """Do what the fault does; what came before it has been delivered. Raises _Over at an end."""
        if not self._muted:
            await self._down.flush()
            await self._delivered()
        match fault.action:
            case "cut":
                self.reset_at_end = True
                self._reset_on_close()
                await abort(self._to_client)
                fault.struck()
                raise _Over
            case "close":
                await self._end_client(fault)
                raise _Over
            case "half-close":
                self._muted = True
                self._socket.shutdown(socket.SHUT_WR)
                fault.struck()
            case "corrupt":
                self._socket.send(_GARBAGE)
                fault.struck()
            case "stall":
                self.flowing.clear()
                fault.struck()
                await self.flow()

    async def _delivered(self) -> None:
        """Wait until the client's kernel has what was sent: a reset would overtake it."""
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline and self._socket.fileno() >= 0:
            unacknowledged = struct.unpack("i", fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(4)))[0]
            if not unacknowledged:
                return
            await asyncio.sleep(0.001)

    async def _end_client(self, fault: Fault | None = None) -> None:
        """End TLS and TCP towards the client in good order and let it do the same."""
        if self._muted:
            return
        await self._down.flush()
        await self.flow()
        self._to_client.close()
        self._socket.shutdown(socket.SHUT_WR)
        if fault:
            fault.struck()
        with contextlib.suppress(TimeoutError, OSError):
            await asyncio.wait_for(self._to_client.wait_closed(), _PATIENCE)

    def _reset_on_close(self) -> None:
        if self._socket.fileno() >= 0:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

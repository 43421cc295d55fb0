"""The sockets of one worker: accepts connections, keeps their clock, drains them.

A connection to a TLS port begins in the lobby: until its first byte has come it is a file and half a kilobyte, and not the tens
of kilobytes of a TLS connection. Then it waits for one of a bounded number of handshakes. Where proxies say for whom they connect,
the lobby hears them out first, and connections to a plain-text port begin there too.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import select
import socket
import ssl
from collections.abc import Callable, Collection
from typing import Protocol

from uplinkd.core.proxy_protocol import Header, begins_like_one
from uplinkd.flow import network_of
from uplinkd.observe import Occasionally
from uplinkd.places import Known, Places
from uplinkd.secured import Secured, Sockets
from uplinkd.tls import why_failed

__all__ = ["Client", "Door", "Listener", "Peer", "Port"]

log = logging.getLogger("uplinkd.listener")

Port = tuple[socket.socket, ssl.SSLContext | None]
"""A listening socket with its TLS context, or None for plain text."""

Client = tuple[str, str]
"""The address of a device and its network (see flow.network_of), as a proxy has told them."""

_TICK = 0.25
_DRAIN_TICK = 0.05
_BACKLOG = 4096
# For the first byte and the handshake together.
_HANDSHAKE_TIMEOUT = 10.0
# So many connections are accepted, and handshakes begun, before it is the others' turn: each costs up to a millisecond of its own.
_SHARE = 16
# A handshake that has gone on for less yields to no other: most are done within a few round trips.
_PATIENCE = 1.0
_OUT_OF_FILES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_SAY_SECONDS = 60
_PEEK_BYTES = 1024
# A header of the PROXY protocol begins with one of these, and TLS with neither.
_LIKE_A_HEADER = frozenset({b"P", b"\r"})


class Peer(Protocol):
    """A connection of a door."""

    @property
    def under_way(self) -> bool: ...

    def abort(self) -> None: ...


class Door(Protocol):
    """What the connections of one kind share."""

    @property
    def connections(self) -> Collection[Peer]: ...

    @property
    def clock(self) -> Callable[[], float]: ...

    @property
    def known(self) -> Known: ...

    def tick(self) -> None: ...

    def drain(self) -> None: ...


class Listener:
    """Serves `ports` with connections that `make` makes for `door`; it is told whether they are TLS, and whose they are where that
    is not the peer. At most `handshakes` go on at a time, and `waiting` connections wait for one or for their first byte; `missed`
    is told of those that end before a handshake is done, and why (see metrics.HANDSHAKE_FAILURES), `shook` of the others.
    Connections from addresses that are `proxies` begin with a header of the PROXY protocol."""

    def __init__(
        self,
        door: Door,
        make: Callable[[bool, Client | None], asyncio.Protocol],
        ports: list[Port],
        *,
        handshakes: int,
        waiting: int,
        missed: Callable[[str], None],
        shook: Callable[[Secured], None] = lambda _: None,
        proxies: Callable[[str], bool] | None = None,
    ) -> None:
        self._door = door
        self._make = make
        self._ports = ports
        self._handshakes = handshakes
        self._waiting = waiting
        self._missed = missed
        self._shook = shook
        self._proxies = proxies
        self._servers: list[asyncio.Server | _Lobby] = []

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        for sock, context in self._ports:
            make = functools.partial(self._make, context is not None)
            if context is None and self._proxies is None:
                alone = functools.partial(make, None)
                self._servers.append(await loop.create_server(alone, sock=sock, backlog=_BACKLOG))
            else:
                missed = self._missed if context else _ignore
                bounds = self._handshakes, self._waiting
                lobby = _Lobby(sock, context, make, self._door, *bounds, missed, self._shook, self._proxies)
                lobby.open()
                self._servers.append(lobby)

    async def run(self) -> None:
        """Keep the connections' clock until cancelled."""
        while True:
            self._door.tick()
            for server in self._servers:
                if isinstance(server, _Lobby):
                    server.tick()
            await asyncio.sleep(_TICK)

    async def drain(self, *, within: float) -> int:
        """Accept no more, answer what is under way, close; return how many connections had to be cut after `within` s."""
        for server in self._servers:
            server.close()
        door = self._door
        door.tick()
        door.drain()
        end = door.clock() + within
        while door.connections and door.clock() < end:
            await asyncio.sleep(_DRAIN_TICK)
            door.tick()
        left = [connection for connection in door.connections if connection.under_way]
        for connection in list(door.connections):
            connection.abort()
        for server in self._servers:
            if isinstance(server, _Lobby):
                server.end()
        return len(left)


def _ignore(_: str) -> None:
    """Of what ends before a plain-text connection begins nobody need know."""


class _Guest:
    """A connection in the lobby. It holds its socket until the handshake begins, then what cuts that off. That of a proxy has a header,
    and is nobody's until that is whole."""

    __slots__ = ("_lobby", "address", "began", "cut", "deadline", "header", "network", "sock")

    def __init__(
        self, lobby: _Lobby, sock: socket.socket, address: str, deadline: float, header: Header | None
    ) -> None:
        self._lobby = lobby
        self.sock: socket.socket | None = sock
        self.address = address
        self.header = header
        self.network = "" if header else network_of(address)
        self.deadline = deadline
        self.cut: Callable[[], object] | None = None
        self.began = 0.0

    @property
    def spare(self) -> bool:
        return self.cut is None or self._lobby.clock() - self.began > _PATIENCE

    @property
    def looks(self) -> bool:
        """Whether it is a proxy that only looks if the port is open: it speaks for nobody, or (HAProxy in version 1) for itself."""
        header = self.header
        return header is not None and (not header.source or self.network == network_of(self.address))

    @property
    def client(self) -> Client | None:
        """Whose connection it is, where a proxy has told that."""
        return (self.header.source, self.network) if self.header and self.header.source else None

    def abort(self) -> None:
        if self.cut is None:
            self._lobby.dismiss(self)
        else:
            self.cut()


class _Lobby:
    """Where the connections of one port are until their handshake is done; of a plain-text port, until their first byte has come."""

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext | None,
        make: Callable[[Client | None], asyncio.Protocol],
        door: Door,
        handshakes: int,
        waiting: int,
        missed: Callable[[str], None],
        shook: Callable[[Secured], None],
        proxies: Callable[[str], bool] | None,
    ) -> None:
        self._sock = sock
        self._context = context
        self._make = make
        self.clock = door.clock
        self._handshakes = handshakes
        self._most = waiting
        self._missed = missed
        self._shook = shook
        self._proxies = proxies
        self._known = door.known
        self._places = Places(door.known, "connections before their handshake", trusting=True)
        self._shaking = Places(door.known, "TLS handshakes", trusting=True)
        self._guests: dict[_Guest, None] = {}  # in the order in which they came
        self._silent: dict[int, _Guest] = {}  # by file, of whom no byte has come
        # Those that could begin: of networks that are known, and of others; each network in its turn.
        self._ready: tuple[dict[str, dict[_Guest, None]], dict[str, dict[_Guest, None]]] = {}, {}
        self._calls = False
        self._rests = False
        self._say = Occasionally(_SAY_SECONDS)
        self._say_missing, self._say_unasked = Occasionally(_SAY_SECONDS), Occasionally(_SAY_SECONDS)

    def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._sockets = Sockets(self._loop)
        self._epoll = select.epoll()
        self._sock.listen(_BACKLOG)
        self._sock.setblocking(False)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # which those that are accepted inherit
        self._loop.add_reader(self._epoll.fileno(), self._spoken)
        self._loop.add_reader(self._sock.fileno(), self._accept)

    def close(self) -> None:
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        self._sock.close()
        self._rests = False
        for guest in list(self._guests):
            guest.abort()

    def end(self) -> None:
        """Nothing is left of it."""
        self._sockets.close()

    def tick(self) -> None:
        """Once in a fraction of a second: end what has overstayed, begin with those to whom others yield by now."""
        now = self.clock()
        for guest in list(self._guests):
            if guest.deadline > now:
                break
            guest.abort()
        self._call_soon()
        if self._rests:
            self._rests = False
            self._loop.add_reader(self._sock.fileno(), self._accept)

    def dismiss(self, guest: _Guest) -> None:
        """It goes without a handshake."""
        sock, guest.sock = guest.sock, None
        if sock is not None:
            if not guest.looks:
                self._missed("timeout_or_closed")
            self._silent.pop(sock.fileno(), None)
            sock.close()
        self._forget(guest)

    def _accept(self) -> None:
        deadline = self.clock() + _HANDSHAKE_TIMEOUT
        for _ in range(_SHARE):
            try:
                sock, address = self._sock.accept()
            except OSError as error:
                if error.errno in _OUT_OF_FILES and self._make_room(error):
                    continue
                return
            sock.setblocking(False)
            header = Header() if self._proxies is not None and self._proxies(address[0]) else None
            guest = _Guest(self, sock, address[0], deadline, header)
            if not self._places.enter(guest, guest.network, self._most):
                self._missed("timeout_or_closed")
                sock.close()
                continue
            self._guests[guest] = None
            self._look(guest, sock)

    def _make_room(self, error: OSError) -> bool:
        """There are no files left: the greediest network yields one. Where there is none to yield the port rests for a moment."""
        if self._say():
            log.warning("connections cannot be accepted: %s; raise the limit of open files", error.strerror)
        if self._places.shrink():
            return True
        self._rests = True
        self._loop.remove_reader(self._sock.fileno())
        return False

    def _look(self, guest: _Guest, sock: socket.socket) -> None:
        """Begin with who has spoken, wait for who is silent, end who has gone."""
        try:
            if guest.header and not guest.header.whole and not self._introduced(guest, sock, guest.header):
                return
            begun = sock.recv(1, socket.MSG_PEEK)
            if begun in _LIKE_A_HEADER and guest.header is None:
                self._hint(guest, sock)
        except (BlockingIOError, InterruptedError):
            self._silent[sock.fileno()] = guest
            self._epoll.register(sock, select.EPOLLIN)
            return
        except OSError:
            begun = b""
        if not begun:
            self.dismiss(guest)
        elif not self._begin(guest):
            self._ready[guest.network not in self._known].setdefault(guest.network, {})[guest] = None

    def _introduced(self, guest: _Guest, sock: socket.socket, header: Header) -> bool:
        """Read the header and not a byte beyond it: from then on the guest is who it tells. False where it has ended instead."""
        while not header.whole:
            said = sock.recv(_PEEK_BYTES, socket.MSG_PEEK)
            try:
                size = header.feed(said)
            except ValueError as fault:
                self._missed("proxy_header")
                if self._say_missing():
                    log.warning(
                        "a connection from %s was closed: by the setting proxy_protocol it has to begin with a PROXY header, and %s; "
                        "have that proxy send one (HAProxy: send-proxy-v2, nginx: proxy_protocol on), or take its address out of "
                        "the setting",
                        guest.address,
                        fault,
                    )
                size = 0
            if not size:
                self.dismiss(guest)
                return False
            sock.recv(size)
        self._places.leave(guest)
        guest.network = network_of(header.source or guest.address)
        if not self._places.enter(guest, guest.network, self._most):
            self.dismiss(guest)
            return False
        return True

    def _hint(self, guest: _Guest, sock: socket.socket) -> None:
        if begins_like_one(sock.recv(_PEEK_BYTES, socket.MSG_PEEK)) and self._say_unasked():
            log.warning(
                "a connection from %s began with a PROXY header, which is not believed: if that is a proxy of yours, name it in "
                "the setting proxy_protocol",
                guest.address,
            )

    def _begin(self, guest: _Guest) -> bool:
        """Whether there is a place for its handshake; a quarter of them is for known networks alone."""
        most = self._handshakes if guest.network in self._known else max(1, self._handshakes * 3 // 4)
        if not self._shaking.enter(guest, guest.network, most):
            return False
        guest.began = self.clock()
        sock, guest.sock = guest.sock, None
        assert sock
        if self._context is None:
            make = functools.partial(self._make, guest.client)
            task = self._loop.create_task(self._admit(make, sock))
            guest.cut = task.cancel
            task.add_done_callback(lambda _: self._admitted(guest))
            return True
        make = functools.partial(self._make, guest.client or (guest.address, guest.network))
        try:
            secured = Secured(self._context, sock, make, functools.partial(self._shaken, guest), self._sockets)
        except OSError as fault:
            sock.close()
            self._missed(why_failed(fault))
            self._admitted(guest)
            return True
        guest.cut = secured.abort
        secured.shake()
        return True

    def _spoken(self) -> None:
        for file, _ in self._epoll.poll(0, _SHARE):
            self._epoll.unregister(file)
            guest = self._silent.pop(file)
            assert guest.sock
            self._look(guest, guest.sock)

    async def _admit(self, make: Callable[[], asyncio.Protocol], sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            await self._loop.connect_accepted_socket(make, sock)

    def _shaken(self, guest: _Guest, secured: Secured, fault: OSError | None) -> None:
        if fault:
            log.debug("a handshake failed: %s", fault)
            self._missed(why_failed(fault))
        else:
            self._shook(secured)
        self._admitted(guest)

    def _admitted(self, guest: _Guest) -> None:
        """It is in, or has been shown out; in any case another one may begin."""
        self._forget(guest)
        self._call_soon()

    def _call_soon(self) -> None:
        if not self._calls and (self._ready[0] or self._ready[1]):
            self._calls = True
            self._loop.call_soon(self._call)

    def _call(self) -> None:
        """Begin with those that wait: who is known first, then each network in its turn."""
        self._calls = False
        for _ in range(_SHARE):
            ready = self._ready[0] or self._ready[1]
            if not ready:
                return
            network = next(iter(ready))
            guests = ready[network] = ready.pop(network)
            guest = next(iter(guests))
            if self._begin(guest):
                self._unready(guest)

    def _unready(self, guest: _Guest) -> None:
        for ready in self._ready:
            if (guests := ready.get(guest.network)) and guest in guests:
                del guests[guest]
                if not guests:
                    del ready[guest.network]

    def _forget(self, guest: _Guest) -> None:
        self._guests.pop(guest, None)
        self._places.leave(guest)
        self._shaking.leave(guest)
        self._unready(guest)

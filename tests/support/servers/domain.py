"""The public face of a mail domain, on the loopback: its name server, its web server, and where names lead.

What listens is started by `Domain` and ends with it. `Domain.network` is the way of `discovery` to it;
`enter` leads a process of its own there, for tests of the whole command.
"""

import contextlib
import functools
import json
import os
import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.resolver
import dns.rrset

from imapfs.account import discovery
from tests.support.servers.account import DEADLINE
from tests.support.servers.tls import CertificateAuthority

ENVIRONMENT = "IMAPFS_TEST_DOMAIN"
_SILENCE = 0.2
"""Seconds that a silent name server is waited for."""


@dataclass(frozen=True, slots=True)
class Page:
    """What the web server answers to a GET."""

    body: bytes = b""
    status: int = 200
    location: str | None = None


class Domain:
    """A world of names while the ``with`` block lasts; a name that nothing was said of does not exist."""

    def __init__(self, authority: CertificateAuthority, *hosts: str) -> None:
        """``hosts`` are the names of the one web server, whose certificate is valid for them."""
        self.authority = authority
        self.records: dict[tuple[str, str], list[str]] = {}
        """Record data by name and type, such as ``("_imaps._tcp.example.org", "SRV")``."""
        self.pages: dict[str, Page] = {}
        """By URL without its query."""
        self.asked: list[str] = []
        """The URLs that were asked for, with their queries."""
        self.silent = False
        """Whether the name server answers nothing at all."""
        self._stack = contextlib.ExitStack()
        self._certificate = authority.issue(names=hosts or ("localhost",))
        self._leads: dict[str, tuple[str, int]] = {}
        self._hosts = hosts

    def __enter__(self) -> "Domain":
        names = socketserver.ThreadingUDPServer(("127.0.0.1", 0), _names_of(self))
        web = ThreadingHTTPServer(("127.0.0.1", 0), _pages_of(self))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self._certificate)
        # The handshake is left to the thread of the request.
        web.socket = context.wrap_socket(web.socket, server_side=True, do_handshake_on_connect=False)
        for server in (names, web):
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            self._stack.callback(thread.join)
            self._stack.callback(server.server_close)
            self._stack.callback(server.shutdown)
        self.name_server: int = names.server_address[1]
        for host in self._hosts:
            self.lead(f"{host}:443", "127.0.0.1", web.server_address[1])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stack.close()

    def lead(self, name: str, host: str, port: int) -> None:
        """Let connections to ``name``, which is HOST:PORT, arrive at ``host`` and ``port``."""
        self._leads[name] = (host, port)

    def where(self, name: str) -> tuple[str, int]:
        """Where connections to ``name`` arrive."""
        return self._leads[name]

    @property
    def network(self) -> discovery.Network:
        lifetime = _SILENCE if self.silent else discovery.TIMEOUT
        return _network(self.name_server, self._leads, self.authority.certificate, lifetime)

    @property
    def environment(self) -> dict[str, str]:
        """For a process that calls `enter`."""
        return {ENVIRONMENT: json.dumps([self.name_server, self._leads])}

    @contextlib.contextmanager
    def greeter(self, name: str, certificate: tuple[Path, Path], greeting: bytes) -> Iterator[None]:
        """Let ``name``, which is HOST:PORT, be a server with TLS that only greets."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)

        class Greeter(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError), context.wrap_socket(self.request, server_side=True) as tls:
                    tls.sendall(greeting)
                    tls.recv(1)

        with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Greeter) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            self.lead(name, "127.0.0.1", server.server_address[1])
            try:
                yield
            finally:
                server.shutdown()
                thread.join()


def enter() -> None:
    """Lead this process, and it alone, to the `Domain` whose `environment` it was started with."""
    name_server, leads = json.loads(os.environ[ENVIRONMENT])
    where = {name: (host, port) for name, (host, port) in leads.items()}
    network = _network(name_server, where, None, discovery.TIMEOUT)
    made = functools.partial(discovery.Network, query=network.query, connect=network.connect)
    vars(discovery)["Network"] = made


def _network(
    name_server: int, leads: dict[str, tuple[str, int]], certificate: Path | None, lifetime: float
) -> discovery.Network:
    resolver = dns.resolver.Resolver(configure=False)
    resolver.nameservers = ["127.0.0.1"]
    resolver.port = name_server

    def query(name: str, kind: str) -> list[Any]:
        return list(resolver.resolve(name, kind, lifetime=lifetime))

    def connect(host: str, port: int) -> socket.socket:
        if f"{host}:{port}" not in leads:
            raise ConnectionRefusedError(f"nothing listens at {host}:{port}")
        return socket.create_connection(leads[f"{host}:{port}"], DEADLINE)

    return discovery.Network(query, connect, certificate)


def _names_of(domain: Domain) -> type[socketserver.BaseRequestHandler]:
    class Names(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            data, sock = self.request
            query = dns.message.from_wire(data)
            question = query.question[0]
            name = question.name.to_text(omit_final_dot=True)
            response = dns.message.make_response(query)
            response.flags |= dns.flags.RA
            known = {one for one, _ in domain.records}
            found = domain.records.get((name, dns.rdatatype.to_text(question.rdtype)))
            if found:
                response.answer.append(
                    dns.rrset.from_text_list(question.name, 60, "IN", question.rdtype, found)
                )
            elif name not in known:
                response.set_rcode(dns.rcode.NXDOMAIN)
            if not domain.silent:
                sock.sendto(response.to_wire(), self.client_address)

    return Names


def _pages_of(domain: Domain) -> type[BaseHTTPRequestHandler]:
    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = f"https://{self.headers['Host']}{self.path}"
            domain.asked.append(url)
            page = domain.pages.get(url.partition("?")[0], Page(status=404))
            self.send_response(page.status)
            if page.location is not None:
                self.send_header("Location", page.location)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(page.body)

        def log_message(self, format: str, *_: object) -> None:  # noqa: A002 - the name is http.server's
            pass

    return Pages

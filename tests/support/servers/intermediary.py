"""What stands before a server, at a port that stays the same and can refuse connections."""

import asyncio
import socket
from abc import ABC, abstractmethod
from types import TracebackType
from typing import ClassVar, Self

from tests.support.servers.account import Dependents
from tests.support.servers.loop import LoopThread, Port, accept
from tests.support.servers.tls import CertificateAuthority


class Intermediary(ABC):
    """Accepts connections at ``port`` while the ``with`` block lasts, unless they are refused.

    Leaving the block raises what broke in the intermediary itself.
    """

    host = "localhost"
    thread_name: ClassVar[str]

    def __init__(self, authority: CertificateAuthority) -> None:
        self.authority = authority
        self.dependents = Dependents()
        self.port = 0
        self._accepting: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        self._port = Port()
        self.port = self._port.number
        self._thread = LoopThread(self.thread_name)
        self.accept()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            self.dependents.__exit__(kind, error, where)
        finally:
            try:
                self.refuse()
                self._thread.close()
            finally:
                self._port.close()

    def refuse(self) -> None:
        """Refuse new connections, as a server that is not running does."""
        self._thread.run(self._refuse())

    def accept(self) -> None:
        """Accept connections again after `refuse`."""
        self._thread.run(self._accept())

    async def _accept(self) -> None:
        if self._accepting is None:
            self._accepting = self._thread.spawn(self._accept_from(self._port.listen()))

    async def _refuse(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
            self._accepting = None

    async def _accept_from(self, listener: socket.socket) -> None:
        with listener:
            while True:
                self._serve(await accept(listener))

    @abstractmethod
    def _serve(self, accepted: socket.socket) -> None:
        """Start a task that serves a connection and then closes it."""

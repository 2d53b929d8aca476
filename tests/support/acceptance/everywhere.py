"""All servers of the acceptance."""

from typing import Final

from tests.support.acceptance.light import GoImapPeer, MailDevelPeer, PymapPeer, TwistedPeer
from tests.support.acceptance.peers import CourierPeer, CyrusPeer, DovecotPeer, NewDovecotPeer, Peer
from tests.support.acceptance.providers import PROVIDERS

PEERS: Final[tuple[type[Peer], ...]] = (
    DovecotPeer,
    NewDovecotPeer,
    CyrusPeer,
    CourierPeer,
    PymapPeer,
    MailDevelPeer,
    TwistedPeer,
    GoImapPeer,
    *PROVIDERS,
)
"""In the order of the matrix."""

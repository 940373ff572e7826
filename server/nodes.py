"""Which sites are Flower nodes: those that the ledger has as enrolled, by the keys of their certificates.

Called every second by the daemon, and at once when a site is revoked. A site that is out is no node from its next
request on; one that renewed its key is a new node.
"""

import logging
from collections.abc import Iterable
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_der_public_key

from federation.pki import Role
from server.flower_link import FlowerNode, node_key
from server.tables import SiteStatus

_log = logging.getLogger(__name__)


class Member(Protocol):
    """A member, as the ledger tells it; see `server.tables.Site`."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def role(self) -> str: ...  # noqa: D102
    @property
    def status(self) -> str: ...  # noqa: D102
    @property
    def node_key(self) -> str: ...  # noqa: D102


class NodeRegister(Protocol):
    """What is needed of `server.flower_link.Control`."""

    def nodes(self) -> list[FlowerNode]: ...  # noqa: D102
    def register(self, key: bytes, name: str) -> int: ...  # noqa: D102
    def unregister(self, number: int) -> None: ...  # noqa: D102


def follow(members: Iterable[Member], control: NodeRegister) -> dict[str, FlowerNode]:
    """Make the enrolled sites, and no others, nodes; gives those that are, by name.

    Raises:
        LinkError: the SuperLink can't be reached.
    """
    wanted = {_key(m.node_key): m.name for m in members if (m.role, m.status) == (Role.SITE, SiteStatus.ENROLLED)}
    there = {node.key: node for node in control.nodes()}
    for key, node in there.items():
        if key not in wanted:
            control.unregister(node.number)
            _log.warning("%s is no node any more: its key is not that of an enrolled site", node.name or node.number)
    for key, name in wanted.items():
        if key not in there:
            number = control.register(key, name)
            _log.info("%s is a node now", name)
            there[key] = FlowerNode(number, key, name, online=False, online_until=0.0)
    return {name: there[key] for key, name in wanted.items()}


def _key(digits: str) -> bytes:
    public = load_der_public_key(bytes.fromhex(digits))
    assert isinstance(public, ec.EllipticCurvePublicKey)
    return node_key(public)

"""Which sites are Flower nodes: those that the ledger has as enrolled, by the keys of their certificates.

Called every second by the daemon, and at once when a site is revoked. A site that is out is no node from its next
request on, one whose certificate has expired, too; one that renewed its key is a new node.
"""

import logging
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_der_public_key

from federation.pki import Role
from server.flower_link import FlowerNode, LinkRefusal, node_key
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
    @property
    def expires_at(self) -> float | None: ...  # noqa: D102


class NodeRegister(Protocol):
    """What is needed of `server.flower_link.Control`."""

    def nodes(self) -> list[FlowerNode]: ...  # noqa: D102
    def register(self, key: bytes, name: str) -> int: ...  # noqa: D102
    def unregister(self, number: int) -> None: ...  # noqa: D102


def follow(
    members: Iterable[Member], control: NodeRegister, clock: Callable[[], float] = time.time
) -> tuple[dict[str, FlowerNode], list[str]]:
    """Make the enrolled sites, and no others, nodes. An expired certificate is none.

    Returns:
        Those that are, by name, and what the SuperLink refused: the other sites' nodes are as they should be.

    Raises:
        LinkError: the SuperLink can't be reached.
    """
    now = clock()
    wanted = {_key(m.node_key): m.name for m in members if _may_be_node(m, now)}
    there = {node.key: node for node in control.nodes()}
    refused: list[str] = []
    for key, node in there.items():
        if key not in wanted:
            whose = node.name or node.number
            try:
                control.unregister(node.number)
            except LinkRefusal as refusal:
                refused.append(f"{whose} should be no node any more, and still is: {refusal}")
                continue
            _log.warning(
                "%s is no node any more: its key is not that of an enrolled site, or its certificate has expired", whose
            )
    for key, name in wanted.items():
        if key not in there:
            try:
                number = control.register(key, name)
            except LinkRefusal as refusal:
                refused.append(
                    f"{name} can't be made a node, and takes part in no round: {refusal} If this stays, its people "
                    "give it another key with fedcomet site renew --new-key."
                )
                continue
            _log.info("%s is a node now", name)
            there[key] = FlowerNode(number, key, name, online=False, online_until=0.0)
    return {name: there[key] for key, name in wanted.items() if key in there}, refused


def enrolled(member: Member) -> bool:
    """Tell whether a member is a site that belongs to the federation."""
    return (member.role, member.status) == (Role.SITE, SiteStatus.ENROLLED)


def _may_be_node(member: Member, now: float) -> bool:
    return enrolled(member) and (member.expires_at is None or member.expires_at > now)


def _key(digits: str) -> bytes:
    public = load_der_public_key(bytes.fromhex(digits))
    assert isinstance(public, ec.EllipticCurvePublicKey)
    return node_key(public)

"""How members come to a federation and stay in it: invitations, certificates for them, and their renewal.

A pure object between the ledger and the authority; `server.control` puts it on a socket. Whoever has
no valid token gets nothing out of it but a refusal, a few times; then it isn't listened to for a while.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256

from federation import pki
from federation.control_pb2 import EnrolReply, EnrolRequest, RenewRequest
from federation.invitation import Invitation
from federation.pki import CertificateError, Member, Role, Wish
from federation.sessions import Throttle
from server.authority import Authority
from server.ledger import Ledger
from server.ledger_entries import Identity, LedgerRefusal, MemberEntry
from server.tables import SiteStatus
from tokenizer.errors import ConfigError, FedcometError

_MOST_HOURS = 24 * 30


class MembershipError(FedcometError):
    """Who calls is no member (any more), or asks for what is another's."""


class TooMany(FedcometError):
    """Too many wrong tokens came from an address."""


@dataclass(frozen=True)
class Welcome:
    """What a new member is told: the federation's name, its ports, and the key that signs requests of runs."""

    federation: str
    fleet_port: int
    control_port: int
    coordinator: str


class Enrolment:
    """A coordinator's desk for those who come, those who stay and those who renew."""

    def __init__(
        self, ledger: Ledger, authority: Authority, welcome: Welcome, clock: Callable[[], float] = time.time
    ) -> None:
        self._ledger, self._authority, self._clock = ledger, authority, clock
        self.welcome = welcome
        self._throttle = Throttle(clock)

    def enrol(self, address: str, request: EnrolRequest) -> EnrolReply:
        """Take in whoever brings a token, with a certificate; the same keys get the same one again.

        Args:
            address: where it comes from.
            request: the token's secret, and a certificate request that answers it.

        Raises:
            TooMany: wrong tokens came from there before.
            LedgerRefusal: the token doesn't hold, or the keys are another member's.
            MembershipError: the token is for another name or role.
            CertificateError: the request is damaged or isn't signed with its keys.
        """
        if wait := self._throttle.wait_s(address):
            raise TooMany(f"Too many wrong tokens came from this address; try again in {wait / 60:.0f} minutes.")
        last = self._throttle.count(address)
        try:
            certificate = self._certificate(request)
        except (LedgerRefusal, MembershipError, CertificateError) as refusal:
            if last:
                self._ledger.note(address, "enrolment.throttled", told=str(refusal))
            raise
        self._throttle.forget(address)
        return EnrolReply(
            certificate=certificate,
            authority=self._authority.pem.decode(),
            federation=self.welcome.federation,
            fleet_port=self.welcome.fleet_port,
            control_port=self.welcome.control_port,
            coordinator=self.welcome.coordinator,
        )

    def renew(self, caller: Member, request: RenewRequest) -> str:
        """Give a member its next certificate, for the key that it has or for a new one.

        The ledger hears of it when the certificate is first used (`admit`): an answer that gets lost locks nobody out.

        Raises:
            MembershipError: the request is for somebody else.
            CertificateError: the request is damaged or isn't signed with its keys.
        """
        wish = pki.read_request(request.request, request.proof, bytes.fromhex(caller.fingerprint))
        if (wish.name, wish.role, wish.ed25519) != (caller.name, caller.role, caller.ed25519):
            raise MembershipError(f"{caller.name} may renew its own certificate only: its name, role and identity.")
        return self._issue(wish).decode()

    def admit(self, member: Member, pem: bytes) -> MemberEntry:
        """Give the ledger's entry of whoever comes with a certificate of the federation.

        A certificate that is newer than the one in use takes its place; an older one holds only for the same key.

        Raises:
            MembershipError: it isn't enrolled (any more), or its certificate expired or was replaced.
        """
        if not member.since <= datetime.fromtimestamp(self._clock(), UTC) <= member.until:  # TLS looks once
            raise MembershipError(f"The certificate of {member.name} has expired; join again with a new invitation.")
        entry = self._find(member.name)
        if entry is None or entry.status == SiteStatus.INVITED:
            raise MembershipError(f"{member.name} is not enrolled; join with an invitation of the coordinator.")
        if entry.status == SiteStatus.REVOKED:
            raise MembershipError(f"{member.name} was revoked; ask the coordinator why, and for a new invitation.")
        replaced = MembershipError(
            f"This certificate of {member.name} was replaced by another one; if nobody at {member.name} did that, tell "
            f"the coordinator to revoke {member.name}."
        )
        if (entry.role, entry.ed25519) != (member.role, member.ed25519):
            raise replaced
        if entry.serial == member.serial:
            return entry
        if member.since > pki.read_member(entry.certificate.encode()).since:
            return self._ledger.members.renew(member.name, _identity(member, pem))
        if entry.node_key != member.node_key:
            raise replaced
        return entry

    def _certificate(self, request: EnrolRequest) -> str:
        digest = sha256(request.secret).digest()
        try:
            invite = self._ledger.members.invitation(digest.hex())
        except LedgerRefusal:
            if (again := self._again(request, digest)) is not None:
                return again
            raise
        wish = pki.read_request(request.request, request.proof, digest)
        if (wish.name, wish.role.value) != (invite.site, invite.role):
            raise MembershipError(
                f"The invitation is for {invite.site} as {invite.role}, the request for {wish.name} as {wish.role}; "
                "ask the coordinator for an invitation of this name."
            )
        pem = self._issue(wish)
        return self._ledger.members.enrol(digest.hex(), _identity(pki.read_member(pem), pem)).certificate

    def _again(self, request: EnrolRequest, digest: bytes) -> str | None:
        """The certificate of a member whose first answer got lost; whoever asks has proved both of its keys."""
        try:
            wish = pki.read_request(request.request, request.proof, digest)
        except CertificateError:
            return None
        entry = self._find(wish.name)
        if entry is None or entry.status != SiteStatus.ENROLLED:
            return None
        same = (entry.ed25519, entry.node_key) == (wish.ed25519, wish.node_key)
        return entry.certificate if same else None

    def _find(self, name: str) -> MemberEntry | None:
        try:
            return self._ledger.members.get(name)
        except LedgerRefusal:
            return None

    def _issue(self, wish: Wish) -> bytes:
        return self._authority.issue(wish, datetime.fromtimestamp(self._clock(), UTC))


def invite(ledger: Ledger, authority: str, name: str, role: Role, hours: float, who: str) -> str:
    """Give a token for a new member, or a new identity for an old one; only its hash is kept.

    Args:
        ledger: where it is kept.
        authority: the sha256 of the authority's certificate; its key is not needed.
        name, role: who is invited, and as what.
        hours: how long the token holds.
        who: invites.

    Raises:
        ConfigError: the name is none, or the hours make no sense.
        LedgerRefusal: the name has another role.
    """
    if not 0 < hours <= _MOST_HOURS:
        raise ConfigError(f"An invitation can hold for up to {_MOST_HOURS} hours, not {hours:g}.")
    invitation = Invitation.new(name, role, authority)
    ledger.members.invite(name, role, invitation.digest.hex(), hours * 3600, who)
    return invitation.token


def _identity(member: Member, pem: bytes) -> Identity:
    return Identity(
        certificate=pem.decode(),
        serial=member.serial,
        fingerprint=member.fingerprint,
        ed25519=member.ed25519,
        node_key=member.node_key,
        expires_at=member.until.timestamp(),
    )

"""How members come to a federation and stay in it: invitations, certificates for them, and their renewal.

A pure object between the ledger (`server.members`) and the authority; `server.control` puts it on a socket. Whoever has
no valid token gets nothing out of it but a refusal, a few times; then it isn't listened to for a while.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256

from federation import pki
from federation.control_pb2 import EnrolReply, EnrolRequest, RenewRequest
from federation.invitation import Invitation
from federation.pki import Authority, CertificateError, Member, Role, Wish
from server.members import Members, MembershipError
from tokenizer.errors import ConfigError, FedcometError

INVITE_HOURS = 72.0
_MOST_HOURS = 24 * 30
_WRONG, _WINDOW_S, _MOST_ADDRESSES = 5, 600.0, 4096


class TooMany(FedcometError):
    """Too many wrong tokens came from an address."""


@dataclass(frozen=True)
class Welcome:
    """What a new member is told: the federation's name, its ports, and the key that signs requests of runs."""

    federation: str
    fleet_port: int
    control_port: int
    coordinator: str


class Throttle:
    """Counts what went wrong per address within ten minutes; only the latest few thousand addresses are kept."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._wrong: OrderedDict[str, list[float]] = OrderedDict()

    def check(self, address: str) -> None:
        """Let an address try.

        Raises:
            TooMany: it was wrong too often; the message says when it may try again.
        """
        now = self._clock()
        recent = [at for at in self._wrong.get(address, []) if now - at < _WINDOW_S]
        if len(recent) >= _WRONG:
            wait = _WINDOW_S - (now - recent[0])
            raise TooMany(f"Too many wrong tokens came from this address; try again in {wait / 60:.0f} minutes.")

    def count(self, address: str) -> bool:
        """Count a wrong try; tell whether it was the last one for a while."""
        now = self._clock()
        recent = [at for at in self._wrong.pop(address, []) if now - at < _WINDOW_S]
        self._wrong[address] = [*recent, now]
        while len(self._wrong) > _MOST_ADDRESSES:
            self._wrong.popitem(last=False)
        return len(recent) + 1 == _WRONG


class Enrolment:
    """A coordinator's desk for those who come and those who renew."""

    def __init__(
        self, members: Members, authority: Authority, welcome: Welcome, clock: Callable[[], float] = time.time
    ) -> None:
        self._members, self._authority, self._welcome, self._clock = members, authority, welcome, clock
        self._throttle = Throttle(clock)

    def enrol(self, address: str, request: EnrolRequest) -> EnrolReply:
        """Take in whoever brings a token, with a certificate.

        Args:
            address: where it comes from.
            request: the token's secret, and a certificate request that answers it.

        Raises:
            TooMany: wrong tokens came from there before.
            MembershipError: the token doesn't hold, or is not for this request.
            CertificateError: the request is damaged or isn't signed with its keys.
        """
        self._throttle.check(address)
        digest = sha256(request.secret).digest()

        def read() -> Wish:
            return pki.read_request(request.request, request.proof, digest)

        try:
            certificate = self._members.enrol(digest, read, self._issue)
        except (MembershipError, CertificateError) as refusal:
            if self._throttle.count(address):
                self._members.note(address, "enrolment.throttled", str(refusal))
            raise
        return EnrolReply(
            certificate=certificate,
            authority=self._authority.pem.decode(),
            federation=self._welcome.federation,
            fleet_port=self._welcome.fleet_port,
            control_port=self._welcome.control_port,
            coordinator=self._welcome.coordinator,
        )

    def renew(self, caller: Member, request: RenewRequest) -> str:
        """Give a member its next certificate, for the key it has or for a new one.

        Raises:
            MembershipError: the request is for somebody else, or the caller isn't enrolled any more.
            CertificateError: the request is damaged or isn't signed with its keys.
        """
        wish = pki.read_request(request.request, request.proof, bytes.fromhex(caller.fingerprint))
        if (wish.name, wish.role, wish.ed25519) != (caller.name, caller.role, caller.ed25519):
            raise MembershipError(
                f"{caller.name} may renew its own certificate only, with its name, role and identity."
            )
        return self._members.renew(wish, self._issue)

    def _issue(self, wish: Wish) -> bytes:
        return self._authority.issue(wish, datetime.fromtimestamp(self._clock(), UTC))


def invite(members: Members, authority: str, name: str, role: Role, hours: float, who: str) -> str:
    """Give a token for a new member; only its hash is kept.

    Args:
        members: where it is kept.
        authority: the sha256 of the authority's certificate; its key is not needed.
        name, role: who is invited, and as what.
        hours: how long the token holds.
        who: invites.

    Raises:
        ConfigError: the name is none or is taken, or the hours make no sense.
    """
    if not 0 < hours <= _MOST_HOURS:
        raise ConfigError(f"An invitation can hold for up to {_MOST_HOURS} hours, not {hours:g}.")
    invitation = Invitation.new(name, role, authority)
    members.invite(invitation, hours, who)
    return invitation.token

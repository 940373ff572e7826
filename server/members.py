"""Who belongs to a federation, in its ledger: invitations, members and what they told, and who changed what.

Every method is one transaction that is on the disk when it returns, with the event that tells of it. The status in here
is what counts at every call: a member that is revoked is out with the next one, whatever its certificate says.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from uuid import uuid4

from sqlalchemy import Engine, or_, select, update
from sqlalchemy.orm import Session

from federation.database import reading
from federation.invitation import Invitation
from federation.pki import Member, Role, Wish, read_member
from server import tables
from server.tables import SiteStatus
from tokenizer.errors import ConfigError, FedcometError

_MESSAGE = "message"


class MembershipError(FedcometError):
    """An invitation that doesn't hold, or a member that isn't one (any more)."""


@dataclass(frozen=True)
class Record:
    """A member as the ledger has it; see `server.tables.Site`."""

    name: str
    role: Role
    status: SiteStatus
    ed25519: str
    certificate: str
    serial: str
    fingerprint: str
    node_key: str
    expires_at: float | None
    enrolled_at: float | None
    revoked_at: float | None
    last_seen: float | None
    version: str
    online_state: str


@dataclass(frozen=True)
class Happening:
    """Who did what: an event, or a message between a site and the coordinator."""

    id: int
    at: float
    who: str
    what: str
    run: str
    round: int | None
    site: str
    text: str


class Members:
    """A federation's members, in the database behind an engine."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self._engine, self._clock = engine, clock

    def invite(self, invitation: Invitation, hours: float, who: str) -> None:
        """Let a token hold for some hours; earlier ones for the same name end.

        Raises:
            ConfigError: a member of this name is enrolled.
        """
        now = self._clock()
        with Session(self._engine) as session, session.begin():
            site = session.get(tables.Site, invitation.name)
            if site is not None and site.status == SiteStatus.ENROLLED:
                raise ConfigError(
                    f"{invitation.name} is enrolled; invite it again after fedcomet coordinator revoke "
                    f"{invitation.name}, or choose another name."
                )
            open_ones = (tables.Invite.site == invitation.name, tables.Invite.used_at.is_(None))
            session.execute(update(tables.Invite).where(*open_ones).values(expires_at=now))
            session.add(
                tables.Invite(
                    token_sha256=invitation.digest.hex(),
                    site=invitation.name,
                    role=invitation.role.value,
                    created_at=now,
                    expires_at=now + hours * 3600,
                    used_at=None,
                )
            )
            if site is None:
                session.add(
                    tables.Site(name=invitation.name, role=invitation.role.value, status=SiteStatus.INVITED.value)
                )
            told = f"as {invitation.role.value}, for {hours:g} hours"
            _note(session, now, who, "member.invited", site=invitation.name, text=told)

    def enrol(self, digest: bytes, read: Callable[[], Wish], issue: Callable[[Wish], bytes]) -> str:
        """Take a member in by its token, once; the same keys get the same certificate again while the token holds.

        Args:
            digest: sha256 of the token's secret.
            read: gives the request for a certificate, checked.
            issue: gives the certificate for it, PEM.

        Returns:
            The certificate.

        Raises:
            MembershipError: the token holds no more, is another's, or the keys are another member's.
            CertificateError: `read` says so.
        """
        now = self._clock()
        with Session(self._engine) as session, session.begin():
            invite = session.get(tables.Invite, digest.hex(), with_for_update=True)
            if invite is None:
                raise MembershipError("The coordinator knows no such invitation; ask it for a new one.")
            if invite.expires_at <= now:
                raise MembershipError("The invitation has expired; ask the coordinator for a new one.")
            wish = read()
            if (wish.name, wish.role.value) != (invite.site, invite.role):
                raise MembershipError(
                    f"The invitation is for {invite.site} as {invite.role}, the request for {wish.name} as "
                    f"{wish.role.value}; ask the coordinator for an invitation of this name."
                )
            site = session.get_one(tables.Site, invite.site)
            if invite.used_at is not None:
                if site.status == SiteStatus.ENROLLED and (site.ed25519, site.node_key) == (
                    wish.ed25519,
                    wish.node_key,
                ):
                    return site.certificate
                raise MembershipError("The invitation has been used; ask the coordinator for a new one.")
            _refuse_taken(session, wish)
            pem = issue(wish)
            changed = session.execute(
                update(tables.Invite)
                .where(tables.Invite.token_sha256 == invite.token_sha256, tables.Invite.used_at.is_(None))
                .values(used_at=now)
                .execution_options(synchronize_session=False)
            )
            if changed.rowcount != 1:  # type: ignore[attr-defined]  # two came at once
                raise MembershipError("The invitation has been used; ask the coordinator for a new one.")
            _write(site, read_member(pem), pem, key_too=True)
            site.role, site.status, site.enrolled_at = wish.role.value, SiteStatus.ENROLLED.value, now
            site.revoked_at = None
            _note(session, now, wish.name, "member.enrolled", site=wish.name, text=f"as {wish.role.value}")
            return pem.decode()

    def renew(self, wish: Wish, issue: Callable[[Wish], bytes]) -> str:
        """Note a member's next certificate; with a new key, the old one holds until the new one is used.

        Raises:
            MembershipError: it isn't enrolled, or the keys are another member's.
        """
        now = self._clock()
        with Session(self._engine) as session, session.begin():
            site = _enrolled(session.get(tables.Site, wish.name, with_for_update=True), wish.name)
            _refuse_taken(session, wish)
            pem = issue(wish)
            _write(site, read_member(pem), pem, key_too=False)
            _note(session, now, wish.name, "member.renewed", site=wish.name)
            return pem.decode()

    def admit(self, member: Member) -> Record:
        """Give the record of whoever comes with a certificate of the federation, and note that it was seen.

        Its key must be the one in use, or its certificate the latest: then its key is the one in use from now on.

        Raises:
            MembershipError: it isn't enrolled, or its certificate was replaced.
        """
        now = self._clock()
        with Session(reading(self._engine)) as session:
            record = _record(_admitted(session, member))
        seen = record.last_seen is not None and now - record.last_seen < _SEEN_S
        if seen and record.node_key == member.node_key:
            return record
        with Session(self._engine) as session, session.begin():
            site = _admitted(session, member)
            site.last_seen = now
            if site.node_key != member.node_key:
                site.node_key = member.node_key
                _note(session, now, member.name, "member.key", site=member.name, text="uses its new key")
            return _record(site)

    def revoke(self, name: str, reason: str, who: str) -> Record:
        """Put a member out; its invitations end, too.

        Raises:
            ConfigError: there is no such member.
        """
        now = self._clock()
        with Session(self._engine) as session, session.begin():
            site = session.get(tables.Site, name, with_for_update=True)
            if site is None:
                raise ConfigError(f"There is no member {name!r}; fedcomet coordinator sites lists all.")
            open_ones = (tables.Invite.site == name, tables.Invite.expires_at > now)
            session.execute(update(tables.Invite).where(*open_ones).values(expires_at=now))
            if site.status != SiteStatus.REVOKED:
                site.status, site.revoked_at = SiteStatus.REVOKED.value, now
                _note(session, now, who, "member.revoked", site=name, text=reason)
            return _record(site)

    def note(self, who: str, what: str, text: str = "") -> None:
        """Note that somebody did something."""
        with Session(self._engine) as session, session.begin():
            _note(session, self._clock(), who, what, text=text)

    def find(self, name: str) -> Record | None:
        """Give a member, or somebody invited."""
        with Session(reading(self._engine)) as session:
            site = session.get(tables.Site, name)
            return None if site is None else _record(site)

    def all(self) -> list[Record]:
        """Give all members, invited and revoked ones too, by name."""
        with Session(reading(self._engine)) as session:
            return [_record(site) for site in session.scalars(select(tables.Site).order_by(tables.Site.name))]

    def health(self, name: str, version: str, state: str) -> None:
        """Note what a member told of itself."""
        with Session(self._engine) as session, session.begin():
            site = _enrolled(session.get(tables.Site, name), name)
            site.version, site.online_state, site.last_seen = version, state, self._clock()

    def budget(
        self, name: str, epsilon: float, delta: float, limit_epsilon: float | None, limit_delta: float | None
    ) -> None:
        """Note what a site told of its privacy budget."""
        now = self._clock()
        told = {"epsilon": epsilon, "delta": delta, "limit_epsilon": limit_epsilon, "limit_delta": limit_delta}
        with Session(self._engine) as session, session.begin():
            session.add(tables.Budget(site=name, at=now, run=None, **told))

    def approve(self, name: str, manifest_hash: str, signature: str) -> None:
        """Note a site's signature under a manifest."""
        now = self._clock()
        with Session(self._engine) as session, session.begin():
            row = session.get(tables.Approval, (manifest_hash, name))
            if row is not None and row.signature == signature:
                return
            session.merge(tables.Approval(manifest_hash=manifest_hash, site=name, signature=signature, at=now))
            _note(session, now, name, "manifest.approved", site=name, text=manifest_hash)

    def say(self, who: str, site: str, text: str) -> None:
        """Keep a message between a site and the coordinator."""
        with Session(self._engine) as session, session.begin():
            _note(session, self._clock(), who, _MESSAGE, site=site, text=text)

    def messages(self, site: str, after: int, most: int = 200) -> list[Happening]:
        """Give messages behind a number, of one site or, with no name, of all."""
        wanted = [tables.Event.what == _MESSAGE, tables.Event.id > after]
        return self._events([*wanted, *([tables.Event.site == site] if site else [])], most)

    def events(self, after: int, most: int = 200) -> list[Happening]:
        """Give events behind a number; messages are none."""
        return self._events([tables.Event.what != _MESSAGE, tables.Event.id > after], most)

    def _events(self, wanted: list, most: int) -> list[Happening]:
        rows = (
            select(tables.Event, tables.Run.name)
            .outerjoin(tables.Run, tables.Run.id == tables.Event.run)
            .where(*wanted)
            .order_by(tables.Event.id)
            .limit(most)
        )
        with Session(reading(self._engine)) as session:
            return [
                Happening(row.id, row.at, row.who, row.what, run or "", row.round, row.site, row.text)
                for row, run in session.execute(rows)
            ]


_SEEN_S = 15.0
_REPLACED = (
    "This certificate of {name} was replaced by another one; if the site's people did not do that, tell the "
    "coordinator to revoke {name}."
)


def _enrolled(site: tables.Site | None, name: str) -> tables.Site:
    if site is None or site.status == SiteStatus.INVITED:
        raise MembershipError(f"{name} is not enrolled; join with an invitation of the coordinator.")
    if site.status == SiteStatus.REVOKED:
        raise MembershipError(f"{name} was revoked; ask the coordinator why, and for a new invitation.")
    return site


def _admitted(session: Session, member: Member) -> tables.Site:
    site = _enrolled(session.get(tables.Site, member.name), member.name)
    known = member.node_key == site.node_key or member.serial == site.serial
    if not known or (site.role, site.ed25519) != (member.role.value, member.ed25519):
        raise MembershipError(_REPLACED.format(name=member.name))
    return site


def _refuse_taken(session: Session, wish: Wish) -> None:
    """See that no other member has one of these keys: one machine would count as two sites."""
    same = or_(tables.Site.ed25519 == wish.ed25519, tables.Site.node_key == wish.node_key)
    if session.scalars(select(tables.Site.name).where(same, tables.Site.name != wish.name)).first() is not None:
        raise MembershipError("Another member has one of these keys; join with a new, empty home folder.")


def _write(site: tables.Site, member: Member, pem: bytes, *, key_too: bool) -> None:
    site.certificate, site.serial, site.fingerprint = pem.decode(), member.serial, member.fingerprint
    site.ed25519, site.expires_at = member.ed25519, member.until.timestamp()
    if key_too:
        site.node_key = member.node_key


def _record(site: tables.Site) -> Record:
    return Record(
        name=site.name,
        role=Role(site.role),
        status=SiteStatus(site.status),
        ed25519=site.ed25519,
        certificate=site.certificate,
        serial=site.serial,
        fingerprint=site.fingerprint,
        node_key=site.node_key,
        expires_at=site.expires_at,
        enrolled_at=site.enrolled_at,
        revoked_at=site.revoked_at,
        last_seen=site.last_seen,
        version=site.version,
        online_state=site.online_state,
    )


def _note(session: Session, now: float, who: str, what: str, site: str = "", text: str = "") -> None:
    session.add(
        tables.Event(at=now, who=who, what=what, run=None, round=None, site=site, text=text, change=uuid4().hex)
    )

"""The ledger's part on members: sites, coordinators and viewers, how they were invited and what they are known by.

A member has one identity at a time: certificate, node key and signing key belong together, and no other member has one
of them. Revoking ends all of it at once, for whoever asks the ledger.
"""

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from federation.pki import Role
from server import tables
from server.ledger_entries import Identity, InviteEntry, LedgerRefusal, MemberEntry, WitnessEntry, entry_of
from server.tables import SiteStatus
from server.transactions import Transactions, note


class Members:
    """The members of the federation of an open ledger (`server.ledger.Ledger.members`)."""

    def __init__(self, ledger: Transactions) -> None:
        self._ledger = ledger

    def invite(self, site: str, role: Role, token_sha256: str, valid_s: float, who: str = "coordinator") -> InviteEntry:
        """Invite a member: whoever brings the token in time becomes it. Earlier invitations of it end.

        Raises:
            LedgerRefusal: it has another role; a revoked one can be invited anew.
        """

        def work(session: Session) -> InviteEntry:
            now, member = self._ledger.now(session), session.get(tables.Site, site)
            if member is None:
                member = tables.Site(name=site, role=role, status=SiteStatus.INVITED)
                session.add(member)
            elif member.role != role:
                raise LedgerRefusal(f"{site} is a {member.role}; take another name for a {role}.")
            for old in session.scalars(select(tables.Invite).where(tables.Invite.site == site)):
                old.expires_at = min(old.expires_at, now)
            row = tables.Invite(
                token_sha256=token_sha256, site=site, role=role, created_at=now, expires_at=now + valid_s, used_at=None
            )
            session.add(row)
            note(session, who, "site.invited", site=site, told=role)
            return entry_of(InviteEntry, row)

        return self._ledger.write(work)

    def invitation(self, token_sha256: str) -> InviteEntry:
        """Give the invitation that a token stands for, if it can still be used.

        Raises:
            LedgerRefusal: there is none, it was used, or it has run out; the message says which.
        """
        return self._ledger.read(lambda session: entry_of(InviteEntry, self._invitation(session, token_sha256)))

    def enrol(self, token_sha256: str, identity: Identity) -> MemberEntry:
        """Use an invitation, once: the member has this identity from here on, whatever it had before.

        Raises:
            LedgerRefusal: as `invitation`, or another member has one of the keys.
        """

        def work(session: Session) -> MemberEntry:
            invite = self._invitation(session, token_sha256)
            member = session.get_one(tables.Site, invite.site)
            now = self._ledger.now(session)
            invite.used_at, member.enrolled_at, member.revoked_at = now, now, None
            member.status = SiteStatus.ENROLLED
            _bear(session, member, identity)
            note(session, member.name, "site.enrolled", site=member.name, told=identity.fingerprint)
            return entry_of(MemberEntry, member)

        return self._ledger.write(work)

    def renew(self, site: str, identity: Identity) -> MemberEntry:
        """Give an enrolled member a new certificate.

        Raises:
            LedgerRefusal: no such member, not enrolled, or another one has one of the keys.
        """

        def work(session: Session) -> MemberEntry:
            member = _get_member(session, site)
            if member.status != SiteStatus.ENROLLED:
                raise LedgerRefusal(f"{site} is {member.status}; only an enrolled member can renew its certificate.")
            _bear(session, member, identity)
            note(session, site, "site.renewed", site=site, told=identity.fingerprint)
            return entry_of(MemberEntry, member)

        return self._ledger.write(work)

    def revoke(self, site: str, reason: str = "", who: str = "coordinator") -> MemberEntry:
        """End a member's rights at once, its open invitations too; its certificate stays known as revoked.

        Raises:
            LedgerRefusal: no such member.
        """

        def work(session: Session) -> MemberEntry:
            member, now = _get_member(session, site), self._ledger.now(session)
            for invite in session.scalars(select(tables.Invite).where(tables.Invite.site == site)):
                invite.expires_at = min(invite.expires_at, now)
            if member.status != SiteStatus.REVOKED:
                member.status, member.revoked_at = SiteStatus.REVOKED, now
                note(session, who, "site.revoked", site=site, told=reason)
            return entry_of(MemberEntry, member)

        return self._ledger.write(work)

    def seen(self, site: str, version: str = "", online_state: str = "online") -> None:
        """Note that a member was there; an event only tells where its state or version changed."""

        def work(session: Session) -> None:
            member = _get_member(session, site)
            before = (member.online_state, member.version)
            member.last_seen, member.online_state = self._ledger.now(session), online_state
            member.version = version or member.version
            if (member.online_state, member.version) != before:
                note(session, site, f"site.{online_state}", site=site, told=member.version)

        self._ledger.write(work)

    def witness(self, site: str, entries: int, sha256: str, known: str, restored: bool = False) -> WitnessEntry:
        """Bear witness of where a site's list of what leaves is, and give the place that stands.

        A new place is noted only from a site that knows the old one: it has looked whether its list still holds that.
        One whose list doesn't, for its state was restored from an older copy, says so only when its people have.

        Args:
            site: its name.
            entries, sha256: where its list is now.
            known: the sha256 of the old place.
            restored: its people have accepted that its list lacks that.
        """

        def work(session: Session) -> WitnessEntry:
            _get_member(session, site)
            row, now = session.get(tables.Witness, site), self._ledger.now(session)
            if row is not None and row.sha256 != known:
                return entry_of(WitnessEntry, row)
            if row is None:
                row = tables.Witness(site=site, entries=entries, sha256=sha256, at=now)
                session.add(row)
            elif restored:
                told = f"its list has {entries:,} entries and had {row.entries:,}; its people have accepted that"
                note(session, site, "site.restored", site=site, told=told)
            row.entries, row.sha256, row.at = entries, sha256, now
            return entry_of(WitnessEntry, row)

        return self._ledger.write(work)

    def get(self, site: str) -> MemberEntry:
        """Give a member.

        Raises:
            LedgerRefusal: there is none of this name.
        """
        return self._ledger.read(lambda session: entry_of(MemberEntry, _get_member(session, site)))

    def with_certificate(self, fingerprint: str) -> MemberEntry | None:
        """Give the member whose certificate has this fingerprint, also a revoked one."""
        rows = select(tables.Site).where(tables.Site.fingerprint == fingerprint)

        def work(session: Session) -> MemberEntry | None:
            row = session.scalar(rows) if fingerprint else None
            return None if row is None else entry_of(MemberEntry, row)

        return self._ledger.read(work)

    def all(self) -> list[MemberEntry]:
        """Give all members by name."""
        rows = select(tables.Site)
        found = self._ledger.read(lambda session: [entry_of(MemberEntry, row) for row in session.scalars(rows)])
        return sorted(found, key=lambda entry: entry.name)

    def _invitation(self, session: Session, token_sha256: str) -> tables.Invite:
        row = session.get(tables.Invite, token_sha256)
        if row is None:
            raise LedgerRefusal("There is no such invitation; ask the coordinator for a new token.")
        if row.used_at is not None:
            raise LedgerRefusal(
                "This invitation was used already, and a token works once. If it was not you who used it, tell the "
                "coordinator at once; in any case, ask for a new token."
            )
        if row.expires_at <= self._ledger.now(session):
            raise LedgerRefusal("This invitation has run out; ask the coordinator for a new token.")
        return row


def _get_member(session: Session, site: str) -> tables.Site:
    row = session.get(tables.Site, site)
    if row is None:
        raise LedgerRefusal(f"The ledger has no member {site}; fedcomet coordinator sites lists them.")
    return row


def _bear(session: Session, member: tables.Site, identity: Identity) -> None:
    """Let a member have an identity, unless another has a part of it."""
    own: dict[str, Any] = {"fingerprint": identity.fingerprint, "ed25519": identity.ed25519}
    own["node_key"] = identity.node_key
    for name, value in own.items():
        column = getattr(tables.Site, name)
        other = session.scalar(select(tables.Site.name).where(column == value, tables.Site.name != member.name))
        if value and other is not None:
            raise LedgerRefusal(f"{other} has this {name} already; every member makes keys of its own.")
    for name, value in {**own, "certificate": identity.certificate, "serial": identity.serial}.items():
        setattr(member, name, value)
    member.expires_at = identity.expires_at

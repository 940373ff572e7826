"""A site's line to its coordinator beside the rounds: what it tells, what it asks, and the renewal of its certificate.

Every message that goes out here is on the list of what leaves the site first, in one place (`Link._send`). What a site
tells is its version, how many runs wait, how much disk is free, its budget's figures, its approvals, and texts that its
people write; docs/privacy.md has every field.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from hashlib import sha256
from math import isinf
from types import TracebackType
from typing import Any, Self

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from client.approval import Approval, Approvals
from client.budget import FILE, Budget
from client.budget_report import report
from client.home import SiteHome
from client.outbound import Leaving, Outbound
from client.policy import UNUSABLE, Policy
from client.witness import Witnessed, refuse_restored
from federation import control_pb2 as wire
from federation import pki
from federation.accountant import Approximate
from federation.calls import CONTROL
from federation.channel import Channel
from federation.manifest import software_version
from federation.messages import ProtocolError
from federation.pki import Validity
from tokenizer.errors import ConfigError

_GIGABYTE = 1 << 30
_MOST_AHEAD_S = 300


class Link:
    """A connection of a site that has joined; close it, or use it in a `with` statement."""

    def __init__(self, home: SiteHome, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        """Connect lazily; after a renewal, the next call is made with the new certificate.

        Raises:
            ConfigError, CertificateError: keys or certificates can't be read or used.
        """
        self.home, self._clock = home, clock
        self._identity = home.identity
        self.ahead_s = 0.0
        self._outbound = Outbound(home.state / "outbound", self._identity)
        self._channel = self._connect()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    @property
    def outdated(self) -> bool:
        """Whether the site has another certificate by now than this connection was made with."""
        return self.home.certificate.read_bytes() != self._certificate

    # --- what it tells ---

    def report_health(self) -> None:
        """Tell that the site is there: its version, runs that wait for approval, free disk space, where its list is.

        The answer shows whether the site's state was restored from an older copy (`client.witness`).

        Raises:
            CallError: the coordinator can't be reached, or refuses.
            DataError: the list of what leaves can't be written; nothing was sent.
            SiteRefusal: the state was restored; from here on the site answers no run.
        """
        free = shutil.disk_usage(self.home.state).free // _GIGABYTE
        waiting = len(Approvals(self.home.state).waiting())
        name = self.home.name
        witnessed = Witnessed(self.home.state)
        head, (known, accepted) = witnessed.head(), witnessed.known()
        told = wire.HealthReport(
            site=name,
            version=software_version(),
            queue=waiting,
            free_gigabytes=min(free, 1 << 31),
            entries=head.sequence,
            entries_sha256=head.sha256,
            known_sha256=known,
            restored=accepted,
        )
        heard = self._send("ReportHealth", told)
        self.ahead_s = self._clock().timestamp() - heard.time if heard.time else 0.0
        budget = (heard.epsilon, heard.delta) if heard.HasField("epsilon") else (None, None)
        witnessed.check(heard.entries, heard.sha256, *budget)
        refuse_restored(name, self.home.state)

    def report_budget(self) -> bool:
        """Tell what the privacy budget holds and its limit; False if there is no budget yet, and nothing was sent.

        Raises:
            CallError: the coordinator can't be reached, or refuses.
            DataError: the list of what leaves can't be written; nothing was sent.
        """
        place: Any = self.home.settings.site.budget or self.home.state / FILE
        policy = self._policy()
        limit = None if policy is None else policy.limit
        if not self.home.settings.site.budget and not (self.home.state / FILE).exists():
            return False
        with Budget.open(place, limit) as budget:
            found = report(budget)
            if isinf(found.epsilon):  # a restored state was charged the limit's whole delta
                taken = sum(each.delta * each.steps for each in budget.mechanisms() if isinstance(each, Approximate))
                found = report(budget, found.delta + taken)
        told = wire.BudgetReport(site=self.home.name, epsilon=found.epsilon, delta=found.delta)
        if limit is not None:
            told.limit_epsilon, told.limit_delta = limit.epsilon, limit.delta
        self._send("ReportBudget", told)
        return True

    def approve(self, approval: Approval) -> None:
        """Tell that a person here has signed a manifest."""
        self._send(
            "ApproveManifest",
            wire.Approval(
                manifest_hash=approval.manifest_hash,
                site=self.home.name,
                policy=approval.policy or "",
                time=approval.time,
                signature=approval.signature,
            ),
        )

    def say(self, text: str) -> None:
        """Send a text, of up to 500 characters, to the coordinator's people."""
        self._send("SendMessage", wire.Text(site=self.home.name, text=text))

    # --- what it asks ---

    def messages(self, after: int = 0) -> list[wire.Message]:
        """Give the texts between this site and the coordinator, behind a number."""
        asked = wire.ListMessagesRequest(site=self.home.name, after=after)
        return list(self._send("ListMessages", asked).messages)

    def runs(self) -> list[wire.Run]:
        """Give the runs that this site takes part in, or could approve."""
        return list(self._send("ListRuns", wire.ListRunsRequest()).runs)

    def manifest(self, run: str) -> bytes:
        """Give the manifest of a run."""
        found: bytes = self._send("GetManifest", wire.RunName(run=run)).manifest
        return found

    def watch(self, after: int = 0) -> Iterator[wire.Event]:
        """Give events behind a number as they happen, until the coordinator stops or the site is revoked.

        Raises:
            CallError: the stream ended.
        """
        asked = wire.WatchRequest(after=after)
        self._note(asked)
        with closing(self._channel.stream(CONTROL["WatchEvents"], asked)) as events:  # type: ignore[type-var]
            yield from events

    def wrong_clock(self) -> str | None:
        """Say what to do about a clock that, at the last report, differed so much that Flower refuses the node."""
        if abs(self.ahead_s) < _MOST_AHEAD_S:
            return None
        where = "ahead of" if self.ahead_s > 0 else "behind"
        there = datetime.fromtimestamp(self._clock().timestamp() - self.ahead_s, UTC)
        return (
            f"this machine's clock is {abs(self.ahead_s):,.0f} s {where} the coordinator's ({there:%Y-%m-%d %H:%M} UTC "
            f"there); nodes that differ by more than {_MOST_AHEAD_S} s are refused: set it right, with NTP or chrony"
        )

    # --- its certificate ---

    def validity(self) -> Validity:
        """Tell how long the certificate still holds."""
        return pki.validity(pki.read_certificate(self.home.certificate), self._clock())

    def renew(self, *, new_key: bool = False) -> Validity:
        """Get the next certificate, and use it from the next call on.

        Args:
            new_key: also make a new key for connections; Flower's node changes with it. The identity of signatures
                stays.

        Raises:
            CallError: the coordinator can't be reached, or refuses.
            ProtocolError: its answer is not what was asked for; the old certificate stays.
        """
        current = pki.read_member(self.home.certificate.read_bytes())
        key = pki.make_key(pki.next_key(self.home.key)) if new_key else pki.read_key(self.home.key)
        request, proof = pki.ask(key, self._identity, current.name, current.role, bytes.fromhex(current.fingerprint))
        reply = self._send("RenewCertificate", wire.RenewRequest(request=request, proof=proof))
        pem = str(reply.certificate).encode()
        certificate, authority = pki.load(pem, "the answer"), pki.read_certificate(self.home.authority)
        member = pki.read_member(pem)
        same = (member.name, member.role, member.ed25519) == (current.name, current.role, current.ed25519)
        if not same or certificate.public_key() != key.public_key() or not pki.issued_by(certificate, authority):
            raise ProtocolError("The coordinator's answer is not the certificate that was asked for; tell it so.")
        pki.write_private(self.home.certificate, pem)
        self._channel.close()
        self._channel = self._connect()
        return self.validity()

    def renew_if_due(self) -> bool:
        """Renew the certificate when a third of its time is left; tell whether it was.

        Raises:
            CertificateError: it has expired, so that nobody can renew it; says what to do.
            CallError, ProtocolError: as `renew`.
        """
        validity = self.validity()
        if not validity.due:
            return False
        if validity.days_left <= 0:
            raise pki.CertificateError(self.warning())
        self.renew()
        return True

    def warning(self) -> str | None:
        """Say what to do about a certificate that should have been renewed; None if nothing is."""
        validity = self.validity()
        again = (
            "ask the coordinator for a new invitation and run fedcomet site join with it in this home, which keeps all"
        )
        todo = "run fedcomet site renew" if validity.days_left > 0 else again
        return validity.warning(self.home.name, todo)

    def _connect(self) -> Channel:
        key, certificate = pki.pair(self.home.key, self.home.certificate)
        self._certificate = certificate
        where = self.home.settings.coordinator
        host = f"[{where.address}]" if ":" in where.address else where.address
        return Channel(f"{host}:{where.control_port}", self.home.authority.read_bytes(), key, certificate)

    def _send(self, call: str, message: Message) -> Any:
        self._note(message)
        return self._channel.call(CONTROL[call], message)

    def _note(self, message: Message) -> None:
        data = message.SerializeToString(deterministic=True)
        content = MessageToDict(message, preserving_proto_field_name=True)
        kind = message.DESCRIPTOR.name
        try:
            policy = self._policy()
            named = None if policy is None else policy.sha256
        except ConfigError:
            named = UNUSABLE
        leaving = Leaving(kind, len(data), sha256(data).hexdigest(), "control", content=content, policy=named)
        self._outbound.note(leaving, self._clock())

    def _policy(self) -> Policy | None:
        return Policy.read(self.home.policy) if self.home.policy.exists() else None

"""Joining, staying and leaving over real sockets on loopback, and what hostile members and strangers try."""

import dataclasses
import re
import shutil
import socket
import ssl
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from client.approval import site_key
from client.enrol import WrongAuthority, fetch_authority, join
from client.home import SiteHome
from client.link import Link
from client.policy import Policy
from federation import control_pb2 as wire
from federation import pki
from federation.calls import CONTROL, ENROLMENT, MOST_ENROL_BYTES
from federation.channel import CallError, Channel
from federation.identity import Identity
from federation.invitation import Invitation
from federation.pki import Role
from server.home import CoordinatorHome
from server.ledger_entries import LedgerRefusal
from server.tables import SiteStatus
from tests.joined import DAY, Coordinator, listening, new_home
from tokenizer.errors import ConfigError

CODE = grpc.StatusCode


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    with listening(tmp_path) as listens:
        yield listens


def asked(
    token: str, path: Path, *, name: str = "", role: Role | None = None, answers: bytes | None = None
) -> wire.EnrolRequest:
    """A request to join as a hostile site could make it: with other names, or for another token."""
    invitation = Invitation.read(token)
    key, identity = pki.make_key(path / "any.key"), Identity.at(path / "any.identity")
    wanted = name or invitation.name, role or invitation.role
    request, proof = pki.ask(key, identity, *wanted, answers or invitation.digest)
    return wire.EnrolRequest(secret=invitation.secret, request=request, proof=proof)


def enrol(coordinator: Coordinator, request: wire.EnrolRequest) -> wire.EnrolReply:
    with Channel(coordinator.enrol_address, coordinator.authority.pem) as channel:
        reply: wire.EnrolReply = channel.call(ENROLMENT["Enrol"], request)
        return reply


def refused(coordinator: Coordinator, request: wire.EnrolRequest) -> CallError:
    with pytest.raises(CallError) as refusal:
        enrol(coordinator, request)
    return refusal.value


def call(coordinator: Coordinator, home: SiteHome, name: str = "ListRuns") -> None:
    with coordinator.channel(home) as channel:
        channel.call(CONTROL[name], CONTROL[name].request())


def test_a_site_joins_with_keys_of_its_own_and_nobody_else_may_read_its_home(
    tmp_path: Path, coordinator: Coordinator
) -> None:
    shown = []
    token = coordinator.token("icu")
    home = join(tmp_path / "icu", coordinator.enrol_address, token, lambda *told: shown.append(told) or True)
    entry = coordinator.ledger.members.get("icu")
    assert entry.status == SiteStatus.ENROLLED
    assert entry.ed25519 == home.identity.public
    assert entry.certificate == home.certificate.read_text()
    # What both people compare is what the ledger holds, and the authority's own.
    (_, prints) = shown[0]
    assert prints.site == pki.identity_fingerprint(entry.ed25519, entry.node_key)
    assert prints.authority == pki.fingerprint(coordinator.authority.certificate)
    for path in (home.key, home.certificate, site_key(home.state), home.path / "site.toml", home.policy):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700
    assert Policy.read(home.policy).runs.coordinators == (Identity.at(coordinator.home.signing_key).public,)
    call(coordinator, home)


def test_nothing_is_sent_where_a_person_does_not_agree_to_the_fingerprints(
    tmp_path: Path, coordinator: Coordinator
) -> None:
    token = coordinator.token("icu")
    with pytest.raises(ConfigError, match="Nothing was sent"):
        join(tmp_path / "icu", coordinator.enrol_address, token, lambda *_: False)
    assert coordinator.ledger.members.get("icu").status == SiteStatus.INVITED
    assert not (tmp_path / "icu" / "state" / "outbound").exists()
    join(tmp_path / "icu", coordinator.enrol_address, token)


def test_a_token_works_once(tmp_path: Path, coordinator: Coordinator) -> None:
    token = coordinator.token("icu")
    join(tmp_path / "icu", coordinator.enrol_address, token)
    with pytest.raises(CallError, match="used already"):
        join(tmp_path / "another", coordinator.enrol_address, token)


def test_of_many_that_bring_one_token_at_the_same_time_one_gets_in(tmp_path: Path, coordinator: Coordinator) -> None:
    token = coordinator.token("icu")
    for each in range(4):
        (tmp_path / str(each)).mkdir()
    requests = [asked(token, tmp_path / str(each)) for each in range(4)]

    def attempt(request: wire.EnrolRequest) -> bool:
        try:
            enrol(coordinator, request)
        except CallError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(attempt, requests)) == 1


def test_a_join_whose_answer_got_lost_is_repeated_and_a_replay_gives_nothing_new(
    tmp_path: Path, coordinator: Coordinator
) -> None:
    request = asked(coordinator.token("icu"), tmp_path)
    first = enrol(coordinator, request)
    assert enrol(coordinator, request).certificate == first.certificate
    stolen = wire.EnrolRequest(secret=request.secret, request=request.request, proof="0" * 128)
    assert refused(coordinator, stolen).code is CODE.FAILED_PRECONDITION
    coordinator.ledger.members.revoke("icu")
    assert "used already" in str(refused(coordinator, request))


def test_an_expired_or_withdrawn_token_is_refused(tmp_path: Path, coordinator: Coordinator) -> None:
    with pytest.raises(CallError, match="has run out"):
        join(tmp_path / "a", coordinator.enrol_address, _expired(coordinator, "icu"))
    earlier = coordinator.token("er")
    coordinator.token("er")
    with pytest.raises(CallError, match="has run out"):
        join(tmp_path / "b", coordinator.enrol_address, earlier)
    with pytest.raises(ConfigError, match="up to 720 hours"):
        coordinator.token("icu", hours=0)


def _expired(coordinator: Coordinator, name: str) -> str:
    return coordinator.token(name, hours=1e-9)


def test_a_forged_token_is_refused(tmp_path: Path, coordinator: Coordinator) -> None:
    coordinator.token("icu")
    forged = Invitation.new("icu", Role.SITE, pki.fingerprint(coordinator.authority.certificate))
    with pytest.raises(CallError, match="no such invitation"):
        join(tmp_path / "icu", coordinator.enrol_address, forged.token)


def test_a_request_for_another_name_role_or_token_is_refused(tmp_path: Path, coordinator: Coordinator) -> None:
    token, other = coordinator.token("icu"), coordinator.token("er")
    assert "is for icu as site" in str(refused(coordinator, asked(token, tmp_path, name="er")))
    assert "is for icu as site" in str(refused(coordinator, asked(token, tmp_path, role=Role.COORDINATOR)))
    crossed = asked(token, tmp_path, answers=Invitation.read(other).digest)
    assert refused(coordinator, crossed).code is CODE.INVALID_ARGUMENT
    assert coordinator.ledger.members.get("icu").status == SiteStatus.INVITED


def test_one_machine_can_not_be_two_sites(tmp_path: Path, coordinator: Coordinator) -> None:
    home = coordinator.join(tmp_path / "icu", "icu")
    shutil.copytree(home.state / "identity", tmp_path / "er" / "state" / "identity")
    with pytest.raises(CallError, match="every member makes keys of its own"):
        coordinator.join(tmp_path / "er", "er")
    with pytest.raises(ConfigError, match="home of icu"):
        coordinator.join(tmp_path / "icu", "er")


def test_a_message_that_is_too_large_is_refused(tmp_path: Path, coordinator: Coordinator) -> None:
    large = wire.EnrolRequest(secret=b"0" * 20, request=bytes(MOST_ENROL_BYTES))
    assert refused(coordinator, large).code is CODE.RESOURCE_EXHAUSTED


def test_who_brings_wrong_tokens_is_not_listened_to_for_a_while(tmp_path: Path, coordinator: Coordinator) -> None:
    token = coordinator.token("icu")
    request = asked(token, tmp_path)
    for number in range(5):
        wrong = wire.EnrolRequest(secret=bytes([number]) * 20, request=request.request, proof=request.proof)
        assert "no such invitation" in str(refused(coordinator, wrong))
    stopped = refused(coordinator, request)
    assert stopped.code is CODE.RESOURCE_EXHAUSTED
    assert "try again in 10 minutes" in str(stopped)
    assert [each.who for each in coordinator.ledger.events(what="enrolment.throttled")] == ["127.0.0.1"]
    coordinator.clock.ahead_s = 601
    enrol(coordinator, request)


def test_whoever_asks_another_port_of_the_coordinators_is_told_of_the_one_for_enrolment(
    tmp_path: Path, coordinator: Coordinator
) -> None:
    with pytest.raises(CallError, match=r"Or \d+ is not its port for enrolment, which is 8445 unless"):
        join(tmp_path / "icu", coordinator.control_address, coordinator.token("icu"))
    with pytest.raises(ConfigError, match=r"There is no folder .*/records; say where the records are"):
        join(tmp_path / "icu", coordinator.enrol_address, coordinator.token("icu"), data=tmp_path / "records")


def test_a_man_in_the_middle_is_refused_before_anything_is_sent(tmp_path: Path, coordinator: Coordinator) -> None:
    token = coordinator.token("icu")
    with listening(tmp_path / "elsewhere", new_home(tmp_path / "other")) as other:
        with pytest.raises(WrongAuthority, match="nothing was sent"):
            join(tmp_path / "icu", other.enrol_address, token)
        assert other.ledger.events() == []
    assert not (tmp_path / "icu").exists()


def test_who_shows_the_right_authority_without_its_key_gets_no_secret(tmp_path: Path, coordinator: Coordinator) -> None:
    """The certificates are public: one in between can show them behind a certificate of its own."""
    fake = new_home(tmp_path / "fake")
    leaf = fake.server_certificate.read_bytes().partition(b"-----END CERTIFICATE-----\n")
    (tmp_path / "chain.pem").write_bytes(leaf[0] + leaf[1] + coordinator.authority.pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "chain.pem", fake.server_key)
    context.set_alpn_protocols(["h2"])
    received: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for _ in range(2):
                plain, _ = listener.accept()
                try:
                    with context.wrap_socket(plain, server_side=True) as shown:
                        received.append(shown.recv(4096))
                except OSError:
                    pass

        server = threading.Thread(target=serve)
        server.start()
        token = coordinator.token("icu")
        with pytest.raises(CallError, match="no valid certificate of this federation"):
            join(tmp_path / "icu", f"127.0.0.1:{listener.getsockname()[1]}", token)
        server.join(30)
    assert b"".join(received) == b""


def test_a_site_can_not_play_the_coordinator_with_its_own_certificate(tmp_path: Path, coordinator: Coordinator) -> None:
    home = coordinator.join(tmp_path / "icu", "icu")
    key, certificate = pki.pair(home.key, home.certificate)
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    server.start()
    with (
        Channel(f"127.0.0.1:{port}", coordinator.authority.pem) as channel,
        pytest.raises(CallError, match="no valid certificate of this federation"),
    ):
        channel.call(ENROLMENT["Enrol"], wire.EnrolRequest())
    server.stop(0).wait()


def test_control_takes_nobody_without_a_certificate_of_this_federation(
    tmp_path: Path, coordinator: Coordinator
) -> None:
    home = coordinator.join(tmp_path / "icu", "icu")
    with listening(tmp_path / "elsewhere", new_home(tmp_path / "other")) as other:
        stranger = other.join(tmp_path / "stranger", "icu")
    pairs = {
        "none": (None, None),
        "another federation's": pki.pair(stranger.key, stranger.certificate),
        "the server's own": coordinator.home.server_pair(),
    }
    for whose, (key, certificate) in pairs.items():
        with (
            Channel(coordinator.control_address, coordinator.authority.pem, key, certificate, 10) as channel,
            pytest.raises(CallError) as refusal,
        ):
            channel.call(CONTROL["ListRuns"], wire.ListRunsRequest())
        assert refusal.value.code in (CODE.UNAVAILABLE, CODE.UNKNOWN), whose
    call(coordinator, home)


def issued(coordinator: Coordinator, home: SiteHome, now: datetime, days: float, **changes: object) -> SiteHome:
    """Give a site another certificate of the authority's, as no coordinator would."""
    key = pki.read_key(home.key)
    member = pki.read_member(home.certificate.read_bytes())
    wish = dataclasses.replace(pki.Wish(member.name, member.role, member.ed25519, key.public_key()), **changes)
    pki.write_private(home.certificate, coordinator.authority.issue(wish, now, days))
    return home


def test_an_expired_certificate_is_refused(tmp_path: Path, coordinator: Coordinator) -> None:
    home = coordinator.join(tmp_path / "icu", "icu")
    issued(coordinator, home, datetime.now(UTC) - timedelta(days=91), 90)
    with pytest.raises(CallError, match="new invitation"):
        call(coordinator, home)
    with Link(home) as link:
        assert "expired on" in (link.warning() or "")
        with pytest.raises(
            pki.CertificateError, match=r"of icu expired on .* UTC; .*new invitation.*fedcomet site join"
        ):
            link.renew_if_due()


def test_a_connection_does_not_outlive_its_certificate(tmp_path: Path, coordinator: Coordinator) -> None:
    home = coordinator.join(tmp_path / "icu", "icu")
    with coordinator.channel(home) as channel:
        channel.call(CONTROL["ListRuns"], wire.ListRunsRequest())
        coordinator.clock.ahead_s = 91 * DAY
        with pytest.raises(CallError, match="has expired"):
            channel.call(CONTROL["ListRuns"], wire.ListRunsRequest())


def test_a_certificate_with_another_role_or_identity_than_the_ledgers_is_refused(
    tmp_path: Path, coordinator: Coordinator
) -> None:
    """Even one that the authority signed: what the ledger says counts."""
    home, now = coordinator.join(tmp_path / "icu", "icu"), datetime.now(UTC) + timedelta(minutes=1)
    for change in ({"role": Role.COORDINATOR}, {"ed25519": Identity.at(tmp_path / "other").public}):
        with pytest.raises(CallError, match="was replaced"):
            call(coordinator, issued(coordinator, home, now, 90, **change))
    with pytest.raises(CallError, match="er is not enrolled"):
        call(coordinator, issued(coordinator, home, now, 90, name="er"))


def test_revoking_takes_effect_at_once_on_open_connections_and_streams_too(
    tmp_path: Path, coordinator: Coordinator
) -> None:
    home = coordinator.join(tmp_path / "icu", "icu")
    with Link(home) as link, coordinator.channel(home) as channel:
        events = link.watch()
        next(events)
        channel.call(CONTROL["ListRuns"], wire.ListRunsRequest())
        coordinator.ledger.members.revoke("icu", "left the federation")
        with pytest.raises(CallError, match="icu was revoked"):
            channel.call(CONTROL["ListRuns"], wire.ListRunsRequest())
        with pytest.raises(CallError, match="icu was revoked"):
            for _ in events:
                pass
        with pytest.raises(CallError, match="icu was revoked"):
            link.renew()


def test_a_revoked_site_comes_back_by_an_invitation_only_with_its_new_certificate(
    tmp_path: Path, coordinator: Coordinator
) -> None:
    home = coordinator.join(tmp_path / "icu", "icu")
    (home.path / "policy.toml").write_text("version = 1\n")
    shutil.copytree(home.path, tmp_path / "copy")
    coordinator.ledger.members.revoke("icu")
    coordinator.clock.ahead_s = 5
    again = coordinator.join(tmp_path / "icu", "icu")
    assert again.identity.public == home.identity.public
    assert again.policy.read_text() == "version = 1\n"
    call(coordinator, again)
    with pytest.raises(CallError, match="was replaced"):
        call(coordinator, SiteHome.open(tmp_path / "copy"))


def test_a_renewed_certificate_is_used_from_the_next_call_on(tmp_path: Path, coordinator: Coordinator) -> None:
    home = coordinator.join(tmp_path / "icu", "icu")
    before = pki.read_member(home.certificate.read_bytes())
    with Link(home) as link:
        assert not link.renew_if_due()
        coordinator.clock.ahead_s = 60
        link.renew()
        link.report_health()
    after = pki.read_member(home.certificate.read_bytes())
    assert after.until > before.until
    assert after.node_key == before.node_key
    entry = coordinator.ledger.members.get("icu")
    assert (entry.serial, entry.expires_at) == (after.serial, after.until.timestamp())


def test_a_certificate_renews_itself_in_the_last_third_of_its_time(tmp_path: Path, coordinator: Coordinator) -> None:
    home = coordinator.join(tmp_path / "icu", "icu")
    later = [datetime.now(UTC)]
    with Link(home, lambda: later[0]) as link:
        assert not link.renew_if_due()
        assert link.warning() is None
        later[0] += timedelta(days=61)
        assert "in 29 days" in (link.warning() or "")
        assert link.renew_if_due()


def test_a_new_key_ends_the_old_one_with_its_first_use_and_a_lost_answer_locks_nobody_out(
    tmp_path: Path, coordinator: Coordinator
) -> None:
    home = coordinator.join(tmp_path / "icu", "icu")
    shutil.copytree(home.path, tmp_path / "old")
    old = SiteHome.open(tmp_path / "old")
    coordinator.clock.ahead_s = 60
    with Link(home) as link:
        link.renew(new_key=True)
        call(coordinator, old)  # as if the answer had been lost
        link.report_health()
    entry = coordinator.ledger.members.get("icu")
    assert entry.node_key == pki.node_key(pki.read_key(home.key).public_key())
    with pytest.raises(CallError, match="was replaced"):
        call(coordinator, old)


def test_nobody_can_renew_for_another_or_with_another_identity(tmp_path: Path, coordinator: Coordinator) -> None:
    home, other = coordinator.join(tmp_path / "icu", "icu"), coordinator.join(tmp_path / "er", "er")
    key, current = pki.read_key(home.key), pki.read_member(home.certificate.read_bytes())
    answers = bytes.fromhex(current.fingerprint)
    asked_for = {
        "another name": pki.ask(key, home.identity, "er", Role.SITE, answers),
        "another role": pki.ask(key, home.identity, "icu", Role.COORDINATOR, answers),
        "another identity": pki.ask(key, Identity.at(tmp_path / "any"), "icu", Role.SITE, answers),
        "another certificate": pki.ask(key, home.identity, "icu", Role.SITE, bytes(32)),
    }
    with coordinator.channel(home) as channel:
        for what, (request, proof) in asked_for.items():
            with pytest.raises(CallError) as refusal:
                channel.call(CONTROL["RenewCertificate"], wire.RenewRequest(request=request, proof=proof))
            assert refusal.value.code in (CODE.UNAUTHENTICATED, CODE.INVALID_ARGUMENT), what
    # A request of somebody else's, repeated over the own connection.
    request, proof = pki.ask(key, home.identity, "icu", Role.SITE, answers)
    with coordinator.channel(other) as channel, pytest.raises(CallError, match="both keys"):
        channel.call(CONTROL["RenewCertificate"], wire.RenewRequest(request=request, proof=proof))


def test_the_servers_certificate_is_rotated_without_a_restart(tmp_path: Path, coordinator: Coordinator) -> None:
    home = coordinator.join(tmp_path / "icu", "icu")
    before = _shown(coordinator)
    coordinator.home.rotate(None)
    assert _shown(coordinator) != before
    call(coordinator, home)
    coordinator.join(tmp_path / "er", "er")


def test_a_coordinator_that_serves_renews_its_certificate_when_it_is_due_and_says_why_it_could_not(
    tmp_path: Path, coordinator: Coordinator
) -> None:
    home, now = coordinator.home, datetime.now(UTC)
    until = pki.read_certificate(home.server_certificate).not_valid_after_utc
    before = _shown(coordinator)
    early, due = now + (until - now) / 2, until - (until - now) / 4
    assert home.keep_certificate(None, early) == []
    assert _shown(coordinator) == before

    shut = home.authority_key.rename(home.path / "elsewhere")
    failed, warning = home.keep_certificate(None, due)
    assert failed.startswith("The server's certificate can't be renewed, which is tried again every hour: ")
    assert str(home.authority_key) in failed
    assert re.match(r"The certificate of the server expires in \d+ days, .*; run fedcomet coordinator rotate", warning)
    assert _shown(coordinator) == before

    shut.rename(home.authority_key)
    assert home.keep_certificate(None, due) == []
    assert pki.read_certificate(home.server_certificate).not_valid_after_utc > until
    assert _shown(coordinator) != before
    home.server_certificate.write_text("damaged")
    assert "is not a certificate" in home.keep_certificate(None, due)[-1]


def _shown(coordinator: Coordinator) -> str:
    return ssl.get_server_certificate(("127.0.0.1", coordinator.listener.control_port))


def test_a_second_coordinator_can_not_take_the_port(tmp_path: Path, coordinator: Coordinator) -> None:
    settings = coordinator.home.settings
    ports = settings.ports.model_copy(update={"control": coordinator.listener.control_port})
    taken = CoordinatorHome(new_home(tmp_path / "second").path, settings.model_copy(update={"ports": ports}))
    with pytest.raises(ConfigError, match=r"ports\.control"), listening(tmp_path / "second", taken):
        pass


def test_a_coordinators_home_is_its_owners_alone_and_made_once(tmp_path: Path) -> None:
    home = new_home(tmp_path / "home")
    for path in (home.path, *home.path.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 or path.name == "ca.crt", path
    assert CoordinatorHome.open(home.path).settings == home.settings
    with pytest.raises(ConfigError, match="not empty"):
        new_home(tmp_path / "home")
    home.path.chmod(0o750)
    with pytest.raises(ConfigError, match="chmod 700"):
        CoordinatorHome.open(home.path)


def test_mistakes_in_settings_are_named_by_file_and_key(tmp_path: Path, coordinator: Coordinator) -> None:
    home = coordinator.join(tmp_path / "icu", "icu")
    file = home.path / "site.toml"
    text = file.read_text()
    file.write_text(text.replace("fleet_port = ", "fleet_prt = "))
    with pytest.raises(ConfigError, match=r"site\.toml: .*coordinator\.fleet_prt"):
        SiteHome.open(home.path)
    place = coordinator.home.path / "coordinator.toml"
    place.write_text(place.read_text().replace("fleet = 18443", 'fleet = "x"'))
    with pytest.raises(ConfigError, match=r"coordinator\.toml: .*ports\.fleet"):
        CoordinatorHome.open(coordinator.home.path)


def test_a_wrong_address_is_told_from_a_wrong_server(tmp_path: Path, coordinator: Coordinator) -> None:
    token = coordinator.token("icu")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ConfigError, match="can't be reached"):
        join(tmp_path / "icu", f"127.0.0.1:{port}", token)
    for wrong in ("", "http://host/path", "host:x", "host:99999"):
        with pytest.raises(ConfigError, match="no address"):
            join(tmp_path / "icu", wrong, token)
    # A certificate is for the addresses that it names.
    with (
        Channel(f"127.0.0.2:{coordinator.listener.enrol_port}", coordinator.authority.pem, timeout_s=5) as channel,
        pytest.raises(CallError),
    ):
        channel.call(ENROLMENT["Enrol"], wire.EnrolRequest())
    print_ = pki.fingerprint(coordinator.authority.certificate)
    assert fetch_authority("127.0.0.1", coordinator.listener.enrol_port, print_) == coordinator.authority.pem


def test_a_revoked_member_is_told_to_the_ledger_by_whoever_revoked_it(coordinator: Coordinator) -> None:
    coordinator.token("icu")
    coordinator.ledger.members.revoke("icu", "test", who="anna")
    assert [(each.who, each.site) for each in coordinator.ledger.events(what="site.revoked")] == [("anna", "icu")]
    with pytest.raises(LedgerRefusal):
        coordinator.ledger.members.revoke("nobody")

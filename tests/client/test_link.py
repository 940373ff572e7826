"""What a site tells over control: all of it is on the list of what left, to the byte, before it leaves."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.message import Message

from client.audit import audit
from client.budget import FILE, Budget, Limit, Release
from client.daemon import _Line
from client.enrol import join
from client.home import SiteHome
from client.link import Link
from client.outbound import Entry, lines, read_entry, read_head
from federation import channel
from federation import control_pb2 as wire
from federation.accountant import Approximate, Mechanisms, epsilon
from federation.invitation import Invitation
from tests.field import until
from tests.joined import Coordinator, listening
from tokenizer.errors import DataError


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    with listening(tmp_path) as listens:
        yield listens


def entries_of(state: Path) -> list[Entry]:
    folder = state / "outbound"
    return [read_entry(line, place) for place, line in lines(folder, read_head(folder))]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bytes]]:
    """The bytes that are handed to the network."""
    seen: list[tuple[str, bytes]] = []
    encode = channel._encode

    def watched(message: Message) -> bytes:
        data = encode(message)
        seen.append((message.DESCRIPTOR.name, data))
        return data

    monkeypatch.setattr(channel, "_encode", watched)
    return seen


def test_everything_that_a_site_sends_over_control_is_on_its_list_to_the_byte(
    tmp_path: Path, coordinator: Coordinator, sent: list[tuple[str, bytes]]
) -> None:
    token = coordinator.token("icu")
    home = join(tmp_path / "icu", coordinator.enrol_address, token)
    with Link(home) as link:
        link.report_health()
        link.say("hello")
        link.messages()
        link.runs()
        next(link.watch())
        link.renew()
    listed = [(entry.message.kind, entry.message.bytes, entry.message.sha256) for entry in entries_of(home.state)]
    assert listed == [(kind, len(data), hashlib.sha256(data).hexdigest()) for kind, data in sent]
    assert {kind for kind, _ in sent} == {
        "EnrolRequest",
        "HealthReport",
        "Text",
        "ListMessagesRequest",
        "ListRunsRequest",
        "WatchRequest",
        "RenewRequest",
    }
    found = audit(home.state)
    assert found.broken is None
    assert found.entries == len(sent)
    # The list may be shown to others: the token's secret is not on it.
    written = b"".join(path.read_bytes() for path in (home.state / "outbound").glob("*.jsonl"))
    assert Invitation.read(token).secret.hex().encode() not in written
    assert entries_of(home.state)[2].message.content == {"site": "icu", "text": "hello"}


def test_a_connection_is_outdated_when_another_process_has_renewed_the_certificate(
    tmp_path: Path, coordinator: Coordinator
) -> None:
    home = coordinator.join(tmp_path / "icu", "icu")
    with Link(home) as link, Link(home) as other:
        link.report_health()
        assert not link.outdated
        other.renew(new_key=True)
        assert not other.outdated
        assert link.outdated


def test_nothing_leaves_where_the_list_can_not_be_written(
    tmp_path: Path, coordinator: Coordinator, sent: list[tuple[str, bytes]]
) -> None:
    home = coordinator.join(tmp_path / "icu", "icu")
    before = len(sent)
    (home.state / "outbound" / "head.json").write_text("damaged")
    with Link(home) as link:
        for tell in (link.report_health, link.runs, lambda: link.say("x"), link.renew, lambda: next(link.watch())):
            with pytest.raises(DataError, match=r"head\.json"):
                tell()
    assert len(sent) == before


def test_a_budget_is_told_with_its_limit_as_the_site_counts_it(tmp_path: Path, coordinator: Coordinator) -> None:
    home = coordinator.join(tmp_path / "icu", "icu")
    home.policy.write_text("version = 1\n[privacy]\nepsilon_total = 8.0\ndelta_total = 1e-5\n")
    mechanisms = Mechanisms((Approximate(1.0, 1e-6),))
    with Link(home) as link:
        assert not link.report_budget()
        with Budget.open(home.state / FILE, Limit(8.0, 1e-5)) as budget:
            release = Release("0" * 64, 1, "training", mechanisms, "1" * 64)
            budget.reserve(release)
            budget.charge(release, sha256="2" * 64)
        assert link.report_budget()
    (told,) = coordinator.ledger.budgets("icu")
    assert (told.limit_epsilon, told.limit_delta, told.delta) == (8.0, 1e-5, 1e-5)
    assert told.epsilon == pytest.approx(epsilon(mechanisms.all, 1e-5))


def test_a_site_whose_budgets_database_is_away_is_heard_of_and_says_so(
    tmp_path: Path, coordinator: Coordinator
) -> None:
    path = coordinator.join(tmp_path / "icu", "icu").path
    settings = (path / "site.toml").read_text()
    (path / "site.toml").write_text(settings.replace('budget = ""', 'budget = "postgresql://x@127.0.0.1:1/b"'))
    line = _Line(SiteHome.open(path))
    line.start()
    assert line.asked.wait(60)
    until(lambda: line.problem, "the budget was looked at")
    line.stop()
    assert "the privacy budget's database can't be used now" in line.problem
    assert len(coordinator.ledger.events(what="site.health")) == 1


def test_what_a_site_tells_of_its_health_is_its_version_queue_and_disk(
    tmp_path: Path, coordinator: Coordinator
) -> None:
    home = coordinator.join(tmp_path / "icu", "icu")
    with Link(home) as link:
        link.report_health()
        link.report_health()
    assert coordinator.ledger.members.get("icu").version == wire.HealthReport(version="0.1.0").version
    (event,) = coordinator.ledger.events(what="site.health")
    assert "0 runs wait" in event.text

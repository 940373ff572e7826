"""Control over real sockets: every call with every role, and what a site may learn and tell."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from client.approval import Approvals
from client.home import SiteHome
from client.link import Link
from client.site import Site
from federation import control_pb2 as wire
from federation import pki
from federation.calls import CONTROL, MOST_BYTES
from federation.channel import CallError, Channel
from federation.manifest import Manifest
from federation.messages import SurveyRequest
from federation.pki import Role
from server.control import RULES
from server.journal import SiteEntry, Status
from server.ledger_entries import MemberEntry
from server.tables import RunState, SiteStatus
from tests import tiny
from tests.joined import Coordinator, listening
from tokenizer.codebook import Codebook, Survey

CODE = grpc.StatusCode
NAMES = {Role.SITE: "icu", Role.COORDINATOR: "anna", Role.VIEWER: "victor"}


@dataclass
class Federation:
    """A coordinator with a member of each role and a second site, and a run that only the second site is in."""

    coordinator: Coordinator
    homes: dict[str, SiteHome]
    manifest: Manifest

    def channel(self, name: str) -> Channel:
        return self.coordinator.channel(self.homes[name])

    def call(self, who: str, name: str, **fields: object) -> Message:
        with self.channel(who) as channel:
            reply: Message = channel.call(CONTROL[name], CONTROL[name].request(**fields))
            return reply

    def refused(self, who: str, name: str, **fields: object) -> CallError:
        with pytest.raises(CallError) as refusal:
            self.call(who, name, **fields)
        return refusal.value


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    plan, site = tiny.plan(), Site(tiny.site(tmp_path_factory.mktemp("site"), "icu", 1))
    told = site.survey(SurveyRequest(plan.split, plan.tokenizer, 1e12)).survey
    return plan.manifest(Codebook.build(Survey.from_bytes(told)))


@contextmanager
def founded(path: Path, manifest: Manifest) -> Iterator[Federation]:
    with listening(path) as coordinator:
        members = {**{name: role for role, name in NAMES.items()}, "er": Role.SITE}
        homes = {name: coordinator.join(path / name, name, role) for name, role in members.items()}
        yield Federation(coordinator, homes, manifest)


@pytest.fixture
def federation(tmp_path: Path, manifest: Manifest) -> Iterator[Federation]:
    with founded(tmp_path, manifest) as made:
        yield made


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> Iterator[Federation]:
    """A federation in which tests change nothing."""
    with founded(tmp_path_factory.mktemp("idle"), manifest) as made:
        yield made


def proposed(federation: Federation, name: str = "run") -> None:
    federation.call("anna", "ProposeRun", run=name, plan=b"{}", manifest=federation.manifest.to_bytes())


def taken_part(federation: Federation, name: str, *sites: str) -> None:
    """Bring a run so far that these sites take part in it."""
    ledger = federation.coordinator.ledger
    ledger.start(name, "anna")
    journal = ledger.journal(name)
    journal.start(name, b"{}")
    journal.begin(federation.manifest)
    for site in sites:
        journal.note_site(SiteEntry(site, Status.ACCEPTED))


def test_every_call_has_its_roles_and_there_are_no_others() -> None:
    assert set(RULES) == set(CONTROL)
    assert all(RULES.values())


@pytest.mark.parametrize(("name", "role"), [*itertools.product(sorted(CONTROL), Role)], ids=str)
def test_a_call_is_for_its_roles_only(idle: Federation, name: str, role: Role) -> None:
    """With an empty request: who may not is told so before it is looked at, who may gets another answer."""
    call = CONTROL[name]
    with idle.channel(NAMES[role]) as channel:
        try:
            if call.streams:
                with closing(channel.stream(call, call.request())) as replies:
                    next(iter(replies))
            else:
                channel.call(call, call.request())
        except CallError as refusal:
            denied = refusal.code is CODE.PERMISSION_DENIED and "takes a" in str(refusal)
        else:
            denied = False
    assert denied == (role not in RULES[name])


def test_a_role_that_a_call_is_not_for_changes_nothing(federation: Federation) -> None:
    proposed(federation)
    before = [each.what for each in federation.coordinator.ledger.events() if not each.what.startswith("site.online")]
    for who in ("icu", "victor"):
        for name in ("StartRun", "PauseRun", "ResumeRun", "StopRun"):
            assert federation.refused(who, name, run="run").code is CODE.PERMISSION_DENIED
        assert federation.refused(who, "RevokeSite", site="er").code is CODE.PERMISSION_DENIED
        assert federation.refused(who, "ProposeRun", run="x").code is CODE.PERMISSION_DENIED
    for who in ("anna", "victor"):
        assert federation.refused(who, "ReportBudget", site="icu", epsilon=1.0).code is CODE.PERMISSION_DENIED
        assert federation.refused(who, "ApproveManifest", site="icu").code is CODE.PERMISSION_DENIED
    after = [each.what for each in federation.coordinator.ledger.events() if not each.what.startswith("site.online")]
    assert after == before


def test_a_site_speaks_for_itself_only(federation: Federation) -> None:
    told = {
        "ReportBudget": {"epsilon": 0.0, "delta": 1e-6},
        "ReportHealth": {"version": "1"},
        "SendMessage": {"text": "it was me"},
        "ListMessages": {},
        "ApproveManifest": {"manifest_hash": "0" * 64},
    }
    for name, fields in told.items():
        for other in ("er", "nobody", "anna"):
            refusal = federation.refused("icu", name, site=other, **fields)
            assert refusal.code is CODE.PERMISSION_DENIED, name
            assert "only for itself" in str(refusal)
    assert federation.coordinator.ledger.budgets() == []


def test_a_run_is_proposed_approved_started_paused_resumed_and_stopped(federation: Federation) -> None:
    ledger = federation.coordinator.ledger
    proposed(federation)
    with Link(federation.homes["icu"]) as link:
        assert [(run.name, run.state) for run in link.runs()] == [("run", "proposed")]
        sent = link.manifest("run")
        assert sent == federation.manifest.to_bytes()
        approval = Approvals(federation.homes["icu"].state).approve(Manifest.from_bytes(sent), None)
        link.approve(approval)
    assert [(each.site, each.signature) for each in ledger.approvals(federation.manifest.hash)] == [
        ("icu", approval.signature)
    ]
    federation.call("anna", "StartRun", run="run")
    assert federation.coordinator.starter.started == ["run"]
    assert federation.call("victor", "GetRun", run="run").state == "ready"
    journal = ledger.journal("run")
    journal.start("run", b"{}")
    journal.begin(federation.manifest)
    assert federation.call("anna", "PauseRun", run="run").state == "pausing"
    journal.end(RunState.PAUSED)
    federation.call("anna", "ResumeRun", run="run")
    assert federation.coordinator.starter.started == ["run", "run"]
    federation.call("anna", "StopRun", run="run", reason="a change of plans")
    assert "a change of plans" in [each.text for each in ledger.events(run="run")]
    assert federation.refused("anna", "GetRun", run="other").code is CODE.NOT_FOUND


def test_an_approval_must_bear_the_signature_of_the_site_that_sends_it(federation: Federation) -> None:
    proposed(federation)
    approval = Approvals(federation.homes["er"].state).approve(federation.manifest, "0" * 64)
    fields = {"manifest_hash": approval.manifest_hash, "policy": "0" * 64, "time": approval.time}
    refusal = federation.refused("icu", "ApproveManifest", site="icu", signature=approval.signature, **fields)
    assert refusal.code is CODE.INVALID_ARGUMENT
    refusal = federation.refused(
        "er", "ApproveManifest", site="er", signature=approval.signature, **fields | {"policy": ""}
    )
    assert refusal.code is CODE.INVALID_ARGUMENT
    federation.call("er", "ApproveManifest", site="er", signature=approval.signature, **fields)


def test_a_site_sees_the_runs_that_it_is_in_or_could_approve(federation: Federation) -> None:
    proposed(federation)
    taken_part(federation, "run", "er")
    for name in ("GetRun", "GetManifest"):
        assert federation.refused("icu", name, run="run").code is CODE.NOT_FOUND
    with federation.channel("icu") as channel:
        events = channel.stream(CONTROL["WatchEvents"], wire.WatchRequest(run="run"))
        with pytest.raises(CallError) as refusal:
            next(events)
    assert refusal.value.code is CODE.NOT_FOUND
    assert list(federation.call("icu", "ListRuns").runs) == []
    assert [run.name for run in federation.call("er", "ListRuns").runs] == ["run"]
    assert [run.name for run in federation.call("victor", "ListRuns").runs] == ["run"]


def events_of(federation: Federation, who: str, until: str) -> list[wire.Event]:
    """What a member sees of all events, up to the last one of a kind that it may see."""
    seen = []
    with (
        federation.channel(who) as channel,
        closing(channel.stream(CONTROL["WatchEvents"], wire.WatchRequest())) as all_,
    ):
        for event in all_:
            seen.append(event)
            if event.what == until:
                return seen
    return seen


def test_a_site_sees_of_others_only_that_something_happened_in_a_run_of_its_own(federation: Federation) -> None:
    proposed(federation)
    taken_part(federation, "run", "er", "icu")
    ledger = federation.coordinator.ledger
    ledger.note("er", "site.something", site="er", told="a secret of er")
    ledger.note("er", "run.something", run="run", site="er", told="a reason of er")
    ledger.note("coordinator", "run.secret", run="run", told="er was too slow")
    ledger.note("icu", "the end", site="icu", told="own")
    seen = events_of(federation, "icu", "the end")
    text = " ".join(map(str, seen))
    for secret in ("secret of er", "reason of er", "too slow", '"er"', "anna", "victor"):
        assert secret not in text
    assert {"run.something", "run.secret"} <= {event.what for event in seen}
    assert "site.something" not in {event.what for event in seen}
    assert seen[-1].text == "own"
    all_of_it = " ".join(map(str, events_of(federation, "victor", "the end")))
    for told in ("secret of er", "reason of er", "too slow"):
        assert told in all_of_it


def test_a_stream_tells_what_happens_after_it_began_and_goes_on_behind_a_number(federation: Federation) -> None:
    ledger = federation.coordinator.ledger
    last = ledger.note("icu", "first", site="icu")
    with Link(federation.homes["icu"]) as link, closing(link.watch(last)) as events:
        number = ledger.note("icu", "second", site="icu")
        found = next(event for event in events if event.what == "second")
        assert found.id == number


def test_messages_go_between_a_site_and_the_coordinator_and_to_nobody_else(federation: Federation) -> None:
    with Link(federation.homes["icu"]) as link, Link(federation.homes["er"]) as other:
        link.say("the scanner is down until Monday\nforged: line")
        federation.call("anna", "SendMessage", site="icu", text="thank you")
        assert [(each.who, each.text) for each in link.messages()] == [
            ("icu", "the scanner is down until Monday forged: line"),
            ("anna", "thank you"),
        ]
        assert other.messages() == []
        assert [each.text for each in link.messages(link.messages()[0].id)] == ["thank you"]
    assert len(federation.call("victor", "ListMessages").messages) == 2
    assert federation.refused("victor", "SendMessage", site="icu", text="x").code is CODE.PERMISSION_DENIED
    assert federation.refused("anna", "SendMessage", site="nobody", text="x").code is CODE.NOT_FOUND
    assert "1 to 500" in str(federation.refused("icu", "SendMessage", text="x" * 501))


def test_budgets_that_are_none_are_refused(federation: Federation) -> None:
    for fields in (
        {"epsilon": math.nan},
        {"epsilon": math.inf},
        {"epsilon": -1.0},
        {"epsilon": 1.0, "delta": 1.0},
        {"epsilon": 1.0, "limit_epsilon": math.inf},
        {"epsilon": 1.0, "limit_delta": -1e-9},
    ):
        assert federation.refused("icu", "ReportBudget", site="icu", **fields).code is CODE.INVALID_ARGUMENT
    federation.call("icu", "ReportBudget", site="icu", epsilon=1.5, delta=1e-6, limit_epsilon=8.0, limit_delta=1e-5)
    (found,) = federation.coordinator.ledger.budgets("icu")
    assert (found.epsilon, found.delta, found.limit_epsilon, found.limit_delta) == (1.5, 1e-6, 8.0, 1e-5)


def test_a_coordinator_revokes_a_site_at_once_but_not_itself(federation: Federation) -> None:
    federation.call("anna", "RevokeSite", site="icu", reason="left")
    assert "icu was revoked" in str(federation.refused("icu", "ListRuns"))
    out: list[MemberEntry] = federation.coordinator.out
    assert [(entry.name, entry.status) for entry in out] == [("icu", SiteStatus.REVOKED)]
    assert "revoke itself" in str(federation.refused("anna", "RevokeSite", site="anna"))
    members = {each.name: each.status for each in federation.call("victor", "ListSites").members}
    assert members == {"icu": "revoked", "er": "enrolled", "anna": "enrolled", "victor": "enrolled"}


def test_large_frequent_and_unknown_calls_are_refused(federation: Federation) -> None:
    assert federation.refused("anna", "ProposeRun", run="x", plan=bytes(MOST_BYTES)).code is CODE.RESOURCE_EXHAUSTED
    with federation.channel("icu") as channel:
        unknown = channel._channel.unary_unary("/fedcomet.control.v1.Control/Anything")
        with pytest.raises(grpc.RpcError) as refusal:
            unknown(b"", timeout=20)
        assert refusal.value.code() is CODE.UNIMPLEMENTED
        asked = channel._channel.unary_unary(CONTROL["ListRuns"].path)
        codes: Counter[grpc.StatusCode] = Counter()
        for _ in range(15):
            codes.update([answer.code() for answer in [asked.future(b"", timeout=20) for _ in range(10)]])
        assert codes[CODE.OK] == 120
        assert codes[CODE.RESOURCE_EXHAUSTED] == 30
    federation.call("er", "ListRuns")


def test_malformed_bytes_are_refused_and_the_service_goes_on(federation: Federation) -> None:
    with federation.channel("icu") as channel:
        for name in sorted(CONTROL):
            call = channel._channel.unary_unary(CONTROL[name].path)
            with pytest.raises(grpc.RpcError) as refusal:
                call(b"\xff\xff\xff\xff", timeout=20)
            assert refusal.value.code() is CODE.INTERNAL, name
    federation.call("icu", "ListRuns")


def test_health_and_reflection_answer_members_only(federation: Federation) -> None:
    with federation.channel("victor") as channel:
        health = health_pb2_grpc.HealthStub(channel._channel)
        answer = health.Check(health_pb2.HealthCheckRequest(service="fedcomet.control.v1.Control"), timeout=20)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        (listed,) = reflection_pb2_grpc.ServerReflectionStub(channel._channel).ServerReflectionInfo(iter([asked]))
        names = {service.name for service in listed.list_services_response.service}
        assert "fedcomet.control.v1.Control" in names
        federation.coordinator.ledger.members.revoke("victor")
        with pytest.raises(grpc.RpcError) as refusal:
            health.Check(health_pb2.HealthCheckRequest(), timeout=20)
        assert refusal.value.code() is CODE.UNAUTHENTICATED
        with pytest.raises(grpc.RpcError) as refusal:
            list(reflection_pb2_grpc.ServerReflectionStub(channel._channel).ServerReflectionInfo(iter([asked])))
        assert refusal.value.code() is CODE.UNAUTHENTICATED


def test_a_run_whose_name_or_manifest_is_none_is_refused(federation: Federation) -> None:
    assert "no name" in str(federation.refused("anna", "ProposeRun", run="../x"))
    refusal = federation.refused("anna", "ProposeRun", run="x", manifest=b"nonsense")
    assert refusal.code is CODE.FAILED_PRECONDITION
    assert federation.refused("anna", "GetRun", run="x").code is CODE.NOT_FOUND


def test_a_failure_at_the_coordinator_is_not_told_to_others(federation: Federation) -> None:
    def broken(run: str) -> None:
        raise RuntimeError(f"/secret/path of {run}")

    federation.coordinator.starter.start = broken  # type: ignore[method-assign]
    proposed(federation)
    refusal = federation.refused("anna", "StartRun", run="run")
    assert refusal.code is CODE.INTERNAL
    assert "secret" not in str(refusal)


def test_the_ledger_knows_the_keys_of_every_member(federation: Federation) -> None:
    for name, home in federation.homes.items():
        entry = federation.coordinator.ledger.members.get(name)
        assert entry.node_key == pki.node_key(pki.read_key(home.key).public_key())
        assert entry.ed25519 == home.identity.public

"""What a site's people type to see how it stands, to approve with no more than their home, and to audit it."""

import io
import json
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

import fedcomet
from client import daemon, status
from client.approval import Approvals, Asked, site_key
from client.approval_page import terminal
from client.budget import Budget, Release
from client.dashboard import dashboard
from client.home import SiteHome
from client.outbound import Leaving, Outbound
from client.policy import PolicyRefusal
from federation.accountant import Gaussian, Mechanisms
from federation.identity import Identity
from federation.vitals import Vitals
from tests import tiny
from tests.watched import Browser, site_home
from tokenizer.codebook import Codebook, Survey, TokenizerOptions


@pytest.fixture
def home(ram_path: Path) -> SiteHome:
    return site_home(ram_path / "site")


def call(*arguments: object, given: str = "") -> Result:
    runner = CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"})
    return runner.invoke(fedcomet.app, [*map(str, arguments)], input=given, catch_exceptions=False)


def with_health_port(home: SiteHome, port: int) -> SiteHome:
    file = home.path / "site.toml"
    file.write_text(file.read_text() + f"\n[daemon]\nhealth_port = {port}\n")
    return SiteHome.open(home.path)


def test_a_site_is_seen_at_a_glance(home: SiteHome) -> None:
    vitals = Vitals(0, lambda: (True, {"site": "bergen", "node": "waiting", "control": "fine"}), "x")
    try:
        home = with_health_port(home, vitals.port)
        shown, found = call("site", "status", home.path), json.loads(call("site", "status", home.path, "--json").output)
    finally:
        vitals.close()
    assert shown.exit_code == 0
    (waits,) = Approvals(home.state).waiting()
    for told in (
        "bergen",
        "federation.example:1",
        "89 days left",
        "running, waiting",
        "runs: ask; private training required, at most epsilon 4; sums of 3 sites or more",
        waits[:16],
        "train_reply 5a5a5a5a round 6, 4,300,512 bytes",
        "the coordinator can't be reached; trying again",
    ):
        assert told in shown.output, told
    assert found["waiting"] == [waits]
    assert [answer["round"] for answer in found["answers"]] == [6, 5, 4, 3, 2]
    assert found["budget"]["limit_epsilon"] == 4.0
    assert 0 < found["budget"]["epsilon"] < 4
    assert "messages" not in found, "nothing is asked over the network unless it is wanted"


def test_a_daemon_that_is_away_or_another_s_is_told_by_the_exit_code(home: SiteHome) -> None:
    vitals = Vitals(0, lambda: (True, {"site": "ghent", "node": "waiting", "control": "fine"}), "x")
    try:
        home = with_health_port(home, vitals.port)
        other = call("site", "status", home.path)
    finally:
        vitals.close()
    assert other.exit_code == 1
    assert "another program" in other.output
    away = call("site", "status", home.path)
    assert away.exit_code == 1
    assert "not running" in away.output
    with daemon._alone(home.path):
        silent = call("site", "status", home.path)
    assert silent.exit_code == 1
    assert "running, not well: nothing answers" in silent.output


def test_damage_in_one_part_hides_no_other(home: SiteHome) -> None:
    home.policy.write_text("version = 2")
    home.certificate.write_text("no certificate")
    (home.state / "outbound" / "head.json").write_text("{}")
    found = status.status(home)
    for part in ("policy", "certificate", "answers"):
        assert found[part]["problem"]
    assert found["waiting"]
    assert "head.json" in call("site", "status", home.path).output


def test_the_budget_is_told_by_run_with_what_is_reserved(home: SiteHome) -> None:
    found = json.loads(call("site", "budget", home.path, "--json").output)
    assert [(line["run"], line["rounds"]) for line in found["lines"]] == [("5a" * 32, 3)]
    assert found["limit"]["epsilon"] == 4.0
    assert found["reserved"] == []
    assert "600 steps of Gaussian noise 1.1" in call("site", "budget", home.path).output
    (home.state / "budget.sqlite").unlink()
    assert "nothing is spent" in call("site", "budget", home.path).output


def test_an_approval_needs_no_more_than_the_home(home: SiteHome) -> None:
    home.policy.write_text("version = 1\n[privacy]\ntraining = 'optional'\n[secure_aggregation]\nrequired = false\n")
    (waits,) = Approvals(home.state).waiting()
    listed = call("site", "approve", "--home", home.path).output
    since = r"since \d{4}-\d\d-\d\d \d\d:\d\d UTC"
    told = rf"{waits} waits for approval: stroke-2026, {since}, asked by ed25519:(0f){{8}}…\n"
    assert re.fullmatch(told, listed), listed
    done = call("site", "approve", waits[:8], "--home", home.path, given="y\n")
    assert f"approved: {waits}" in done.output
    assert "The coordinator could not be told" in done.output, "it is away here; the approval holds"
    assert Approvals(home.state).approved(waits)


def test_a_refused_run_is_shown_with_its_rules_and_not_signed_while_it_breaks_them(home: SiteHome) -> None:
    approvals = Approvals(home.state)
    (digest,) = approvals.waiting()
    approvals.refuse(approvals.find(digest).manifest, "")
    assert f"stroke-2026 ({digest[:16]})  (see it:" in call("site", "status", home.path).output
    assert json.loads(call("site", "status", home.path, "--json").output)["refused"] == [digest]
    listed = call("site", "approve", "--home", home.path).output
    assert f"{digest} was refused by the policy (privacy.training: the run has no differential privacy" in listed
    with pytest.raises(PolicyRefusal, match=r"privacy\.training"):
        call("site", "approve", digest[:8], "--home", home.path, "--yes")
    assert not approvals.approved(digest)
    home.policy.write_text("version = 1\n[privacy]\ntraining = 'optional'\n[secure_aggregation]\nrequired = false\n")
    assert (
        f"{digest} was refused by the policy: stroke-2026, since "
        in call("site", "approve", "--home", home.path).output
    )
    assert f"approved: {digest}" in call("site", "approve", digest[:8], "--home", home.path, "--yes").output
    assert call("site", "approve", "--home", home.path).output == "No run waits for approval.\n"


def test_updates_without_privacy_are_told_beside_the_budget_and_by_their_run_s_name(home: SiteHome) -> None:
    told = "updates of 1 run left without differential privacy: no epsilon is claimed for them"
    for command in ("status", "budget"):
        assert told not in call("site", command, home.path).output
    (digest,) = Approvals(home.state).waiting()
    listed = Outbound(home.state / "outbound", Identity.at(site_key(home.state)))
    listed.note(Leaving("train.reply", 10, "1" * 64, "train", run=digest, round=1, policy="1" * 64), datetime.now(UTC))
    for command in ("status", "budget"):
        assert told in call("site", command, home.path).output
    assert f"train.reply stroke-2026 ({digest[:8]}) round 1, 10 bytes" in call("site", "status", home.path).output
    assert f"stroke-2026 {digest[:16]}" in call("site", "audit", home.path).output
    page = Browser(dashboard(home, "token"), base="http://127.0.0.1:8453", address="127.0.0.1")
    page.submit(page.get("/sign-in"), "/sign-in", secret="token")
    assert f"stroke-2026 <code>{digest[:12]}</code>" in page.get("/").text
    assert json.loads(call("site", "budget", home.path, "--json").output)["without_privacy"] == [digest]
    (home.state / "budget.sqlite").unlink()
    assert told in call("site", "budget", home.path).output


def test_a_reservation_of_an_open_round_asks_for_nothing(home: SiteHome) -> None:
    with Budget.open(home.state / "budget.sqlite") as budget:
        budget.reserve(Release("5a" * 32, 4, "training", Mechanisms((Gaussian(1.1, 0.01, 200),)), "q"))
    shown = " ".join(call("site", "budget", home.path).output.split())
    assert "while its run goes on, nothing needs to be done" in shown


def test_a_site_that_starts_is_not_unwell(home: SiteHome) -> None:
    told = {"site": "bergen", "node": "connecting", "reason": "the node is about to connect", "starting": True}
    vitals = Vitals(0, lambda: (False, told), "x")
    try:
        shown = call("site", "status", with_health_port(home, vitals.port).path)
    finally:
        vitals.close()
    assert "starting: the node is about to connect" in shown.output
    assert "not well" not in shown.output
    assert shown.exit_code == 1, "it takes no part yet"


def test_an_audit_takes_the_home_as_well_as_the_state(home: SiteHome) -> None:
    by_home = call("site", "audit", home.path, "--json").output
    assert json.loads(by_home)["broken"] is None
    assert json.loads(by_home) == json.loads(call("site", "audit", home.state, "--json").output)


def test_a_coordinators_words_are_no_markup() -> None:
    plan = tiny.plan(name="x[/red]", purposes=("q[/b]",), tokenizer=TokenizerOptions())
    manifest = plan.manifest(Codebook.build(Survey(TokenizerOptions())))
    console = Console(soft_wrap=True, record=True, file=io.StringIO())
    console.print(terminal(Asked(manifest), None, []))
    shown = console.export_text()
    assert "What will run: x[/red]" in shown
    assert "q[/b]" in shown

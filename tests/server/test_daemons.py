"""A federation by its two commands: `fedcomet coordinator serve` and `fedcomet site run`; real processes, TLS, kills.

Four sites join. One's policy refuses the run, one is killed in the middle of it and comes back, and the SuperLink, the
process that leads the run and then the whole coordinator are killed, too. The run finishes, the sites' lists of what
left are whole, the ledger says who refused and why, and a site that is revoked is out.
"""

import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.audit import audit
from client.enrol import join
from client.home import SiteHome
from federation import pki
from federation.pki import Role
from server.enrolment import invite
from server.home import CoordinatorHome, CoordinatorSettings, Federation, Listen, Ports
from server.journal import Status
from server.ledger import Ledger
from server.tables import RunState
from tests import tiny
from tests.superlink import REPOSITORY, Machine, Service, free_ports, machine

pytestmark = pytest.mark.slow

FEDCOMET = (sys.executable, str(REPOSITORY / "fedcomet.py"))
LAX = """
[privacy]
training = "optional"
[secure_aggregation]
required = false
[statistics]
floor = 3
"""
PATIENCE_S = 1800.0


def until(true: Callable[[], Any], what: str, seconds: float = PATIENCE_S) -> Any:
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, what
        time.sleep(0.5)
    return found


def health(port: int) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=20) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return json.loads(error.read())
    except OSError:
        return {"healthy": False, "reason": "does not answer"}


def process(place: Machine, marks: tuple[str, ...]) -> int | None:
    """Find one of a machine's processes by words of its command line."""
    for pid in place.processes():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
        except OSError:
            continue
        if all(mark in words for mark in marks):
            return pid
    return None


def found_federation(root: Path) -> CoordinatorHome:
    fleet, control, enrol, ui, alive, runtime = free_ports(6)
    settings = CoordinatorSettings(
        federation=Federation(name="daemons", address="127.0.0.1"),
        ports=Ports(fleet=fleet, control=control, enrol=enrol, ui=ui, health=alive, runtime=runtime),
        listen=Listen(host="127.0.0.1"),
    )
    return CoordinatorHome.init(root / "coordinator", settings, None)


def join_site(
    root: Path, home: CoordinatorHome, ledger: Ledger, name: str, seed: int, lax: bool
) -> tuple[SiteHome, int]:
    print_ = pki.fingerprint(pki.read_certificate(home.authority))
    token = invite(ledger, print_, name, Role.SITE, 1.0, "test")
    joined = join(root / "homes" / name, f"127.0.0.1:{home.settings.ports.enrol}", token)
    alive, runtime = free_ports(2)
    made = tiny.site(root, name, seed)
    text = (joined.path / "site.toml").read_text().replace('data = "data"', f'data = "{made.data}"')
    text += f"\n[daemon]\nhealth_port = {alive}\nruntime_port = {runtime}\nstop_seconds = 20\n"
    (joined.path / "site.toml").write_text(text)
    key = joined.settings.coordinator.key
    manifests = '"any"' if lax else '"ask"'
    rules = f'version = 1\n[runs]\ncoordinators = ["{key}"]\nmanifests = {manifests}\n'
    (joined.path / "policy.toml").write_text(rules + (LAX if lax else ""))
    return SiteHome.open(joined.path), alive


def test_a_federation_of_two_commands_survives_refusals_and_kills(tmp_path: Path) -> None:
    home = found_federation(tmp_path)
    alive = home.settings.ports.health
    with machine(tmp_path) as place, Ledger.open(home.ledger_url) as ledger:
        place.env["FLWR_TELEMETRY_ENABLED"] = "1"  # the daemons switch it off by themselves
        coordinator = place.start(*FEDCOMET, "coordinator", "serve", str(home.path))
        until(lambda: health(alive)["healthy"], "the coordinator serves")
        sites: dict[str, tuple[SiteHome, int, Service]] = {}
        for seed, name in enumerate(("icu", "ward", "strict", "lab"), 1):
            joined, port = join_site(tmp_path, home, ledger, name, seed, lax=name != "strict")
            sites[name] = joined, port, place.start(*FEDCOMET, "site", "run", str(joined.path))
        for name, (_, port, service) in sites.items():
            until(lambda port=port: health(port)["healthy"], name + "".join(service.lines))
        until(lambda: health(alive)["online"] == 4, "all sites are online")

        plan = tiny.plan(name="first", rounds=3, expect_sites=4, join_s=600.0, deadline_s=1200.0, min_sites=2)
        (tmp_path / "plan.json").write_bytes(plan.to_bytes())
        arguments = ("coordinator", "start", "first", "--plan", str(tmp_path / "plan.json"), "--home", str(home.path))
        assert "run first is ready" in place.call(*FEDCOMET, *arguments)
        journal = ledger.journal("first")
        until(lambda: journal.committed() >= 1, "".join(coordinator.lines))

        sites["lab"][2].kill()
        pid = process(place, ("server.superlink",))
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        until(lambda: process(place, ("server.superlink",)) not in (pid, None), "the SuperLink is started again")
        place.start(*FEDCOMET, "site", "run", str(sites["lab"][0].path))
        leader = process(place, ("flwr-serverapp",))
        if leader is not None:
            os.kill(leader, signal.SIGKILL)
        until(lambda: journal.committed() >= 2 or process(place, ("flwr-serverapp",)) not in (leader, None), "goes on")
        coordinator.kill()
        again = place.start(*FEDCOMET, "coordinator", "serve", str(home.path), "--wait")
        until(lambda: ledger.run("first").state in (RunState.FINISHED, RunState.FAILED), "".join(again.lines))

        run = ledger.run("first")
        assert run.state == RunState.FINISHED, run.reason + "".join(again.lines)
        refused = {entry.site: entry for entry in journal.sites()}["strict"]
        assert refused.status == Status.REFUSED
        assert "privacy.training" in refused.reason or "has not approved" in refused.reason
        for number in (1, 2, 3):
            accepted = {entry.site for entry in journal.replies(number) if entry.status == Status.ACCEPTED}
            assert accepted >= {"icu", "ward"}
        until(lambda: health(sites["lab"][1])["healthy"], "the killed site is back")
        assert ledger.run("first").flower_run not in ("", "0")

        pid = process(place, ("client.supernode", "homes/icu"))
        assert pid is not None
        ledger.members.revoke("icu", "left the federation", "test")
        until(lambda: not health(sites["icu"][1])["healthy"], "a revoked site is out")
        told = "".join((home.logs / "coordinator.jsonl").read_text().splitlines())
        assert '"program": "superlink"' in told
    for name in ("icu", "ward", "lab", "strict"):
        found = audit(sites[name][0].state)
        # Without a policy is the first message alone: joining, which writes the first policy.
        assert (found.broken, found.without_policy) == (None, 1)
    for path in (tmp_path / "homes").rglob("*.jsonl"):
        assert "subject_id" not in path.read_text()

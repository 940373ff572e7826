"""A federation by its two commands: `fedcomet coordinator serve` and `fedcomet site run`; real processes, TLS, kills.

Four sites join. One's policy refuses the run, one is killed in the middle of it and comes back, and the SuperLink, the
process that leads the run and then the whole coordinator are killed, too. The run finishes, the sites' lists of what
left are whole, the ledger says who refused and why, and a site that is revoked is out.
"""

import os
import signal
from pathlib import Path

import pytest

from client.audit import audit
from client.home import SiteHome
from server.journal import Status
from server.ledger import Ledger
from server.tables import RunState
from tests import tiny
from tests.field import FEDCOMET, found_federation, health, join_site, process, until
from tests.superlink import Service, machine

pytestmark = pytest.mark.slow


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
        assert (found.broken, found.without_policy) == (None, 0)
    for path in (tmp_path / "homes").rglob("*.jsonl"):
        assert "subject_id" not in path.read_text()

"""A federation by its two commands: `fedcomet coordinator serve` and `fedcomet site run`; real processes, TLS, kills.

Four sites join. One's policy refuses the run, one is killed in the middle of it and comes back, and the SuperLink, the
process that leads the run and then the whole coordinator are killed, too. The run finishes, the sites' lists of what
left are whole, the ledger says who refused and why, and a site that is revoked is out, and told what to do. Flower's
processes neither phone home nor install anything, monitoring finds what the guide names, and no log holds a record.
"""

import os
import re
import signal
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from prometheus_client.parser import text_string_to_metric_families

from client.audit import audit
from client.home import SiteHome
from server.journal import Status
from server.ledger import Ledger
from server.tables import RunState
from tests import tiny
from tests.field import FEDCOMET, found_federation, health, join_site, process, until
from tests.superlink import REPOSITORY, Machine, Service, machine

pytestmark = pytest.mark.slow

PRIVATE = {
    "FLWR_TELEMETRY_ENABLED": ("1", "0"),
    "FLWR_DISABLE_UPDATE_CHECK": ("0", "1"),
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": ("0", "1"),
}
"""What the daemons are started with, and what every process of Flower's must have all the same."""
FLOWERS = ("server.superlink", "client.supernode", "federation.nursery", "flwr-serverapp")
GUIDES = {"coordinator": "coordinator-guide.md", "site": "site-guide.md"}


def check_private(place: Machine, marks: Iterable[str]) -> set[str]:
    """See that processes of Flower's phone nobody and install nothing; gives which of them are there."""
    there = set()
    for pid in place.processes():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
            given = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        except OSError:
            continue
        for mark in marks:
            if mark in words and given != [""]:  # else it ends just now
                there.add(mark)
                wrong = {name for name, (_, safe) in PRIVATE.items() if f"{name}={safe}" not in given}
                assert not wrong, f"{words}: {wrong}"
    return there


def metrics(port: int) -> Mapping[str, list[Mapping[str, str]]]:
    """What monitoring finds at a daemon: each metric's samples, by their labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    assert all(family.documentation for family in families)
    return {family.name: [sample.labels for sample in family.samples] for family in families}


def check_metrics(side: str, found: Mapping[str, list[Mapping[str, str]]]) -> None:
    """See that there is what a guide says one should be alerted on."""
    text = (REPOSITORY / "docs" / GUIDES[side]).read_text(encoding="utf-8")
    (alerts,) = re.findall(r"Alert on\s(.*?)\.\s", text, re.DOTALL)
    named = re.findall(r"`(\w+)(?:\{(\w+)=\"(\w+)\"\})?`", alerts)
    assert named
    for name, label, value in named:
        samples = found[name if name.startswith("fedcomet_") else f"fedcomet_{side}{name}"]
        assert not label or {label: value} in samples


def reason(port: int) -> str:
    return str(health(port).get("reason", ""))


def check_logs(texts: Mapping[str, str], data: Iterable[Path]) -> None:
    """See that no log holds a code, a patient or a value of the sites' records."""
    records = pl.concat(pl.read_parquet(folder / "data/**/*.parquet") for folder in data)
    assert records.height > 1000
    codes = set(records["code"].unique())
    words = {str(subject) for subject in records["subject_id"].unique()}
    values = [abs(value) for value in records["numeric_value"].drop_nulls().unique()]
    words |= {str(value) for value in values} | {str(np.float32(value)) for value in values}
    assert all(len(word) > 4 for word in codes | words)
    for name, text in texts.items():
        assert "subject_id" not in text, name
        assert not [code for code in codes if code in text], name
        assert not words & set(re.findall(r"[\d.]+\d", text)), name


def test_a_federation_of_two_commands_survives_refusals_and_kills(tmp_path: Path) -> None:
    home = found_federation(tmp_path)
    alive = home.settings.ports.health
    with machine(tmp_path) as place, Ledger.open(home.ledger_url) as ledger:
        place.env.update({name: unsafe for name, (unsafe, _) in PRIVATE.items()})  # the daemons know better
        coordinator = place.start(*FEDCOMET, "coordinator", "serve", str(home.path))
        until(lambda: health(alive)["healthy"], "the coordinator serves")
        sites: dict[str, tuple[SiteHome, int, Service]] = {}
        for seed, name in enumerate(("icu", "ward", "strict", "lab"), 70_001):
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
        seen: set[str] = set()
        until(lambda: seen.update(check_private(place, FLOWERS)) or seen == set(FLOWERS), lambda: str(seen), 300)
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

        assert check_private(place, FLOWERS) >= {"server.superlink", "client.supernode", "federation.nursery"}
        found = metrics(alive)
        check_metrics("coordinator", found)
        assert sorted(each["site"] for each in found["fedcomet_coordinator_site_online"]) == sorted(sites)
        check_metrics("site", metrics(sites["icu"][1]))

        ledger.members.revoke("icu", "left the federation", "test")
        until(lambda: not health(sites["icu"][1])["healthy"], "a revoked site is out")
        # Whichever of its two lines hears of it first says so.
        said = re.compile(r"(does not know this site \(any more\).*|icu was revoked;) ask the coordinator")
        until(lambda: said.search(reason(sites["icu"][1])), lambda: reason(sites["icu"][1]), 90)
        assert health(sites["ward"][1])["healthy"]
        for service in place.services:
            if service is not again:  # before the coordinator: a node asks for a while for one that is away
                service.stop()
    logs = {str(path): path.read_text() for path in tmp_path.rglob("logs/*")}
    assert any('"program": "superlink"' in text for text in logs.values())
    assert {Path(name).name.partition(".")[0] for name in logs} >= {"coordinator", "site"}
    logs |= {f"printed {number}": "".join(service.lines) for number, service in enumerate(place.services)}
    check_logs(logs, [joined.files.data for joined, _, _ in sites.values()])
    for name in ("icu", "ward", "lab", "strict"):
        listed = audit(sites[name][0].state)
        assert (listed.broken, listed.without_policy) == (None, 0)
    for path in (tmp_path / "homes").rglob("*.jsonl"):
        assert "subject_id" not in path.read_text()

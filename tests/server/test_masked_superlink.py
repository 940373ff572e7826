"""A masked round on a real SuperLink: a site is killed in the middle of the sum, and nobody else knows one site's work.

What the coordinator's machine keeps is searched for parts of every site's update, its tokens and its loss: the run's
folder with its ledger, the SuperLink's database, all logs, and the memory of the SuperLink and of the ServerApp, which
stand still meanwhile.
"""

import dataclasses
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.archive import Archive
from client.audit import audit
from client.files import SiteFiles
from client.outbound import lines, read_entry, read_head
from federation.identity import Identity
from federation.manifest import LocalWork, Manifest, SecureAggregation
from federation.masking import MaskingOptions, Shares
from federation.messages import TrainReply
from server.app import coordinator_key
from server.journal import Journal
from simulation.engine import roster_of
from tests import tiny
from tests.masked import as_text, dumped, needles
from tests.superlink import (
    BIN,
    REPOSITORY,
    Machine,
    Service,
    free_ports,
    machine,
    start_superlink,
    start_supernode,
)

pytestmark = pytest.mark.slow

POLICY = """version = 1
[runs]
manifests = "any"
coordinators = ["{key}"]
[privacy]
training = "optional"
[secure_aggregation]
min_sites = 3
[statistics]
floor = 3
"""
STEPS = 40


def left(files: SiteFiles) -> list[str]:
    """The kinds of all messages that have left a site."""
    folder = files.state / "outbound"
    if not (folder / "head.json").exists():
        return []
    return [read_entry(line, place).message.kind for place, line in lines(folder, read_head(folder))]


def wait_until_left(files: SiteFiles, kind: str, timeout_s: float = 900) -> None:
    until = time.monotonic() + timeout_s
    while kind not in left(files):
        assert time.monotonic() < until, left(files)
        time.sleep(0.02)


def of_the_coordinator(place: Machine) -> list[int]:
    names = (b"flwr-serverapp", b"flower-superlink")
    return [pid for pid in place.processes() if any(n in Path(f"/proc/{pid}/cmdline").read_bytes() for n in names)]


def memory(pid: int) -> Iterator[bytes]:
    """All that a process may write to, region by region."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, rights, *_ = line.split()
            start, end = (int(edge, 16) for edge in span.split("-"))
            if rights.startswith("rw"):
                try:
                    memory.seek(start)
                    yield memory.read(end - start)
                except (OSError, ValueError, OverflowError):
                    continue


def found_in_memory(place: Machine, patterns: dict[str, bytes]) -> set[str]:
    """Which patterns are in the memory of the coordinator's processes; they stand still while they are read."""
    found: set[str] = set()
    pids = of_the_coordinator(place)
    assert len(pids) >= 2
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        for pid in pids:
            for region in memory(pid):
                found |= {name for name, pattern in patterns.items() if re.search(pattern, region)}
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    return found


def kept(files: SiteFiles, manifest: Manifest) -> TrainReply:
    reply = Archive(files.state).run(manifest.hash).reply(1)
    assert reply is not None
    return reply


def test_a_killed_site_does_not_stop_the_sum_and_no_site_s_work_is_at_the_coordinator(tmp_path: Path) -> None:
    key = Identity.at(coordinator_key(tmp_path / "runs")).public
    (tmp_path / "policy.toml").write_text(POLICY.format(key=key))
    files = [dataclasses.replace(one, policy=tmp_path / "policy.toml") for one in tiny.sites(tmp_path, 4)]
    masking = MaskingOptions(threshold=3, clip=1.0, max_weight=STEPS * 512)
    plan = tiny.plan(
        rounds=1,
        local=LocalWork(steps=STEPS, batch_tokens=512),
        min_sites=3,
        expect_sites=4,
        join_s=300.0,
        deadline_s=300.0,
        stage_deadline_s=90.0,
        secure_aggregation=SecureAggregation(3, masking, roster_of(files)),
    )
    run_dir = tmp_path / "runs/first"
    run_dir.mkdir(parents=True)
    (run_dir / "plan.json").write_bytes(plan.to_bytes())
    with machine(tmp_path) as place:
        port, *ports = free_ports(5)
        superlink = start_superlink(place, port)
        nodes: list[Service] = [start_supernode(place, one, port, own) for one, own in zip(files, ports, strict=True)]
        run = place.start(
            str(BIN / "flwr"),
            "run",
            str(REPOSITORY / "federation/flower_app"),
            "test",
            "--stream",
            "--run-config",
            'run="first"',
        )
        wait_until_left(files[3], Shares.kind)
        nodes[3].kill()
        run.wait_for("round.aggregated round 1", 900)
        manifest = Manifest.from_bytes((run_dir / "manifest.json").read_bytes())
        replies = {one.name: kept(one, manifest) for one in files}
        wanted = {
            f"{what} of {name}": pattern
            for name, reply in replies.items()
            for what, pattern in needles(reply).items()
            if what != "tokens"  # a small integer is in any memory, whatever it counts
        }
        found = found_in_memory(place, {**wanted, "the run's name": manifest.hash.encode()})
        assert found == {"the run's name"}
        run.wait_for("run.finished", 900)
        logs = "".join(line for service in (superlink, run) for line in service.lines).encode()

    with Journal(run_dir / "ledger.sqlite") as journal:
        entry = journal.sum(1, "train")
        assert journal.committed() == 1
    assert entry is not None
    assert set(entry.sites.split(",")) >= {"site-0", "site-1", "site-2"}
    assert "site-3" in entry.dropped
    assert b"sum.dropped round 1 site-3" in logs
    told = logs + dumped(run_dir) + b"".join(path.read_bytes() for path in tmp_path.glob("state.db*"))
    told += as_text(tmp_path / "state.db")
    for name, reply in replies.items():
        for what, pattern in needles(reply).items():
            assert not re.search(pattern, told), f"{what} of {name}"
    assert re.search(rb"(?<![0-9a-f.])%d(?![0-9a-f.])" % entry.tokens, told)  # what the sum tells is found
    for one in files:
        assert (audit(one.state).broken, audit(one.state).without_policy) == (None, 0)
        assert not {"train.reply", "evaluate.reply"} & set(left(one))

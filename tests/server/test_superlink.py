"""The same apps on a real SuperLink with three SuperNodes: TLS, node authentication, real processes, on loopback.

The coordinator is killed in the second round and the run is started again. The sites answer only requests that bear its
signature, and every update that its ledger holds is on its site's list of what left.
"""

import dataclasses
from pathlib import Path

import pytest

from client.audit import audit
from client.files import SiteFiles
from client.outbound import lines, read_entry, read_head
from federation.identity import Identity
from federation.manifest import OuterOptions
from federation.messages import TrainReply
from server.app import coordinate, coordinator_key
from server.journal import Journal, Status
from tests import tiny
from tests.superlink import BIN, REPOSITORY, free_ports, kill_coordinator, machine, start_superlink, start_supernode
from tokenizer.settings import STANDARD

pytestmark = pytest.mark.slow

POLICY = """version = 1
[runs]
manifests = "any"
coordinators = ["{key}"]
[privacy]
training = "optional"
[secure_aggregation]
required = false
[statistics]
floor = 3
"""


def test_a_real_superlink_gives_what_the_engine_on_one_machine_gives(tmp_path: Path) -> None:
    key = Identity.at(coordinator_key(tmp_path / "runs")).public
    (tmp_path / "policy.toml").write_text(POLICY.format(key=key))
    files = [dataclasses.replace(one, policy=tmp_path / "policy.toml") for one in tiny.sites(tmp_path)]
    plan = tiny.plan(outer=OuterOptions.nesterov(), expect_sites=3, join_s=120.0, deadline_s=600.0, min_sites=3)
    run_dir = tmp_path / "runs/first"
    run_dir.mkdir(parents=True)
    (run_dir / "plan.json").write_bytes(plan.to_bytes())
    with machine(tmp_path) as place:
        port, *ports = free_ports(4)
        superlink = start_superlink(place, port)
        for one, own in zip(files, ports, strict=True):
            start_supernode(place, one, port, own)
        run = [str(BIN / "flwr"), "run", str(REPOSITORY / "federation/flower_app"), "test", "--stream"]
        first = place.start(*run, "--run-config", 'run="first"')
        first.wait_for("update.accepted round 2", 400)
        kill_coordinator(place)
        first.wait()
        told = place.call(*run, "--run-config", 'run="first"')

    with Journal(run_dir / "ledger.sqlite") as journal:
        assert journal.committed() == plan.rounds, told + "".join(superlink.lines)
        assert [entry.status for entry in journal.replies(2)] == [Status.ACCEPTED] * 3
        fingerprint = journal.fingerprint()
        arrived = {(e.site, n): (e.update_sha256, e.bytes) for n in (1, 2) for e in journal.replies(n)}
    for one in files:
        found = audit(one.state)
        assert (found.broken, found.without_policy) == (None, 0)
        folder = one.state / "outbound"
        left = [read_entry(line, place).message for place, line in lines(folder, read_head(folder))]
        for number in (1, 2):
            updates = [m.content["update"] for m in left if (m.kind, m.round) == (TrainReply.kind, number)]
            assert {(update["sha256"], update["bytes"]) for update in updates} == {arrived[one.name, number]}
    fresh = [SiteFiles(one.name, one.data, tmp_path / "fresh" / one.name, STANDARD) for one in files]
    grid = tiny.FunctionGrid(dict(enumerate(map(tiny.honest, fresh), 1)))
    here = coordinate(grid, tmp_path / "here", plan)
    assert here.ledger_fingerprint == fingerprint
    assert here.checkpoint.read_bytes() == (run_dir / "checkpoints/0002.safetensors").read_bytes()

"""A site in a network of its own, slow and then cut off: the run goes on without it, and it comes back.

The site's processes are in a network namespace, joined to the coordinator's by a pair of virtual interfaces.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from server.journal import Status
from server.tables import RunState
from tests.field import federation, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace takes root"),
    pytest.mark.skipif(not shutil.which("ip") or not shutil.which("tc"), reason="iproute2 is not installed"),
]

_NETEM = "netem delay 150ms 50ms loss 3% rate 4mbit"
_BUCKET = "tbf rate 2mbit burst 16k latency 30ms"
_CUT_S = 90.0
"""Longer than two of Flower's heartbeats, after which the coordinator knows that a node is away."""


@dataclass(frozen=True)
class Far:
    """A network namespace, and the coordinator's address as seen from there."""

    name: str
    link: str
    address: str

    def inside(self, *command: str) -> None:
        _run("ip", "netns", "exec", self.name, *command)

    def cut(self) -> None:
        self.inside("ip", "link", "set", self.link, "down")

    def mend(self) -> None:
        self.inside("ip", "link", "set", self.link, "up")


@contextmanager
def far() -> Iterator[Far]:
    """Make a namespace whose link is slow, in both directions; with netem it loses packets, too.

    Where the kernel has no netem, a token bucket makes it slow; what would wait for longer than 30 ms is dropped.
    """
    number = os.getpid() % 250
    made = Far(f"fedcomet{number}", f"fc{number}b", f"10.231.{number}.1")
    _run("ip", "netns", "add", made.name)
    try:
        _run("ip", "link", "add", f"fc{number}a", "type", "veth", "peer", "name", made.link, "netns", made.name)
        _run("ip", "address", "add", f"{made.address}/30", "dev", f"fc{number}a")
        _run("ip", "link", "set", f"fc{number}a", "up")
        made.inside("ip", "address", "add", f"10.231.{number}.2/30", "dev", made.link)
        for device in ("lo", made.link):
            made.inside("ip", "link", "set", device, "up")
        for quality in (_NETEM, _BUCKET):
            try:
                _run("tc", "qdisc", "add", "dev", f"fc{number}a", "root", *quality.split())
                made.inside("tc", "qdisc", "add", "dev", made.link, "root", *quality.split())
                break
            except AssertionError:
                continue
        else:
            pytest.skip("the kernel has neither netem nor tbf")
        yield made
    finally:
        _run("ip", "netns", "delete", made.name)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def test_a_run_goes_on_without_a_site_that_is_cut_off_and_with_it_when_it_is_back(tmp_path: Path) -> None:
    with far() as line, federation(tmp_path, (), address=line.address) as field:
        field.join("far")
        field.join("near")
        field.run_site("far", "ip", "netns", "exec", line.name)
        field.run_site("near")
        field.all_online()
        journal = field.begin("first", rounds=60, min_sites=1, evaluate_every=0)
        field.committed("first", 1)

        def accepted(number: int) -> set[str]:
            return {entry.site for entry in journal.replies(number) if entry.status == Status.ACCEPTED}

        assert accepted(1) == {"far", "near"}
        line.cut()
        cut_at = time.monotonic()
        until(lambda: field.health()["online"] == 1, lambda: str(field.health()), 300)
        before = journal.committed()
        field.committed("first", before + 2)
        assert accepted(before + 2) == {"near"}
        time.sleep(max(0.0, _CUT_S - (time.monotonic() - cut_at)))
        line.mend()
        until(lambda: accepted(journal.committed()) == {"far", "near"}, field.told, 400)
        field.cli("coordinator", "stop", "first", "--home", str(field.home.path))
        until(lambda: field.state("first") == RunState.STOPPED, field.told, 200)
        done = journal.committed()
        commits = [each.round for each in field.ledger.events(run="first", what="round.committed", limit=1000)]
        assert commits == list(range(1, done + 1))

"""A round's seconds, memory and bytes, beside Flower's own FedAvg: four sites over TLS on loopback, random data.

    python -m benchmarks.transport --mb 250 [--rounds 3] [--only flower,float32,bfloat16,int8] [--dir /tmp]
    python -m benchmarks.transport --noop

Ours is `coordinator serve` and four sites' nodes with all that they do for a real run, only that local training is a
random update (`benchmarks.random_site`); with --noop, `coordinator serve` and four `site run` that train a tiny model.
Flower's is its SuperLink (its default: everything in memory) and four SuperNodes with node authentication, its FedAvg,
and a client that adds the same noise. Neither evaluates. "bfloat16" and "int8" are the updates; weights then travel as
bfloat16. Rounds after the first are timed; processor seconds are those of all processes of a side, so they tell more
than seconds where a machine is shared. Peaks are of resident memory as the system counted it, the largest of each kind
of process. Progress goes to stderr.
"""

import argparse
import contextlib
import itertools
import os
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.enrol import join
from client.home import SiteHome
from federation import pki, supervisor
from federation.manifest import LocalWork, Transport
from federation.pki import Role
from model.settings import DecoderConfig
from server.enrolment import invite
from server.home import CoordinatorHome, CoordinatorSettings, Federation, Listen, Ports
from server.ledger import Ledger
from server.plan import FederationPlan
from server.tables import RunState
from tests import tiny
from tests.superlink import REPOSITORY, free_ports, write_certificates, write_node_key
from tokenizer.codebook import TokenizerOptions
from tokenizer.split import SplitRule

SITES = 4
KINDS = {
    "server app": ("flwr-serverapp",),
    "SuperLink": ("server.superlink", "flower-superlink"),
    "client app": ("federation.nursery", "flwr-clientapp"),
    "node": ("benchmarks.random_site", "client.supernode", "flower-supernode"),
}
MARK = "FEDCOMET_BENCHMARK"
POLICY = """version = 1
[runs]
coordinators = ["{key}"]
manifests = "any"
[privacy]
training = "optional"
[secure_aggregation]
required = false
[statistics]
floor = 3
"""
PEER = """
import json, os, time
from pathlib import Path
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
client = ClientApp()
server = ServerApp()
TOLD = json.loads(Path(__file__).with_name("told.toml").read_text()[2:])

@server.main()
def main(grid: Grid, context: Context) -> None:
    rng = np.random.default_rng(1)
    parts = np.array_split(np.arange(TOLD["values"]), TOLD["arrays"])
    first = ArrayRecord({str(n): Array(rng.standard_normal(p.size, np.float32)) for n, p in enumerate(parts)})
    def done(number: int, arrays: ArrayRecord) -> MetricRecord:
        with open(TOLD["times"], "a") as file:
            file.write(f"{time.time()}\\n")
        return MetricRecord({"time": time.time()})
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=TOLD["sites"], min_available_nodes=TOLD["sites"])
    strategy.start(grid=grid, initial_arrays=first, num_rounds=TOLD["rounds"], timeout=900.0, evaluate_fn=done)

@client.train()
def train(message: Message, context: Context) -> Message:
    tile = np.random.default_rng().standard_normal(1 << 20, np.float32) * np.float32(1e-3)
    moved = {}
    for name, array in message.content["arrays"].items():
        values = array.numpy().copy()
        for start in range(0, values.size, tile.size):
            part = values[start : start + tile.size]
            part += np.roll(tile, start // tile.size)[: part.size]
        moved[name] = Array(values)
    content = {"arrays": ArrayRecord(moved), "metrics": MetricRecord({"num-examples": 100, "loss": 1.0})}
    return Message(RecordDict(content), reply_to=message)
"""
PEER_PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "average"
version = "1.0.0"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41.0,<1.42"]
[tool.hatch.build.targets.wheel]
only-include = ["average.py"]
[tool.flwr.app]
publisher = "benchmark"
fab-format-version = 1
flwr-version-target = "1.41.0"
fab-include = ["average.py", "told.toml", "LICENSE"]
[tool.flwr.app.components]
serverapp = "average:server"
clientapp = "average:client"
"""


@dataclass
class Figures:
    """What a side took: seconds of each timed round; in a round, processor seconds by kind of process, and MB to and
    from sites; peaks in MB by kind of process.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    cpu_s: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    sent_mb: float = 0.0
    received_mb: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def cpu(self) -> float:
        return sum(self.cpu_s.values())


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Machine:
    """Processes that are marked by their environment, watched for their memory, and end here."""

    def __init__(self, root: Path) -> None:
        self.root, self.peaks = root, dict.fromkeys(KINDS, 0.0)
        self._mark = f"{MARK}={uuid.uuid4().hex}"
        self._started: list[subprocess.Popen[bytes]] = []
        self._stopping = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()

    def start(self, *command: str, env: dict[str, str], log: str) -> "subprocess.Popen[bytes]":
        name, value = self._mark.split("=")
        environment = {**os.environ, **env, name: value, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
        with (self.root / f"{log}.log").open("ab") as file:
            started = subprocess.Popen(
                command, cwd=self.root, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
        self._started.append(started)
        return started

    def cpu_s(self) -> dict[str, float]:
        """Processor seconds of marked processes that live, by kind, with those of their children that have ended."""
        total = dict.fromkeys((*KINDS, "other"), 0.0)
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self._mark.encode() in (entry / "environ").read_bytes():
                    ticks = sum(map(int, (entry / "stat").read_text().rpartition(")")[2].split()[11:15]))
                    total[_kind(entry)] += ticks / os.sysconf("SC_CLK_TCK")
        return total

    def _look(self) -> None:
        kinds: dict[int, str | None] = {}
        while not self._stopping.wait(0.3):
            for entry in Path("/proc").glob("[0-9]*"):
                pid = int(entry.name)
                with contextlib.suppress(OSError):
                    if pid not in kinds:
                        if self._mark.encode() not in (entry / "environ").read_bytes():
                            kinds[pid] = None
                            continue
                        kinds[pid] = _kind(entry)
                    if kind := kinds[pid]:
                        lines = (entry / "status").read_text().splitlines()
                        peak = max((int(x.split()[1]) / 1024 for x in lines if x.startswith("VmHWM")), default=0.0)
                        self.peaks[kind] = max(self.peaks.get(kind, 0.0), peak)
                    if kinds[pid] == "other":
                        del kinds[pid]  # it may not have become what it will be

    def stop(self) -> None:
        self._stopping.set()
        self._watch.join()
        for process in reversed(self._started):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _kind(process: Path) -> str:
    words = (process / "cmdline").read_bytes().decode()
    return next((kind for kind, marks in KINDS.items() if any(mark in words for mark in marks)), "other")


def _per_round(before: dict[str, float], after: dict[str, float], rounds: int) -> dict[str, float]:
    return {kind: (after[kind] - before[kind]) / rounds for kind in after}


@contextmanager
def machine(folder: Path | None) -> Iterator[Machine]:
    root = Path(tempfile.mkdtemp(prefix="fedcomet-transport-", dir=folder))
    place = Machine(root)
    try:
        yield place
    finally:
        place.stop()
        shutil.rmtree(root, ignore_errors=True)


def model(mb: float) -> DecoderConfig:
    """A decoder of so many MB (of a million bytes) in float32, whatever small vocabulary it gets."""
    width, layers = 1024, max(1, round(mb / 62.5))
    ff = round((mb * 1e6 / 4 / layers - 4 * width * width) / (3 * width))
    return DecoderConfig(vocab=8, layers=layers, width=width, heads=16, kv_heads=16, ff=ff, context=64)


def ours(name: str, shape: DecoderConfig, rounds: int, folder: Path | None, noop: bool) -> Figures:
    """Lead a run of ours."""
    transport = Transport() if name == "float32" else Transport(name, "bfloat16")  # type: ignore[arg-type]
    figures = Figures(name)
    with machine(folder) as place:
        home, ledger_url = _coordinator(place)
        with Ledger.open(ledger_url) as ledger:
            serve = (sys.executable, "-m", "fedcomet", "coordinator", "serve", str(home.path))
            place.start(*serve, env={}, log="coordinator")
            for number in range(SITES):
                _site(place, home, ledger, number, noop)
            plan = FederationPlan(
                name="bench",
                rounds=rounds + 1,
                split=SplitRule("key"),
                local=LocalWork(steps=1, batch_tokens=512, optimizer_state="reset"),
                model=tiny.MODEL if noop else shape,
                tokenizer=TokenizerOptions(min_patients=5),
                min_sites=SITES,
                expect_sites=SITES,
                deadline_s=1800.0,
                evaluate_every=0,
                transport=transport,
            )
            ledger.propose("bench", plan.to_bytes())
            ledger.start("bench")
            figures.seconds, figures.cpu_s = _times(place, ledger, rounds + 1)
            figures.peaks = dict(place.peaks)
            figures.sent_mb, figures.received_mb = _traffic(home.path / "flower/superlink.sqlite", rounds + 1)
    return figures


def _coordinator(place: Machine) -> tuple[CoordinatorHome, Any]:
    fleet, control, enrol, ui, alive, runtime = free_ports(6)
    settings = CoordinatorSettings(
        federation=Federation(name="bench", address="127.0.0.1"),
        ports=Ports(fleet=fleet, control=control, enrol=enrol, ui=ui, health=alive, runtime=runtime),
        listen=Listen(host="127.0.0.1"),
    )
    home = CoordinatorHome.init(place.root / "coordinator", settings, None)
    return home, home.ledger_url


def _site(place: Machine, home: CoordinatorHome, ledger: Ledger, number: int, noop: bool) -> None:
    name = f"site-{number}"
    token = invite(ledger, pki.fingerprint(pki.read_certificate(home.authority)), name, Role.SITE, 1.0, "benchmark")
    joined = _patiently(lambda: join(place.root / name, f"127.0.0.1:{home.settings.ports.enrol}", token))
    made = tiny.site(place.root / "made", name, number + 1)
    alive, runtime = free_ports(2)
    text = (joined.path / "site.toml").read_text().replace('data = "data"', f'data = "{made.data}"')
    text += f"\n[daemon]\nhealth_port = {alive}\nruntime_port = {runtime}\n"
    (joined.path / "site.toml").write_text(text)
    (joined.path / "policy.toml").write_text(POLICY.format(key=joined.settings.coordinator.key))
    SiteHome.open(joined.path)
    program = ("fedcomet", "site", "run") if noop else ("benchmarks.random_site",)
    if not noop:  # nobody starts these nodes again, so they must not come before the coordinator knows them
        log = place.root / "coordinator.log"
        _patiently(lambda: log.read_text().index(f"{name} is a node now"))
    environment = {} if noop else supervisor.flower_environment(joined.path / "flower")
    place.start(sys.executable, "-m", *program, str(joined.path), env=environment, log=name)


def _patiently(ask: Any) -> Any:
    until = time.monotonic() + 120
    while True:
        try:
            return ask()
        except Exception:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def _times(place: Machine, ledger: Ledger, rounds: int) -> tuple[list[float], dict[str, float]]:
    """Wait for all rounds; gives the seconds from one's end to the next one's, and processor seconds of a round."""
    journal, ends, looks, began = ledger.journal("bench"), [0.0], 0, place.cpu_s()
    while len(ends) <= rounds:
        time.sleep(0.05)
        if (looks := looks + 1) % 40 == 0 and (run := ledger.run("bench")).state is RunState.FAILED:
            raise SystemExit(f"the run has failed: {run.reason}")
        while journal.committed() >= len(ends):
            say(f"  round {len(ends)} of {rounds}")
            ends.append(time.time())
            began = place.cpu_s() if len(ends) == 2 else began
    cpu_s = _per_round(began, place.cpu_s(), rounds - 1)
    return [after - before for before, after in itertools.pairwise(ends[1:])], cpu_s


def _traffic(database: Path, rounds: int) -> tuple[float, float]:
    """MB that went to sites and came from them, a round, as Flower's database counts it."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as opened:
        sent, received = opened.execute("SELECT max(bytes_sent), max(bytes_recv) FROM run").fetchone()
    return sent / 1e6 / rounds, received / 1e6 / rounds


def flower(values: int, arrays: int, rounds: int, folder: Path | None) -> Figures:
    """Lead a run of Flower's own."""
    figures = Figures("flower")
    with machine(folder) as place:
        root = place.root
        port, *ports = free_ports(1 + SITES)
        env = supervisor.flower_environment(root / "flwr")
        for ours_alone in ("FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", "GLIBC_TUNABLES"):
            del env[ours_alone]
        (root / "flwr").mkdir()
        write_certificates(root)
        (root / "flwr/config.toml").write_text(
            f'[superlink]\ndefault = "bench"\n\n[superlink.bench]\naddress = "127.0.0.1:{port}"\n'
            f'root-certificates = "{root / "ca.crt"}"\n'
        )
        app = root / "average"
        app.mkdir()
        times = root / "times"
        told = f'{{"values": {values}, "arrays": {arrays}, "rounds": {rounds + 1}, "sites": {SITES}, '
        (app / "told.toml").write_text(f'# {told}"times": "{times}"}}\n')
        (app / "average.py").write_text(PEER)
        (app / "pyproject.toml").write_text(PEER_PROJECT)
        (app / "LICENSE").write_text("Apache-2.0\n")
        programs = Path(sys.executable).parent
        tls = ["--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key", "--ssl-ca-certfile", "ca.crt"]
        rules = ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
        where = ["--host", "127.0.0.1", "--port", str(port)]
        place.start(str(programs / "flower-superlink"), *tls, *where, *rules, env=env, log="superlink")
        for number, own in enumerate(ports):
            key = root / f"site-{number}"
            write_node_key(key)
            register = [str(programs / "flwr"), "supernode", "register", str(key.with_suffix(".pub")), "bench"]
            _patiently(
                lambda register=register: subprocess.run(
                    register, env={**os.environ, **env}, check=True, capture_output=True
                )
            )
            link = ["--superlink", f"127.0.0.1:{port}", "--root-certificates", "ca.crt"]
            mine = ["--auth-supernode-private-key", str(key), "--port", str(own)]
            place.start(str(programs / "flower-supernode"), *link, *mine, env=env, log=f"site-{number}")
        asked = place.start(str(programs / "flwr"), "run", str(app), "bench", env=env, log="run")
        ends, began = list[float](), place.cpu_s()
        until = time.monotonic() + 400 * (rounds + 1)
        while len(ends) < rounds + 2:
            if time.monotonic() > until:
                raise SystemExit("Flower's run came to no end: " + (root / "superlink.log").read_text()[-3000:])
            time.sleep(0.1)
            if asked.poll():
                raise SystemExit("Flower takes no run: " + (root / "run.log").read_text())
            found = [float(line) for line in times.read_text().split()] if times.exists() else []
            if len(found) > len(ends):
                ends = found
                began = place.cpu_s() if len(ends) == 2 else began
                figures.cpu_s = _per_round(began, place.cpu_s(), max(1, len(ends) - 2))
                say(f"  round {len(ends) - 1} of {rounds + 1}")
        figures.seconds = [after - before for before, after in itertools.pairwise(ends[1:])]
        figures.peaks = dict(place.peaks)
        figures.sent_mb = figures.received_mb = values * 4 * SITES / 1e6
    return figures


def show(all_figures: list[Figures]) -> None:
    peer = next((one for one in all_figures if one.name == "flower"), None)
    print(
        f"{'':10} {'s/round':>8} {'range':>13} {'x':>5} {'CPU s':>7} {'x':>5}"
        + "".join(f"{kind:>12}" for kind in KINDS),
        end="",
    )
    print(f" {'app x':>6} {'MB out':>8} {'MB in':>8}")
    for one in all_figures:
        ratio = f"{one.median / peer.median:.2f}" if peer else "-"
        cpu = f"{one.cpu / peer.cpu:.2f}" if peer else "-"
        memory = f"{one.peaks['server app'] / peer.peaks['server app']:.2f}" if peer else "-"
        peaks = "".join(f"{one.peaks[kind]:9.0f} MB" for kind in KINDS)
        spread = f"{min(one.seconds):.2f}-{max(one.seconds):.2f}"
        print(
            f"{one.name:10} {one.median:8.2f} {spread:>13} {ratio:>5} {one.cpu:7.2f} {cpu:>5}{peaks} {memory:>6} "
            f"{one.sent_mb:8.1f} {one.received_mb:8.1f}"
        )
        print(f"{'':10} CPU s: " + ", ".join(f"{kind} {seconds:.1f}" for kind, seconds in one.cpu_s.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=250.0, help="float32 megabytes of the model")
    parser.add_argument("--noop", action="store_true", help="a tiny model, really trained")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that are timed")
    parser.add_argument("--only", default="", help="sides: flower, float32, bfloat16, int8; all of them by default")
    parser.add_argument("--dir", type=Path, help="where homes and databases are; the system's folder by default")
    given = parser.parse_args()
    sides = given.only.split(",") if given.only else ["flower", "float32"]
    if not given.only and not given.noop:
        sides += ["bfloat16", "int8"]
    shape = tiny.MODEL if given.noop else model(given.mb)
    found = []
    for side in sides:
        say(side)
        if side == "flower":
            found.append(flower(shape.parameters(), 7 * shape.layers, given.rounds, given.dir))
        else:
            found.append(ours(side, shape, given.rounds, given.dir, given.noop))
        say(f"  {found[-1].seconds}")
    print(f"{shape.parameters() * 4 / 1e6:.1f} MB in float32, {SITES} sites, {given.rounds} rounds")
    show(found)


if __name__ == "__main__":
    main()

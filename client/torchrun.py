"""Several processes of one machine that do a round's local work together, started as `torchrun` starts them.

A Flower ClientApp is one process, so the site starts the others itself: `advance` runs this module in each of them,
they go the way of any local work (`client.local`), and leave a snapshot that holds the whole round. The site goes on
from that snapshot as from any other. What the processes need lies in the run's folder:

    job/request.safetensors    the global weights, and everything else that they are told
        failed-0.json          why a process gave up, if it did

The lock on the run is handed down to them: were the site killed, the next one waits until they are done.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors
import safetensors.numpy
import torch
import torch.distributed as dist

from client.archive import Archive, RunArchive
from client.gate import Gate
from client.local import LocalRound, Task, Work, choices_of, open_work
from client.policy import PolicyRefusal
from federation import canonical
from federation.messages import ProtocolError, SiteRefusal, TrainRequest
from model.parallel import Team
from model.settings import Machine
from model.train import TrainingDiverged, WindowTooLarge
from tokenizer.errors import ConfigError, DataError, FedcometError

if TYPE_CHECKING:
    from client.files import SiteFiles

_OUT_OF_MEMORY = "OutOfMemoryError"
_TOLD_AS_THEY_ARE = {
    kind.__name__: kind
    for kind in (SiteRefusal, ProtocolError, TrainingDiverged, WindowTooLarge, ConfigError, DataError)
}
_TOLD_AS_THEY_ARE[PolicyRefusal.__name__] = SiteRefusal  # its rules stand in its text
_SIGKILL_AFTER_S = 10.0


class ProcessesFailed(FedcometError):
    """The processes that were started to train ended without a result; nothing of the run is lost."""


@dataclass(frozen=True)
class _Job:
    """What the processes are told beside the weights."""

    site: str
    state: str
    manifest_hash: str
    round: int
    deadline_s: float
    machine: Machine
    snapshot_s: float
    policy: str | None
    share_of_time: float


def advance(files: "SiteFiles", run: RunArchive, work: Work, task: Task) -> None:
    """Do a round's work in `task.machine.processes` processes; its snapshot then holds the whole round.

    Raises:
        SiteRefusal, TrainingDiverged, WindowTooLarge, ConfigError, DataError: as the processes raised it.
        ProcessesFailed: they ended in another way, which the message tells.
    """
    request, machine = task.request, task.machine
    machine = replace(machine, micro_tokens=choices_of(run, work, machine).micro_tokens)
    folder = run.path / "job"
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        job = _Job(
            files.name,
            str(files.state),
            request.manifest_hash,
            request.round,
            request.deadline_s,
            machine,
            task.snapshot_s,
            None if files.policy is None else str(files.policy),
            task.share_of_time,
        )
        header = {"job": canonical.encode(job).decode()}
        safetensors.numpy.save_file({"weights": np.asarray(request.weights)}, folder / "request.safetensors", header)
        try:
            code, told = _run(folder, machine)
            failures = [json.loads(path.read_bytes()) for path in sorted(folder.glob("failed-*.json"))]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if code == 0:
            return
        if any(failure["kind"] == _OUT_OF_MEMORY for failure in failures):
            machine = replace(machine, micro_tokens=work.smaller_passes(machine.micro_tokens))
            continue
        for failure in failures:
            if failure["kind"] in _TOLD_AS_THEY_ARE:
                raise _TOLD_AS_THEY_ARE[failure["kind"]](failure["text"])
        reasons = "\n".join(f"{failure['kind']}: {failure['text']}" for failure in failures) or told[-2000:]
        raise ProcessesFailed(f"{machine.processes} training processes ended with code {code}:\n{reasons}")


def _run(folder: Path, machine: Machine) -> tuple[int, str]:
    """Start the processes and wait; give their exit code and what they wrote to stderr."""
    count = str(machine.processes)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
    threads = str(max(1, torch.get_num_threads() // machine.processes))
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join([root, *sys.path[1:]])}
    with (folder / "stderr.txt").open("w+b") as told:
        process = subprocess.Popen(
            [*command, "-m", "client.torchrun", str(folder)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=told,
            start_new_session=True,
            pass_fds=_locks(folder.parent / "lock"),
        )
        try:
            code = process.wait()
        finally:
            _end(process)
        told.seek(0)
        return code, told.read().decode(errors="replace")


def _locks(path: Path) -> list[int]:
    """This process's open descriptors of the lock, which a child holds on to after our death."""
    wanted = path.stat()
    return [
        int(entry.name)
        for entry in Path("/proc/self/fd").iterdir()
        if entry.exists() and os.path.samestat(entry.stat(), wanted)
    ]


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(_SIGKILL_AFTER_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main(folder: Path, environment: Mapping[str, str]) -> None:
    """Be one of the processes."""
    rank, size, local = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    try:
        _work(folder, rank, size, local)
    except Exception as error:  # the site must hear of it, whatever it is
        kind = _OUT_OF_MEMORY if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
        (folder / f"failed-{rank}.json").write_text(json.dumps({"kind": kind, "text": str(error)}))
        raise


def _work(folder: Path, rank: int, size: int, local: int) -> None:
    path = folder / "request.safetensors"
    with safetensors.safe_open(path, "np") as file:
        job = canonical.decode(_Job, file.metadata()["job"].encode(), str(path), DataError)
        weights = file.get_tensor("weights")
    device = job.machine.device
    if torch.device(device).type == "cuda":
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device != "cpu" else "gloo")
    try:
        archive = Archive(Path(job.state))
        run = archive.run(job.manifest_hash)
        request = TrainRequest(job.manifest_hash, job.round, weights, job.deadline_s)
        policy = None if job.policy is None else Path(job.policy)
        gate = Gate(job.site, policy, device, lambda: None, archive, time.time)

        def in_time() -> None:
            _in_time(job.deadline_s)
            gate.admit_time()

        task = Task(request, replace(job.machine, device=device), job.snapshot_s, in_time, job.share_of_time)
        team = Team(rank, size, device, job.machine.shard)
        LocalRound(open_work(archive, run, job.site), run, task, team).go(keep_end=True)
    finally:
        dist.destroy_process_group()


def _in_time(deadline_s: float) -> None:
    if time.time() > deadline_s:
        raise SiteRefusal("The deadline of the request has passed.")


if __name__ == "__main__":
    main(Path(sys.argv[1]), os.environ)

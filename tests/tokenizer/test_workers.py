import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tokenizer import jobs
from tokenizer.workers import Pool, WorkerDied


def gone(pid: int) -> bool:
    """Wait for the end of a process that need not be a child."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with os.fdopen(descriptor):
        return bool(select.select([descriptor], [], [], 30)[0])


def test_a_dead_worker_fails_its_job_and_is_replaced() -> None:
    with Pool(1) as pool:
        (first,) = pool.pids()
        died = pool.submit("icu", jobs.end_this_process)
        after = pool.submit("icu", jobs.double, 21)
        with pytest.raises(WorkerDied, match="worker of icu ended"):
            died.result(60)
        assert after.result(60) == 42
        assert pool.pids() != [first]


def test_an_error_of_a_job_is_given_back_and_the_worker_lives_on() -> None:
    with Pool(1) as pool:
        before = pool.pids()
        failed = pool.submit("icu", jobs.fail, "no such shard")
        with pytest.raises(ValueError, match="no such shard"):
            failed.result(60)
        assert pool.submit("icu", jobs.double, 1).result(60) == 2
        assert pool.pids() == before


def test_a_closed_pool_leaves_no_process_and_fails_what_was_under_way() -> None:
    with Pool(2) as pool:
        pids = pool.pids()
        pool.submit("icu", jobs.double, 1).result(60)
        endless = pool.submit("icu", jobs.wait_for_ever)
    assert all(map(gone, pids))
    with pytest.raises(WorkerDied):
        endless.result(0)
    with pytest.raises(WorkerDied, match="closed"):
        pool.submit("icu", jobs.double, 1)


def test_workers_end_with_a_parent_that_is_killed_while_they_work() -> None:
    script = (
        "import os, signal; from tokenizer.workers import Pool; from tests.tokenizer import jobs\n"
        "pool = Pool(2); pool.submit('icu', jobs.double, 1).result(); pool.submit('icu', jobs.wait_for_ever)\n"
        "print(*pool.pids(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    assert all(map(gone, pids))

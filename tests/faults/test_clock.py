"""A site whose clock is wrong is told by how much, costs the others nothing, and is back when the clock is right."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.field import federation, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cc") is None, reason="a C compiler is not installed"),
]

# Only the wall clock is wrong, as on a machine without NTP; sleeps and waits go by the monotonic one, with which
# libfaketime 0.9.10 has trouble.
_WRONG_CLOCK = """
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long shift(void) { const char *told = getenv("SHIFT_S"); return told ? atol(told) : 0; }

int clock_gettime(clockid_t clock, struct timespec *at) {
    int failed = syscall(SYS_clock_gettime, clock, at);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) at->tv_sec += shift();
    return failed;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.fixture
def shim(tmp_path: Path) -> Path:
    """A library that gives the programs which load it first another wall clock."""
    (tmp_path / "clock.c").write_text(_WRONG_CLOCK)
    made = tmp_path / "clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", made, tmp_path / "clock.c"], check=True)
    return made


@pytest.mark.parametrize(("shift", "where"), [(400, "ahead of"), (-400, "behind")])
def test_a_wrong_clock_is_said_and_waited_for(tmp_path: Path, shim: Path, shift: int, where: str) -> None:
    """Beyond Flower's 300 s, in both directions."""
    wrong = {"LD_PRELOAD": str(shim), "SHIFT_S": str(shift)}
    with federation(tmp_path, (), run=False) as field:
        field.join("wrong")
        field.join("right")
        field.run_site("wrong", environment=wrong)
        field.run_site("right")
        told = until(lambda: next(iter(reasons(field.sites["wrong"].health())), None), field.told, 300)
        assert "this machine's clock is 4" in told or "this machine's clock is 3" in told  # 400 s, and a round trip
        assert f" s {where} the coordinator's" in told
        field.all_online(1)
        journal = field.begin("first", rounds=2, min_sites=1, join_s=20.0, evaluate_every=0)
        field.finished("first")
        assert {entry.site for entry in journal.replies(2)} == {"right"}
        service = field.sites["wrong"].service
        assert service is not None
        service.stop()
        field.run_site("wrong")
        field.all_online()
        journal = field.begin("second", rounds=2, min_sites=2, evaluate_every=0)
        field.finished("second")
        assert {entry.site for entry in journal.replies(2)} == {"right", "wrong"}


def reasons(health: dict[str, object]) -> list[str]:
    """What a daemon says of a clock."""
    return [text for text in map(str, health.values()) if "clock" in text]

"""Programs that are kept running: started, watched, started again after a while when they end, stopped in order.

Each program has a thread of its own, which starts it, reads what it prints, line by line, and waits for its end. What
is started ends with whoever started it, also after `kill -9` (Linux: PR_SET_PDEATHSIG); so nothing is left that holds
a port, and starting the daemon again is all that a crash needs.
"""

import contextlib
import ctypes
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

BAD_CONFIG = 78
"""Exit code of a program that can't start with what it was given (EX_CONFIG of sysexits.h)."""

REFUSED = 77
"""Exit code of a program that the other side does not let in (EX_NOPERM)."""

NOT_STARTABLE = 127
"""Exit code that stands for a program that the system would not start, as in a shell."""

_PARENT = "FEDCOMET_PARENT"
_PR_SET_PDEATHSIG = 1
_MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=67108864"
_STEADY_S = 60.0
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_LEVEL = re.compile(r"^(DEBUG|INFO|WARNING|WARN|ERROR|CRITICAL)\s*:\s*")
_MOST_LINE = 4000

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Program:
    """A program to keep running.

    Attributes:
        name: under which its lines stand in the log.
        command: what to start.
        environment: beside what the daemon's own `environment` gives.
        stop_s: how long it may take to end after SIGTERM.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_s: float = 10.0


@dataclass(frozen=True)
class Condition:
    """How a program is: running or not, its process, how often it ended by itself, and the code of its last end."""

    running: bool
    pid: int | None
    ends: int
    code: int | None


class Supervisor:
    """Keeps programs running until it is told to stop."""

    def __init__(self, programs: Sequence[Program], waits_s: Sequence[float] = (0.5, 1, 2, 5, 10, 20, 30)) -> None:
        """Take programs; `start` starts them.

        Args:
            programs: in the order of starting; they are stopped in the other order.
            waits_s: seconds to wait after the first, second, ... end in a row; the last counts from then on.
        """
        self._keepers = [_Keeper(program, waits_s) for program in programs]

    def start(self) -> None:
        """Start all."""
        for keeper in self._keepers:
            keeper.start()

    def stop(self) -> None:
        """Stop all, one after the other; what does not end in time is killed."""
        for keeper in reversed(self._keepers):
            keeper.stop()

    def conditions(self) -> dict[str, Condition]:
        """Tell how all are."""
        return {keeper.program.name: keeper.condition() for keeper in self._keepers}


class _Keeper(threading.Thread):
    def __init__(self, program: Program, waits_s: Sequence[float]) -> None:
        super().__init__(name=f"keep-{program.name}", daemon=True)
        self.program, self._waits_s = program, waits_s
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._ends = 0
        self._code: int | None = None

    def run(self) -> None:
        in_a_row = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            code = self._once()
            if self._stopping.is_set():
                return
            in_a_row = 0 if time.monotonic() - began > _STEADY_S else in_a_row
            wait_s = self._waits_s[min(in_a_row, len(self._waits_s) - 1)]
            in_a_row += 1
            with self._lock:
                self._ends, self._code = self._ends + 1, code
            _log.warning("%s ended (%s); starting again in %g s", self.program.name, meaning(code), wait_s)
            self._stopping.wait(wait_s)

    def _once(self) -> int:
        # This very thread starts it, and lives until it ends: its end is what PR_SET_PDEATHSIG of the child is about.
        environment = {**os.environ, **self.program.environment, _PARENT: str(os.getpid())}
        pipe = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with self._lock:
            if self._stopping.is_set():
                return 0
            try:
                process = subprocess.Popen(
                    self.program.command,
                    env=environment,
                    text=True,
                    errors="replace",
                    start_new_session=True,  # a terminal's Ctrl-C is for the daemon, which stops things in order
                    **pipe,  # type: ignore[call-overload]
                )
            except OSError as error:
                _log.error("%s can't be started: %s", self.program.name, error)
                return NOT_STARTABLE
            self._process = process
        log = logging.getLogger(f"program.{self.program.name}")
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                relay(log, line)
        code = process.wait()
        with self._lock:
            self._process = None
        return code

    def stop(self) -> None:
        self._stopping.set()
        with self._lock:
            process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                process.wait(self.program.stop_s)
            except subprocess.TimeoutExpired:
                _log.warning("%s did not end within %g s and is killed", self.program.name, self.program.stop_s)
                process.kill()
        if self.is_alive():
            self.join(10)

    def condition(self) -> Condition:
        with self._lock:
            process = self._process
            running = process is not None and process.poll() is None
            return Condition(running, process.pid if process and running else None, self._ends, self._code)


def relay(log: logging.Logger, line: str) -> None:
    """Log a line that a program printed, at the level that it begins with."""
    text = _COLOURS.sub("", line).rstrip()
    if not text:
        return
    found = _LEVEL.match(text)
    level = logging.INFO
    if found:
        name = found.group(1)
        level, text = logging.getLevelNamesMapping()["WARNING" if name == "WARN" else name], text[found.end() :]
    if text:
        log.log(level, "%s", text[:_MOST_LINE])


def meaning(code: int) -> str:
    """Say in words what an exit code says."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return {
        0: "done",
        REFUSED: "refused by the other side",
        BAD_CONFIG: "wrong configuration",
        NOT_STARTABLE: "not startable",
    }.get(code, f"exit code {code}")


def begin_child(quiet: Sequence[str] = ()) -> None:
    """Begin as a program of ours: end with the parent, keep new files private, log lines to stdout.

    Args:
        quiet: names of loggers that only warn.
    """
    end_with_parent()
    os.umask(0o077)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stdout, force=True)
    logging.getLogger("flwr").handlers.clear()  # it would print everything a second time, in colours
    for noisy in ("alembic", "httpx", "httpcore", "uvicorn", *quiet):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def end_with_parent(number: int = signal.SIGKILL, parent: int | None = None) -> None:
    """Ask the system for a signal when the parent ends; end now if it already has.

    Args:
        number: the signal.
        parent: the parent's process, where no `Supervisor` is the parent.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    known = os.environ.get(_PARENT) if parent is None else str(parent)
    if known is not None and known != str(os.getppid()):
        os.kill(os.getpid(), number)


@contextmanager
def private_files() -> Iterator[None]:
    """Make new files for their owner only."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def flower_environment(home: Path) -> dict[str, str]:
    """Give what Flower's processes need: no telemetry, no update check, no run-time installs, a home of their own."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_INTERNAL_GRPC_FLEET_API": "0",
        "FLWR_INTERNAL_GRPC_CONTROL_API": "0",
        "FLWR_OIDC_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Of a vector, in one request: each costs milliseconds, whatever its size. Below what `federation.front` takes.
        "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(12 << 20),
        # Chunks come and go by the hundred. Given back and taken anew in pages of 4 KiB, their memory costs more than
        # all that is done with their bytes; in huge pages it costs little. (glibc; others don't look.)
        "GLIBC_TUNABLES": ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), _MALLOC))),
        "PYTHONUNBUFFERED": "1",
        "PATH": path,
    }


def until_signal() -> Callable[[float], bool]:
    """Catch SIGTERM and SIGINT; gives a function that waits up to some seconds and tells whether one came."""
    came = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: came.set())
    return came.wait

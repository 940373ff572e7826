"""Forks app processes from one that has imported everything, so that a message costs no seconds of imports.

A node starts one nursery (`python -m federation.nursery`), which imports what its app needs and then does nothing but
fork: a child for each message, with memory, state and end of its own, as if it had been started afresh. The nursery
runs no code of a message, has one Python thread, and never touches a GPU: CUDA can't be used on both sides of a fork.
(Native threads that stand idle are OpenBLAS's and jemalloc's, which expect forks, and one of polars that only clears up
after queries that spilled to the disk.)

Over one socket it hears a line of JSON for each task and says how each child ended. Children end with the nursery
(Linux: PR_SET_PDEATHSIG), the nursery with its node, whose end of the socket closes however the node ends.
"""

import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federation.supervisor import end_with_parent

_END_S = 10.0
_LINE = 1 << 16
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class NurseryOptions:
    """What a nursery is told.

    Attributes:
        modules: to import before the first fork.
        port: of the runtime, on loopback.
        environment: beside this process's own.
        output: a file for what the nursery, or the last child, prints; for its owner only.
    """

    modules: Sequence[str]
    port: int
    environment: Mapping[str, str]
    output: Path


class Nursery:
    """The node's side: it keeps a nursery running and asks it for children."""

    def __init__(self, options: NurseryOptions) -> None:
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._heard = b""
        self._alive: set[int] = set()
        self._lost: list[tuple[int, int]] = []

    def start(self) -> None:
        """Start it; it takes seconds until it is warm, and tasks that come before wait for that."""
        here, there = socket.socketpair()
        here.setblocking(False)
        self._line, self._heard = here, b""
        options = self._options
        with there, _written_anew(options.output) as output:
            self._process = subprocess.Popen(
                (sys.executable, "-m", "federation.nursery", str(there.fileno()), *options.modules),
                env={**os.environ, **options.environment},
                pass_fds=(there.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def launch(self, number: int, token: str) -> None:
        """Let a child do a task, whose token goes to it in memory."""
        if self._process is None or self._process.poll() is not None:
            self._lost += list(self.ended())
            self._close()
            self.start()
        told = {"task": number, "token": token, "port": self._options.port, "output": str(self._options.output)}
        self._alive.add(number)
        self._say(told)

    def ended(self) -> Iterator[tuple[int, int]]:
        """Give tasks whose children have ended since the last call, each with its exit code."""
        while self._lost:
            yield self._lost.pop()
        for line in self._lines():
            number, told = (int(word) for word in line.split())
            if number in self._alive:
                self._alive.discard(number)
                yield number, told
        if self._process is not None and self._alive and (code := self._process.poll()) is not None:
            for number in list(self._alive):  # they ended with it
                self._alive.discard(number)
                yield number, code or 1

    def stop(self) -> None:
        """Let children hand back their tasks, for a while, and end it with them."""
        if self._process is None or self._line is None:
            return
        self._say({"stop": True})
        try:
            self._process.wait(_END_S + 2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._alive.clear()
        self._close()

    @property
    def pid(self) -> int | None:
        """The nursery's process, if one was started."""
        return None if self._process is None else self._process.pid

    def _say(self, told: Mapping[str, Any]) -> None:
        assert self._line is not None
        try:
            self._line.sendall(json.dumps(told).encode() + b"\n")
        except OSError:
            return  # it has ended: `ended` tells

    def _lines(self) -> list[bytes]:
        while self._line is not None:
            try:
                data = self._line.recv(_LINE)
            except OSError:  # nothing there, or the other end is gone
                break
            if not data:
                break
            self._heard += data
        *lines, self._heard = self._heard.split(b"\n")
        return lines

    def _close(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None


def _written_anew(path: Path) -> Any:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")


class _Forks:
    """The nursery's own side."""

    def __init__(self, line: socket.socket) -> None:
        self._line, self._heard = line, b""
        self._children: dict[int, int] = {}
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)

    def serve(self) -> None:
        """Fork until the node says stop, or is gone."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        while True:
            ready, _, _ = select.select([self._line, self._woken], [], [])
            if self._woken in ready:
                self._woken.recv(_LINE)
            self._reap(os.WNOHANG)
            if self._line not in ready:
                continue
            data = self._line.recv(_LINE)
            if not data:
                self._end(signal.SIGKILL)
                return
            *lines, self._heard = (self._heard + data).split(b"\n")
            for line in lines:
                told = json.loads(line)
                if "stop" in told:
                    self._end(signal.SIGTERM)
                    return
                self._fork(told)

    def _fork(self, told: Mapping[str, Any]) -> None:
        assert threading.active_count() == 1, "another thread's locks would stay locked in the child"
        parent, pid = os.getpid(), os.fork()
        if pid:
            self._children[pid] = told["task"]
            return
        code = 1
        try:
            self._forget_parent()
            end_with_parent(parent=parent)
            code = _live(told)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _forget_parent(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, *_SIGNALS):
            signal.signal(number, signal.SIG_DFL)
        for end in (self._line, self._woken, self._wake):
            end.close()

    def _reap(self, how: int) -> None:
        while self._children:
            pid, status = os.waitpid(-1, how)
            if not pid:
                return
            number = self._children.pop(pid)
            try:
                self._line.sendall(b"%d %d\n" % (number, os.waitstatus_to_exitcode(status)))
            except OSError:
                return  # the node is gone; so are we, next

    def _end(self, number: signal.Signals) -> None:
        """End all children; those that don't heed SIGTERM in time are killed."""
        self._signal(number)
        until = time.monotonic() + _END_S
        while self._children and time.monotonic() < until:
            select.select([self._woken], [], [], 0.2)
            self._reap(os.WNOHANG)
        self._signal(signal.SIGKILL)
        self._reap(0)

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._children:
            os.kill(pid, number)


def _live(told: Mapping[str, Any]) -> int:
    """Be an app process: what Flower's `flwr-clientapp` does; gives its exit code."""
    from flwr.supernode.runtime.run_clientapp import run_clientapp

    from federation.handover import hand_over

    hand_over()
    # The last child's words only: a file that can't grow without end.
    with _written_anew(Path(told["output"])) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    try:
        run_clientapp(
            runtime_api_address=f"127.0.0.1:{told['port']}",
            token=told["token"],
            insecure=True,
            parent_pid=os.getppid(),
            runtime_dependency_install=False,
        )
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def main(descriptor: int, modules: Sequence[str]) -> None:
    """Be a nursery at the end of a socket."""
    for number in _SIGNALS:  # meant for the node, which says when to stop
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent=os.getppid())
    for name in modules:
        importlib.import_module(name)
    end_with_parent(0, parent=os.getppid())  # from here on the socket tells; the node may have started us in a thread
    gc.collect()
    gc.freeze()  # else a child's collector would write to, and so copy, every page
    with socket.socket(fileno=descriptor) as line:
        _Forks(line).serve()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
    os._exit(0)  # taking PyTorch down in order takes longer than anybody waits

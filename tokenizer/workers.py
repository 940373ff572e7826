"""Worker processes: they call functions of modules and give back what these return.

A worker is a fresh interpreter on the other end of a socket. It doesn't import the caller's main module, so a script
needs no `if __name__ == "__main__"`. It ends when the socket closes, at once and even in the middle of its work: a
parent that is killed leaves no orphan. A worker that dies fails the one message it worked on and is replaced.

Which worker does what makes no difference: nothing is kept in one between two jobs, and all have the same environment.
"""

import json
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from tokenizer.errors import FedcometError

_P = ParamSpec("_P")
_T = TypeVar("_T")

_BOOT = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from tokenizer.workers import work
work(int(sys.argv[2]), bytes.fromhex(sys.argv[3]))
"""


class WorkerDied(FedcometError):
    """A worker process ended in the middle of a job."""


_Job = tuple[str, bytes, Future[Any]]
_being_worker = threading.Event()


class Pool:
    """A number of worker processes; close it, or use it in a `with` statement. Safe to share between threads."""

    def __init__(
        self,
        workers: int | None = None,
        environment: Mapping[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        """Start the workers.

        Args:
            workers: how many; as many as there are cores when not given.
            environment: variables that differ from this process's.
            prepare: a function of a module that every worker calls before its first job.
        """
        self.workers = workers or len(os.sched_getaffinity(0))
        self._environment = dict(environment or {})
        self._prepare = pickle.dumps(prepare)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self._changing = threading.Lock()
        self._living: set[_Worker] = set()
        self._slots = [threading.Thread(target=self._serve, daemon=True) for _ in range(self.workers)]
        for slot in self._slots:
            slot.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, label: str, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Let a worker call a function of a module, and give its result.

        The future fails with what the function raised, or with WorkerDied when the worker died; `label` names the job
        in that message.
        """
        if self._closed:
            raise WorkerDied("The pool is closed.")
        if getattr(function, "__module__", None) == "__main__":
            raise ValueError(f"{function!r}: workers don't import the program that is run; put it into a module.")
        future: Future[_T] = Future()
        self._jobs.put((label, pickle.dumps((function, args, kwargs)), future))
        return future

    def pids(self) -> list[int]:
        """Give the process ids of the workers."""
        with self._changing:
            return sorted(worker.pid for worker in self._living)

    def close(self) -> None:
        """End all workers, whatever they are doing; messages that are not answered yet fail."""
        with self._changing:
            self._closed = True
            for worker in self._living:
                worker.interrupt()
        for _ in self._slots:
            self._jobs.put(None)
        for slot in self._slots:
            slot.join()

    def _serve(self) -> None:
        worker = self._start()
        while (job := self._jobs.get()) is not None:
            label, work, future = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                good, result = worker.answer(work)
            except Exception as error:  # whatever it is, the slot must go on with a fresh worker
                self._forget(worker)
                code = worker.stop()
                future.set_exception(WorkerDied(f"The worker of {label} ended with code {code} ({error!r})."))
                worker = self._start()
            else:
                if good:
                    future.set_result(result)
                else:
                    future.set_exception(result)
        self._forget(worker)
        worker.stop()

    def _forget(self, worker: "_Worker") -> None:
        with self._changing:
            self._living.discard(worker)

    def _start(self) -> "_Worker":
        with self._changing:
            worker = _Worker(self._environment, self._prepare)
            if self._closed:
                worker.interrupt()
            self._living.add(worker)
        return worker


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self, environment: Mapping[str, str], prepare: bytes) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(sys.path), str(theirs.fileno()), prepare.hex()],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, **environment},
            )
        self._connection = Connection(ours.detach())
        self.pid = self._process.pid

    def answer(self, work: bytes) -> tuple[bool, Any]:
        self._connection.send_bytes(work)
        answer: tuple[bool, Any] = pickle.loads(self._connection.recv_bytes())
        return answer

    def interrupt(self) -> None:
        """End the process; `answer` in another thread fails."""
        self._process.kill()

    def stop(self) -> int:
        """Let go of the process and give its exit code."""
        self._connection.close()
        return self._process.wait()


def is_worker() -> bool:
    """Whether this process is a worker; one that starts workers itself would take other workers' cores."""
    return _being_worker.is_set()


def work(descriptor: int, prepare: bytes) -> None:
    """Be a worker: do what arrives on the socket, until it closes."""
    _being_worker.set()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(descriptor)
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    if (ready := pickle.loads(prepare)) is not None:
        ready()
    while True:
        connection.send_bytes(_do(inbox.get()))


def _do(work: bytes) -> bytes:
    """Call the function; what it raises goes back as it is, and the worker goes on."""
    function, args, kwargs = pickle.loads(work)
    try:
        return pickle.dumps((True, function(*args, **kwargs)))
    except Exception as error:
        return pickle.dumps((False, error))


def _listen(connection: Connection, inbox: "queue.SimpleQueue[bytes]") -> None:
    """Take messages in; when the other end is gone, end the process whatever it is doing."""
    try:
        while True:
            inbox.put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(0)

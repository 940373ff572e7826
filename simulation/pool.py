"""Worker processes that play sites: every message runs through the real ClientApp, in a process of its own kind.

A worker is a fresh interpreter on the other end of a socket. It doesn't import the caller's main module, so a script
needs no `if __name__ == "__main__"`. It ends when the socket closes, at once and even in the middle of its work: a
parent that is killed leaves no orphan. A worker that dies fails the one message it worked on and is replaced.

Which worker does what makes no difference: what a site must not forget is in its state folder, and every worker uses
the same number of threads.
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
from concurrent.futures import Future
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

from flwr.app import Context, Message, RecordDict

from client.site import SiteFiles
from tokenizer.errors import FedcometError

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from simulation.pool import work; work(int(sys.argv[2]))"
)


class WorkerDied(FedcometError):  # noqa: N818 - named as what happened
    """A worker process ended in the middle of a message."""


_Job = tuple[SiteFiles, int, Message, Future[Message]]


class Pool:
    """A number of worker processes; close it, or use it in a `with` statement. Safe to share between threads."""

    def __init__(self, workers: int | None = None, threads: int = 1) -> None:
        """Start the workers.

        Args:
            workers: how many; as many as there are cores when not given.
            threads: torch threads in each. Results on other numbers of threads may differ in the last bits.
        """
        self.workers = workers or len(os.sched_getaffinity(0))
        self._threads = threads
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

    def submit(self, files: SiteFiles, node: int, message: Message) -> Future[Message]:
        """Let a worker answer a message as the site; the future fails with WorkerDied when the worker dies."""
        if self._closed:
            raise WorkerDied("The pool is closed.")
        future: Future[Message] = Future()
        self._jobs.put((files, node, message, future))
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
            files, node, message, future = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(worker.answer(files, node, message))
            except Exception as error:  # whatever it is, the slot must go on with a fresh worker
                self._living.discard(worker)
                code = worker.stop()
                future.set_exception(WorkerDied(f"The worker of {files.name} ended with code {code} ({error!r})."))
                worker = self._start()
        self._living.discard(worker)
        worker.stop()

    def _start(self) -> "_Worker":
        with self._changing:
            worker = _Worker(self._threads)
            if self._closed:
                worker.interrupt()
            self._living.add(worker)
        return worker


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self, threads: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(sys.path), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
            )
        self._connection = Connection(ours.detach())
        self.pid = self._process.pid

    def answer(self, files: SiteFiles, node: int, message: Message) -> Message:
        self._connection.send_bytes(pickle.dumps((files, node, message)))
        answer: Message = pickle.loads(self._connection.recv_bytes())
        return answer

    def interrupt(self) -> None:
        """End the process; `answer` in another thread fails."""
        self._process.kill()

    def stop(self) -> int:
        """Let go of the process and give its exit code."""
        self._connection.close()
        return self._process.wait()


def work(descriptor: int) -> None:
    """Be a worker: answer what arrives on the socket, until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(descriptor)
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    import torch

    from client.app import app

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    while True:
        files, node, message = pickle.loads(inbox.get())
        config = {"name": files.name, "data": str(files.data), "state": str(files.state)}
        context = Context(0, node, config, RecordDict(), {})
        connection.send_bytes(pickle.dumps(app(message, context)))


def _listen(connection: Connection, inbox: "queue.SimpleQueue[bytes]") -> None:
    """Take messages in; when the other end is gone, end the process whatever it is doing."""
    try:
        while True:
            inbox.put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(0)

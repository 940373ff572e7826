"""Starts Flower's app processes: what its SuperExec does, with secrets in files and a crash noticed within a second.

The same loop serves a coordinator (ServerApps, which live on when the SuperLink is killed) and a site (ClientApps).
Flower's own SuperExec hands tokens over on the command line, where every user of the machine can read them, and leaves
it to a heartbeat of a minute to find that a process has died. Checked against flwr 1.41.
"""

import contextlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PushTaskOutputRequest
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient

from federation.supervisor import NOT_STARTABLE, meaning, relay

TASK_HEARTBEAT_S = 300
"""How long an app process may be silent, in seconds; twice that once it has begun."""

RUNTIME = (
    "acquire-task",
    "send-task-heartbeat",
    "pull-task-input",
    "push-task-output",
    "push-object",
    "pull-object",
    "confirm-message-received",
    "push-logs",
    "push-messages",
    "pull-messages",
)
"""What an app process and whoever starts it ask of the runtime beside them."""

_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_KINDS = {"coordinator": TaskType.SERVER_APP, "site": TaskType.CLIENT_APP}
_LOOK_S = 0.3
_AWAY_S = 2.0
_END_S = 10.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskOptions:
    """How app processes are started.

    Attributes:
        side: whose they are: only ServerApps run at a coordinator, only ClientApps at a site.
        port: of the runtime, on loopback.
        secret: proves to the runtime that it is us.
        folder: for files with tokens; emptied at the beginning.
        environment: beside this process's own.
        output: a file for what they print, for its owner only; None logs it.
    """

    side: Literal["coordinator", "site"]
    port: int
    secret: bytes
    folder: Path
    environment: dict[str, str]
    output: Path | None = None


@dataclass
class _Task:
    process: "subprocess.Popen[str]"
    number: int
    token: str
    file: Path


class Tasks:
    """Takes tasks from a runtime and starts a process for each, in a thread of its own."""

    def __init__(self, options: TaskOptions, crashed: Callable[[int], None] = lambda run: None) -> None:
        """Take the options.

        Args:
            options: see there.
            crashed: called with the number of Flower's run when one of its processes has died.
        """
        self._options, self._crashed = options, crashed
        self._running: dict[int, _Task] = {}
        self._runs: dict[int, int] = {}
        self._unsaid: dict[str, int] = {}  # exit codes by token, of which the runtime has not heard
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="tasks", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._options.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left_over in self._options.folder.glob("*.token"):
            left_over.unlink()
        self._thread.start()

    def stop(self) -> None:
        """Take no more tasks, and end the processes that run."""
        self._stopping.set()
        self._thread.join(_AWAY_S + 35)
        for task in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                task.process.terminate()
        for task in list(self._running.values()):
            try:
                task.process.wait(_END_S)
            except subprocess.TimeoutExpired:
                task.process.kill()
                task.process.wait()
            task.file.unlink(missing_ok=True)

    @property
    def busy(self) -> int:
        """How many processes run."""
        return len(self._running)

    def _serve(self) -> None:
        client = self._client(
            SuperExecAuthHttpInterceptor(master_secret=self._options.secret, protected_methods={_ACQUIRE})
        )
        request = AcquireTaskRequest(supported_task_types=[_KINDS[self._options.side]])
        away = False
        while not self._stopping.is_set():
            self._look()
            wait_s = _LOOK_S
            try:
                answer = client.AcquireTask(request)
                if answer.HasField("task") and answer.token:
                    self._try(answer.task.task_id, answer.task.run_id, answer.token)
                away = False
            except (httpx.HTTPError, OSError, ValueError) as error:
                if not away:
                    _log.info("the runtime does not answer (%s); asking again", error)
                away, wait_s = True, _AWAY_S
            self._stopping.wait(wait_s)
        client.close()

    def _client(self, *interceptors: object) -> RuntimeHttpClient:
        version = RuntimeVersionHttpInterceptor(component_name="SuperExec")
        return RuntimeHttpClient.from_server_address(
            f"127.0.0.1:{self._options.port}",
            insecure=True,
            root_certificates=None,
            interceptors=[version, *interceptors],  # type: ignore[list-item]
        )

    def _try(self, number: int, run: int, token: str) -> None:
        """Start a task's process; where the system refuses, such as on a full disk, it is reported as one that died."""
        try:
            self._launch(number, run, token)
        except OSError as problem:
            _log.error("an app process can't be started (%s)", problem)
            self._unsaid[token] = NOT_STARTABLE
            self._crashed(run)

    def _launch(self, number: int, run: int, token: str) -> None:
        file = self._options.folder / f"{number}.token"
        file.unlink(missing_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            opened.write(token)
        program = Path(sys.executable).parent / TASK_TYPE_TO_COMMAND[_KINDS[self._options.side]]
        address = f"127.0.0.1:{self._options.port}"
        command = [str(program), "--runtime-api-address", address, "--insecure", "--token-file", str(file)]
        process = self._start([*command, "--parent-pid", str(os.getpid())])
        self._running[number], self._runs[number] = _Task(process, number, token, file), run

    def _start(self, command: list[str]) -> "subprocess.Popen[str]":
        environment = {**os.environ, **self._options.environment}
        output = self._options.output
        if output is None:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            threading.Thread(target=_relay_all, args=(process,), name="task-lines", daemon=True).start()
            return process
        # The last task's words only: a file that can't grow without end. They may tell of records, so no log has them.
        with os.fdopen(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def _look(self) -> None:
        """Clear up after processes that ended, and report those that died."""
        for number, task in list(self._running.items()):
            code = task.process.poll()
            if code is None:
                continue
            del self._running[number]
            run = self._runs.pop(number)
            task.file.unlink(missing_ok=True)
            if code == 0:
                continue
            where = "" if self._options.output is None else f"; {self._options.output} has its last words"
            _log.warning("an app process ended (%s)%s", meaning(code), where)
            self._unsaid[task.token] = code
            self._crashed(run)
        self._unsaid = {token: code for token, code in self._unsaid.items() if not self._said(token, code)}

    def _said(self, token: str, code: int) -> bool:
        """Tell the runtime of a process that died; False if it is away. It may have heard from the process itself."""
        client = self._client(RuntimeTokenHttpInterceptor(token))
        request = PushTaskOutputRequest(sub_status=SubStatus.FAILED, details=f"The process ended: {meaning(code)}.")
        try:
            client.PushTaskOutput(request)
        except httpx.HTTPStatusError:
            return True
        except (httpx.HTTPError, OSError, ValueError):
            return False
        finally:
            client.close()
        return True


def _relay_all(process: "subprocess.Popen[str]") -> None:
    log = logging.getLogger("program.app")
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            relay(log, line)

"""Starts Flower's app processes: what its SuperExec does, with hidden secrets and a crash noticed within a second.

The same loop serves a coordinator (ServerApps, which live on when the SuperLink is killed) and a site (ClientApps,
which are forked: `federation.nursery`). Flower's own SuperExec hands tokens over on the command line, where every user
of the machine can read them, and leaves it to a heartbeat of a minute to find that a process has died. Checked against
flwr 1.41.
"""

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Literal, Protocol

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

from federation.nursery import Nursery, NurseryOptions
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
_ASK_S = 1.0
_AWAY_S = 2.0
_END_S = 10.0
_BEGIN_S = 15.0  # in which a runtime that was started together with this one need not answer yet

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskOptions:
    """How app processes are started.

    Attributes:
        side: whose they are: only ServerApps run at a coordinator, only ClientApps at a site.
        port: of the runtime, on loopback.
        secret: proves to the runtime that it is us.
        folder: for files with tokens; emptied at the beginning. None at a site.
        environment: beside this process's own.
        output: of a site: a file for what they print, for its owner only. What a coordinator's print is logged.
        modules: of a site: what is imported before its processes are forked.
    """

    side: Literal["coordinator", "site"]
    port: int
    secret: bytes
    folder: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    output: Path | None = None
    modules: Sequence[str] = ()


class _Launcher(Protocol):
    def start(self) -> None: ...
    def launch(self, number: int, token: str) -> None: ...
    def ended(self) -> Iterator[tuple[int, int]]: ...
    def stop(self) -> None: ...


class Tasks:
    """Takes tasks from a runtime and lets a process do each, in a thread of its own."""

    def __init__(
        self,
        options: TaskOptions,
        crashed: Callable[[int], None] = lambda run: None,
        come: threading.Event | None = None,
    ) -> None:
        """Take the options.

        Args:
            options: see there.
            crashed: called with the number of Flower's run when one of its processes has died.
            come: set when a task has come; without it, the runtime is asked again and again.
        """
        self._options, self._crashed, self._come = options, crashed, come
        self._launcher: _Launcher
        if options.output is not None:
            nursery = NurseryOptions(options.modules, options.port, options.environment, options.output)
            self._launcher = Nursery(nursery)
        else:
            self._launcher = _Processes(options)
        self._running: dict[int, tuple[int, str]] = {}  # Flower's run and the token by task
        self._dead: list[int] = []  # Flower's runs whose processes died, for which `crashed` is still to be called
        self._unsaid: dict[str, int] = {}  # exit codes by token, of which the runtime has not heard
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="tasks", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._launcher.start()
        self._thread.start()

    def stop(self) -> None:
        """Take no more tasks, and end the processes that run."""
        self._stopping.set()
        self._thread.join(_AWAY_S + 35)
        self._launcher.stop()

    @property
    def alive(self) -> bool:
        """Whether tasks are taken, and those of processes that died reported."""
        return self._thread.is_alive()

    @property
    def busy(self) -> int:
        """How many processes run."""
        return len(self._running)

    def _serve(self) -> None:
        client = self._client(
            SuperExecAuthHttpInterceptor(master_secret=self._options.secret, protected_methods={_ACQUIRE})
        )
        away, said, asked, patient_until = False, False, 0.0, time.monotonic() + _BEGIN_S
        trouble = ""
        while not self._stopping.is_set():
            try:
                self._look()
                trouble = ""
            except Exception as error:  # whatever it is: whoever waits for a process that died would wait for ever
                if str(error) != trouble:
                    _log.error("an app process that died can't be answered for (%s); trying again", error)
                trouble = str(error)
            wait_s = _LOOK_S
            try:
                now = time.monotonic()
                # While one works, asking each time whether there is more would take a share of the machine.
                due = now - asked >= _ASK_S or not self._running if self._come is None else self._come.is_set()
                if due:
                    asked = now
                    self._take(client)
                    patient_until = 0.0
                away = said = False
            except Exception as error:
                if not said and time.monotonic() >= patient_until:
                    _log.info("the runtime does not answer (%s); asking again", error)
                    said = True
                away, wait_s = True, _AWAY_S
            if self._come is None or away:
                self._stopping.wait(wait_s)
            else:
                self._come.wait(wait_s)
        client.close()

    def _take(self, client: RuntimeHttpClient) -> None:
        """Take one task, if there is one, and let a process do it."""
        if self._come is not None:
            self._come.clear()
        more = True
        try:
            answer = client.AcquireTask(AcquireTaskRequest(supported_task_types=[_KINDS[self._options.side]]))
            if more := answer.HasField("task") and bool(answer.token):
                self._try(answer.task.task_id, answer.task.run_id, answer.token)
        finally:
            if more and self._come is not None:
                self._come.set()

    def _try(self, number: int, run: int, token: str) -> None:
        """Let a process do a task; one that can't be started, as on a full disk, is reported as dead."""
        self._running[number] = run, token
        try:
            self._launcher.launch(number, token)
        except Exception as problem:
            _log.error("an app process can't be started (%s)", problem)
            self._running.pop(number)
            self._unsaid[token] = NOT_STARTABLE
            self._dead.append(run)

    def _client(self, *interceptors: object) -> RuntimeHttpClient:
        version = RuntimeVersionHttpInterceptor(component_name="SuperExec")
        return RuntimeHttpClient.from_server_address(
            f"127.0.0.1:{self._options.port}",
            insecure=True,
            root_certificates=None,
            interceptors=[version, *interceptors],  # type: ignore[list-item]
        )

    def _look(self) -> None:
        """Report processes that died."""
        for number, code in self._launcher.ended():
            run, token = self._running.pop(number)
            if code == 0:
                continue
            where = "" if self._options.output is None else f"; {self._options.output} has its last words"
            _log.warning("an app process ended (%s)%s", meaning(code), where)
            self._unsaid[token] = code
            self._dead.append(run)
        while self._dead:
            self._crashed(self._dead[0])
            del self._dead[0]
        self._unsaid = {token: code for token, code in self._unsaid.items() if not self._said(token, code)}

    def _said(self, token: str, code: int) -> bool:
        """Tell the runtime of a process that died; False if it is away. It may have heard from the process itself."""
        client = self._client(RuntimeTokenHttpInterceptor(token))
        request = PushTaskOutputRequest(sub_status=SubStatus.FAILED, details=f"The process ended: {meaning(code)}.")
        try:
            client.PushTaskOutput(request)
        except httpx.HTTPStatusError as problem:
            return problem.response.status_code != HTTPStatus.SERVICE_UNAVAILABLE
        except (httpx.HTTPError, OSError, ValueError):
            return False
        finally:
            client.close()
        return True


@dataclass
class _Task:
    process: "subprocess.Popen[str]"
    file: Path


class _Processes:
    """A new program for each task, which logs what it prints."""

    def __init__(self, options: TaskOptions) -> None:
        assert options.folder is not None
        self._options, self._folder = options, options.folder
        self._tasks: dict[int, _Task] = {}

    def start(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left_over in self._folder.glob("*.token"):
            left_over.unlink()

    def launch(self, number: int, token: str) -> None:
        file = self._folder / f"{number}.token"
        file.unlink(missing_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            opened.write(token)
        program = Path(sys.executable).parent / TASK_TYPE_TO_COMMAND[_KINDS[self._options.side]]
        address = f"127.0.0.1:{self._options.port}"
        command = [str(program), "--runtime-api-address", address, "--insecure", "--token-file", str(file)]
        process = subprocess.Popen(
            [*command, "--parent-pid", str(os.getpid())],
            env={**os.environ, **self._options.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        threading.Thread(target=_relay_all, args=(process,), name="task-lines", daemon=True).start()
        self._tasks[number] = _Task(process, file)

    def ended(self) -> Iterator[tuple[int, int]]:
        for number, task in list(self._tasks.items()):
            code = task.process.poll()
            if code is not None:
                del self._tasks[number]
                with contextlib.suppress(OSError):  # it is swept at the next start
                    task.file.unlink()
                yield number, code

    def stop(self) -> None:
        for task in self._tasks.values():
            with contextlib.suppress(ProcessLookupError):
                task.process.terminate()
        for task in self._tasks.values():
            try:
                task.process.wait(_END_S)
            except subprocess.TimeoutExpired:
                task.process.kill()
                task.process.wait()
            task.file.unlink(missing_ok=True)


def _relay_all(process: "subprocess.Popen[str]") -> None:
    log = logging.getLogger("program.app")
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            relay(log, line)

"""A site that answers a private round through its ClientApp and is killed at any of its steps, in a process of its own.

Steps are all SQL statements (before and after) and commits, every flush and rename of a file, every optimizer step, and
the moment before the answer leaves. What leaves is appended to a file, and so is the key of every draw.
"""

import hashlib
import os
import shutil
import signal
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Engine, event

from client import evaluation, local
from client.archive import RunArchive
from client.budget import Budget, Charge, Release
from client.gate import digest_of_answer
from client.outbound import Outbound
from client.site import Site, SiteFiles
from federation import flower
from federation.manifest import LocalWork, Manifest, PrivateEvaluation
from federation.messages import EvaluateReply, EvaluateRequest, PrepareRequest, SurveyRequest, TrainReply, TrainRequest
from federation.update import to_vector
from model.decoder import Decoder
from model.private import PrivateTrainer, Secret
from server.plan import PrivacyPlan
from tests import tiny
from tokenizer.codebook import Codebook, Survey

FAR = 1e12
PLAN = tiny.plan(
    local=LocalWork(steps=2, batch_tokens=512),
    privacy=PrivacyPlan(
        sampling_rate=0.25, noise_multiplier=2.0, delta=1e-5, evaluation=PrivateEvaluation(1, 8.0, 5.0)
    ),
)
Step = Callable[..., None]


class Place(NamedTuple):
    """A site that has agreed to a run, what is asked of it, and what the world has seen."""

    files: SiteFiles
    manifest: Manifest

    @classmethod
    def prepared(cls, root: Path) -> "Place":
        files = replace(tiny.site(root, "icu", 1), snapshot_minutes=0.0)
        site = Site(files)
        codebook = Codebook.build(Survey.from_bytes(site.survey(SurveyRequest(PLAN.split, PLAN.tokenizer, FAR)).survey))
        manifest = PLAN.manifest(codebook)
        site.prepare(PrepareRequest(manifest.to_bytes(), codebook.to_bytes(), FAR))
        return cls(files, manifest)

    def copy(self, to: Path) -> "Place":
        shutil.copytree(self.files.state, to)
        return Place(replace(self.files, state=to), self.manifest)

    @property
    def draws(self) -> Path:
        return self.files.state / "draws"

    @property
    def outbox(self) -> Path:
        return self.files.state / "outbox"


def answer(place: Place, step: Step) -> None:
    """Answer the first round, and let the answer go."""
    manifest = place.manifest
    weights = to_vector(Decoder.create(manifest.model, manifest.seed))
    request = TrainRequest(manifest.hash, 1, weights, FAR)
    flower.assume_identity()
    message = flower.request(flower.to_record(request), request.kind, 1, group="1", ttl_s=60.0)
    flower.number_(message, "1")
    sent = tiny.honest(place.files)(message)
    assert sent is not None
    reply = flower.read(sent)
    step("about to leave")
    assert isinstance(reply, TrainReply), reply
    line = f"{sent.content.object_id} {hashlib.sha256(reply.update.tobytes()).hexdigest()}"
    _append(place.outbox, line)
    step("sent")


def answer_evaluation(place: Place, step: Step) -> None:
    """Answer the evaluation of the first round, and let the answer go."""
    manifest = place.manifest
    request = EvaluateRequest(manifest.hash, 1, "tuning", to_vector(Decoder.create(manifest.model, 1)), FAR)
    flower.assume_identity()
    message = flower.request(flower.to_record(request), request.kind, 1, group="1", ttl_s=60.0)
    flower.number_(message, "1")
    sent = tiny.honest(place.files)(message)
    assert sent is not None
    reply = flower.read(sent)
    step("about to leave")
    assert isinstance(reply, EvaluateReply), reply
    _append(place.outbox, f"{sent.content.object_id} {digest_of_answer(reply)}")
    step("sent")


def answer_with_forgotten_keys(place: Place, step: Step) -> None:
    """The negative control: a site whose ledger does not keep the key, so that an interrupted round draws again."""
    reserve = Budget.reserve

    def fresh(budget: Budget, release: Release) -> Charge:
        return replace(reserve(budget, release), key=os.urandom(32))

    Budget.reserve = fresh  # type: ignore[method-assign]  # in a process that ends with this
    answer(place, step)


def killed_at(place: Place, nth: int, kind: str = "", how: Callable[[Place, Step], None] = answer) -> str:
    """Work in a child process that kills itself at its nth step of a kind, of any if not said.

    Returns:
        The step's name, or nothing if the work came to its end.
    """
    child = os.fork()
    if child == 0:
        try:
            _work_until(place, nth, kind, how)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return (place.files.state / "step").read_text()
    assert os.WEXITSTATUS(status) == 0, "the site failed; see above"
    return ""


def _work_until(place: Place, nth: int, kind: str, how: Callable[[Place, Step], None]) -> None:
    seen = 0

    def step(name: str) -> None:
        nonlocal seen
        seen += not kind or name == kind
        if seen == nth and (not kind or name == kind):
            (place.files.state / "step").write_text(name)
            os.kill(os.getpid(), signal.SIGKILL)

    for name in ("before_cursor_execute", "after_cursor_execute", "begin", "commit"):
        event.listen(Engine, name, lambda *_, name=name: step(f"sql {name}"))
    kept = ((RunArchive, "keep"), (RunArchive, "keep_score"))
    for owner, name in ((os, "fsync"), (os, "replace"), (PrivateTrainer, "step"), *kept):
        _watch(owner, name, step)
    for owner, name in ((Budget, "charge"), (Budget, "released"), (Outbound, "note")):
        _watch(owner, name, step)
    drawn = evaluation.Secret

    def noted_evaluation(key: bytes, purpose: str) -> Secret:
        _append(place.draws, f"{purpose} {hashlib.sha256(key).hexdigest()}")
        return drawn(key, purpose)

    evaluation.Secret = noted_evaluation  # type: ignore[assignment, misc]
    secret = local._secret

    def noted(key: bytes, where: str, number: int, use: str) -> Secret:
        _append(place.draws, f"{where}/{number}/{use} {hashlib.sha256(key).hexdigest()}")
        return secret(key, where, number, use)

    local._secret = noted
    how(place, step)


def _watch(owner: Any, name: str, step: Step) -> None:
    real, told = getattr(owner, name), name if owner is os else f"{owner.__name__}.{name}"

    def watched(*args: Any, **kwargs: Any) -> Any:
        step(f"before {told}")
        result = real(*args, **kwargs)
        step(f"after {told}")
        return result

    setattr(owner, name, watched)


def _append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")


def lines(path: Path) -> list[list[str]]:
    """What was appended, split into words."""
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

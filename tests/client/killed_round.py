"""A site that answers a private round through its ClientApp and is killed at any of its steps, in a process of its own.

In a round with shared noise it also masks its update, in a new attempt of the sum each time that it is asked. Steps
are all SQL statements (before and after) and commits, every flush and rename of a file, every optimizer step, and the
moment before the answer leaves. What leaves is appended to a file, and so is the key of every draw.
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

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Engine, event

from client import evaluation, local, summing
from client.approval import site_key
from client.archive import RunArchive
from client.budget import Budget, Charge, Release
from client.files import SiteFiles
from client.gate import digest_of_answer
from client.masked import MaskedSite
from client.outbound import Outbound
from client.site import Site
from federation import flower, masking
from federation.identity import Identity
from federation.keystream import Masks, chunks
from federation.manifest import LocalWork, Manifest, OuterOptions, PrivateEvaluation, SecureAggregation, Transport
from federation.masking import Masked, MaskingOptions
from federation.messages import (
    EvaluateReply,
    EvaluateRequest,
    Kept,
    PrepareRequest,
    SurveyRequest,
    TrainReply,
    TrainRequest,
)
from federation.summed import agreement_of
from federation.update import to_vector
from model.decoder import Decoder
from model.private import PrivateTrainer, Secret
from server.plan import FederationPlan, PrivacyPlan
from server.unmask import Stage, Unmasking
from tests import tiny
from tokenizer.codebook import Codebook, Survey

FAR = 1e12
PLAN = tiny.plan(
    local=LocalWork(steps=2, batch_tokens=512),
    privacy=PrivacyPlan(
        sampling_rate=0.25, noise_multiplier=2.0, delta=1e-5, evaluation=PrivateEvaluation(1, 8.0, 5.0)
    ),
)
OTHERS = {name: Identity(Ed25519PrivateKey.generate()) for name in ("ward", "yard")}
SHARED = tiny.plan(
    local=LocalWork(steps=2, batch_tokens=512),
    privacy=PrivacyPlan(noise_multiplier=4.0, delta=1e-5, mechanism="distributed", honest_sites=2),
    outer=OuterOptions(weights="uniform"),
)
ROUNDED = tiny.plan(local=LocalWork(steps=2, batch_tokens=512), transport=Transport("bfloat16"))
Step = Callable[..., None]


class Place(NamedTuple):
    """A site that has agreed to a run, what is asked of it, and what the world has seen."""

    files: SiteFiles
    manifest: Manifest

    @classmethod
    def prepared(cls, root: Path, *, shared: bool = False, plan: FederationPlan = PLAN) -> "Place":
        files = replace(tiny.site(root, "icu", 1), snapshot_minutes=0.0)
        site = Site(files)
        codebook = Codebook.build(Survey.from_bytes(site.survey(SurveyRequest(PLAN.split, PLAN.tokenizer, FAR)).survey))
        roster = {"icu": Identity.at(site_key(files.state)).public} | {name: one.public for name, one in OTHERS.items()}
        manifest = (replace(SHARED, secure_aggregation=_summing(roster)) if shared else plan).manifest(codebook)
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


def answer_rounded(place: Place, step: Step) -> None:
    """Answer the second round, whose update comes with what rounding took from the first, and let the answer go."""
    manifest = place.manifest
    flower.assume_identity()
    for number in (1, 2):
        weights = to_vector(Decoder.create(manifest.model, number))
        request = TrainRequest(manifest.hash, number, weights, FAR)
        message = flower.request(flower.to_record(request), request.kind, 1, group=str(number), ttl_s=60.0)
        flower.number_(message, str(number))
        sent = tiny.honest(place.files)(message)
        assert sent is not None
        reply = flower.read(sent)
        step("about to leave")
        assert isinstance(reply, TrainReply), reply
        _append(place.outbox, f"{number} {hashlib.sha256(np.asarray(reply.update).tobytes()).hexdigest()}")
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


def answer_masked(place: Place, step: Step) -> None:
    """Work on the first round, and let the masked update go in an attempt that was not begun before."""
    manifest = place.manifest
    node = tiny.honest(place.files)
    flower.assume_identity()

    def ask(request: Any) -> Any:
        message = flower.request(flower.to_record(request), request.kind, 1, group="1", ttl_s=60.0)
        flower.number_(message, "1")
        sent = node(message)
        assert sent is not None
        step("about to leave")
        reply = flower.read(sent)
        if isinstance(reply, Masked):
            _append(place.outbox, f"{sent.content.object_id} {_unmasked(place, agreed, reply)}")
            step("sent")
        return reply

    work = TrainRequest(manifest.hash, 1, to_vector(Decoder.create(manifest.model, manifest.seed)), FAR)
    assert isinstance(ask(work), Kept)
    _append(place.files.state / "attempts", "one more")
    attempt = len(lines(place.files.state / "attempts"))
    agreed = agreement_of(manifest, masking.Place(manifest.hash, 1, "train", attempt), work.digest)
    server = Unmasking(agreed)
    others = {name: MaskedSite(agreed, name, identity) for name, identity in OTHERS.items()}
    for stage in (Stage.KEYS, Stage.SHARES):
        for name in server.asked:
            request: Any = server.request(name, FAR)
            if name == "icu":
                reply = ask(request)
            else:
                reply = others[name].keys(request) if stage is Stage.KEYS else others[name].shares(request)
            server.receive(name, reply)
        server.advance()
    assert isinstance(ask(server.request("icu", FAR)), Masked)


def _unmasked(place: Place, agreed: masking.Agreement, reply: Masked) -> str:
    """Name what is under the masks, which follow from what the site holds: its update and its noise, in integers."""
    held = Site(place.files).archive.run(place.manifest.hash).held("train")
    site = MaskedSite(agreed, "icu", Identity.at(site_key(place.files.state)), before=held)
    masks = Masks([replace(mask, add=not mask.add) for mask in site._masks()])
    words = reply.words.copy()
    for part in chunks(words.size):
        masks.apply_(words[part])
    assert np.std(words.view("<i4")) > 0.1 * agreed.numbers.noise_variance**0.5, "these are not the masks"
    assert np.std(words.view("<i4")) < 10 * agreed.numbers.noise_variance**0.5, "these are not the masks"
    return hashlib.sha256(words.tobytes()).hexdigest()


def answer_with_forgotten_keys(place: Place, step: Step) -> None:
    """The negative control: a site whose ledger does not keep the key, so that an interrupted round draws again."""
    reserve = Budget.reserve

    def fresh(budget: Budget, release: Release) -> Charge:
        return replace(reserve(budget, release), key=os.urandom(32))

    Budget.reserve = fresh  # type: ignore[method-assign]  # in a process that ends with this
    answer(place, step)


def answer_masked_with_forgotten_keys(place: Place, step: Step) -> None:
    """The negative control: a site that does not keep the noise beside its update, so that an attempt draws again."""
    real = summing.update_of
    summing.update_of = lambda manifest, reply, _: real(manifest, reply, os.urandom(32))  # type: ignore[assignment]
    answer_masked(place, step)


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
    _watch(RunArchive, "hold", step)
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


def _summing(roster: dict[str, str]) -> SecureAggregation:
    return SecureAggregation(3, MaskingOptions(3, clip=1.0, max_weight=1), roster)


def _append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")


def lines(path: Path) -> list[list[str]]:
    """What was appended, split into words."""
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

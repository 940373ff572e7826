"""What the sites' answers to a run's questions say together; pure, as the round engine is.

A site's tallies are checked, added up and forgotten: what is kept is of all sites. With secure aggregation only the sum
is seen. `federation.merged` makes the figures.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from federation import canonical, masking
from federation.manifest import Manifest, TaskEvaluation
from federation.merged import Merged, merge
from federation.messages import AssessReply, AssessRequest, ProtocolError, Refusal, Reply
from server.unmask import Opening
from tokenizer.errors import DataError

_MOST = 2.0**24


@dataclass(frozen=True)
class Assessment:
    """All questions' figures after a round.

    Attributes:
        round: after which the questions were asked.
        sites: whose answers are in it.
        questions: by the task's name.
        left_out: other sites, and why.
        reason: why there are no figures, if there are none.
    """

    round: int
    sites: tuple[str, ...]
    questions: Mapping[str, Merged] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""

    def to_bytes(self) -> bytes:
        """Give canonical JSON."""
        return canonical.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Assessment":
        """Read what `to_bytes` gave.

        Raises:
            DataError: naming what doesn't fit.
        """
        return canonical.decode(cls, data, where, DataError)

    def figures(self) -> dict[str, float]:
        """Give all figures for the ledger: `tasks.<name>.<figure>`."""
        told = {f"tasks.{name}.{key}": value for name, found in self.questions.items()
                for key, value in found.figures().items()}  # fmt: skip
        return {"tasks.sites": len(self.sites), **told}


def of_answers(
    manifest: Manifest, request: AssessRequest, answers: Mapping[str, Reply | masking.Reply | ProtocolError | None]
) -> Assessment:
    """Add up what the sites answered; an answer that does not fit leaves its site out."""
    asked = _tasks_of(manifest)
    total, left_out = np.zeros(asked.size), {}
    for site in sorted(answers):
        answer = answers[site]
        if reason := _objection(site, answer, request, asked):
            left_out[site] = reason
        elif isinstance(answer, AssessReply):
            total += answer.tallies
    sites = tuple(site for site in sorted(answers) if site not in left_out)
    return Assessment(request.round, sites, _figures(total, asked, len(sites)), left_out)


def of_opening(manifest: Manifest, number: int, opening: Opening) -> Assessment:
    """Read an opened sum of tallies."""
    asked = _tasks_of(manifest)
    total = opening.mean.astype(np.float64) * len(opening.sites)
    cells = total.reshape(len(asked.tasks), -1)[:, : 2 * asked.form.parts * asked.form.bins]
    np.rint(cells, out=cells)  # the mean travels as float32; counts are whole
    return Assessment(number, opening.sites, _figures(total, asked, len(opening.sites)))


def _tasks_of(manifest: Manifest) -> TaskEvaluation:
    if manifest.tasks is None:
        raise AssertionError("questions are asked only where the manifest has some")
    return manifest.tasks


def _figures(total: NDArray[np.float64], asked: TaskEvaluation, sites: int) -> dict[str, Merged]:
    if not sites:
        return {}
    parts = total.reshape(len(asked.tasks), asked.form.size)
    return {task.name: merge(part, asked.form, sites) for task, part in zip(asked.tasks, parts, strict=True)}


def _objection(
    site: str, answer: Reply | masking.Reply | ProtocolError | None, request: AssessRequest, asked: TaskEvaluation
) -> str:
    if answer is None:
        return "no answer before the deadline"
    if isinstance(answer, ProtocolError):
        return str(answer)
    if isinstance(answer, Refusal):
        return answer.reason
    if not isinstance(answer, AssessReply) or (answer.site, answer.request_digest) != (site, request.digest):
        return "it does not answer these questions"
    told = answer.tallies
    # Noise can make counts negative.
    least = 0.0 if not asked.form.noise else -_MOST
    if told.shape != (asked.size,) or not np.isfinite(told).all() or told.min() < least or told.max() > _MOST:
        return "its tallies are no counts of the agreed form"
    return "" if asked.form.noise else _inconsistent(told, asked)


def _inconsistent(told: NDArray[np.float32], asked: TaskEvaluation) -> str:
    """Say what in exact tallies contradicts itself: one site must not spoil the others' figures."""
    form = asked.form
    for part in told.reshape(len(asked.tasks), form.size).astype(np.float64):
        cells = part[: 2 * form.parts * form.bins].reshape(2, form.parts, form.bins)
        moments, totals = part[cells.size :].reshape(2, 2), cells.sum(2)
        if (cells != cells.round()).any() or (totals != totals[:, :1]).any():
            return "its cells are no counts of the same predictions"
        if (moments > totals[:, :1] * (1 + 1e-6)).any() or (moments[:, 1] > moments[:, 0] * (1 + 1e-6) + 1e-6).any():
            return "its sums of risks don't fit its counts"
    return ""

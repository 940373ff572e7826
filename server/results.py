"""What a study has to say, as plain values: settings, data, training, ledger, and the answers of every arm.

A `Report` is complete: `report.json` is its canonical JSON, and pages and tables are made from nothing else
(`server.report`). `ask` turns labels and risks into the figures of a question. A figure that isn't defined is None with
a reason, never nan.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from model import metrics
from model.cohort import Counts
from model.known_truth import AgainstTruth, against_truth
from model.tasks import Task

Kind = Literal["federated", "pooled", "ensemble", "alone", "supervised", "truth"]

# What an arm may stand for, in the order of tables, and what that means.
KINDS: dict[Kind, str] = {
    "federated": "all sites train one model together; records stay where they are",
    "pooled": "the records of all sites in one place: the ceiling that a federation can't have",
    "ensemble": "the mean of the risks that the sites' own models give",
    "alone": "one site trains by itself",
    "supervised": "a model trained for this question only, on counts and last values, of all sites pooled or of one",
    "truth": "the risk by which the synthetic patients' fate was drawn: the best possible answer",
}


@dataclass(frozen=True)
class Figure:
    """A number with its 95 % interval; None where it isn't defined, `note` says why."""

    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Calibration:
    """Predicted against observed risk by bins of about equal size, with 95 % limits of the observed share."""

    predicted: tuple[float, ...]
    observed: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    count: tuple[int, ...]


@dataclass(frozen=True)
class Known:
    """An arm against the known risks of made-up patients, over endlessly many draws of their fates.

    Attributes:
        auroc: the expected one.
        behind: the best possible AUROC (the true risk's) minus it, paired.
        slope: of recalibration towards the true risks; 1 is perfect.
        mean_risk: the arm's mean risk over the true mean; 1 is perfect.
    """

    auroc: Figure
    behind: Figure
    slope: Figure
    mean_risk: Figure


@dataclass(frozen=True)
class ArmResult:
    """How well one arm answers a question.

    Attributes:
        arm: its name.
        kind: what it stands for; gives its place and colour.
        auroc, auprc, brier, ece: with intervals over patients.
        difference: its AUROC minus the reference arm's, paired; None for that arm.
        roc: false and true positive rates; empty where undefined.
        calibration: by bins.
        unresolved: share of trajectories that gave no answer; None where risks don't come from trajectories.
        slope, intercept: of the logistic regression of outcomes on the log-odds of risks; 1 and 0 are perfect.
        known: against the true risks, where they are known.
    """

    arm: str
    kind: Kind
    auroc: Figure
    auprc: Figure
    brier: Figure
    ece: Figure
    difference: Figure | None
    roc: tuple[tuple[float, ...], tuple[float, ...]]
    calibration: Calibration
    unresolved: float | None = None
    slope: Figure = Figure(None)
    intercept: Figure = Figure(None)
    known: Known | None = None


@dataclass(frozen=True)
class SiteResult:
    """AUROC of every arm on one site's own patients; `gain` is the reference arm's minus that of the site alone."""

    site: str
    predictions: int
    positives: int
    auroc: Mapping[str, Figure]
    gain: Figure | None = None


@dataclass(frozen=True)
class Question:
    """A question, whom it was put to, and every arm's answer.

    Attributes:
        name, question: as in the task.
        definition: its terms for people: (term, text).
        patients: that were asked about.
        counts: how the cohort came about.
        reference: the arm that `difference` compares with.
        resamples: of the bootstrap.
        arms: in the order of the tables.
        by_site: the same question on each site's own patients; may be empty.
        notes: what the codebook or the records could not tell.
    """

    name: str
    question: str
    definition: tuple[tuple[str, str], ...]
    patients: int
    counts: Counts
    reference: str
    resamples: int
    arms: tuple[ArmResult, ...]
    by_site: tuple[SiteResult, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SiteSummary:
    """A site's data: patients by split, tokens of the training split; `note` says why a site took no part.

    `epsilon` is what the federated run has cost its patients, by the site's own ledger; None without differential
    privacy. In a private run, tokens are not told, and 0.
    """

    name: str
    patients: int
    train: int
    tuning: int
    held_out: int
    tokens: int
    note: str = ""
    epsilon: float | None = None


@dataclass(frozen=True)
class Training:
    """An arm's course: the loss on its tuning patients (nats a token) by round; `best` is the round that was used."""

    arm: str
    kind: Kind
    rounds: tuple[int, ...]
    loss: tuple[float, ...]
    best: int
    tokens: int = 0
    note: str = ""


@dataclass(frozen=True)
class Round:
    """One round of the federated arm, as its ledger has it; `refusals` are `site: reason`."""

    round: int
    accepted: int
    refused: int
    tokens: int
    bytes_received: int
    seconds: float
    loss: float | None
    refusals: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outbound:
    """What left a site, by kind of message."""

    site: str
    what: str
    messages: int
    bytes_sent: int


@dataclass(frozen=True)
class Codebook:
    """The shared vocabulary: tokens by kind."""

    hash: str
    tokens: Mapping[str, int]
    note: str = ""


@dataclass(frozen=True)
class Together:
    """A question that the sites answered at home: what their tallies say together, and the same from all predictions.

    `figures` are (name, merged with the interval in which the pooled one must lie, pooled); `pooled_predictions` counts
    what the pooled figures are of.
    """

    question: str
    sites: tuple[str, ...]
    predictions: float
    pooled_predictions: int
    figures: tuple[tuple[str, Figure, float | None], ...]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that a study has to say.

    Attributes:
        title: for people.
        name: of the study.
        created: when, as text; empty if it should not matter.
        introduction: what was done, a sentence or two.
        settings: (term, text).
        sites: their data.
        questions: the results.
        training: every trained arm's course.
        rounds: the federated arm's ledger.
        outbound: what left the sites.
        codebook: the vocabulary.
        command: what makes this report again.
        versions, hashes: (term, text), for the same purpose.
        notes: what else a reader must know.
        together: questions that sites answered themselves.
    """

    title: str
    name: str
    introduction: str
    settings: tuple[tuple[str, str], ...]
    sites: tuple[SiteSummary, ...]
    questions: tuple[Question, ...]
    training: tuple[Training, ...]
    rounds: tuple[Round, ...]
    outbound: tuple[Outbound, ...]
    codebook: Codebook
    command: str
    versions: tuple[tuple[str, str], ...]
    hashes: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()
    created: str = ""
    together: tuple[Together, ...] = ()


def ask(
    task: Task,
    counts: Counts,
    labels: ArrayLike,
    risks: Mapping[str, ArrayLike],
    kinds: Mapping[str, Kind],
    *,
    subjects: NDArray[np.int64],
    seed: int,
    resamples: int,
    reference: str | None = None,
    unresolved: Mapping[str, float] | None = None,
    sites: tuple[Sequence[str], NDArray[np.int64]] | None = None,
    notes: tuple[str, ...] = (),
) -> Question:
    """Measure every arm's answers to a question.

    Args:
        task: the question.
        counts: of its cohort.
        labels: 0 or 1, [P].
        risks: [P] by arm, in the order of the tables.
        kinds: what each arm stands for.
        subjects: whose prediction each is, int64 [P]: the unit of the intervals.
        seed, resamples: of the bootstrap.
        reference: the arm to compare with; the federated one if None, or else the first.
        unresolved: share of trajectories without answer, by arm.
        sites: names of sites, and each prediction's site, int64 [P]; adds every site's own figures.
        notes: to show beside the results.
    """
    order = sorted(risks, key=lambda arm: list(KINDS).index(kinds[arm]))
    against = reference or next((arm for arm in order if kinds[arm] == "federated"), order[0])
    arms = {arm: np.asarray(risks[arm], np.float64) for arm in order}
    truth = np.asarray(labels, np.float64)
    draws: dict[str, Any] = {"seed": seed, "resamples": resamples, "subjects": subjects}
    table = metrics.compare(truth, arms, reference=against, **draws)
    oracle = next((risk for arm, risk in arms.items() if kinds[arm] == "truth"), None)
    known = {} if oracle is None else against_truth(oracle, arms, **draws)
    results = []
    for row in table.rows:
        curve, bins = metrics.roc(truth, arms[row.arm]), metrics.calibration(truth, arms[row.arm])
        results.append(
            ArmResult(
                arm=row.arm,
                kind=kinds[row.arm],
                auroc=_figure(row.auroc),
                auprc=_figure(row.auprc),
                brier=_figure(row.brier),
                ece=_figure(row.ece),
                difference=None if row.difference is None else _figure(row.difference),
                roc=(tuple(curve.x.tolist()), tuple(curve.y.tolist())),
                calibration=Calibration(*(tuple(column.tolist()) for column in vars(bins).values())),
                unresolved=(unresolved or {}).get(row.arm),
                slope=_figure(row.slope),
                intercept=_figure(row.intercept),
                known=_known(known[row.arm]) if known else None,
            )
        )
    own = []
    for number, site in enumerate(sites[0]) if sites is not None else ():
        mine = np.flatnonzero(sites[1] == number) if sites is not None else np.zeros(0, np.int64)
        if len(mine):
            here = {arm: risk[mine] for arm, risk in arms.items()}
            alone = f"{site} alone" if f"{site} alone" in here else against
            rows = metrics.compare(
                truth[mine], here, reference=alone, calibrated=False, **(draws | {"subjects": subjects[mine]})
            ).rows
            figures = {row.arm: _figure(row.auroc) for row in rows}
            gains = [_figure(row.difference) for row in rows if row.arm == against and row.difference is not None]
            own.append(SiteResult(site, len(mine), int(truth[mine].sum()), figures, gains[0] if gains else None))
    return Question(
        name=task.name,
        question=task.question,
        definition=_define(task),
        patients=table.patients,
        counts=counts,
        reference=against,
        resamples=resamples,
        arms=tuple(results),
        by_site=tuple(own),
        notes=notes,
    )


def _known(found: AgainstTruth) -> Known:
    return Known(*(_figure(measure) for measure in vars(found).values()))


def _figure(measure: metrics.Measure | None) -> Figure:
    if measure is None:
        return Figure(None)
    value, low, high = (None if np.isnan(n) else float(n) for n in (measure.value, measure.low, measure.high))
    return Figure(value, low, high, measure.note)


def _define(task: Task) -> tuple[tuple[str, str], ...]:
    when = f"{task.occurrence} {' or '.join(task.trigger)}" if task.occurrence != "each" else ""
    start = when or f"every {' or '.join(task.trigger)}"
    if task.after_hours:
        start += f", {task.after_hours:g} h later"
    until = "whichever comes first" if task.horizon_days is None else f"within {task.horizon_days:g} days"
    terms = [("Asked at", start), ("Yes", f"{' or '.join(task.outcome)}, {until}")]
    if task.competing:
        terms.append(("No, if before that", " or ".join(task.competing)))
    return tuple(terms)

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

Kind = Literal["federated", "pooled", "ensemble", "personal", "alone", "supervised", "truth"]

# What an arm may stand for, in the order of tables, and what that means.
KINDS: dict[Kind, str] = {
    "federated": "all sites train one model together; records stay where they are",
    "pooled": "the records of all sites in one place: the ceiling that a federation can't have",
    "ensemble": "the mean of the risks that the sites' own models give",
    "personal": "the federation's model, trained on at one site as far as its own patients gain by it; it stays there",
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
        difference, auprc_difference: its AUROC and AUPRC minus the reference arm's, paired; None for that arm.
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
    auprc_difference: Figure | None = None
    unresolved: float | None = None
    slope: Figure = Figure(None)
    intercept: Figure = Figure(None)
    known: Known | None = None


@dataclass(frozen=True)
class SiteArm:
    """What one arm is worth to a site: `role` says what it is from there, `arm` is its name in the study.

    `gain` is its AUROC minus that of the site alone, paired, on the site's own patients; None for that arm, or without
    it.
    """

    role: str
    arm: str
    auroc: Figure
    auprc: Figure
    gain: Figure | None = None


@dataclass(frozen=True)
class SiteResult:
    """A question on one site's own held-out patients: the arms that this site could have had."""

    site: str
    predictions: int
    positives: int
    arms: tuple[SiteArm, ...]


@dataclass(frozen=True)
class GroupScore:
    """A group's figures, and how they differ from everybody else's; empty for all patients together."""

    name: str
    patients: int
    predictions: int
    figures: Mapping[str, Figure]
    difference: Mapping[str, Figure]


@dataclass(frozen=True)
class Scorecard:
    """One task's measures; the decision curve is net benefit of the model and of treating all, by threshold.

    `over_time` is the AUROC by a day of the risk told for that day, where the predictions hold risks by day.
    """

    task: str
    groups: tuple[GroupScore, ...]
    thresholds: tuple[float, ...]
    net_benefit: tuple[float, ...]
    treat_all: tuple[float, ...]
    notes: tuple[str, ...] = ()
    over_time: tuple[tuple[float, Figure], ...] = ()


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
        score: the reference arm's figures in groups of patients, over time, and its decision curve.
        hashes: (term, text) of what the answers depend on.
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
    score: Scorecard | None = None
    hashes: tuple[tuple[str, str], ...] = ()


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

    `figures` are (name, merged with the interval in which the pooled one must lie, pooled), `intervals` the same merged
    figures with their 95 % intervals; `pooled_predictions` counts what the pooled figures are of.
    """

    question: str
    sites: tuple[str, ...]
    predictions: float
    pooled_predictions: int
    figures: tuple[tuple[str, Figure, float | None], ...]
    note: str = ""
    intervals: tuple[Figure, ...] = ()


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
    return measure(
        task.name,
        task.question,
        labels,
        risks,
        kinds,
        subjects=subjects,
        seed=seed,
        resamples=resamples,
        definition=define(task),
        counts=counts,
        hashes=(("Task, sha256", task.hash),),
        reference=reference,
        unresolved=unresolved,
        sites=sites,
        notes=notes,
    )


def measure(
    name: str,
    question: str,
    labels: ArrayLike,
    risks: Mapping[str, ArrayLike],
    kinds: Mapping[str, Kind],
    *,
    subjects: NDArray[np.int64],
    seed: int,
    resamples: int,
    definition: tuple[tuple[str, str], ...],
    counts: Counts,
    hashes: tuple[tuple[str, str], ...],
    reference: str | None = None,
    unresolved: Mapping[str, float] | None = None,
    sites: tuple[Sequence[str], NDArray[np.int64]] | None = None,
    notes: tuple[str, ...] = (),
    score: Scorecard | None = None,
) -> Question:
    """Measure answers as `ask` does, to a question of which only name, text and definition are known."""
    order = sorted(risks, key=lambda arm: list(KINDS).index(kinds[arm]))
    against = reference or next((arm for arm in order if kinds[arm] == "federated"), order[0])
    arms = {arm: np.asarray(risks[arm], np.float64) for arm in order}
    truth = np.asarray(labels, np.float64)
    draws: dict[str, Any] = {"seed": seed, "resamples": resamples, "subjects": subjects}
    table = metrics.compare(truth, arms, reference=against, **draws)
    oracle = next((risk for arm, risk in arms.items() if kinds[arm] == "truth"), None)
    known = {} if oracle is None or not len(truth) else against_truth(oracle, arms, **draws)
    own = []
    for number, site in enumerate(sites[0]) if sites is not None else ():
        mine = np.flatnonzero(sites[1] == number) if sites is not None else np.zeros(0, np.int64)
        if len(mine):
            here = {arm: risk[mine] for arm, risk in arms.items()}
            found = _at_site(site, truth[mine], here, kinds, subjects[mine], seed=seed, resamples=resamples)
            own.append(SiteResult(site, len(mine), int(truth[mine].sum()), found))
    return Question(
        name=name,
        question=question,
        definition=definition,
        patients=table.patients,
        counts=counts,
        reference=against,
        resamples=resamples,
        arms=tuple(
            _result(row, truth, arms[row.arm], kinds[row.arm], unresolved or {}, known.get(row.arm))
            for row in table.rows
        ),
        by_site=tuple(own),
        notes=notes,
        score=score,
        hashes=hashes,
    )


def _known(found: AgainstTruth) -> Known:
    return Known(*(_figure(measure) for measure in vars(found).values()))


def _result(
    row: metrics.Row,
    truth: NDArray[np.float64],
    risk: NDArray[np.float64],
    kind: Kind,
    lost: Mapping[str, float],
    known: AgainstTruth | None,
) -> ArmResult:
    curve, bins = metrics.roc(truth, risk), metrics.calibration(truth, risk)
    return ArmResult(
        arm=row.arm,
        kind=kind,
        auroc=_figure(row.auroc),
        auprc=_figure(row.auprc),
        brier=_figure(row.brier),
        ece=_figure(row.ece),
        difference=None if row.difference is None else _figure(row.difference),
        auprc_difference=None if row.auprc_difference is None else _figure(row.auprc_difference),
        roc=(tuple(curve.x.tolist()), tuple(curve.y.tolist())),
        calibration=Calibration(*(tuple(column.tolist()) for column in vars(bins).values())),
        unresolved=lost.get(row.arm),
        slope=_figure(row.slope),
        intercept=_figure(row.intercept),
        known=None if known is None else _known(known),
    )


def _at_site(
    site: str,
    truth: NDArray[np.float64],
    risks: Mapping[str, NDArray[np.float64]],
    kinds: Mapping[str, Kind],
    subjects: NDArray[np.int64],
    *,
    seed: int,
    resamples: int,
) -> tuple[SiteArm, ...]:
    """Compare what a site could have, on its own patients; with its own model where it has one."""
    parts = {arm: role for arm in risks if (role := _role(arm, kinds[arm], site))}
    if not parts:
        return ()
    alone = next((arm for arm in parts if kinds[arm] == "alone"), None)
    rows = metrics.compare(
        truth,
        {arm: risks[arm] for arm in parts},
        seed=seed,
        resamples=resamples,
        reference=alone or next(iter(parts)),
        subjects=subjects,
        calibrated=False,
    ).rows
    gains = {row.arm: _figure(row.difference) for row in rows if alone and row.difference is not None}
    return tuple(
        SiteArm(parts[row.arm], row.arm, _figure(row.auroc), _figure(row.auprc), gains.get(row.arm)) for row in rows
    )


def _role(arm: str, kind: Kind, site: str) -> str:
    """What an arm is to a site; empty for another site's own."""
    if kind == "alone":
        return "alone" if arm == f"{site} alone" else ""
    if kind == "personal":
        return "personal" if arm == f"{site} personal" else ""
    if kind == "supervised":
        model, _, where = arm.partition(", ")
        return {site: f"{model}, local", "pooled": f"{model}, pooled"}.get(where, "")
    return {"federated": "global", "truth": "true risk"}.get(kind, kind)


def _figure(measure: metrics.Measure | None) -> Figure:
    if measure is None:
        return Figure(None)
    value, low, high = (None if np.isnan(n) else float(n) for n in (measure.value, measure.low, measure.high))
    return Figure(value, low, high, measure.note)


def define(task: Task) -> tuple[tuple[str, str], ...]:
    """Tell what a task asks, for people: (term, text)."""
    triggers = " or ".join(task.trigger)
    start = f"every {triggers}" if task.occurrence == "each" else f"{task.occurrence} {triggers}"
    if task.calendar or task.given:
        start = ", ".join(task.calendar) or "the times in a file of labels"
    if task.after_hours:
        start += f", {task.after_hours:g} h later"
    until = "whichever comes first" if task.horizon_days is None else f"within {task.horizon_days:g} days"
    terms = [("Asked at", start), ("Yes", f"{' or '.join(task.outcome)}, {until}")]
    if task.competing:
        terms.append(("No, if before that", " or ".join(task.competing)))
    if task.onset == "new":
        terms.append(("Not asked", "whoever had the outcome before"))
    return tuple(terms)

"""From a finished study to its report: ledgers, answers and codebook become the figures that people read."""

import hashlib
import json
import math
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

import numpy as np
import polars as pl

from client.archive import Archive
from client.budget import FILE, Budget, State
from client.files import SiteFiles
from federation import protection
from federation.accountant import epsilon
from federation.manifest import Manifest, OuterOptions, software_version
from federation.merged import Bounded, ece_at
from federation.summed import update_bytes
from model import metrics
from model.cohort import join
from model.people import groups_of
from server.app import Outcome
from server.assessment import Assessment
from server.central import PREFIX
from server.journal import GIVEN_UP, Journal, Status
from server.results import Codebook as CodebookSummary
from server.results import (
    Figure,
    Kind,
    Outbound,
    Question,
    Report,
    Round,
    Scorecard,
    SiteSummary,
    Together,
    Training,
    ask,
)
from server.rounds import TUNING
from server.scorecard import scorecards
from simulation.arms import FEDERATED, POOLED, Arm
from simulation.baselines import BOOSTING, LOGISTIC
from simulation.config import Study
from simulation.questions import ENSEMBLE, MODEL, TRUTH, Answers, counts_of, table_of
from simulation.study import Result
from tokenizer.codebook import Codebook
from tokenizer.split import SPLITS
from tokenizer.store import TokenStore

_GROUP_RESAMPLES = 100
"""Of the figures in groups, of which there are many; each is a fit or a ranking of its own."""
_TOLD = ("torch", "flwr", "numpy", "polars")


_KINDS: dict[str, Kind] = {
    MODEL: "federated",
    FEDERATED: "federated",
    POOLED: "pooled",
    ENSEMBLE: "ensemble",
    TRUTH: "truth",
}


def report_of(result: Result, command: str) -> Report:
    """Tell what a study found.

    Args:
        result: the finished study.
        command: what the user typed, to be shown as the way to make it again.
    """
    study = result.study
    federated = next(arm for arm in result.arms if arm.name == FEDERATED)
    with Journal(federated.folder / "ledger.sqlite") as journal:
        rounds, outbound = _rounds(journal), _outbound(federated, journal)
        sites = _site_summaries(result, journal)
    outcome = _outcome(federated)
    codebook = Codebook.load(outcome.codebook)
    failures = [f"{arm.name}: could not be trained ({arm.failure})" for arm in result.arms if arm.failure]
    return Report(
        title=study.title or study.name,
        name=study.name,
        introduction=_introduction(result),
        settings=_settings(result, federated),
        sites=sites,
        questions=tuple(
            question_of(study, answers, [site.name for site in result.sites], codebook) for answers in result.answers
        ),
        training=tuple(_training(arm) for arm in result.arms),
        rounds=rounds,
        outbound=outbound,
        codebook=CodebookSummary(
            codebook.hash,
            dict(sorted(Counter(token.kind for token in codebook.tokens).items())),
            f"built from counts and histograms of at least {codebook.options.min_patients} patients each",
        ),
        command=command,
        versions=(
            ("fedcomet", software_version()),
            ("python", platform.python_version()),
            *((name, metadata.version(name)) for name in _TOLD),
            ("machine", f"{platform.system()} {platform.machine()}"),
        ),
        hashes=(
            ("study", study.digest()),
            ("codebook", codebook.hash),
            ("run manifest", outcome.manifest.hash),
            ("ledger", outcome.ledger_fingerprint),
            ("model", hashlib.sha256(outcome.best_checkpoint.read_bytes()).hexdigest()),
            *_data_hashes(result, outcome.manifest),
        ),
        notes=(*result.notes, *failures, *_reading_notes(result)),
        together=_together(result, federated),
    )


def _together(result: Result, federated: Arm) -> tuple[Together, ...]:
    """What the sites' own answers say together, beside the same figures of all predictions in one place."""
    asked = _outcome(federated).manifest.tasks
    path = federated.folder / "assessments" / f"{_outcome(federated).manifest.rounds:04d}.json"
    if asked is None or not path.exists():
        return ()
    found = Assessment.from_bytes(path.read_bytes(), str(path))
    told = []
    for answers in result.answers:
        labels, risks = answers.cohort.labels, answers.risks[FEDERATED]
        merged = found.questions.get(answers.task.name)
        if merged is None or merged.auroc.value is None or not len(labels):
            reason = found.reason or "no site has enough patients with and without the outcome"
            told.append(Together(answers.task.name, found.sites, 0, len(labels), (), reason))
            continue
        slope, intercept = metrics.recalibration(labels, risks)
        pooled = {
            "auroc": metrics.auroc(labels, risks),
            "auprc": metrics.auprc(labels, risks),
            "brier": metrics.brier(labels, risks),
            "ece": ece_at(labels, risks, asked.form, merged.cuts),
            "slope": slope,
            "intercept": intercept,
        }
        figures, intervals = [], []
        for name, value in pooled.items():
            part: Bounded = getattr(merged, name)
            intervals.append(Figure(part.value, part.least, part.most))
            figures.append((name, Figure(part.value, part.low, part.high), None if math.isnan(value) else value))
        same = merged.predictions == len(labels) and asked.split == SPLITS[2]
        note = "" if same else "the pooled figures are of other predictions or rollouts than the sites' own"
        row = (answers.task.name, found.sites, merged.predictions, len(labels), tuple(figures), note)
        told.append(Together(*row, tuple(intervals)))
    return tuple(told)


def _outcome(arm: Arm) -> Outcome:
    if arm.outcome is None:
        raise AssertionError("a federated arm that fails raises before this")
    return arm.outcome


def _introduction(result: Result) -> str:
    study, sites = result.study, len(result.sites)
    made = {
        "synthetic": f"{sites} made-up hospitals with different case mixes",
        "meds": f"the patients of one dataset, split into {sites} sites,",
        "sites": f"{sites} sites",
    }[study.data.kind]
    return (
        f"{made[0].upper()}{made[1:]} trained one model together through Flower without showing their records. "
        "Simulated timelines of the model then answered questions about patients whom it had never seen."
    )


def _settings(result: Result, federated: Arm) -> tuple[tuple[str, str], ...]:
    study, train = result.study, result.study.training
    manifest = _outcome(federated).manifest
    work = f"{train.local_epochs:g} passes" if train.local_epochs is not None else f"{train.local_steps} steps"
    outer = manifest.outer
    optimizer = {"adamw": "AdamW", "muon": "Muon", "sgd": "SGD"}[train.optimizer]
    futures = "; ".join(f"{study.trajectories(task.name)} for {task.name}" for task in study.task)
    preset = "own shape" if study.model.layers else study.model.preset
    names = {"nesterov": "Nesterov", "adam": "FedAdam", "yogi": "FedYogi"}
    how = "FedAvg"
    if outer.name != "fedavg":
        how = f"{names[outer.name]}, momentum {outer.momentum:g}, learning rate {outer.lr:g}"
    if train.proximal:
        how += f"; FedProx with mu {train.proximal:g}"
    if train.correct_drift:
        how += "; drift corrected (SCAFFOLD)"
    return (
        (
            "Model",
            f"{preset}: {manifest.model.parameters():,} parameters, context {manifest.model.context}",
        ),
        ("Values", f"{study.tokenizer.values}, {study.tokenizer.value_bins} bins"),
        ("Rounds", f"{train.rounds}, each with {work} over a site's own patients"),
        (
            "Inner optimizer",
            f"{optimizer}, peak learning rate {train.learning_rate:g}, batches of {train.batch_tokens:,} tokens",
        ),
        ("Outer optimizer", f"{how}, on the {_rule(outer)} of the updates"),
        ("Transport", f"updates as {manifest.transport.update}, weights as {manifest.transport.weights}"),
        ("Rollouts", f"trajectories for each prediction: {futures}"),
        (
            "Split",
            f"{study.split.tuning:.0%} tuning, {study.split.held_out:.0%} held out, by keyed hash of the patient",
        ),
        ("Privacy", _privacy(manifest)),
        *_tuning(federated, manifest),
        *_central(study, federated, manifest),
    )


def _central(study: Study, federated: Arm, manifest: Manifest) -> tuple[tuple[str, str], ...]:
    """What the server's own questions said, and whether they ended the federated arm."""
    if (chosen := study.evaluation.central) is None:
        return ()
    with Journal(federated.folder / "ledger.sqlite") as journal:
        values, done = journal.figures(f"{PREFIX}{chosen.metric}"), journal.committed()
    told = ", ".join(f"{value:.3f} after round {number}" for number, value in sorted(values.items()))
    early = f"; ended early, after round {done}" if done < manifest.rounds else ""
    return (("The server's own questions", f"{chosen.metric} on its own cohort: {told or 'none was told'}{early}"),)


def _tuning(federated: Arm, manifest: Manifest) -> tuple[tuple[str, str], ...]:
    """How large the noise of a private run's tuning losses is."""
    if manifest.privacy is None or (told := manifest.privacy.evaluation) is None:
        return ()
    with Journal(federated.folder / "ledger.sqlite") as journal:
        good = [score for score in journal.scores() if score.status is Status.ACCEPTED]
        sizes = [(len(sum_.sites.split(",")), sum_.tokens) for sum_ in journal.sums(f"evaluate {TUNING}") if sum_.sites]
        for number in sorted({score.round for score in good}):
            of_round = [score.tokens for score in good if score.round == number]
            sizes.append((len(of_round), sum(of_round)))
    if not sizes or not sizes[-1][1]:
        return (("Tuning loss", "none could be summed"),)
    sites, patients = sizes[-1]
    deviation = told.noise_multiplier * told.bound * math.sqrt(sites) / patients
    text = (
        f"mean over {patients:,} patients of {sites} sites of their mean loss per token, cut at {told.bound:g} nats, "
        f"with noise of standard deviation {deviation:.3g} nats ({told.noise_multiplier:g} x {told.bound:g} on each "
        "site's sum): rounds that differ by less can't be told apart by it"
    )
    return (("Tuning loss", text),)


def _rule(outer: OuterOptions) -> str:
    rule = {"mean": "weighted mean", "median": "median", "trimmed_mean": "trimmed mean", "krum": "Multi-Krum mean"}
    bears = f" (bears {outer.byzantine} hostile)" if outer.byzantine else ""
    cut = f", each cut to norm {outer.clip_norm:g}" if outer.clip_norm else ""
    share = f", none more than {outer.max_share:.0%}" if outer.max_share < 1 else ""
    return rule[outer.rule] + bears + share + cut


def _privacy(manifest: Manifest) -> str:
    privacy = manifest.privacy
    if privacy is None:
        return f"no differential privacy; {_summing(manifest)}"
    steps = protection.releases_of_round(privacy, manifest.local) * manifest.rounds
    how = {"dp-sgd": "DP-SGD", "local": "noise on the update"}.get(
        privacy.mechanism, f"noise shared out over {privacy.honest_sites} honest sites, a share of it"
    )
    losses = "" if privacy.evaluation is None else ", and noised tuning losses"
    return (
        f"{how} at every site: epsilon {privacy.epsilon:g} at most, at delta {privacy.delta:g}, for the whole record "
        f"of each patient (add or remove one); {steps} noised sums, sampling rate {privacy.sampling_rate:g}, noise "
        f"{privacy.noise_multiplier:g} x clip {privacy.clip:g}{losses}; {_summing(manifest)}"
    )


def _summing(manifest: Manifest) -> str:
    if (chosen := manifest.secure_aggregation) is None:
        return "no secure aggregation"
    return (
        f"secure aggregation: of updates and losses the coordinator sees sums over {chosen.min_sites} sites or more "
        f"only; {chosen.masking.threshold} of {len(chosen.roster)} open them"
    )


def _spent(site: SiteFiles, manifest: Manifest) -> float | None:
    """What a run has cost the patients of a site, as the site's own ledger has it."""
    if manifest.privacy is None:
        return None
    with Budget.open(site.budget or site.state / FILE) as budget:
        charges = [charge for charge in budget.charges() if charge.release.run == manifest.hash]
    counted = [charge for charge in charges if charge.state != State.FREED]
    return epsilon([each for charge in counted for each in charge.release.mechanisms.all], manifest.privacy.delta)


def _site_summaries(result: Result, journal: Journal) -> tuple[SiteSummary, ...]:
    known = {entry.site: entry for entry in journal.sites()}
    manifest = journal.manifest()
    summaries = []
    for site in result.sites:
        entry = known.get(site.name)
        if entry is None or entry.status is not Status.ACCEPTED:
            reason = "took no part" if entry is None else entry.reason
            summaries.append(SiteSummary(site.name, 0, 0, 0, 0, 0, reason))
            continue
        splits = json.loads(entry.counts)["splits"]
        if manifest is not None and manifest.secure_aggregation is not None:
            splits = _sizes(site, manifest)
        train, tuning, held_out = (int(splits[name]["patients"]) for name in SPLITS)
        tokens = int(splits["train"]["tokens"])
        cost = None if manifest is None else _spent(site, manifest)
        patients = train + tuning + held_out
        summaries.append(SiteSummary(site.name, patients, train, tuning, held_out, tokens, epsilon=cost))
    return tuple(summaries)


def _data_hashes(result: Result, manifest: Manifest) -> list[tuple[str, str]]:
    """The fingerprint of every site's records, as its token store has it."""
    found = []
    for site in result.sites:
        archive = Archive(site.state)
        if (agreement := archive.run(manifest.hash).agreement()) is not None:
            store = TokenStore.open(archive.store_path(agreement.store), manifest.codebook_hash)
            found.append((f"records of {site.name}", str(store.manifest["dataset_fingerprint"])))
    return found


def _sizes(site: SiteFiles, manifest: Manifest) -> dict[str, Any]:
    """A site's own sizes, which it does not tell its coordinator in a run with secure aggregation."""
    archive = Archive(site.state)
    agreement = archive.run(manifest.hash).agreement()
    if agreement is None:
        raise AssertionError("a site that takes part has agreed")
    sizes: dict[str, Any] = TokenStore.open(archive.store_path(agreement.store), manifest.codebook_hash).manifest
    return dict(sizes["splits"])


def question_of(study: Study, answers: Answers, sites: Sequence[str], codebook: Codebook | None = None) -> Question:
    """Measure the answers to a question.

    Args:
        study: its seed and its resamples are used.
        answers: every arm's risks.
        sites: names by the index in `answers.sites`; none for no figures of single sites.
        codebook: what the prompts' tokens mean, for figures of groups of patients; without, there are none.
    """
    question = ask(
        answers.task,
        counts_of(answers),
        answers.cohort.labels,
        answers.risks,
        {name: _kind(name) for name in answers.risks},
        subjects=answers.cohort.subject_ids,
        seed=study.seed,
        resamples=study.evaluation.resamples,
        unresolved=answers.unresolved,
        sites=(sites, answers.sites) if sites else None,
        notes=answers.cohort.notes,
    )
    if codebook is None or not len(answers.cohort):
        return question
    return replace(question, score=_score(study, answers, question.reference, sites, codebook))


def _score(study: Study, answers: Answers, arm: str, sites: Sequence[str], codebook: Codebook) -> Scorecard:
    """Measure one arm in groups of patients and over time."""
    whole = answers.cohort if answers.lost is None else join([answers.cohort, answers.lost])
    places = answers.sites if answers.lost is None else np.concatenate([answers.sites, answers.lost_sites])
    groups = groups_of(whole, codebook)
    if len(sites) > 1:
        groups["site"] = [sites[place] for place in places]
    table = table_of(answers, arm).with_columns(pl.Series(name, column) for name, column in groups.items())
    (card,) = scorecards(
        table,
        list(groups),
        horizon_days=answers.task.horizon_days,
        seed=study.seed,
        resamples=min(study.evaluation.resamples, _GROUP_RESAMPLES),
    )
    return card


def _kind(arm: str) -> Kind:
    if arm.startswith((LOGISTIC, BOOSTING)):
        return "supervised"
    return _KINDS.get(arm, "personal" if arm.endswith(" personal") else "alone")


def _training(arm: Arm) -> Training:
    if arm.outcome is None:
        return Training(arm.name, _kind(arm.name), (), (), 0, 0, arm.failure)
    with Journal(arm.folder / "ledger.sqlite") as journal:
        losses = dict(sorted(journal.losses(TUNING).items()))
        if arm.begun_at is not None:
            losses = {0: arm.begun_at, **losses}
        private = arm.outcome.manifest.privacy is not None
        tokens = 0 if private else journal.work(journal.committed()).tokens
    best = int(stem) if (stem := arm.outcome.best_checkpoint.stem).isdecimal() else 0  # the model that it began with
    return Training(arm.name, _kind(arm.name), tuple(losses), tuple(losses.values()), best, tokens)


def _rounds(journal: Journal) -> tuple[Round, ...]:
    rounds = []
    losses = journal.losses(TUNING)
    manifest = journal.manifest()
    private = manifest is not None and manifest.privacy is not None
    for number in range(1, journal.committed() + 1):
        replies = journal.replies(number)
        good = [reply for reply in replies if reply.status is Status.ACCEPTED]
        bad = [f"{reply.site}: {reply.reason}" for reply in replies if reply.status is not Status.ACCEPTED]
        tokens, received = sum(reply.tokens for reply in good), sum(reply.bytes for reply in good)
        accepted = len(good)
        if manifest is not None and (masked := journal.sum(number, "train")) is not None:
            accepted, tokens = len(masked.sites.split(",")) if masked.sites else 0, masked.tokens
            received = accepted * update_bytes(manifest)
            bad += [masked.dropped] if masked.dropped else []
            bad += [f"given up: {masked.reason}"] if masked.stage == GIVEN_UP else []
        rounds.append(
            Round(
                round=number,
                accepted=accepted,
                refused=len(bad),
                tokens=0 if private else tokens,
                bytes_received=received,
                seconds=max((reply.seconds for reply in good), default=0.0),
                loss=losses.get(number),
                refusals=tuple(bad),
            )
        )
    return tuple(rounds)


def _outbound(federated: Arm, journal: Journal) -> tuple[Outbound, ...]:
    """Count what left each site, in bytes of content without envelopes."""
    sent = []
    numbers, manifest = range(1, journal.committed() + 1), journal.manifest()
    private = None if manifest is None else manifest.privacy
    replies = [reply for number in numbers for reply in journal.replies(number)]
    scores = [score for score in journal.scores() if score.round in numbers]
    for entry in journal.sites():
        survey = federated.folder / "surveys" / f"{entry.site}.json"
        if survey.exists():
            sent.append(Outbound(entry.site, "survey (counts, histograms)", 1, survey.stat().st_size))
        if entry.counts:
            sent.append(Outbound(entry.site, "sizes of the splits", 1, len(entry.counts)))
        what = (
            "model update, with token count and loss"
            if manifest is None or manifest.privacy is None
            else "noised update"
        )
        updates = [r.bytes for r in replies if r.site == entry.site and r.status is Status.ACCEPTED]
        if manifest is not None and manifest.secure_aggregation is not None:
            what, size = "update under masks, with token count and loss", update_bytes(manifest)
            updates = [size for masked in journal.sums("train") if entry.site in masked.sites.split(",")]
        sent.append(Outbound(entry.site, what, len(updates), sum(updates)))
        sums = [s for s in scores if s.site == entry.site and s.status is Status.ACCEPTED]
        if sums:
            told = "sum of losses and token count" if private is None else "noised sum of losses, and patients"
            sent.append(Outbound(entry.site, told, len(sums), 16 * len(sums)))
    return tuple(sent)


def _reading_notes(result: Result) -> tuple[str, ...]:
    arms = {arm.name for arm in result.arms}
    notes = [
        "The questions were put to held-out patients of all sites. A real server has no such patients: it asks about a "
        "public, synthetic or consented cohort.",
    ]
    if (privacy := result.study.privacy) is not None:
        ends = "The sites' losses stay where they are, so no round is evaluated and every arm ends with its last."
        if privacy.evaluation is not None:
            ends = "Every arm ends with its best round by noised tuning losses; fewer patients mean more noise."
        notes.append(
            f"Every arm trains privately, with the same settings. {ends} A site's ledger adds up the arms that it "
            "takes part in, which a site of one real run does not have: fedcomet privacy budget shows all of it."
        )
    if POOLED in arms:
        notes.append("The pooled arm trains on as many tokens as the federated one, with the same settings.")
    if any(arm.endswith(" alone") for arm in arms):
        notes.append("A site alone makes as many passes over its own patients as in the federation.")
    return tuple(notes)

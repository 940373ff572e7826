"""Sites answer a run's questions at home; what comes of their tallies is what pooling would have told."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, roc_auc_score

from client.archive import Archive
from client.budget import FILE, Budget, State
from client.files import SiteFiles
from federation import accountant, protection
from federation.manifest import LocalWork, TaskEvaluation
from federation.messages import AssessReply, AssessRequest
from federation.tallies import Form, tally
from model import checkpoint
from model.cohort import cohort
from model.estimate import estimate
from model.tasks import Task
from server import assessment
from server.app import Outcome, coordinate
from server.assessment import Assessment
from server.journal import Journal
from server.plan import FederationPlan, PrivacyPlan
from tests import masked, tiny
from tokenizer.codebook import Codebook
from tokenizer.errors import ConfigError
from tokenizer.split import SplitRule
from tokenizer.store import TokenStore

TASK = Task("lab", "Which lab comes first?", ("LAB//0", "LAB//2"), ("LAB//1",), ("LAB//3",), 0.0, 30.0, "each")
ASKED = TaskEvaluation((TASK,), trajectories=2, max_tokens=16, form=Form(bins=256, floor=1))
SPLIT = SplitRule("key", 0.1, 0.4)


def played(root: Path, **changes: object) -> tuple[Outcome, list[SiteFiles]]:
    files = tiny.sites(root, 3)
    grid = tiny.FunctionGrid(dict(enumerate(map(tiny.honest, files), 1)))
    plan = tiny.plan(**{"split": SPLIT, "tasks": ASKED, **changes})
    return coordinate(grid, root / "run", plan), files


def pooled(outcome: Outcome, files: list[SiteFiles]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and risks of all sites' held-out patients in one place."""
    codebook = Codebook.load(outcome.codebook)
    decoder = checkpoint.load(outcome.best_checkpoint, codebook.hash).decoder
    labels, risks = [], []
    for site in files:
        archive = Archive(site.state)
        agreement = archive.run(outcome.manifest.hash).agreement()
        assert agreement is not None
        store = TokenStore.open(archive.store_path(agreement.store), codebook.hash)
        found = cohort(TASK, store.split("held_out"), codebook).labelled()
        labels.append(found.labels)
        risks.append(estimate(decoder, codebook, found, TASK, trajectories=2, seed=0, max_tokens=16).risk)
    return np.concatenate(labels), np.concatenate(risks)


def assessed(root: Path, number: int = 2) -> Assessment:
    path = root / "run" / "assessments" / f"{number:04d}.json"
    return Assessment.from_bytes(path.read_bytes(), str(path))


def test_sites_answers_together_are_the_pooled_answer(ram_path: Path) -> None:
    outcome, files = played(ram_path)
    found, (labels, risks) = assessed(ram_path), pooled(outcome, files)
    told = found.questions["lab"]
    assert found.sites == ("site-0", "site-1", "site-2")
    assert (told.predictions, told.positives) == (len(labels), labels.sum())
    assert told.auroc.low is not None
    assert told.auroc.high is not None
    assert told.auroc.low - 1e-9 <= roc_auc_score(labels, risks) <= told.auroc.high + 1e-9
    assert told.brier.value == pytest.approx(brier_score_loss(labels, risks), abs=1e-6)
    with Journal(ram_path / "run" / "ledger.sqlite") as journal:
        assert journal.committed() == 2
    assert not (ram_path / "run" / "assessments" / "0001.json").exists()


def test_under_masks_the_sum_says_the_same(ram_path: Path) -> None:
    outcome, _ = played(ram_path / "clear")
    federation = masked.Federation(ram_path, 3, threshold=2, split=SPLIT, tasks=ASKED, min_sites=2)
    federation.lead()
    clear, under = assessed(ram_path / "clear"), assessed(ram_path)
    assert outcome.manifest.tasks == ASKED
    assert under.sites == clear.sites
    # The two runs' models differ by the sums' rounding, which moves risks a little.
    ours, theirs = clear.questions["lab"], under.questions["lab"]
    assert (ours.predictions, ours.positives) == (theirs.predictions, theirs.positives)
    assert ours.auroc.value == pytest.approx(theirs.auroc.value, abs=0.02)
    assert ours.brier.value == pytest.approx(theirs.brier.value, abs=1e-3)
    lines = [json.loads(line)["message"] for path in ram_path.glob("state/site-0/outbound/*.jsonl")
             for line in path.read_text().splitlines()]  # fmt: skip
    assert not [line for line in lines if line["kind"] == "evaluate.tasks.reply"]
    assert [line["kind"] for line in lines if line["answers"] == "evaluate.tasks"] == ["kept"]


NOISED = dataclasses.replace(ASKED, form=Form(bins=32, floor=1, noise=5.0), delta=1e-5)
PRIVACY = PrivacyPlan(sampling_rate=0.25, noise_multiplier=2.0, delta=1e-5)


def test_noised_tallies_are_charged_before_they_leave(ram_path: Path) -> None:
    _, files = played(ram_path, rounds=1, tasks=NOISED)
    lines = [json.loads(line)["message"] for path in (files[0].state / "outbound").glob("*.jsonl")
             for line in path.read_text().splitlines()]  # fmt: skip
    (sent,) = [line for line in lines if line["kind"] == "evaluate.tasks.reply"]
    assert protection.of_tallies(NOISED, 2, 2) == (accountant.DiscreteGaussian(25.0, 1.0),)
    assert sent["epsilon"] == pytest.approx(accountant.epsilon(protection.of_tallies(NOISED, 1, 1), 1e-5))
    with Budget.open(files[0].state / FILE) as budget:
        (charge,) = budget.charges()
    assert (charge.release.purpose, charge.state) == ("statistics", State.RELEASED)
    assert assessed(ram_path, 1).questions["lab"].noise == pytest.approx(5.0 * 3**0.5)


def test_what_answers_cost_is_in_what_a_private_run_states() -> None:
    work = LocalWork(steps=2, batch_tokens=512)
    assert PRIVACY.promise(work, 4, NOISED).epsilon > PRIVACY.promise(work, 4).epsilon + 0.1


def test_a_private_run_without_noise_on_its_answers_is_refused(ram_path: Path) -> None:
    with pytest.raises(ConfigError, match="noise only"):
        played(ram_path, privacy=PRIVACY)


def reply(request: AssessRequest, site: str, tallies: np.ndarray) -> AssessReply:
    return AssessReply(site, request.manifest_hash, request.round, request.digest, tallies.astype(np.float32))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return played(tmp_path_factory.mktemp("played"), rounds=1)[0]


def test_one_site_with_nonsense_does_not_spoil_the_others(outcome: Outcome) -> None:
    manifest, rng = outcome.manifest, np.random.default_rng(4)
    request = AssessRequest(manifest.hash, 1, np.zeros(3, np.float32), 1.0)
    labels, risks = (rng.random(60) < 0.4).astype(int), rng.random(60)
    good = tally(labels, risks, np.arange(60), ASKED.form)
    half, sums, huge = good.copy(), good.copy(), good.copy()
    half[np.flatnonzero(half)[0]] += 0.5
    sums[-1] = 1000.0
    huge[0] = np.inf
    answers = {
        "ash": reply(request, "ash", good),
        "elm": reply(request, "elm", half),
        "fir": reply(request, "fir", sums),
        "oak": reply(request, "oak", huge),
        "yew": reply(request, "ash", good),
        "box": None,
    }
    found = assessment.of_answers(manifest, request, answers)
    assert found.sites == ("ash",)
    assert found.questions["lab"].auroc.value == pytest.approx(roc_auc_score(labels, risks), abs=0.02)
    assert sorted(found.left_out) == ["box", "elm", "fir", "oak", "yew"]


def test_a_plan_with_questions_survives_its_bytes() -> None:
    plan = tiny.plan(tasks=ASKED)
    assert FederationPlan.from_bytes(plan.to_bytes()) == plan

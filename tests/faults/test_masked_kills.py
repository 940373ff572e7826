"""Sites by their daemons, each kind of process killed (-9) before a masked private run and at each stage of its sums.

Noise is shared out over the sites, so that what a killed site masks anew must have the same noise, and losses are told,
so that there are two sums in a round.
"""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from client.archive import Archive
from client.audit import audit
from client.budget import FILE, Budget
from client.outbound import Leaving, lines, read_entry, read_head
from federation import protection
from federation.discrete_noise import DiscreteGaussianNoise
from federation.manifest import LocalWork, Manifest, OuterOptions, PrivateEvaluation, SecureAggregation
from federation.masking import Consent, Masked, MaskingOptions, Opened
from federation.messages import EvaluateReply, SurveyReply, TrainReply
from federation.summed import numbers_of
from federation.update import to_vector
from model import checkpoint
from model.private import Secret
from server.journal import SumEntry
from server.plan import PrivacyPlan
from server.tables import RunState
from server.unmask import Stage
from tests.field import KINDS, Field, federation, until

pytestmark = pytest.mark.slow

SITES = ("ward-0", "ward-1", "ward-2", "ward-3")
VICTIM = "ward-1"
"""The site whose processes are killed."""
THRESHOLD = 3
PRIVACY = PrivacyPlan(
    noise_multiplier=2.0,
    delta=1e-5,
    mechanism="distributed",
    honest_sites=2,
    evaluation=PrivateEvaluation(every=1, bound=10.0, noise_multiplier=2.0),
)
STAGES = [("train", stage.value) for stage in Stage if stage is not Stage.DONE]
STAGES += [("evaluate tuning", stage.value) for stage in (Stage.MASKED, Stage.CONSENT)]


def asked(field: Field, kind: str) -> None:
    """Wait until the leading process has asked the sites a kind of question."""
    told = f"asked query.{kind}"
    until(lambda: any(told in str(line.values()) for line in field.log()), lambda: f"no {told}: {field.told()}", 300)


def reached(field: Field, purpose: str, stage: str) -> int:
    """Wait until a sum comes to a stage once more, and give its round."""
    before = newest(field)

    def look() -> int:
        events = field.ledger.events(run="first", what="sum.advanced", newest=True, limit=5)
        wanted = f"{purpose}, attempt "
        here = [each for each in events if each.id > before and each.text.startswith(wanted)]
        return max((each.round or 0 for each in here if each.text.partition(": ")[2].startswith(stage)), default=0)

    return until(look, lambda: f"no {stage} of {purpose}: {field.told()}", 300, every=0.02)


def newest(field: Field) -> int:
    events = field.ledger.events(run="first", what="sum.advanced", newest=True, limit=1)
    return events[0].id if events else 0


def left(field: Field, site: str) -> list[Leaving]:
    """All that has left a site."""
    folder = field.sites[site].home.state / "outbound"
    return [read_entry(line, place).message for place, line in lines(folder, read_head(folder))]


def summed(field: Field, number: int) -> SumEntry:
    entry = field.ledger.journal("first").sum(number, "train")
    assert entry is not None
    return entry


def signed_once(field: Field, manifest: Manifest) -> None:
    """See that nobody masked, signed or opened two things for one sum, and that nothing left without masks."""
    for site in SITES:
        seen: dict[tuple[str, str], set[str]] = defaultdict(set)
        signed: dict[int, set[str]] = defaultdict(set)
        for message in left(field, site):
            assert message.kind not in (TrainReply.kind, EvaluateReply.kind)
            if message.run == manifest.hash and message.kind in (Masked.kind, Consent.kind, Opened.kind):
                agreement = message.content["agreement"]
                seen[message.kind, agreement].add(message.sha256)
                if message.kind == Consent.kind:
                    assert message.round is not None
                    signed[message.round].add(agreement)
        assert {len(answers) for answers in seen.values()} == {1}, f"{site} gave two answers to one question"
        # Once about the updates and once about the losses, whatever attempts there were.
        assert max(map(len, signed.values())) <= 2, f"{site} signed more than one attempt of a sum"
        assert audit(field.sites[site].home.state).broken is None


def paid(field: Field, manifest: Manifest) -> None:
    """See that every site has paid for what left it under masks, once, and that what is in a sum has left.

    What was charged and did not leave stays charged: the site is missing in that sum.
    """
    journal = field.ledger.journal("first")
    words = 8 * manifest.model.parameters()
    for site in SITES:
        gone: dict[str, set[int]] = {"training": set(), "evaluation": set()}
        for message in left(field, site):
            if message.run == manifest.hash and message.kind == Masked.kind:
                assert message.epsilon is not None
                assert message.round is not None
                gone["training" if message.bytes > words / 4 else "evaluation"].add(message.round)
        with Budget.open(field.sites[site].home.state / FILE) as budget:
            charges = [charge for charge in budget.charges() if charge.state.spent]
        surveys = [charge for charge in charges if charge.release.purpose == "survey"]
        assert len(surveys) == (SurveyReply.kind in {message.kind for message in left(field, site)})
        costs = {
            "training": protection.of_releases(manifest, 1),
            "evaluation": protection.of_evaluations(protection.privacy_of(manifest), 1),
        }
        for purpose, rounds in gone.items():
            own = [charge.release for charge in charges if charge.release.purpose == purpose]
            spent = Counter(release.round for release in own)
            assert set(spent.values()) <= {1}
            assert rounds <= set(spent), f"{site}: {purpose} of rounds {rounds - set(spent)} left without a charge"
            sums = journal.sums("train" if purpose == "training" else "evaluate tuning")
            assert {entry.round for entry in sums if site in entry.sites.split(",")} <= rounds
            assert all((release.run, release.mechanisms) == (manifest.hash, costs[purpose]) for release in own)


def added_up(field: Field, manifest: Manifest, number: int) -> None:
    """See that a round's weights are those before it and the mean of what the summed sites keep, and nothing else."""
    entry, numbers = summed(field, number), numbers_of(manifest)
    names = entry.sites.split(",")
    assert len(set(names)) == len(names) >= THRESHOLD
    words = np.zeros(manifest.model.parameters(), numbers.dtype)
    for name in names:
        run = Archive(field.sites[name].home.state).run(manifest.hash)
        reply = run.reply(number)
        assert reply is not None
        part = np.empty_like(words)
        numbers.encode(np.asarray(reply.update), 1, part)
        secret = Secret(run.noise_key(number), f"{manifest.hash}/{number}/share")
        DiscreteGaussianNoise(numbers.noise_variance, secret).add_to_(part)
        words += part
    mean = np.empty(words.size, np.float32)
    numbers.decode(words, len(names), mean)
    folder = field.home.runs / "first/checkpoints"
    before, after = (to_vector(checkpoint.load(folder / f"{n:04d}.safetensors").decoder) for n in (number - 1, number))
    assert np.abs(mean).max() > 0
    assert np.array_equal(after, before + mean)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_every_stage_no_sum_is_lost_or_signed_or_paid_twice(tmp_path: Path, kind: str) -> None:
    with federation(tmp_path, SITES, run=False) as field:
        for name, site in field.sites.items():
            file, settings = site.home.path / "site.toml", site.home.path / "settings.toml"
            settings.write_text("[survey_privacy]\nepsilon = 50.0\ndelta = 1e-6\n")
            file.write_text(file.read_text().replace('settings = "none"', f'settings = "{settings}"', 1))
            field.run_site(name)
        field.all_online()
        roster = {each.name: each.ed25519 for each in field.ledger.members.all() if each.name in SITES}
        sums = SecureAggregation(THRESHOLD, MaskingOptions(THRESHOLD, clip=1.0, max_weight=1024), roster)
        journal = field.begin(
            "first",
            rounds=60,
            min_sites=THRESHOLD,
            privacy=PRIVACY,
            outer=OuterOptions(weights="uniform"),
            local=LocalWork(steps=2, batch_tokens=512),
            secure_aggregation=sums,
            deadline_s=120.0,
            stage_deadline_s=100.0,
            signed_wait_s=300.0,
        )
        for question in ("survey", "prepare"):
            asked(field, question)
            field.kill(kind, VICTIM)
            print(f"{kind} killed at {question}")
        field.committed("first", 1, 400)
        field.all_online()
        manifest = Manifest.from_bytes((field.home.runs / "first/manifest.json").read_bytes())
        for purpose, stage in STAGES:
            number = reached(field, purpose, stage)
            field.kill(kind, VICTIM)
            field.committed("first", number, 400)
            print(f"{kind} killed at {stage} of {purpose} in round {number}: {summed(field, number)}")
        field.all_online()
        until(lambda: VICTIM in summed(field, journal.committed()).sites.split(","), f"{VICTIM} is not back", 200)
        field.order("pause", "first", RunState.PAUSED)
        field.stop_sites()  # or one might be at work
        field.contiguous("first")
        assert all(journal.sum(number, "train") for number in range(1, journal.committed() + 1))
        added_up(field, manifest, journal.committed())
        signed_once(field, manifest)
        paid(field, manifest)

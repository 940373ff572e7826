"""Claims about a site with a policy: what it answers, and that it looks at the rules before it looks at its records."""

import dataclasses
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.approval import Approvals, site_key
from client.budget import Release, State
from client.files import SiteFiles
from client.policy import PolicyRefusal
from client.site import Site
from federation.accountant import Approximate, Mechanisms
from federation.identity import Identity
from federation.manifest import LocalWork, Manifest, Privacy
from federation.messages import (
    EvaluateRequest,
    PrepareReply,
    PrepareRequest,
    ProtocolError,
    Request,
    SiteRefusal,
    SurveyReply,
    SurveyRequest,
    TrainReply,
    TrainRequest,
)
from federation.update import to_vector
from model.decoder import Decoder
from model.settings import Machine
from tests import tiny
from tokenizer.codebook import Codebook, Survey
from tokenizer.errors import DataError

FAR = 1e12
NOON = datetime(2026, 3, 4, 12).timestamp()
OPEN = """version = 1
[privacy]
training = "optional"
[secure_aggregation]
required = false
[statistics]
floor = {floor}
[runs]
manifests = "{manifests}"
coordinators = [{coordinators}]
"""


def write(path: Path, more: str = "", manifests: str = "any", coordinators: str = "", floor: int = 3) -> Path:
    path.write_text(OPEN.format(manifests=manifests, coordinators=coordinators, floor=floor) + more)
    return path


class Run(NamedTuple):
    """A run that was agreed on elsewhere, so that a test can ask for it here."""

    manifest: Manifest
    codebook: Codebook

    def prepare(self) -> PrepareRequest:
        return PrepareRequest(self.manifest.to_bytes(), self.codebook.to_bytes(), FAR)

    def train(self, number: int = 1) -> TrainRequest:
        return TrainRequest(self.manifest.hash, number, self.weights(), FAR)

    def evaluate(self, split: str = "tuning") -> EvaluateRequest:
        return EvaluateRequest(self.manifest.hash, 1, split, self.weights(), FAR)

    def weights(self) -> np.ndarray:
        return to_vector(Decoder.create(self.manifest.model, self.manifest.seed))


SURVEY = SurveyRequest(tiny.plan().split, tiny.plan().tokenizer, FAR)


@pytest.fixture
def files(ram_path: Path) -> SiteFiles:
    return dataclasses.replace(tiny.site(ram_path, "icu", 1), policy=write(ram_path / "policy.toml"))


@pytest.fixture
def run(files: SiteFiles) -> Run:
    plan = tiny.plan()
    open_site = Site(dataclasses.replace(files, policy=None, state=files.state.with_name("elsewhere")))
    codebook = Codebook.build(Survey.from_bytes(open_site.survey(SURVEY).survey))
    return Run(plan.manifest(codebook), codebook)


@pytest.fixture
def untouched(files: SiteFiles, run: Run, monkeypatch: pytest.MonkeyPatch) -> SiteFiles:
    """The site, whose records must not be looked at."""
    monkeypatch.setattr(SiteFiles, "records", lambda *_: pytest.fail("records were touched"))
    return files


def policy_of(files: SiteFiles) -> Path:
    assert files.policy is not None
    return files.policy


def refused(site: Site, request: Request) -> list[str]:
    with pytest.raises(PolicyRefusal) as refusal:
        site.answer(request)
    assert site.files.name in str(refusal.value)
    for broken in refusal.value.broken:
        assert str(broken) in str(refusal.value)
    return [broken.rule for broken in refusal.value.broken]


def test_a_policy_that_is_kept_changes_nothing(files: SiteFiles, run: Run) -> None:
    site, other = Site(files), Site(dataclasses.replace(files, policy=None, state=files.state.with_name("open")))
    for request in (SURVEY, run.prepare(), run.train(), run.evaluate()):
        answer, same = site.answer(request), other.answer(request)
        if isinstance(answer, TrainReply) and isinstance(same, TrainReply):
            assert np.array_equal(answer.update, same.update)
        else:
            assert answer == same


def test_broken_rules_are_named_before_a_record_is_touched(untouched: SiteFiles, run: Run) -> None:
    write(
        policy_of(untouched), "[tasks]\nallowed = []\npurposes = []\n[work]\nmax_rounds = 1\n[machine]\ndevices = []\n"
    )
    site = Site(untouched)
    assert refused(site, SURVEY) == ["tasks.allowed"]
    assert refused(site, run.prepare()) == ["work.max_rounds", "machine.devices"]
    assert refused(site, run.train()) == ["tasks.allowed"]


def test_a_policy_that_can_not_be_used_opens_nothing_and_its_text_stays_here(untouched: SiteFiles, run: Run) -> None:
    path = policy_of(untouched)
    for broken in (lambda: path.write_text("version = 1\n[secret_rules]\n"), path.unlink):
        broken()
        for request in (SURVEY, run.prepare(), run.train()):
            with pytest.raises(SiteRefusal, match="can't be used; its own log says why") as refusal:
                Site(untouched).answer(request)
            assert str(path) not in str(refusal.value)
    assert "secret_rules is not a known key" in (untouched.state / "site.log").read_text()


def test_requests_must_be_signed_by_an_allowed_coordinator(files: SiteFiles, run: Run, ram_path: Path) -> None:
    one, other = (Identity.at(ram_path / name) for name in ("one.key", "other.key"))
    write(policy_of(files), coordinators=f'"{one.public}"')
    site = Site(files)
    for request in (SURVEY, run.prepare(), run.train(), run.evaluate()):
        assert refused(site, request) == ["runs.coordinators"]
        assert refused(site, other.sign_request(request)) == ["runs.coordinators"]
        late = dataclasses.replace(one.sign_request(request), deadline_s=2e12)
        assert refused(site, late) == ["runs.coordinators"]
        site.answer(one.sign_request(request))


def test_a_run_that_needs_approval_waits_for_it_and_no_record_is_touched(untouched: SiteFiles, run: Run) -> None:
    write(policy_of(untouched), manifests="ask")
    with pytest.raises(SiteRefusal, match=f"has not approved the manifest {run.manifest.hash}"):
        Site(untouched).answer(run.prepare())
    assert Approvals(untouched.state).waiting() == [run.manifest.hash]


def test_an_approval_holds_for_one_manifest_and_can_be_withdrawn(files: SiteFiles, run: Run) -> None:
    write(policy_of(files), manifests="ask")
    site, approvals = Site(files), Approvals(files.state)
    with pytest.raises(SiteRefusal):
        site.answer(run.prepare())
    approvals.approve(approvals.find(run.manifest.hash[:8]).manifest, None)
    assert approvals.waiting() == []
    assert isinstance(site.answer(run.prepare()), PrepareReply)
    assert isinstance(site.answer(run.train(1)), TrainReply)
    other = run._replace(manifest=dataclasses.replace(run.manifest, seed=1))
    with pytest.raises(SiteRefusal, match="has not approved"):
        site.answer(other.prepare())
    (files.state / "approvals" / f"{run.manifest.hash}.json").unlink()
    with pytest.raises(SiteRefusal, match="has not approved"):
        site.answer(run.train(2))


@given(st.data())
def test_a_manifest_that_differs_in_one_bit_is_not_approved(tmp_path_factory: Any, data: st.DataObject) -> None:
    manifest = tiny.plan().manifest(Codebook.build(Survey(tiny.plan().tokenizer)))
    approvals = Approvals(tmp_path_factory.getbasetemp() / "one-bit")
    if not approvals.approved(manifest.hash):
        approvals.approve(manifest, None)
    raw = bytearray(manifest.to_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        changed = Manifest.from_bytes(bytes(raw))
    except ProtocolError:
        return
    assert not approvals.approved(changed.hash)


def test_an_approval_that_this_site_did_not_sign_is_refused(files: SiteFiles, run: Run) -> None:
    write(policy_of(files), manifests="ask")
    elsewhere = Approvals(files.state.with_name("other-site"))
    elsewhere.approve(run.manifest, None)
    name = f"approvals/{run.manifest.hash}.json"
    (files.state / "approvals").mkdir(parents=True)
    (files.state / name).write_bytes((files.state.with_name("other-site") / name).read_bytes())
    with pytest.raises(DataError, match="doesn't bear this site's signature"):
        Site(files).answer(run.prepare())
    changed = dataclasses.replace(run.manifest, seed=5)
    ours = Approvals(files.state)
    ours.approve(changed, None)
    (files.state / name).write_bytes((files.state / f"approvals/{changed.hash}.json").read_bytes())
    with pytest.raises(DataError, match="doesn't bear this site's signature"):
        ours.approved(run.manifest.hash)
    assert site_key(files.state).stat().st_mode & 0o077 == 0


def test_many_manifests_do_not_fill_the_disk(tmp_path: Path) -> None:
    approvals = Approvals(tmp_path)
    manifest = tiny.plan().manifest(Codebook.build(Survey(tiny.plan().tokenizer)))
    for seed in range(30):
        approvals.wait(dataclasses.replace(manifest, seed=seed), "")
    assert len(approvals.waiting()) == 20
    assert len(list((tmp_path / "waiting").iterdir())) == 40


def test_a_run_that_the_policy_refuses_is_kept_for_a_person_to_see(files: SiteFiles, run: Run, ram_path: Path) -> None:
    one, other = (Identity.at(ram_path / name) for name in ("one.key", "other.key"))
    site, approvals = Site(files), Approvals(files.state)
    asked = {"manifests": "ask", "coordinators": f'"{one.public}"'}
    write(policy_of(files), "[work]\nmax_rounds = 1\n", **asked)
    assert refused(site, other.sign_request(run.prepare())) == ["runs.coordinators", "work.max_rounds"]
    assert approvals.refused() == [], "a stranger leaves nothing here"
    assert refused(site, one.sign_request(run.prepare())) == ["work.max_rounds"]
    assert (approvals.refused(), approvals.waiting()) == ([run.manifest.hash], [])
    assert approvals.find(run.manifest.hash[:8]).coordinator == one.public
    write(policy_of(files), **asked)
    with pytest.raises(SiteRefusal, match="has not approved"):
        site.answer(one.sign_request(run.prepare()))
    assert (approvals.refused(), approvals.waiting()) == ([], [run.manifest.hash])
    write(policy_of(files), "[work]\nmax_rounds = 1\n", **asked)
    refused(site, one.sign_request(run.prepare()))
    write(policy_of(files))
    assert isinstance(site.answer(run.prepare()), PrepareReply)
    assert (approvals.refused(), approvals.waiting()) == ([], []), "it runs"


def test_many_refused_manifests_push_out_none_that_waits(tmp_path: Path) -> None:
    approvals = Approvals(tmp_path)
    manifest = tiny.plan().manifest(Codebook.build(Survey(tiny.plan().tokenizer)))
    approvals.wait(manifest, "")
    for seed in range(1, 31):
        approvals.refuse(dataclasses.replace(manifest, seed=manifest.seed + seed), "")
    assert approvals.waiting() == [manifest.hash]
    assert len(approvals.refused()) == 20
    assert len(list((tmp_path / "refused").iterdir())) == 40


def test_a_tightened_policy_holds_in_the_middle_of_a_run(files: SiteFiles, run: Run) -> None:
    site = Site(files)
    site.answer(run.prepare())
    site.answer(run.train(1))
    write(policy_of(files), "[work]\nmax_rounds = 1\n")
    assert refused(site, run.train(2)) == ["work.max_rounds"]


def test_a_run_that_does_not_fit_into_the_budget_is_refused_before_it_begins(untouched: SiteFiles, run: Run) -> None:
    site = Site(untouched)
    privacy = Privacy("dp-sgd", epsilon=20, delta=1e-6, clip=1, noise_multiplier=1, sampling_rate=0.1)
    private = run._replace(manifest=dataclasses.replace(run.manifest, privacy=privacy))
    text = policy_of(untouched).read_text()
    limit = "[privacy]\nepsilon_total = 5.0\ndelta_total = 1e-6\n"
    policy_of(untouched).write_text(text.replace("[privacy]\n", limit))
    with site.gate.budget() as budget:
        budget.reserve(Release("c" * 64, 1, "training", Mechanisms((Approximate(4.0),)), "request"))
    assert refused(site, private.prepare()) == ["privacy.epsilon_total"]
    policy_of(untouched).write_text(text.replace("[privacy]\n", limit.replace("5.0", "12.0")))
    with pytest.raises(ProtocolError, match=r"train\.clip = 0"):  # so the policy has let it pass
        site.answer(private.prepare())


def test_a_private_message_that_was_not_charged_does_not_leave(files: SiteFiles, run: Run, ram_path: Path) -> None:
    settings = ram_path / "settings.toml"
    settings.write_text("[survey_privacy]\nepsilon = 2.0\ndelta = 1e-6\n")
    site = Site(dataclasses.replace(files, settings=str(settings)))
    reply = site.answer(SURVEY)
    assert isinstance(reply, SurveyReply)
    site.gate.note(reply, "survey", "0" * 64, 1)
    with site.gate.budget() as budget:
        (charge,) = budget.charges()
        assert charge.state == State.CHARGED
        site.gate.released(reply)
        assert budget.charges()[0].state == State.RELEASED
    changed = dataclasses.replace(reply, survey=reply.survey + b" ")
    other = Site(dataclasses.replace(site.files, state=files.state.with_name("other")))
    for gate, wrong in ((site.gate, changed), (other.gate, reply)):
        with pytest.raises(DataError, match="holds no charge for this survey"):
            gate.note(wrong, "survey", "0" * 64, 1)


def test_a_run_whose_noise_is_shared_out_among_nobody_is_refused_rather_than_run_without(
    files: SiteFiles, run: Run
) -> None:
    lacks = dataclasses.replace(run.manifest, privacy=Privacy("distributed", 2, 1e-6, 1, 1, honest_sites=2))
    with pytest.raises(ProtocolError, match=r'"distributed" needs secure_aggregation'):
        Site(files).answer(run._replace(manifest=lacks).prepare())


def test_few_patients_take_no_part_and_few_are_told_by_no_figure(files: SiteFiles, run: Run) -> None:
    write(policy_of(files), floor=5)
    site = Site(files)
    told = site.answer(run.prepare())
    assert isinstance(told, PrepareReply)
    assert {split: counts.patients for split, counts in told.splits.items()} == {
        "train": 31,
        "tuning": 6,
        "held_out": 0,
    }
    assert told.splits["held_out"].events == told.splits["held_out"].tokens == 0
    site.answer(run.evaluate("tuning"))
    assert refused(site, run.evaluate("held_out")) == ["statistics.floor"]
    policy_of(files).write_text(policy_of(files).read_text().replace("floor = 5", "min_patients = 41"))
    assert refused(site, SURVEY) == ["statistics.floor"]
    policy_of(files).write_text(policy_of(files).read_text().replace("41", "41\nfloor = 3"))
    assert refused(site, SURVEY) == ["statistics.min_patients"]
    other = run._replace(manifest=dataclasses.replace(run.manifest, name="other"))
    assert refused(site, other.prepare()) == ["statistics.min_patients"]


def test_steps_that_follow_from_passes_are_limited_too(files: SiteFiles, run: Run) -> None:
    write(policy_of(files), "[work]\nmax_steps_per_round = 1\n")
    long = dataclasses.replace(run.manifest, local=LocalWork(epochs=9, batch_tokens=128))
    assert refused(Site(files), run._replace(manifest=long).prepare()) == ["work.max_steps_per_round"]


def test_work_stops_when_the_hours_end(files: SiteFiles, run: Run) -> None:
    site = Site(files, clock=lambda: NOON)
    site.answer(run.prepare())
    write(policy_of(files), '[machine]\nhours = ["20:00-06:00"]\n')
    for request in (SURVEY, run.prepare(), run.train()):
        assert refused(site, request) == ["machine.hours"]
    times = iter([NOON - 9 * 3600, NOON - 9 * 3600])
    ends = Site(files, clock=lambda: next(times, NOON))
    assert refused(ends, run.train()) == ["machine.hours"]
    assert isinstance(Site(files, clock=lambda: NOON - 9 * 3600).answer(run.train()), TrainReply)


def test_the_device_rests_as_long_as_the_policy_says(files: SiteFiles, run: Run) -> None:
    rests: list[float] = []
    write(policy_of(files), "[machine]\nshare_of_time = 0.25\n")
    site = Site(files, pause=rests.append)
    site.answer(run.prepare())
    reply = site.answer(run.train())
    assert isinstance(reply, TrainReply)
    assert len(rests) == reply.steps
    assert all(rest > 0 for rest in rests)
    assert sum(rests) < 3 * reply.seconds + 0.01  # three quarters of the time are rest


def test_traffic_is_limited_by_message_and_by_day(files: SiteFiles, run: Run) -> None:
    site = Site(files, clock=lambda: NOON)
    assert isinstance(site.answer(SURVEY), SurveyReply)
    site.answer(run.prepare())
    write(policy_of(files), "[traffic]\nmax_bytes_per_round = 100\nmax_bytes_per_day = 1000\n")
    assert refused(site, run.train()) == ["traffic.max_bytes_per_day", "traffic.max_bytes_per_round"]
    with pytest.raises(PolicyRefusal, match="max_bytes_per_round"):
        site.gate.admit_bytes(101)
    site.gate.admit_bytes(100)


def test_processes_of_a_machine_keep_the_hours_too(files: SiteFiles, run: Run) -> None:
    opens = datetime.now() + timedelta(hours=6)
    write(policy_of(files), f'[machine]\nhours = ["{opens:%H:%M}-{opens + timedelta(hours=1):%H:%M}"]\n')
    team = dataclasses.replace(files, machine=Machine(processes=2))
    inside = (opens + timedelta(minutes=10)).timestamp()
    site = Site(team, clock=lambda: inside)  # only the processes look at another clock
    site.answer(run.prepare())
    with pytest.raises(SiteRefusal, match=r"machine\.hours"):
        site.answer(run.train())

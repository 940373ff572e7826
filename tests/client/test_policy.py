import dataclasses
import io
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from client.approval import Asked
from client.approval_page import terminal
from client.budget import Limit
from client.hours import Hours
from client.policy import TEMPLATE, Policy, PolicyRefusal
from federation import protection
from federation.accountant import Approximate, epsilon
from federation.manifest import LocalWork, Manifest, OuterOptions, Privacy, SecureAggregation
from federation.masking import MaskingOptions
from federation.messages import AssessRequest, EvaluateRequest, PrepareRequest, SurveyRequest, TrainRequest
from model.settings import TrainOptions
from tests import tiny
from tests.sums import agreement
from tokenizer.codebook import Codebook, Survey, TokenizerOptions
from tokenizer.errors import ConfigError
from tokenizer.noisy_survey import SurveyPrivacy
from tokenizer.split import SplitRule

BASE = tiny.plan(tokenizer=TokenizerOptions(min_patients=10)).manifest(
    Codebook.build(Survey(TokenizerOptions(min_patients=10)))
)
PRIVATE = Privacy("dp-sgd", epsilon=2, delta=1e-6, clip=1, noise_multiplier=1, sampling_rate=0.01)
MASKED = SecureAggregation(5, MaskingOptions(threshold=4, clip=1, max_weight=100), agreement(5, 4).roster)
GOOD = dataclasses.replace(BASE, privacy=PRIVATE, secure_aggregation=MASKED)
SHARED = dataclasses.replace(GOOD, privacy=Privacy("distributed", 2, 1e-6, 1, 1, honest_sites=4))
NOON = datetime(2026, 3, 4, 12)  # a Wednesday
OPEN: dict[str, Any] = {
    "version": 1,
    "runs": {"manifests": "any"},
    "privacy": {"training": "optional"},
    "secure_aggregation": {"required": False},
}


def policy(**tables: dict[str, Any]) -> Policy:
    return Policy.model_validate({**OPEN, **{name: {**OPEN.get(name, {}), **table} for name, table in tables.items()}})


def rules(broken: list[Any]) -> list[str]:
    return [each.rule for each in broken]


def test_the_template_is_a_policy_that_a_private_masked_run_keeps(tmp_path: Path) -> None:
    strict = Policy.read(TEMPLATE)
    manifest = dataclasses.replace(GOOD, software="0.1.0")
    assert strict.check(manifest) == []
    assert rules(strict.check(dataclasses.replace(BASE, software="0.1.0"))) == [
        "privacy.training",
        "secure_aggregation.required",
    ]


def test_the_template_names_every_rule() -> None:
    text = TEMPLATE.read_text()
    for name, field in Policy.model_fields.items():
        for key in getattr(field.annotation, "model_fields", {}):
            assert f"\n{key} = " in text or f"\n# {key} = " in text, f"{name}.{key}"


def test_the_page_shows_the_template_that_is_shipped() -> None:
    page = Path(__file__).parents[2] / "docs" / "site-policy.md"
    assert f"```toml\n{TEMPLATE.read_text()}```\n" in page.read_text()


def test_an_empty_policy_is_a_strict_one() -> None:
    empty = Policy.model_validate({"version": 1})
    assert rules(empty.check(BASE)) == ["privacy.training", "secure_aggregation.required"]
    assert empty.runs.manifests == "ask"


BROKEN: list[tuple[str, dict[str, Any], Manifest, str]] = [
    ("runs.software", {"runs": {"software": ["9.9"]}}, BASE, "which is not listed"),
    ("runs.manifests", {"runs": {"manifests": ["0" * 64]}}, BASE, BASE.hash),
    ("tasks.purposes", {"tasks": {"purposes": ["a"]}}, dataclasses.replace(BASE, purposes=("a", "b")), "'b'"),
    ("statistics.floor", {"statistics": {"floor": 11}}, BASE, "would be 10, at least 11"),
    ("privacy.training", {"privacy": {"training": "required"}}, BASE, "no differential privacy"),
    ("privacy.epsilon_per_run", {"privacy": {"epsilon_per_run": 1.9}}, GOOD, "would be 2, 1.9"),
    ("privacy.delta_per_run", {"privacy": {"delta_per_run": 1e-7}}, GOOD, "1e-06, 1e-07"),
    ("privacy.colluding_sites", {"privacy": {"colluding_sites": 2}}, SHARED, "would be 1, at least 2"),
    ("secure_aggregation.required", {"secure_aggregation": {"required": True}}, BASE, "in clear"),
    ("secure_aggregation.min_sites", {"secure_aggregation": {"min_sites": 6}}, GOOD, "would be 5, at least 6"),
    (
        "secure_aggregation.min_threshold",
        {"secure_aggregation": {"min_sites": 5, "min_threshold": 5}},
        GOOD,
        "would be 4, at least 5",
    ),
    ("work.max_rounds", {"work": {"max_rounds": 1}}, BASE, "would be 2, 1"),
    ("work.max_steps_per_round", {"work": {"max_steps_per_round": 1}}, BASE, "would be 2, 1"),
    (
        "work.max_epochs_per_round",
        {"work": {"max_epochs_per_round": 0.5}},
        dataclasses.replace(BASE, local=LocalWork(epochs=1)),
        "would be 1, 0.5",
    ),
    ("work.max_batch_tokens", {"work": {"max_batch_tokens": 511}}, BASE, "would be 512, 511"),
    ("work.max_parameters", {"work": {"max_parameters": 10}}, BASE, "10 is allowed"),
    (
        "work.optimizers",
        {"work": {"optimizers": ["adamw"]}},
        dataclasses.replace(BASE, train=TrainOptions(optimizer="muon")),
        "'muon'",
    ),
    ("machine.devices", {"machine": {"devices": ["cuda"]}}, BASE, "'cpu'"),
    ("traffic.max_bytes_per_round", {"traffic": {"max_bytes_per_round": 1000}}, BASE, "1,000 is allowed"),
]


@pytest.mark.parametrize(("rule", "tables", "manifest", "told"), BROKEN, ids=[case[0] for case in BROKEN])
def test_a_run_that_breaks_a_rule_is_told_which_and_how(
    rule: str, tables: dict[str, Any], manifest: Manifest, told: str
) -> None:
    (broken,) = policy(**tables).check(manifest)
    assert broken.rule == rule
    assert told in broken.told
    assert policy().check(manifest) == []


def test_whoever_approves_shared_noise_reads_whom_it_relies_on_and_that_nothing_else_is_told() -> None:
    manifest = dataclasses.replace(SHARED, outer=OuterOptions(weights="uniform"))
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(terminal(Asked(manifest), policy(), []))
    page = console.export_text()
    assert "4 sites of every sum, this one among them, add their share of the noise as agreed" in page
    assert "the coordinator and 1 other sites may work together" in page
    assert "beside the noisy update, the sums hold constants" in page
    console.print(terminal(Asked(GOOD), policy(), []))
    assert "add their share" not in console.export_text()


def test_a_run_that_the_budget_has_no_room_for_breaks_a_rule_whose_figures_stay_at_the_site() -> None:
    cost = epsilon(protection.of_run(GOOD).all, 1e-6)
    before = [Approximate(0.5)]
    tight, wide = (policy(privacy={"epsilon_total": cost + more, "delta_total": 1e-6}) for more in (0.4, 0.6))
    assert wide.limit == Limit(cost + 0.6, 1e-6)
    assert wide.check_total(GOOD, before) == tight.check_total(GOOD, []) == tight.check_total(BASE, before) == []
    (broken,) = tight.check_total(GOOD, before)
    assert broken.rule == "privacy.epsilon_total"
    assert f"{cost + 0.4:g} is allowed, and 0.5000 is spent" in broken.figures
    refusal = PolicyRefusal("icu", [broken])
    assert not any(digit in str(refusal) for digit in "0123456789")
    assert broken.figures in refusal.__notes__[0]
    assert policy().limit is None
    assert policy().check_total(GOOD, before) == []


def test_all_broken_rules_are_named_at_once() -> None:
    found = policy(work={"max_rounds": 1, "max_batch_tokens": 1}, machine={"devices": []}).check(BASE)
    assert rules(found) == ["work.max_rounds", "work.max_batch_tokens", "machine.devices"]


REQUESTS = {
    "survey": SurveyRequest(SplitRule("k"), TokenizerOptions(min_patients=10), 1.0),
    "train": TrainRequest("0" * 64, 1, np.zeros(1, np.float32), 1.0),
    "evaluate tuning": EvaluateRequest("0" * 64, 1, "tuning", np.zeros(1, np.float32), 1.0),
    "evaluate held_out": EvaluateRequest("0" * 64, 1, "held_out", np.zeros(1, np.float32), 1.0),
    "evaluate tasks": AssessRequest("0" * 64, 1, np.zeros(1, np.float32), 1.0),
}


def test_only_allowed_tasks_may_be_asked() -> None:
    for name, request in REQUESTS.items():
        assert policy(tasks={"allowed": [name]}).check_request(request, None, NOON) == []
        (broken,) = policy(tasks={"allowed": [n for n in REQUESTS if n != name]}).check_request(request, None, NOON)
        assert (broken.rule, repr(name) in broken.told) == ("tasks.allowed", True)
    prepare = PrepareRequest(b"", b"", 1.0)
    assert policy(tasks={"allowed": []}).check_request(prepare, None, NOON) == []


def test_a_split_that_is_none_is_not_an_allowed_task() -> None:
    request = EvaluateRequest("0" * 64, 1, "train", np.zeros(1, np.float32), 1.0)
    assert rules(policy().check_request(request, None, NOON)) == ["tasks.allowed"]


def test_a_survey_below_the_floor_or_without_the_privacy_that_is_required_breaks_a_rule() -> None:
    low = SurveyRequest(SplitRule("k"), TokenizerOptions(min_patients=9), 1.0)
    assert rules(policy().check_request(low, None, NOON)) == ["statistics.floor"]
    assert policy().check_survey(None) == []
    strict = policy(privacy={"survey": "required"})
    assert rules(strict.check_survey(None)) == ["privacy.survey"]
    assert strict.check_survey(SurveyPrivacy(epsilon=1.0, delta=1e-6)) == []


def test_only_allowed_coordinators_may_ask() -> None:
    one, other = (f"ed25519:{digit * 64}" for digit in "12")
    strict = policy(runs={"coordinators": [one]})
    request = REQUESTS["survey"]
    assert strict.check_request(request, one, NOON) == []
    assert "is not signed" in strict.check_request(request, None, NOON)[0].told
    assert other in strict.check_request(request, other, NOON)[0].told


def test_figures_on_few_patients_and_sites_with_few_break_rules_that_do_not_tell_how_many() -> None:
    strict = policy(statistics={"min_patients": 500, "floor": 20})
    assert strict.check_patients(500) == strict.check_figure(20) == []
    for broken in (*strict.check_patients(77), *strict.check_figure(7)):
        assert "7" not in broken.told


def test_bytes_and_steps_have_limits() -> None:
    strict = policy(traffic={"max_bytes_per_round": 10, "max_bytes_per_day": 100}, work={"max_steps_per_round": 5})
    assert rules(strict.check_bytes(11)) == ["traffic.max_bytes_per_round"]
    assert rules(strict.check_day(91, 10)) == ["traffic.max_bytes_per_day"]
    assert rules(strict.check_steps(6)) == ["work.max_steps_per_round"]
    assert strict.check_bytes(10) == strict.check_day(90, 10) == strict.check_steps(5) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "version is missing"),
        ("version = 2", "version = 2"),
        ("version = 1\n[privacy]\nepsilon = 1", "privacy.epsilon is not a known key; did you mean epsilon_total"),
        ("version = 1\n[privacy]\nepsilon_total = 1", "are one limit: give both"),
        ("version = 1\n[privacy]\nepsilon_total = -1", "privacy.epsilon_total = -1"),
        ("version = 1\n[privacy]\nepsilon_total = inf", "privacy.epsilon_total = inf"),
        ('version = 1\n[privacy]\nepsilon_total = "1"', "privacy.epsilon_total = '1'"),
        ('version = 1\n[runs]\ncoordinators = ["me"]', "'me' is not a public key"),
        ('version = 1\n[runs]\nmanifests = "all"', "runs.manifests"),
        ('version = 1\n[tasks]\nallowed = ["peek"]', "tasks.allowed"),
        ('version = 1\n[machine]\nhours = ["always"]', "'always' is not a span"),
        ("version = 1\n[machine]\nshare_of_time = 0", "machine.share_of_time = 0"),
        ("version = 1\n[secure_aggregation]\nmin_sites = 2\nmin_threshold = 3", "must not be above min_sites"),
        ("version = 1\nversion = 1", "can't be read"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused_by_the_key(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        Policy.read(tmp_path / "policy.toml")
    assert told in str(refused.value)
    assert "policy.toml: " in str(refused.value)


def test_equal_rules_have_one_name_whatever_the_comments(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("version = 1\n")
    (tmp_path / "b.toml").write_text("# a word\nversion = 1\n[runs]\n")
    (tmp_path / "c.toml").write_text("version = 1\n[statistics]\nfloor = 11\n")
    a, b, c = (Policy.read(tmp_path / f"{name}.toml").sha256 for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("span", "open_", "closed"),
    [
        ("Mon-Fri 20:00-06:00", ["2026-03-02 20:00", "2026-03-07 05:59"], ["2026-03-02 05:59", "2026-03-07 06:00"]),
        ("Sun 00:00-24:00", ["2026-03-08 00:00", "2026-03-08 23:59"], ["2026-03-09 00:00", "2026-03-07 23:59"]),
        ("Sun 22:00-02:00", ["2026-03-09 01:59"], ["2026-03-09 02:00", "2026-03-08 01:00"]),
        ("22:00-05:30", ["2026-03-04 05:29", "2026-03-04 22:00"], ["2026-03-04 05:30", "2026-03-04 12:00"]),
        ("Sat-Mon 08:00-09:00", ["2026-03-07 08:30", "2026-03-09 08:30"], ["2026-03-10 08:30"]),
    ],
)
def test_hours_are_the_weeks(span: str, open_: list[str], closed: list[str]) -> None:
    hours = Hours([span])
    assert all(hours.open_at(datetime.fromisoformat(moment)) for moment in open_)
    assert not any(hours.open_at(datetime.fromisoformat(moment)) for moment in closed)


@pytest.mark.parametrize("span", ["Mon 20-22", "Day 10:00-11:00", "10:00-10:00", "24:00-25:00", "10:61-11:00", ""])
def test_hours_that_are_none_are_refused(span: str) -> None:
    with pytest.raises(ValueError, match=r"span of hours|names a day"):
        Hours([span])


@given(st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1)), st.integers(0, 6), st.integers(0, 1439), st.data())
def test_the_told_opening_is_the_next_one(now: datetime, day: int, begin: int, data: st.DataObject) -> None:
    end = data.draw(st.integers(0, 1440).filter(lambda minute: minute != begin))
    name = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")[day]
    hours = Hours([f"{name} {begin // 60:02}:{begin % 60:02}-{end // 60:02}:{end % 60:02}"])
    opens = hours.opens_after(now)
    assert hours.open_at(opens)
    if hours.open_at(now):
        assert opens == now.replace(second=0, microsecond=0)
    else:
        assert opens > now
        assert not hours.open_at(opens - timedelta(minutes=1))


def test_outside_its_hours_a_site_says_when_to_ask_again() -> None:
    night = policy(machine={"hours": ["Mon-Fri 20:00-06:00"]})
    (broken,) = night.check_time(NOON)
    assert broken.rule == "machine.hours"
    assert "ask again from 2026-03-04 20:00 on" in broken.told
    assert night.check_time(datetime(2026, 3, 4, 21)) == []

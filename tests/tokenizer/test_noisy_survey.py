"""A noisy survey bounds what one patient changes, tells no lone patient's codes, and costs what it says.

Each statistical test alarms falsely once in a million runs; a control beside it shows that it can alarm at all.
"""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tests.tokenizer import hospital
from tokenizer import noise, noisy_survey, sketch
from tokenizer.codebook import Codebook, Survey, TokenizerOptions
from tokenizer.errors import ConfigError
from tokenizer.events import MedsDataset, canonical_order, write_meds
from tokenizer.noisy_survey import Bounds, Counted, SurveyPrivacy, count, price, release
from tokenizer.split import SplitRule
from tokenizer.survey import pairs_of

FALSE_ALARM = 1e-6
EVERYBODY = SplitRule("key", tuning=0, held_out=0)
OPTIONS = TokenizerOptions(min_patients=1)
TIGHT = SurveyPrivacy(bounds=Bounds(2, 1, 1, 3, 2), join=3)
PARTS = ("codes", "prefixes", "statics", "values", "gaps")


def counted(rows, privacy=TIGHT):
    frame = canonical_order(hospital.frame(rows))
    return count(pairs_of(frame, EVERYBODY, OPTIONS), privacy, seed=7)


@given(hospital.histories())
def test_one_patient_changes_no_more_than_the_bounds(rows):
    everybody = counted(rows)
    for one in {row[0] for row in rows}:
        others = counted([row for row in rows if row[0] != one])
        assert everybody.patients - others.patients == 1
        for part in PARTS:
            more, less = getattr(everybody, part), getattr(others, part)
            changed = {cell: more.get(cell, 0) - less.get(cell, 0) for cell in more.keys() | less.keys()}
            changed = {cell: by for cell, by in changed.items() if by}
            assert len(changed) <= getattr(TIGHT.bounds, part)
            assert set(changed.values()) <= {1}


@given(hospital.histories())
def test_shards_add_up(rows):
    frames = [[row for row in rows if row[0] % 2 == rest] for rest in (0, 1)]
    assert counted(frames[0]) + counted(frames[1]) == counted(rows)


@given(hospital.histories())
def test_within_wide_bounds_every_patient_is_counted_once(rows):
    wide = SurveyPrivacy(bounds=Bounds(10**6, 10**6, 10**6, 10**6, 10**6), join=1)
    codes = counted(rows, wide).codes
    for code in {row[2] for row in rows if row[1] is not None} - {"MEDS_BIRTH"}:
        assert codes[code, 0] == len({row[0] for row in rows if row[2] == code and row[1] is not None})


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-3])
def test_the_parts_cost_no_more_than_the_whole(mechanism, epsilon, delta):
    spend = price(SurveyPrivacy(mechanism, epsilon, delta))
    failing = sum(part.delta for part in spend.releases)
    if mechanism == "laplace":
        assert sum(part.epsilon for part in spend.releases) <= epsilon * (1 + 1e-12)
        assert failing <= delta * (1 + 1e-12)
    else:
        rho = sum(part.rho for part in spend.releases)
        assert rho <= spend.rho * (1 + 1e-12)
        assert noise.delta_of(rho, epsilon) + failing <= delta * (1 + 1e-9)
    for part in spend.releases:
        assert (part.l1, part.l2) == (part.l0, math.sqrt(part.l0))
        if part.rho is not None:
            assert part.rho == pytest.approx(part.l2**2 / (2 * float(part.scale)))
        else:
            assert part.epsilon == pytest.approx(part.l1 / float(part.scale))


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_thresholds_are_the_least_that_hold_their_promise(mechanism):
    for part in price(SurveyPrivacy(mechanism, 1.0, 1e-6)).releases:
        if part.threshold:
            tail = noise.gaussian_tail if mechanism == "gaussian" else noise.laplace_tail
            assert part.l0 * tail(part.threshold - 1, part.scale) <= part.delta
            assert part.l0 * tail(part.threshold - 2, part.scale) > part.delta


LONELY = SurveyPrivacy("laplace", 2.0, 0.1, Bounds(5, 1, 1, 1, 1))
RUNS = 2000


def tellings(privacy, less=0):
    """In how many runs a code of one patient alone is told, with the threshold that much lower."""
    part = next(part for part in price(privacy).releases if part.name == "codes")
    part = dataclasses.replace(part, threshold=part.threshold - less)
    draw = getattr(noise.Noise(), privacy.mechanism)
    cells = {(f"CODE{n}", 0): 1 for n in range(part.l0)}
    return sum(bool(noisy_survey._told(cells, part, draw)) for _ in range(RUNS)), part


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_codes_of_one_patient_are_told_no_more_often_than_delta(mechanism):
    told, part = tellings(dataclasses.replace(LONELY, mechanism=mechanism))
    assert stats.binom.sf(told - 1, RUNS, part.delta) > FALSE_ALARM


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_a_threshold_too_low_would_be_found_out(mechanism):
    told, part = tellings(dataclasses.replace(LONELY, mechanism=mechanism), less=30)
    assert stats.binom.sf(told - 1, RUNS, part.delta) < FALSE_ALARM


def ratio_bound(first, second, runs):
    """A lower bound of log(P1 / P2) from two counts, that is too high once in a million times."""
    low = stats.beta.ppf(FALSE_ALARM / 2, first, runs - first + 1)
    high = stats.beta.ppf(1 - FALSE_ALARM / 2, second + 1, runs - second)
    return math.log(low / high)


@pytest.mark.parametrize("share_of_noise", [Fraction(1), Fraction(1, 4)])
def test_an_attacker_learns_no_more_than_epsilon_and_would_with_less_noise(share_of_noise):
    runs, most = 20_000, 1
    scale = Fraction(2) * share_of_noise  # epsilon = most / 2 with all of it
    draw = noise.Noise().laplace
    with_one = sum(100 + most + draw(scale) >= 101 for _ in range(runs))
    without = sum(100 + draw(scale) >= 101 for _ in range(runs))
    learnt = ratio_bound(with_one, without, runs)
    assert (learnt <= most / 2) == (share_of_noise == 1)


def stays(patients):
    rng = np.random.default_rng(1)
    subject = np.repeat(np.arange(patients), 6)
    values = rng.normal(80, 12, subject.size).astype(np.float32)
    return pl.DataFrame(
        {
            "subject_id": subject,
            "time": pl.Series(np.tile(np.arange(6), patients) * 60 * hospital.MINUTE).cast(pl.Datetime("us")),
            "code": ["LAB//HR", "LAB//HR", "LAB//HR", "VISIT", "LAB//HR", "DX//RARE"] * patients,
            "numeric_value": np.where(np.tile(np.arange(6), patients) % 5 == 3, np.nan, values),
        }
    ).with_columns(
        pl.col("numeric_value").fill_nan(None).cast(pl.Float32),
        code=pl.when((pl.col("code") == "DX//RARE") & (pl.col("subject_id") > 0))
        .then(pl.lit("VISIT"))
        .otherwise("code"),
    )


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_a_large_hospital_tells_nearly_the_truth_and_no_rare_code(tmp_path, mechanism):
    write_meds(tmp_path / "meds", [("0", stays(5000))], name="large")
    dataset = MedsDataset.open(tmp_path / "meds")
    options = TokenizerOptions()
    privacy = SurveyPrivacy(mechanism, 2.0, 1e-6, Bounds(4, 2, 1, 4, 4), join=9)
    survey, spend = noisy_survey.noisy_survey(dataset, EVERYBODY, options, privacy)
    assert (spend.mechanism, spend.epsilon, spend.delta) == (mechanism, 2.0, 1e-6)
    # Ten scales of noise: beyond them once in ten thousand runs for Laplace, far less for Gaussian.
    assert survey.patients == pytest.approx(5000, abs=200)
    assert survey.codes.keys() == {"LAB//HR", "VISIT"}
    assert survey.codes["LAB//HR"] == pytest.approx(5000, abs=300)
    assert survey.prefixes.keys() == {"LAB"}
    assert Survey.from_bytes(survey.to_bytes()) == survey
    breaks = Codebook.build(survey).breaks["LAB//HR"]
    assert 55 < breaks[0] < breaks[-1] < 115


def test_buckets_are_joined_near_where_they_were():
    values = np.concatenate([-np.geomspace(1e-30, 1e30, 500)[::-1], [0.0], np.geomspace(1e-30, 1e30, 500)])
    buckets = sketch.bucket_of(values, 0.01)
    pairs = pl.DataFrame({"key": ["A"] * 1001, "bucket": buckets, "subject_id": range(1001), "events": [1] * 1001})
    joined = noisy_survey._coarse(pairs, 9).sort("subject_id")["bucket"].to_list()
    for value, bucket in zip(values, joined, strict=True):
        assert sketch.is_bucket(bucket, 0.01)
        assert sketch.bucket_value(bucket, 0.01) == pytest.approx(value, rel=0.1)


def test_nobody_at_all_can_be_surveyed():
    survey, _ = release(Counted(), TokenizerOptions(), SurveyPrivacy())
    assert (survey.codes, survey.values) == ({}, {})


@pytest.mark.parametrize(
    "wrong",
    [{"epsilon": 0.0}, {"epsilon": math.nan}, {"delta": 0.0}, {"delta": 0.5}, {"mechanism": "none"}, {"join": 0}],
)
def test_protection_that_is_none_is_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=rf"survey privacy: {name} must .*, got {value!r}\."):
        SurveyPrivacy(**wrong)
    with pytest.raises(ConfigError, match=r"bounds\.codes must be at least 1, got 0"):
        Bounds(codes=0)


@given(st.integers(1, 100), st.integers(1, 9))
def test_the_price_is_known_without_any_record(codes, values):
    spend = price(SurveyPrivacy(bounds=Bounds(codes=codes, values=values)), floor=10)
    assert all(part.threshold >= 10 for part in spend.releases if part.name != "patients")

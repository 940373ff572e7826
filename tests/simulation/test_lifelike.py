"""Hospitals whose records hide frailty and hold an interaction in time: their exact risks against what happens.

Statistical tests give z-scores of 10 bins or fewer; a bound of 4.5 raises a false alarm once in 15,000 (10 bins).
"""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

from simulation import frailty, pathway
from simulation.chart import OTHER_CODES, SI
from simulation.course import CONDITIONS, DAY_US, Facts, death_curve, follow, law
from simulation.extract import events, extract
from simulation.forms import FORMS, write
from simulation.hospital import LIFELIKE, Records, generate

TASKS = ("death_90d", "readmission_30d", "kidney_injury_90d")


@pytest.fixture(scope="module")
def made() -> dict[str, Records]:
    return {name: generate(LIFELIKE[f"{name}-lifelike"], 5000, seed=5) for name in ("heart", "surgical")}


def _worst(labels: np.ndarray, risks: np.ndarray) -> float:
    bins = np.array_split(np.argsort(risks), 10)
    errors = [np.sqrt((risks[rows] * (1 - risks[rows])).sum()) for rows in bins]
    return float(max(abs(labels[rows].sum() - risks[rows].sum()) / e for rows, e in zip(bins, errors, strict=True)))


@pytest.mark.parametrize("task", TASKS)
def test_outcomes_come_as_often_as_the_risk_given_the_record_says(made: dict[str, Records], task: str) -> None:
    rows = pl.concat([records.truth.filter(pl.col("complete") & (pl.col("task") == task)) for records in made.values()])
    first = rows.unique("subject_id", keep="first", maintain_order=True)
    assert _worst(first["label"].to_numpy(), first["risk"].to_numpy()) < 4.5
    labels, risks = rows["label"].to_numpy(), rows["risk"].to_numpy()
    assert _worst(labels, np.minimum(1.3 * risks, 0.999)) > 4.5, "risks that are wrong are found out"


def test_what_the_record_tells_of_frailty_is_calibrated() -> None:
    """Chances of each class, against how often it is the true one, at patients' second live discharges."""
    rng = np.random.default_rng(0)
    count = 20_000
    facts = Facts(
        np.full(count, 78.0), np.tile(np.array(CONDITIONS) == "copd", (count, 1)), np.zeros(count),
        frailty.draw(rng, count),
    )  # fmt: skip
    entry = np.zeros(count, np.int64)
    stays, _ = follow(rng, law(facts), entry, entry + 700 * DAY_US)
    weight = frailty.believe(facts, stays).weight
    # All stays that begin within 700 days are there, and the second is a stopping time: no choice by the future.
    second = np.nonzero(~stays.first & np.append(False, stays.first[:-1]) & ~stays.died)[0]
    for number, level in enumerate(frailty.LEVELS):
        truly = facts.frailty[stays.patient[second]] == level
        assert _worst(truly.astype(int), weight[second, number]) < 4.5
        if level != frailty.LEVELS[1]:
            prior = np.full(len(second), frailty.SHARES[number])
            assert _worst(truly.astype(int), prior) > 4.5, "shares of all are found out"
    assert weight[second, 2].max() > 3 * frailty.SHARES[2], "a hard course tells of frailty"


def test_the_injury_comes_as_often_as_the_closed_form_says() -> None:
    """Brute force over patients of one kind, by dangerous episodes; z below 4.5 for each of 7."""
    rng = np.random.default_rng(1)
    count = 40_000
    facts = Facts(np.full(count, 83.0), np.tile(np.array(CONDITIONS) == "cancer", (count, 1)), np.full(count, 1.0))
    entry = np.full(count, 16_000 * DAY_US)
    rules = law(facts)
    stays, death = follow(rng, rules, entry, entry + 400 * DAY_US)
    path = pathway.prescribe(rng, entry, stays, death)
    table = pathway.injury_risk(death_curve(rules, 90))
    asked = np.nonzero(stays.first & ~stays.died)[0]
    who = stays.patient[asked]
    risk = table[path.dangerous[who], rules.kind[who], stays.acuity[asked], stays.run[asked]]
    without_death = -np.expm1(-90 * pathway.hazards())[path.dangerous[who]]
    hurt = path.injury[who] <= stays.left[asked] + 90 * DAY_US
    for dangerous in range(pathway.EPISODES + 1):
        rows = path.dangerous[who] == dangerous
        error = np.sqrt((risk[rows] * (1 - risk[rows])).sum())
        assert abs(hurt[rows].sum() - risk[rows].sum()) < 4.5 * error
    gap = without_death.sum() - hurt.sum()
    assert gap > 4.5 * np.sqrt((risk * (1 - risk)).sum()), "that death competes matters here"


def _counts(records: Records) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features of each prediction as `simulation.baselines` makes them, the true order, labels and risks."""
    asked = records.truth.filter((pl.col("task") == "kidney_injury_90d") & pl.col("complete"))
    seen = records.events.join(asked.select("subject_id", "prediction_time"), on="subject_id").filter(
        (pl.col("time") <= pl.col("prediction_time")) & (pl.col("code") != "MEDS_BIRTH")
    )
    told = seen.group_by("subject_id", "code").agg(
        count=pl.len(),
        last=pl.col("numeric_value").last(),
        since=(pl.col("prediction_time") - pl.col("time").max()).first().dt.total_minutes(),
    )
    table = asked.select("subject_id").join(
        told.pivot("code", index="subject_id", sort_columns=True), on="subject_id", how="left", maintain_order="left"
    )
    drug = {name: pl.col("code") == f"MEDICATION//{name}" for name in (pathway.FIRST, pathway.SECOND)}
    after = pl.col("before").str.ends_with(pathway.FIRST) & (pl.col("gap") < pl.duration(days=7))
    pairs = (
        seen.filter(drug[pathway.FIRST] | drug[pathway.SECOND])
        .sort("subject_id", "time")
        .with_columns(gap=pl.col("time").diff().over("subject_id"), before=pl.col("code").shift().over("subject_id"))
        .filter(drug[pathway.SECOND] & after)
        .group_by("subject_id")
        .len()
    )
    order = asked.join(pairs, on="subject_id", how="left", maintain_order="left")["len"].fill_null(0)
    features = table.drop("subject_id").cast(pl.Float64).to_numpy()
    features = features[:, [len(np.unique(column[~np.isnan(column)])) > 1 for column in features.T]]
    return features, order.to_numpy(), asked["label"].to_numpy(), asked["risk"].to_numpy()


def test_only_order_and_time_tell_of_the_injury(made: dict[str, Records]) -> None:
    features, order, labels, risks = _counts(made["heart"])
    half = len(labels) // 2
    boosting = HistGradientBoostingClassifier(max_iter=100, learning_rate=0.05, max_leaf_nodes=15, random_state=0)
    by_features = boosting.fit(features[:half], labels[:half]).predict_proba(features[half:])[:, 1]
    reached = roc_auc_score(labels[half:], by_features)
    best, ordered = (roc_auc_score(labels[half:], told[half:]) for told in (risks, order))
    print(f"gradient boosting on counts, last values and recency {reached:.3f}; order {ordered:.3f}; truth {best:.3f}")
    assert best > 0.80
    assert ordered > best - 0.02
    assert reached < best - 0.12


def test_sites_differ_in_codes_units_values_and_missingness(made: dict[str, Records]) -> None:
    def count(name: str, code: str) -> int:
        return int((made[name].events["code"] == code).sum())

    for ours, theirs in ((unit, other.code) for unit, other in SI.items()):
        assert count("heart", ours) > 0 == count("heart", theirs)
        assert count("surgical", theirs) > 0 == count("surgical", ours)
    other = f"DIAGNOSIS//ICD10CM//{OTHER_CODES[0]}"
    assert count("surgical", other) > count("surgical", "DIAGNOSIS//ICD10CM//I50.9")
    assert count("heart", other) < count("heart", "DIAGNOSIS//ICD10CM//I50.9")


def test_first_admissions_come_in_winter(made: dict[str, Records]) -> None:
    first = pl.concat([
        records.events.filter(pl.col("code").str.starts_with("HOSPITAL_ADMISSION//")).unique("subject_id", keep="first",
        maintain_order=True) for records in made.values()
    ])  # fmt: skip
    month = first["time"].dt.month()
    winter, summer = (int(month.is_in(months).sum()) for months in ((12, 1, 2), (6, 7, 8)))
    # Expected ratio (1 + 0.36) / (1 - 0.36) with a winter of 0.4; 10,000 patients.
    assert 1.7 < winter / summer < 2.7


def test_a_drug_moves_the_values_that_answer_to_it_and_only_after_a_delay(made: dict[str, Records]) -> None:
    stays = made["heart"].events
    fluid = stays.filter(pl.col("code") == "MEDICATION//FUROSEMIDE").select("subject_id", given=pl.col("time"))
    begins = stays.filter(pl.col("code").str.starts_with("HOSPITAL_ADMISSION//")).select("subject_id", begin="time")
    values = stays.filter(pl.col("code") == "LAB//NT-PROBNP//pg/mL").sort("time")
    ill = stays.filter(pl.col("code").is_in(["DIAGNOSIS//ICD10CM//I50.9", f"DIAGNOSIS//ICD10CM//{OTHER_CODES[0]}"]))
    inside = values.join(ill.select("subject_id").unique(), on="subject_id", how="semi").join_asof(
        begins.sort("begin"), left_on="time", right_on="begin", by="subject_id", check_sortedness=False
    )
    # A stay's drug comes three hours after its begin.
    treated = fluid.select("subject_id", begin=pl.col("given") - pl.duration(hours=3), treated=pl.lit(True))
    told = inside.join(treated, on=["subject_id", "begin"], how="left").with_columns(
        pl.col("treated").fill_null(False),
        hours=(pl.col("time") - pl.col("begin")).dt.total_minutes() / 60,
        log=pl.col("numeric_value").log(),
    )

    def mean(first: int, last: int, treated: bool) -> tuple[float, float]:
        chosen = told.filter(pl.col("hours").is_between(first, last) & (pl.col("treated") == treated))
        return float(chosen["log"].mean()), float(chosen["log"].std() / np.sqrt(chosen.height))

    for first, last, effect in ((0, 9, 0.0), (60, 200, -1.4 * 0.8)):
        # Given 3 h after admission, it begins to work at 9 h; -1.4 spreads of 0.8 in the end.
        (with_drug, one), (without, other) = mean(first, last, True), mean(first, last, False)
        print(f"from {first} to {last} h: {with_drug - without:.3f}, error {np.hypot(one, other):.3f}")
        assert with_drug - without == pytest.approx(effect, abs=4.5 * np.hypot(one, other) + 0.15 * abs(effect))


def test_equal_seeds_give_equal_bytes_in_every_form(tmp_path: Path) -> None:
    profile = LIFELIKE["oncology-lifelike"]
    tables = extract(generate(profile, 60, seed=2), profile, seed=2)
    codes = set(events(tables)["code"])
    assert {"ICD10CM//N17.9", "RxNorm//29046", "RxNorm//5640", "LOINC//14682-9"} <= codes
    for form in FORMS:
        folders = [tmp_path / f"{form}-{turn}" for turn in range(2)]
        for folder in folders:
            write(profile, folder, form=form, patients=60, seed=2)
        first, again = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders)
        assert first == again
        assert any(b"ynthetic" in content or b"HTEST" in content for content in first.values())

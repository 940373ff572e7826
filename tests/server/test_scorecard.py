"""A table of predictions is measured as a whole, by time, by number and by group."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from federation import canonical
from model import decisions, metrics, survival
from model.cohort import Counts
from model.subgroups import ALL
from server.about import About, Asked, write_table
from server.loose import horizons_of, report_of_file
from server.report import load, write_report
from server.scorecard import scorecards, table
from tokenizer.errors import DataError


def predictions(size: int = 200) -> pl.DataFrame:
    rng = np.random.default_rng(3)
    risk = rng.random(size)
    event = (rng.random(size) < risk).astype(int) + 0
    label = np.where(np.arange(size) % 10 == 0, -1, event)
    return pl.DataFrame(
        {
            "subject_id": np.arange(size) // 2,
            "task": ["back"] * size,
            "label": label.astype(np.int8),
            "risk": risk,
            "time_days": rng.exponential(10, size) + 0.1,
            "event": np.where(label < 0, 0, np.where(event == 1, 1, 2)),
            "count": rng.integers(0, 5, size),
            "count_mean": rng.random(size) * 4,
            "grid_days": [[2.0, 4.0, 7.0]] * size,
            "risk_curve": [[r / 4, r / 2, r] for r in risk],
            "sex": ["F" if (row // 2) % 3 else "M" for row in range(size)],
        }
    )


def test_every_measure_of_a_table_is_that_of_its_own_module() -> None:
    told = predictions()
    (card,) = scorecards(told, ["sex"], horizon_days=7.0, resamples=60)
    known = told.filter(pl.col("label") >= 0)
    whole = card.groups[0]
    truth = {
        "AUROC": metrics.auroc(known["label"], known["risk"]),
        "ECE": metrics.ece(known["label"], known["risk"]),
        "slope": metrics.recalibration(known["label"], known["risk"])[0],
        "sensitivity at 10%": decisions.sensitivity_at(known["label"], known["risk"], 0.1),
        "C-index": survival.concordance(told["time_days"], told["event"], told["risk"]),
        "AUC at 7 d": survival.auc_at(told["time_days"], told["event"], told["risk"], 7.0),
        "MAE of count": metrics.mae(told["count"], told["count_mean"]),
        "RMSLE of count": metrics.rmsle(told["count"], told["count_mean"]),
    }
    assert (whole.name, whole.patients, whole.predictions) == (ALL, 100, 200)
    for name, value in truth.items():
        figure = whole.figures[name]
        assert figure.value == pytest.approx(value)
        assert figure.low is not None
        assert figure.high is not None
        assert figure.low <= value <= figure.high
    assert [group.name for group in card.groups] == [ALL, "sex: F", "sex: M"]
    women, men = (group.figures["AUROC"].value for group in card.groups[1:])
    assert women is not None
    assert men is not None
    assert card.groups[1].difference["AUROC"].value == pytest.approx(women - men)
    assert "censored" in card.notes[0]
    assert len(card.thresholds) == len(card.net_benefit) == len(card.treat_all)
    assert canonical.encode(card)
    assert table(card).row_count == 3


def test_a_missing_column_is_named() -> None:
    with pytest.raises(DataError, match="'race'"):
        scorecards(predictions(), ["race"])


def test_risks_by_day_are_measured_on_those_days_and_lost_patients_weigh_the_others() -> None:
    told = predictions()
    (card,) = scorecards(told, horizon_days=7.0, resamples=50)
    whole = survival.auc_at(told["time_days"], told["event"], told["risk"], 7.0)
    assert card.over_time[-1][0] == 7.0
    assert card.over_time[-1][1].value == pytest.approx(whole)
    # Those who were lost before the day have no risk: the figure stays, as only their time counts.
    gone = (pl.col("label") < 0) & (pl.col("time_days") <= 7.0)
    nothing = pl.when(~gone).then(pl.col("risk"))
    (less,) = scorecards(told.with_columns(risk=nothing), horizon_days=7.0, resamples=50)
    assert less.groups[0].figures["AUC at 7 d"].value == pytest.approx(whole)
    # One who was followed beyond it and was not asked about would bias it, so it is left out.
    unasked = pl.when((pl.col("label") >= 0) | (pl.col("time_days") <= 7.0)).then(pl.col("risk"))
    assert (
        "AUC at 7 d"
        not in scorecards(told.with_columns(risk=unasked), horizon_days=7.0, resamples=50)[0].groups[0].figures
    )


def test_who_is_free_of_the_outcome_to_the_horizon_where_looking_stops_counts_as_that() -> None:
    told = predictions().with_columns(
        time_days=pl.when(pl.col("label") == 0).then(7.0).otherwise(pl.col("time_days").clip(upper_bound=7.0)),
        event=pl.when(pl.col("label") == 1).then(1).otherwise(0),
    ).filter(pl.col("label") >= 0)  # fmt: skip
    (card,) = scorecards(told, horizon_days=7.0, resamples=50)
    # Nobody is lost, so that every weight is one: it is the AUROC.
    assert card.groups[0].figures["AUC at 7 d"].value == pytest.approx(metrics.auroc(told["label"], told["risk"]))


def test_a_file_of_predictions_has_a_page_that_says_what_it_is_of(tmp_path: Path) -> None:
    path, table_ = tmp_path / "predictions.parquet", predictions().with_columns(task_hash=pl.lit("ab" * 32))
    counts = Counts(140, 200, 100, 80, 20, {"age": 40})
    asked = Asked("Will it come back?", (("Asked at", "every LAB"),), counts, 7.0)
    write_table(path, table_, About({"back": asked}, (("Privacy", "none"),), (("Codebook", "cd" * 32),)))
    assert horizons_of(path) == {"back": 7.0}
    cards = scorecards(table_, ["sex"], horizon_days=horizons_of(path), resamples=50)
    assert "AUC at 7 d" in cards[0].groups[0].figures
    report = report_of_file(path, cards, resamples=100)
    write_report(tmp_path / "page.html", report)
    assert load(tmp_path / "page.json") == report
    page = (tmp_path / "page.html").read_text()
    for phrase in ("Will it come back?", "not asked: age", "ab" * 32, "cd" * 32, "sex: F", 'id="limits"'):
        assert phrase in page
    for absent in (
        "()",
        "Trajectories without answer",
        "paired</th>",
        'id="training"',
        'id="sites"',
        'id="gains"',
        "<script",
    ):
        assert absent not in page
    (question,) = report.questions
    assert question.arms[0].auroc.value == pytest.approx(cards[0].groups[0].figures["AUROC"].value)


def test_a_file_that_says_nothing_of_itself_has_a_page_too(tmp_path: Path) -> None:
    write_table(tmp_path / "p.parquet", predictions())
    report = report_of_file(tmp_path / "p.parquet", scorecards(predictions(), resamples=50), resamples=100)
    assert report.questions[0].counts == Counts(
        100, 200, *np.bincount(predictions()["label"] + 1)[[2, 1, 0]].tolist(), {}
    )
    assert horizons_of(tmp_path / "p.parquet") == {}

"""A table of predictions is measured as a whole, by time, by number and by group."""

import numpy as np
import polars as pl
import pytest

from federation import canonical
from model import decisions, metrics, survival
from model.subgroups import ALL
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

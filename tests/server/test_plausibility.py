"""Futures are held against the same patients' records: equal ones agree, and each kind of nonsense shows by itself."""

import datetime as dt
import re

import numpy as np
import polars as pl
import pytest

from server.plausibility import Plausibility, in_words_of, plausibility
from server.plausibility_page import render, table
from tests import tiny
from tokenizer.codebook import Codebook, TokenizerOptions
from tokenizer.errors import ConfigError, DataError
from tokenizer.release import Survey

AT = dt.datetime(2020, 6, 1)
Row = tuple[int, dt.datetime | None, str, float | None]


def records() -> list[Row]:
    rng, rows = np.random.default_rng(1), list[Row]()
    for patient in range(40):
        rows += [
            (patient, None, f"GENDER//{'MF'[patient % 2]}", None),
            (patient, dt.datetime(1960, 1, 1), "MEDS_BIRTH", None),
        ]
        rows += [
            (patient, AT + dt.timedelta(days=40), "LAST", None),
            (patient, AT - dt.timedelta(days=1), "BEFORE", None),
        ]
        for day in sorted(rng.integers(1, 29, 4).tolist()):
            rows.append((patient, AT + dt.timedelta(days=day), "LAB//NA", 140 + float(rng.normal())))
            if rng.random() < 0.5:
                rows.append((patient, AT + dt.timedelta(days=day, hours=1), "ICD10CM//E11", None))
    return rows


def compare(futures: list[Row], real: list[Row] | None = None, days: float = 30.0) -> Plausibility:
    whole = pl.DataFrame(real or records(), schema=tiny.SCHEMA, orient="row")
    made = pl.DataFrame(futures, schema=tiny.SCHEMA, orient="row")
    told = pl.DataFrame(
        {"subject_id": range(40), "patient": range(40), "prediction_time": [AT] * 40, "reason": ["horizon"] * 40,
         "elapsed_days": [30.0] * 40}
    ).with_columns(pl.col("prediction_time").cast(pl.Datetime("us")))  # fmt: skip
    return plausibility(whole, made, told, days)


def same() -> list[Row]:
    """Futures that are just what was recorded."""
    return [row for row in records() if row[1] is not None and row[2].startswith(("LAB", "ICD"))]


def figure(found: Plausibility, name: str) -> float:
    value = next(each.generated for each in found.findings if each.name == name)
    assert value is not None
    return value


def test_futures_equal_to_the_records_are_plausible_in_every_respect() -> None:
    found = compare(same())
    assert (found.spans, found.trajectories) == (40, 40)
    for name in ("RMSLE of prevalence", "RMSLE of co-occurrence", "distance of lengths", "distance of gaps"):
        assert figure(found, name) == 0
    for name in ("codes that the records don't have", "events after death", "events that the sex rules out"):
        assert figure(found, name) == 0
    assert [row[1] for row in found.values] == [0.0]
    assert {code for code, *_ in found.prevalence} == {"LAB//NA", "ICD10CM//E11"}


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("NEVER//SEEN", "codes that the records don't have"),
        ("ICD10CM//C61", "events that the sex rules out"),
        ("ICD10CM//O80", "events that the age rules out"),
    ],
)
def test_each_impossible_event_is_counted_under_its_own_name(code: str, name: str) -> None:
    real = [*records(), (999, AT, code, None)] if not code.startswith("NEVER") else records()
    extra = [(1, AT + dt.timedelta(days=2), code, None)]
    found = compare([*same(), *extra], real)
    assert figure(found, name) == pytest.approx(1 / (len(same()) + 1))
    others = {"codes that the records don't have", "events that the sex rules out", "events that the age rules out"}
    assert all(figure(found, other) == 0 for other in others - {name})


def test_events_after_death_and_other_values_show() -> None:
    dead = [(0, AT + dt.timedelta(minutes=5), "MEDS_DEATH", None)]
    after = sum(1 for row in same() if row[0] == 0)
    assert figure(compare([*same(), *dead]), "events after death") == pytest.approx(after / (len(same()) + 1))
    shifted = [(who, when, code, None if value is None else value + 5) for who, when, code, value in same()]
    ((code, distance, real, made),) = compare(shifted).values
    assert code == "LAB//NA"
    assert made - real == pytest.approx(5, abs=1e-3)
    assert distance > 2


def test_twice_the_events_are_seen_in_prevalence_and_length() -> None:
    more = [*same(), *[(who, AT + dt.timedelta(days=3, hours=who), "NEW", None) for who in range(40)]]
    found = compare(more)
    assert figure(found, "RMSLE of prevalence") > 1
    assert figure(found, "distance of lengths") > 0.1


def test_the_page_and_the_table_tell_the_figures() -> None:
    found = compare(same())
    page = render(found, "Futures")
    assert page.count("<svg") == 3
    assert "ICD10CM//E11" in page
    assert table(found).row_count == len(found.findings)


@pytest.mark.filterwarnings("error")
def test_axes_are_told_in_plain_text_whatever_the_range() -> None:
    rows = [
        (who, AT + dt.timedelta(days=1, minutes=who % 3 * n), "LAB//NA", 1.0) for who in range(40) for n in (1, 2, 9)
    ]
    for futures in (same(), rows, rows[:9]):
        page = render(compare(futures), "Futures")
        assert "mathdefault" not in page
        assert ">recorded</text>" in page
        assert re.search(r">[\d.]+ %</text>", page)


def test_nothing_is_said_of_sexes_that_the_records_do_not_tell() -> None:
    coded = [(who, when, code.replace("GENDER//", "GENDER//0"), value) for who, when, code, value in records()]
    ruled = {each.name: each for each in compare(same(), coded).findings}["events that the sex rules out"]
    assert (ruled.real, ruled.generated) == (None, None)


def test_what_can_not_be_compared_is_refused() -> None:
    with pytest.raises(DataError, match="look less far"):
        compare(same(), days=100.0)
    with pytest.raises(ConfigError, match="horizon"):
        compare(same(), days=0.0)


def test_records_are_told_in_the_words_that_a_model_has() -> None:
    known = {"ICD10CM//E11.65": 30, "ICD10CM//E11.9": 30, "ICD10CM//I50.1": 30, "LAB//NA": 30}
    book = Codebook.build(Survey(TokenizerOptions(min_patients=5), patients=30, codes=known))
    codes = ["ICD10CM//E11.65", "ICD10CM//E11.9", "ICD10CM//I50.9", "LAB//NA", "LAB//RARE"]
    real = pl.DataFrame(
        [(1, None, "GENDER//F", None), (1, AT, "MEDS_BIRTH", None), *((1, AT, code, 1.0) for code in codes)],
        schema=tiny.SCHEMA,
        orient="row",
    )
    told = in_words_of(book, real)["code"].to_list()
    assert told[:4] == ["GENDER//F", "MEDS_BIRTH", "ICD10CM//E11.65", "ICD10CM//E11.9"]
    assert told[5] == "LAB//NA"
    assert not {"ICD10CM//I50.9", "LAB//RARE"} & set(told)
    # Every word is one that a trajectory can hold.
    words = {book.event(node) for node in range(book.grammar.nodes)}
    assert set(told[2:]) <= words

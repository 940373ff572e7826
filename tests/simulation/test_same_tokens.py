"""One truth in four forms gives one token stream: writers and importers were made apart, from the specifications.

What a form can't hold alike is left out of all of them; see docs/sources/synthetic.md.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simulation.forms import FORMS, Form, write
from simulation.hospital import PROFILES
from tokenizer.codebook import Codebook, TokenizerOptions
from tokenizer.events import MedsDataset
from tokenizer.sources.fhir import import_fhir
from tokenizer.sources.intake import EVENTS, Flow
from tokenizer.sources.omop import import_omop
from tokenizer.sources.tables import import_tables
from tokenizer.split import SPLITS, SplitRule
from tokenizer.store import build_store
from tokenizer.survey import survey

IMPORTERS: dict[str, Callable[[Path, Path], Flow]] = {
    "omop": lambda records, out: import_omop(records, out, name="omop", visit_details=True),
    "omop, codes of the source": lambda records, out: import_omop(
        records, out, name="omop", codes="source", visit_details=True
    ),
    "fhir": lambda records, out: import_fhir(records, out, name="fhir"),
    "tables": lambda records, out: import_tables(records, out, records / "mapping.toml", name="tables"),
}

# Tables with rows that give no event: the panel of a blood pressure has no value of its own, the others are only
# referred to.
NO_EVENTS = {"Observation", "Location", "Medication", "begins"}


@dataclass(frozen=True)
class Stream:
    """What a model is trained on: the codebook's hash; each split's tokens, times, lengths and subjects as bytes."""

    codebook: str
    splits: dict[str, tuple[bytes, ...]]


def stream(records: Path, store: Path) -> Stream:
    """Survey, codebook and tokens of a MEDS dataset, subjects in ascending order."""
    dataset = MedsDataset.open(records)
    rule = SplitRule("key")
    codebook = Codebook.build(survey(dataset, rule, TokenizerOptions(min_patients=3)))
    built = build_store(dataset, codebook, rule, store)
    splits = {}
    for name in SPLITS:
        split = built.split(name)
        order = np.argsort(split.subject_ids)
        lines = [split.timeline(int(place)) for place in order]
        empty = (np.zeros(0, np.int32), np.zeros(0, np.int64))
        tokens, times = (np.concatenate(column) for column in zip(*(lines or [empty]), strict=True))
        lengths = np.array([len(line) for line, _ in lines], np.int64)
        splits[name] = tuple(array.tobytes() for array in (tokens, times, lengths, split.subject_ids[order]))
    return Stream(codebook.hash, splits)


def recorded(records: Path) -> pl.DataFrame:
    """All events of a dataset with unit and encounter, in one order."""
    dataset = MedsDataset.open(records)
    shards = [pl.read_parquet(records / shard, columns=list(EVENTS)) for shard in dataset.shards]
    return pl.concat(shards).select(pl.col(name).cast(kind) for name, kind in EVENTS.items()).sort(list(EVENTS))


def written(folder: Path, hospital: str, patients: int, seed: int) -> dict[Form, Path]:
    return {form: write(hospital, folder / form, form=form, patients=patients, seed=seed).records for form in FORMS}


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(PROFILES)), st.integers(0, 2**32), st.integers(1, 120))
def test_four_forms_of_one_truth_give_the_same_tokens(tmp_path: Path, hospital: str, seed: int, patients: int):
    folder = tmp_path / f"{hospital}-{seed}-{patients}"
    forms = written(folder, hospital, patients, seed)
    truth, events = stream(forms["meds"], folder / "store"), recorded(forms["meds"])
    assert sum(len(subjects) // 8 for *_, subjects in truth.splits.values()) == patients
    for number, (name, importer) in enumerate(IMPORTERS.items()):
        out = folder / f"imported-{number}"
        flow = importer(forms[name.split(",")[0]], out)
        assert flow.quarantined == {}, name
        assert set(flow.dropped) <= NO_EVENTS, name
        assert flow.subjects == patients, name
        assert flow.events_total == events.height, name
        assert recorded(out).equals(events), name
        assert stream(out, folder / f"store-{number}") == truth, name


def _value_of_omop(records: Path) -> None:
    frame = pl.read_csv(records / "measurement.csv", infer_schema=False)
    value = pl.when(pl.int_range(pl.len()) == 0).then(pl.lit("9999")).otherwise("value_as_number")
    frame.with_columns(value_as_number=value).write_csv(records / "measurement.csv")


def _minute_of_fhir(records: Path) -> None:
    lines = (records / "Immunization.ndjson").read_text(encoding="utf-8").splitlines()
    first = json.loads(lines[0])
    hour, minute = first["occurrenceDateTime"][11:16].split(":")
    first["occurrenceDateTime"] = f"{first['occurrenceDateTime'][:11]}{hour}:{(int(minute) + 7) % 60:02}:00-05:00"
    lines[0] = json.dumps(first)
    (records / "Immunization.ndjson").write_text("\n".join([*lines, ""]), encoding="utf-8")


def _code_of_tables(records: Path) -> None:
    frame = pl.read_csv(records / "diagnoses.csv", infer_schema=False)
    code = pl.when(pl.int_range(pl.len()) == 0).then(pl.lit("Z99.9")).otherwise("icd10")
    frame.with_columns(icd10=code).write_csv(records / "diagnoses.csv")


@pytest.mark.parametrize(
    ("form", "change"), [("omop", _value_of_omop), ("fhir", _minute_of_fhir), ("tables", _code_of_tables)]
)
def test_one_wrong_cell_in_one_form_is_noticed(tmp_path: Path, form: Form, change: Callable[[Path], None]):
    records = write("heart", tmp_path / form, form=form, patients=60, seed=3).records
    IMPORTERS[form](records, tmp_path / "right")
    change(records)
    IMPORTERS[form](records, tmp_path / "wrong")
    assert recorded(tmp_path / "right").height == recorded(tmp_path / "wrong").height
    assert stream(tmp_path / "right", tmp_path / "store-right") != stream(tmp_path / "wrong", tmp_path / "store-wrong")


def test_a_stay_that_goes_on_when_the_record_closes_has_no_end_in_any_form(tmp_path: Path):
    # More patients than a writer holds at a time.
    forms = written(tmp_path, "surgical", 2100, 0)
    started, ended = (pl.col("code").str.starts_with(f"ENCOUNTER_{border}//") for border in ("START", "END"))
    truth = recorded(forms["meds"])
    still_there = truth.select(started.sum() - ended.sum()).item()
    assert still_there > 0
    for number, (name, importer) in enumerate(IMPORTERS.items()):
        importer(forms[name.split(",")[0]], tmp_path / f"{number}")
        found = recorded(tmp_path / f"{number}")
        assert found.select(started.sum() - ended.sum()).item() == still_there, name
        assert found.equals(truth), name

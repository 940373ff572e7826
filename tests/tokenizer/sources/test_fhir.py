"""FHIR R4: what becomes of small resources, in all layouts that hospitals export them in."""

import gzip
import json
import tarfile
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.data import DATA
from tokenizer.errors import ConfigError, DataError
from tokenizer.sources.fhir import import_fhir
from tokenizer.sources.intake import Flow

Json = dict[str, Any]

LOINC, SNOMED, UCUM = "http://loinc.org", "http://snomed.info/sct", "http://unitsofmeasure.org"
RXNORM = "http://www.nlm.nih.gov/research/umls/rxnorm"
ICD10CM = "http://hl7.org/fhir/sid/icd-10-cm"
T = "2020-03-01T10:00:00"
AT = datetime(2020, 3, 1, 10)


def concept(system: str | None, code: str, **more: Any) -> Json:
    return {"coding": [{"system": system, "code": code, **more} if system else {"code": code, **more}]}


def patient(name: str = "1", **more: Any) -> Json:
    return {"resourceType": "Patient", "id": name, "gender": "female", "birthDate": "1950-06-01", **more}


def resource(kind: str, name: str = "r", **more: Any) -> Json:
    return {"resourceType": kind, "id": name, "subject": {"reference": "Patient/1"}, **more}


def observation(name: str = "o", code: str = "2345-7", **more: Any) -> Json:
    body = {"status": "final", "code": concept(LOINC, code), "effectiveDateTime": T, **more}
    return resource("Observation", name, **body)


def quantity(value: float, unit: str = "mg/dL") -> Json:
    return {"value": value, "unit": unit, "system": UCUM, "code": unit}


def encounter(name: str = "e1", **more: Any) -> Json:
    body = {
        "status": "finished",
        "class": {"code": "IMP"},
        "period": {"start": T, "end": "2020-03-04T12:00:00"},
        **more,
    }
    return resource("Encounter", name, **body)


def ndjson(folder: Path, *resources: Json, name: str = "all.ndjson") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(each) + "\n" for each in resources), encoding="utf-8")
    return folder


def take(tmp_path: Path, *resources: Json, **options: Any) -> tuple[pl.DataFrame, Flow]:
    """Events and flow of some resources in one mixed ndjson file."""
    return load(ndjson(tmp_path / "in", *resources), tmp_path / "out", **options)


def load(source: Path, out: Path, **options: Any) -> tuple[pl.DataFrame, Flow]:
    flow = import_fhir(source, out, name="test", **options)
    files = sorted(out.glob("data/**/*.parquet"))
    return pl.concat([pl.read_parquet(file) for file in files]), flow


def timed(events: pl.DataFrame) -> list[tuple[Any, ...]]:
    """Time, code, value and unit of what isn't static and isn't birth."""
    rows = events.filter(pl.col("time").is_not_null(), pl.col("code") != "MEDS_BIRTH")
    return rows.select("time", "code", "numeric_value", "unit").rows()


def codes(events: pl.DataFrame) -> list[str]:
    return [row[1] for row in timed(events)]


def check_sums(flow: Flow, kept: dict[str, int]) -> None:
    """Every row is kept, dropped by name or set aside."""
    assert {table: count for table, count in flow.kept.items() if count} == kept
    for table, rows in flow.rows.items():
        gone = sum(flow.dropped.get(table, {}).values()) + sum(flow.quarantined.get(table, {}).values())
        assert rows == kept.get(table, 0) + gone, (table, flow)


def test_a_patient_gives_birth_death_and_facts_of_us_core(tmp_path: Path) -> None:
    def us_core(name: str, code: str, text: str) -> Json:
        url = f"http://hl7.org/fhir/us/core/StructureDefinition/us-core-{name}"
        parts = [{"url": "ombCategory", "valueCoding": {"code": code}}, {"url": "text", "valueString": text}]
        return {"url": url, "extension": parts}

    extensions = [us_core("race", "2054-5", "Black"), us_core("ethnicity", "2135-2", "Hispanic")]
    events, _ = take(tmp_path, patient(extension=extensions, deceasedDateTime="2021-02-03T04:05:06+01:00"))
    assert events.select("subject_id", "time", "code").rows() == [
        (1, None, "ETHNICITY//HISPANIC"),
        (1, None, "GENDER//F"),
        (1, None, "RACE//BLACK"),
        (1, datetime(1950, 6, 1), "MEDS_BIRTH"),
        (1, datetime(2021, 2, 3, 4, 5, 6), "MEDS_DEATH"),
    ]


@pytest.mark.parametrize(
    ("text", "time"),
    [("2021", (2021, 12, 31)), ("2020-02", (2020, 2, 29)), ("2020-02-03", (2020, 2, 3))],
)
def test_a_death_known_by_year_or_month_is_put_at_its_end(tmp_path: Path, text: str, time: tuple[int, ...]) -> None:
    events, _ = take(tmp_path, patient(deceasedDateTime=text))
    assert timed(events) == [(datetime(*time), "MEDS_DEATH", None, None)]


def test_a_death_without_a_time_gives_no_event_but_is_counted(tmp_path: Path) -> None:
    events, flow = take(tmp_path, patient(deceasedBoolean=True))
    assert codes(events) == []
    assert flow.dropped["Patient.deceased"] == {"no time of death": 1}


def test_partial_dates_are_their_first_moment_and_zones_keep_the_wall_clock(tmp_path: Path) -> None:
    times = ["2019", "2019-05", "2019-05-06", "2019-05-06T10:11:12Z", "2019-05-06T10:11:12.5-05:00"]
    made = [observation(f"o{i}", f"{i}-0", effectiveDateTime=t, valueInteger=i) for i, t in enumerate(times)]
    events, _ = take(tmp_path, patient(), *made)
    assert [row[0] for row in timed(events)] == [
        datetime(2019, 1, 1),
        datetime(2019, 5, 1),
        datetime(2019, 5, 6),
        datetime(2019, 5, 6, 10, 11, 12),
        datetime(2019, 5, 6, 10, 11, 12, 500_000),
    ]


def test_every_kind_of_value_has_its_form(tmp_path: Path) -> None:
    absent = concept(None, "unknown")
    values: list[tuple[Json, Any]] = [
        ({"valueQuantity": quantity(5.5)}, ("", 5.5, "mg/dL")),
        ({"valueQuantity": {"value": 1, "unit": "tablet", "system": "http://x", "code": "T"}}, ("", 1.0, "tablet")),
        ({"valueQuantity": {"value": 0.01, "comparator": "<"}}, ("", pytest.approx(0.01), None)),
        ({"valueCodeableConcept": concept(SNOMED, "266919005")}, ("//SNOMED//266919005", None, None)),
        ({"valueCodeableConcept": {"text": "Gram  negative\n rods"}}, ("//GRAM NEGATIVE RODS", None, None)),
        ({"valueString": "positive"}, ("//POSITIVE", None, None)),
        ({"valueString": " 7.25 "}, ("", 7.25, None)),
        ({"valueBoolean": False}, ("//FALSE", None, None)),
        ({"valueInteger": 15}, ("", 15.0, None)),
        ({"valueRatio": {"numerator": {"value": 1}, "denominator": {"value": 128}}}, ("", 1 / 128, None)),
        ({"valueRange": {"low": {"value": 5}, "high": {"value": 10, "code": "/[HPF]"}}}, ("//5-10 /[HPF]", None, None)),
        ({}, ("", None, None)),
        ({"dataAbsentReason": absent}, "data absent"),
        ({"valueString": "x" * 41}, "free text"),
        ({"valueTime": "10:00:00"}, "value of a type that isn't read"),
        ({"hasMember": [{"reference": "Observation/1"}]}, "panel, its parts are read"),
    ]
    made = [observation(f"o{i}", f"{i}-0", **value) for i, (value, _) in enumerate(values)]
    events, flow = take(tmp_path, patient(), *made)
    found = {row[1].split("//")[1]: row[1:] for row in timed(events)}
    drops: dict[str, int] = {}
    for i, (_, wanted) in enumerate(values):
        if isinstance(wanted, str):
            drops[wanted] = drops.get(wanted, 0) + 1
            assert f"{i}-0" not in found
        else:
            assert found[f"{i}-0"] == (f"LOINC//{i}-0{wanted[0]}", *wanted[1:])
    assert flow.dropped["Observation"] == drops
    check_sums(flow, {"Patient": 1, "Observation": len(found)})


def test_components_are_rows_of_their_own(tmp_path: Path) -> None:
    parts = [
        {"code": concept(LOINC, "8480-6"), "valueQuantity": quantity(120, "mm[Hg]")},
        {"code": concept(LOINC, "8462-4"), "valueQuantity": quantity(80, "mm[Hg]")},
        {"code": concept(LOINC, "8478-0"), "dataAbsentReason": concept(None, "unknown")},
    ]
    cancelled = observation("gone", "85354-9", component=parts, status="cancelled")
    events, flow = take(tmp_path, patient(), observation("bp", "85354-9", component=parts), cancelled)
    assert timed(events) == [(AT, "LOINC//8462-4", 80.0, "mm[Hg]"), (AT, "LOINC//8480-6", 120.0, "mm[Hg]")]
    assert flow.rows["Observation.component"] == 3
    assert flow.dropped["Observation.component"] == {"data absent": 1}
    check_sums(flow, {"Patient": 1, "Observation.component": 2})


def test_an_encounter_gives_start_department_complaint_end_and_destination(tmp_path: Path) -> None:
    ward = {"resourceType": "Location", "id": "icu", "name": "Intensive  Care"}
    stay = encounter(
        serviceType={"text": "Cardiology"},
        reasonCode=[{"text": "chest pain"}],
        location=[
            {"location": {"display": "Emergency room"}},
            {"location": {"reference": "Location/icu"}, "period": {"start": "2020-03-02T00:00:00"}},
        ],
        hospitalization={"dischargeDisposition": concept("http://x", "home", display="Home")},
    )
    events, flow = take(tmp_path, patient(), ward, stay)
    assert [(row[0].day, row[1]) for row in timed(events)] == [
        (1, "CHIEF_COMPLAINT//CHEST PAIN"),
        (1, "DEPARTMENT//CARDIOLOGY"),
        (1, "ENCOUNTER_START//INPATIENT"),
        (2, "DEPARTMENT//INTENSIVE CARE"),
        (4, "DISCHARGE_TO//HOME"),
        (4, "ENCOUNTER_END//INPATIENT"),
    ]
    assert events.filter(pl.col("encounter_id") == "e1").height == 6
    assert flow.dropped["Location"] == {"read for references only": 1}


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("AMB", "OUTPATIENT"),
        ("EMER", "EMERGENCY"),
        ("ACUTE", "INPATIENT"),
        ("OBSENC", "INPATIENT"),
        ("SS", "INPATIENT"),
        ("VR", "TELEHEALTH"),
        ("HH", "HOME"),
        ("FLD", "OTHER"),
    ],
)
def test_classes_become_types_and_an_open_encounter_has_no_end(tmp_path: Path, code: str, kind: str) -> None:
    events, _ = take(tmp_path, patient(), encounter(**{"class": {"code": code}}, period={"start": T}))
    assert codes(events) == [f"ENCOUNTER_START//{kind}"]


def test_an_end_before_the_start_by_the_clock_change_only_is_at_the_start(tmp_path: Path) -> None:
    period = {"start": "2022-11-06T01:50:00-04:00", "end": "2022-11-06T01:07:00-05:00"}
    events, _ = take(tmp_path, patient(), encounter(period=period), encounter("e2", period={"start": T, "end": T[:10]}))
    assert [row[0] for row in timed(events)] == [AT] * 2 + [datetime(2022, 11, 6, 1, 50)] * 2


def test_the_best_coding_is_taken_and_spelled_as_its_vocabulary_does(tmp_path: Path) -> None:
    both = {"coding": [*concept(SNOMED, "44054006")["coding"], *concept(ICD10CM, "e1165")["coding"]]}
    local = concept("http://hospital.example/codes/labs", "Foo//1")
    made = [
        resource("Condition", "c1", code=both, recordedDate=T),
        resource("Condition", "c2", code=concept("http://hl7.org/fhir/sid/icd-9-cm", "25000"), recordedDate=T),
        resource("Condition", "c3", code=concept("urn:oid:2.16.840.1.113883.6.90", "I10"), recordedDate=T),
        resource("Condition", "c4", code={"text": "Feels  unwell"}, recordedDate=T),
        resource("Condition", "c5", code=concept(None, "x"), recordedDate=T),
        resource("Condition", "c6", code=concept("http://snomed.info/sct/731000124108", "1"), recordedDate=T),
        resource("Observation", "o", code=local, effectiveDateTime=T, valueInteger=1),
    ]
    events, flow = take(tmp_path, patient(), *made)
    found = codes(events)
    (labs,) = [code for code in found if code.startswith("labs-")]
    assert sorted(set(found) - {labs}) == [
        "CONDITION//FEELS UNWELL",
        "CONDITION//x",
        "ICD10CM//E11.65",
        "ICD10CM//I10",
        "ICD9CM//250.00",
        "SNOMED//1",
    ]
    assert labs.endswith("//Foo/1")
    assert any("http://hospital.example/codes/labs are named labs-" in note for note in flow.notes)

    snomed_first, _ = load(tmp_path / "in", tmp_path / "out2", prefer={"Condition": ["SNOMED"]})
    assert "SNOMED//44054006" in codes(snomed_first)
    named, _ = load(tmp_path / "in", tmp_path / "out3", systems={"http://hospital.example/codes/labs": "LAB"})
    assert "LAB//Foo/1" in codes(named)
    with pytest.raises(ConfigError, match="Conditions"):
        load(tmp_path / "in", tmp_path / "out4", prefer={"Conditions": []})


def test_a_diagnosis_is_placed_when_it_could_be_known(tmp_path: Path) -> None:
    here = {"encounter": {"reference": "Encounter/e1"}}
    made = [
        resource(
            "Condition", "c1", code=concept(ICD10CM, "A01"), onsetDateTime="1990", recordedDate="2020-03-02", **here
        ),
        resource("Condition", "c2", code=concept(ICD10CM, "A02"), onsetDateTime="1990", **here),
        resource("Condition", "c3", code=concept(ICD10CM, "A03"), onsetDateTime="2020-03-03", **here),
        resource("Condition", "c4", code=concept(ICD10CM, "A04"), **here),
        resource("Condition", "c5", code=concept(ICD10CM, "A05"), onsetPeriod={"start": "2001-01-01"}),
    ]
    source = ndjson(tmp_path / "in", *made, encounter(), patient())
    events, _ = load(source, tmp_path / "out")
    when = {row[1]: row[0] for row in timed(events)}
    assert when["ICD10CM//A01"] == datetime(2020, 3, 2)
    assert when["ICD10CM//A02"] == AT
    assert when["ICD10CM//A03"] == datetime(2020, 3, 3)
    assert when["ICD10CM//A04"] == AT
    assert when["ICD10CM//A05"] == datetime(2001, 1, 1)
    at_onset, _ = load(source, tmp_path / "out2", condition_time="onset")
    when = {row[1]: row[0] for row in timed(at_onset)}
    assert when["ICD10CM//A01"] == when["ICD10CM//A02"] == datetime(1990, 1, 1)


def test_medications_are_found_in_place_contained_and_elsewhere(tmp_path: Path) -> None:
    drug = {"resourceType": "Medication", "id": "m1", "code": concept(RXNORM, "860975")}
    inner = {"resourceType": "Medication", "id": "in", "code": concept(RXNORM, "197361")}
    contained = {"contained": [inner], "medicationReference": {"reference": "#in"}}
    made = [
        resource(
            "MedicationRequest", "1", authoredOn=T, medicationCodeableConcept=concept(RXNORM, "1"), intent="order"
        ),
        resource("MedicationRequest", "2", authoredOn=T, medicationReference={"reference": "Medication/m1"}),
        resource("MedicationAdministration", "3", effectivePeriod={"start": T}, **contained),
        resource("MedicationStatement", "4", effectiveDateTime="1999", dateAsserted=T, **contained),
    ]
    events, _ = take(tmp_path, patient(), *made, drug)
    assert timed(events) == [
        (AT, "RxNorm//1", None, None),
        (AT, "RxNorm//197361", None, None),
        (AT, "RxNorm//197361", None, None),
        (AT, "RxNorm//860975", None, None),
    ]


def test_other_resources_have_their_forms(tmp_path: Path) -> None:
    def of_patient(kind: str, **more: Any) -> Json:
        return {"resourceType": kind, "id": kind, "patient": {"reference": "Patient/1"}, **more}

    made = [
        of_patient("AllergyIntolerance", code=concept(RXNORM, "1191"), recordedDate=T),
        of_patient("Immunization", vaccineCode=concept("http://hl7.org/fhir/sid/cvx", "08"), occurrenceDateTime=T),
        resource("Procedure", code=concept("http://www.ama-assn.org/go/cpt", "99213"), performedPeriod={"start": T}),
        resource("DiagnosticReport", "d1", code=concept(LOINC, "58410-2"), issued=T),
        resource("DiagnosticReport", "d2", code=concept(LOINC, "1-8"), issued=T, conclusionCode=[concept(SNOMED, "9")]),
    ]
    events, _ = take(tmp_path, patient(), *made)
    assert codes(events) == [
        "ALLERGY//RxNorm//1191",
        "CPT4//99213",
        "CVX//08",
        "LOINC//1-8//SNOMED//9",
        "LOINC//58410-2",
    ]


def test_what_did_not_happen_is_dropped_by_name(tmp_path: Path) -> None:
    sure = {"code": concept(ICD10CM, "A01"), "recordedDate": T}
    drug = {"medicationCodeableConcept": concept(RXNORM, "1"), "authoredOn": T}
    made = [
        observation("o1", status="entered-in-error", valueInteger=1),
        observation("o2", status="cancelled", valueInteger=1, subject={"reference": "Patient/none"}),
        observation("o3", subject={"reference": "Group/1"}),
        resource("Condition", "c1", **sure, verificationStatus=concept(None, "refuted")),
        resource("Condition", "c2", **sure, verificationStatus=concept(None, "confirmed")),
        resource("Condition", "c3", recordedDate=T),
        resource("MedicationRequest", "m1", **drug, intent="plan"),
        resource("MedicationRequest", "m2", **drug, doNotPerform=True),
        resource("Procedure", "p1", status="not-done", code=concept(SNOMED, "1"), performedDateTime=T),
        encounter(status="planned"),
        resource("ServiceRequest", "s1"),
    ]
    events, flow = take(tmp_path, patient(), *made)
    assert codes(events) == ["ICD10CM//A01"]
    assert flow.dropped == {
        "Observation": {"status entered-in-error": 1, "status cancelled": 1, "subject is not a patient": 1},
        "Condition": {"verification refuted": 1, "no code": 1},
        "MedicationRequest": {"intent plan": 1, "order not to give": 1},
        "Procedure": {"status not-done": 1},
        "Encounter": {"status planned": 1},
        "ServiceRequest": {"resource type not read": 1},
    }
    check_sums(flow, {"Patient": 1, "Condition": 1})


@pytest.mark.parametrize(
    "subject",
    [
        {"reference": "Patient/1"},
        {"reference": "Patient/1/_history/3"},
        {"reference": "https://fhir.example.org/r4/Patient/1"},
        {"reference": "Patient?identifier=http://mrn|M-77"},
        {"reference": "Patient?identifier=http%3A%2F%2Fmrn%7CM-77"},
        {"identifier": {"system": "http://mrn", "value": "M-77"}, "type": "Patient"},
        {"reference": "urn:uuid:1"},
        {"reference": "Patient/old"},
    ],
)
def test_all_forms_of_references_lead_to_the_patient(tmp_path: Path, subject: Json) -> None:
    identified = patient(identifier=[{"system": "http://mrn", "value": "M-77"}])
    old = patient("old", link=[{"type": "replaced-by", "other": {"reference": "Patient/1"}}])
    events, flow = take(tmp_path, old, observation(valueInteger=3, subject=subject), identified)
    assert events.filter(pl.col("code") == "LOINC//2345-7")["subject_id"].to_list() == [1]
    assert events["subject_id"].n_unique() == 1
    assert flow.dropped["Patient"] == {"replaced by another record": 1}


def bundle(*resources: Json, urls: bool = True, kind: str = "transaction") -> Json:
    entries = [{"fullUrl": f"urn:uuid:{i:08d}-0000", "resource": each} for i, each in enumerate(resources)]
    return {"resourceType": "Bundle", "type": kind, "entry": entries if urls else [{"resource": r} for r in resources]}


def test_references_within_a_bundle_go_by_full_url(tmp_path: Path) -> None:
    here = {"reference": "urn:uuid:00000000-0000"}
    made = bundle(
        patient("77"),
        observation(valueInteger=1, subject=here, encounter={"reference": "urn:uuid:00000002-0000"}),
        encounter("visit", subject=here),
    )
    (tmp_path / "b.json").write_text(json.dumps(made, indent=2))
    events, _ = load(tmp_path / "b.json", tmp_path / "out")
    assert events["subject_id"].unique().to_list() == [77]
    assert set(events.filter(pl.col("time") >= AT)["encounter_id"]) == {"visit"}


def layouts(tmp_path: Path, resources: list[Json]) -> dict[str, Path]:
    """The same resources as hospitals may send them."""
    places = {name: tmp_path / name for name in ("mixed", "typed", "gz", "bundle", "line", "list", "named")}
    ndjson(places["mixed"], *resources)
    for kind in {each["resourceType"] for each in resources}:
        ndjson(places["typed"], *[r for r in resources if r["resourceType"] == kind], name=f"{kind}.000.ndjson")
    for name in ("gz", "bundle", "line", "list", "named"):
        places[name].mkdir()
    (places["gz"] / "a.ndjson.gz").write_bytes(gzip.compress((places["mixed"] / "all.ndjson").read_bytes()))
    whole = bundle(*resources, urls=False, kind="searchset")
    (places["bundle"] / "b.json").write_text(json.dumps(whole, indent=1))
    (places["line"] / "b.ndjson").write_text(json.dumps(whole) + "\n")
    (places["list"] / "b.json").write_text("\ufeff" + json.dumps(resources), encoding="utf-8")
    (places["named"] / "b.json").write_bytes((places["mixed"] / "all.ndjson").read_bytes())
    places["tar"] = tmp_path / "all.tar.gz"
    with tarfile.open(places["tar"], "w:gz") as archive:
        archive.add(places["typed"], "export")
    return places


def sample(patients: int = 3) -> list[Json]:
    made: list[Json] = [{"resourceType": "Medication", "id": "m1", "code": concept(RXNORM, "860975")}]
    for number in range(1, patients + 1):
        me = {"subject": {"reference": f"Patient/{number}"}}
        made += [
            observation(
                f"o{number}", valueQuantity=quantity(number), encounter={"reference": f"Encounter/e{number}"}, **me
            ),
            resource(
                "MedicationRequest",
                f"m{number}",
                medicationReference={"reference": "Medication/m1"},
                authoredOn=T,
                **me,
            ),
            encounter(f"e{number}", **me),
            patient(str(number)),
        ]
    return made


def test_all_layouts_and_any_number_of_processes_give_the_same(tmp_path: Path) -> None:
    places = layouts(tmp_path, sample())
    wanted, flow = load(places["mixed"], tmp_path / "out")
    assert wanted.height == 3 * 6
    for name, place in places.items():
        events, other = load(place, tmp_path / f"out-{name}", workers=2 if name == "typed" else 1)
        assert events.equals(wanted), name
        assert other.rows == flow.rows


def test_large_files_are_cut_into_ranges_and_large_bundles_into_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = layouts(tmp_path, sample(40))
    wanted, _ = load(places["mixed"], tmp_path / "out")
    for size in (301, 1000, 4096):
        for name in ("_RANGE", "_BLOCK", "_WHOLE"):
            monkeypatch.setattr(f"tokenizer.sources.fhir_files.{name}", size)
        for name in ("mixed", "bundle", "list", "typed"):
            events, _ = load(places[name], tmp_path / "again")
            assert events.equals(wanted), (name, size)


def test_bad_rows_keep_their_line_numbers_in_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [*sample(20), observation("bad", effectiveDateTime="yesterday", valueInteger=1), *sample(1)]
    source = ndjson(tmp_path / "in", *made)
    monkeypatch.setattr("tokenizer.sources.fhir_files._RANGE", 700)
    with pytest.raises(DataError, match=r"all\.ndjson: Observation, row 82, time: not a date or time \('yesterday'\)"):
        load(source, tmp_path / "out")


def test_rows_set_aside_from_several_ranges_keep_their_line_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = observation("bad", effectiveDateTime="yesterday", valueInteger=1)
    source = ndjson(tmp_path / "in", patient(), bad, *sample(20), bad, *sample(20), bad)
    monkeypatch.setattr("tokenizer.sources.fhir_files._RANGE", 700)
    import_fhir(source, tmp_path / "out", name="test", quarantine=True)
    lines = (tmp_path / "in" / "all.ndjson").read_text().splitlines()
    wanted = [row for row, line in enumerate(lines, 1) if "yesterday" in line]
    assert pl.read_csv(tmp_path / "out" / "quarantine.csv")["row"].to_list() == wanted


def test_of_a_resource_that_comes_twice_the_last_update_counts(tmp_path: Path) -> None:
    def version(value: int, updated: str | None) -> Json:
        meta = {"meta": {"lastUpdated": updated}} if updated else {}
        return observation("o", valueInteger=value, **meta)

    events, flow = take(
        tmp_path,
        patient(),
        version(1, "2020-01-02T00:00:00+00:00"),
        version(2, "2020-01-02T23:00:00-05:00"),
        version(3, "2020-01-03T00:00:00Z"),
        observation("p", "1-1", valueInteger=4),
        observation("p", "1-1", valueInteger=5, status="entered-in-error", meta={"lastUpdated": T + "Z"}),
    )
    assert [row[2] for row in timed(events)] == [2.0]
    assert flow.dropped["Observation"] == {"older version": 3, "status entered-in-error": 1}
    check_sums(flow, {"Patient": 1, "Observation": 1})
    repeated, flow = take(tmp_path / "b", patient(), patient(), version(1, None), version(7, None))
    assert [row[2] for row in timed(repeated)] == [7.0]
    check_sums(flow, {"Patient": 1, "Observation": 1})


def test_references_to_missing_encounters_are_noted_and_their_events_kept(tmp_path: Path) -> None:
    events, flow = take(tmp_path, patient(), observation(valueInteger=1, encounter={"reference": "Encounter/none"}))
    assert events.filter(pl.col("numeric_value") == 1)["encounter_id"].to_list() == ["none"]
    assert any("1 reference leads to encounters" in note for note in flow.notes)


@pytest.mark.skipif(not (DATA / "pysynthea_fhir_30pts_seed1.tar.gz").exists(), reason="the Synthea bundles aren't here")
def test_synthea_bundles_match_their_counts(tmp_path: Path) -> None:
    events, flow = load(DATA / "pysynthea_fhir_30pts_seed1.tar.gz", tmp_path / "out")
    assert flow.subjects == 30
    assert flow.rows["Observation"] == 39_120
    assert flow.events["Observation"] == 39_120 - 1_077
    assert flow.events["Observation.component"] == 2_154
    assert flow.events["Condition"] == 3_844
    assert flow.quarantined == {}
    assert events.height == flow.events_total


@pytest.mark.skipif(not (DATA / "smart_bulk_fhir_10pts_partial.tar.gz").exists(), reason="the bulk export isn't here")
def test_a_bulk_export_matches_its_counts(tmp_path: Path) -> None:
    events, flow = load(DATA / "smart_bulk_fhir_10pts_partial.tar.gz", tmp_path / "out")
    assert flow.subjects == 13
    assert flow.events["MedicationRequest"] == 1_745
    assert flow.events["Procedure"] == 2_056
    assert flow.events["Condition"] == 555
    assert flow.dropped["export log"] == {"log of a bulk export": 4}
    assert events["code"].str.starts_with("DEPARTMENT//").sum() == 1_215

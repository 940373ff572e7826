"""FHIR that isn't as it should be: refused with the place, or set aside and counted; never dropped in silence."""

import gzip
import io
import json
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tokenizer.errors import DataError
from tokenizer.sources.fhir import import_fhir
from tokenizer.sources.fhir_codes import PREFER, Namer
from tokenizer.sources.fhir_cut import cut
from tokenizer.sources.fhir_files import Piece
from tokenizer.sources.fhir_index import Index, build
from tokenizer.sources.fhir_pass import COMPONENT, TABLES, Settings, read_piece, survey_piece
from tokenizer.sources.intake import Flow

T = "2020-03-01T10:00:00Z"
LOINC = "http://loinc.org"
PATIENT = {"resourceType": "Patient", "id": "1", "gender": "male", "birthDate": "1950-06-01"}
OBSERVATION: dict[str, Any] = {
    "resourceType": "Observation",
    "id": "o1",
    "meta": {"lastUpdated": T},
    "status": "final",
    "code": {"coding": [{"system": LOINC, "code": "2345-7", "display": "Gl\u00fccose"}], "text": "sugar"},
    "subject": {"reference": "Patient/1"},
    "encounter": {"reference": "Encounter/e1"},
    "effectiveDateTime": T,
    "valueQuantity": {"value": 5.5, "unit": "mmol/L", "system": "http://unitsofmeasure.org", "code": "mmol/L"},
    "component": [
        {"code": {"coding": [{"system": LOINC, "code": "8480-6"}]}, "valueQuantity": {"value": 120, "code": "mm[Hg]"}}
    ],
}


def changed(**more: Any) -> bytes:
    """An observation with other members; None removes one."""
    return json.dumps({name: value for name, value in (OBSERVATION | more).items() if value is not None}).encode()


def rows_of(*lines: bytes) -> bytes:
    return b"".join(line + b"\n" for line in (json.dumps(PATIENT).encode(), *lines))


def source(tmp_path: Path, *lines: bytes, name: str = "all.ndjson") -> Path:
    folder = tmp_path / "in"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(rows_of(*lines))
    return folder


def aside(out: Path) -> pl.DataFrame:
    return pl.read_csv(out / "quarantine.csv", infer_schema=False)


BAD = {
    "broken JSON": (changed()[:-20], "Observation", "not JSON"),
    "another type": (changed(status=["final"]), "Observation", "wrong type"),
    "a number in quotes": (changed(valueQuantity={"value": "5.5"}), "Observation", "wrong type"),
    "no subject": (changed(subject=None), "Observation", "no subject"),
    "a subject of another type": (changed(subject="Patient/1"), "Observation", "wrong type"),
    "an unknown patient": (changed(subject={"reference": "Patient/2"}), "Observation", "unknown patient"),
    "an unknown urn": (changed(subject={"reference": "urn:uuid:0"}), "Observation", "unknown patient"),
    "an empty reference": (changed(subject={}), "Observation", "unknown patient"),
    "no time": (changed(effectiveDateTime=None), "Observation", "no time"),
    "a time that is none": (changed(effectiveDateTime="2020-13-01"), "Observation", "not a date or time"),
    "a day that is none": (changed(effectiveDateTime="2021-02-29"), "Observation", "not a date or time"),
    "a filler date": (changed(effectiveDateTime="9999-12-31"), "Observation", "time out of range"),
    "a number too large": (changed(valueQuantity={"value": 1e300}), "Observation", "value out of range"),
    "a concept of another type": (changed(code={"coding": {"code": "x"}}), "Observation", "wrong type"),
    "not UTF-8": (changed(effectiveDateTime="@").replace(b"@", b"2020\xff"), "Observation", "not UTF-8"),
    "a code that is not UTF-8": (changed(code={"text": "@"}).replace(b"@", b"\xff"), "Observation", "not UTF-8"),
    "no resource": (b'{"a": 1}', "unreadable", "no resourceType"),
    "a list": (b"[1, 2]", "unreadable", "wrong type"),
    "a text": (b"hello", "unreadable", "not JSON"),
    "UTF-16": ("\ufeff{}".encode("utf-16-le"), "unreadable", "UTF-16 text"),
    "deep nesting": (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "unreadable", "nested too deeply"),
    "deep nesting in a resource": (
        changed()[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "Observation",
        "nested too deeply",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_refused_with_its_place_or_set_aside(tmp_path: Path, name: str) -> None:
    line, table, reason = BAD[name]
    folder = source(tmp_path, changed(id="o2"), line)
    with pytest.raises(DataError, match=rf"all\.ndjson: {table}, row 3.*: {reason}.*--quarantine"):
        import_fhir(folder, tmp_path / "out", name="x")
    assert not (tmp_path / "out").exists()
    flow = import_fhir(folder, tmp_path / "out", name="x", quarantine=True)
    assert flow.quarantined_total == 1
    (row,) = aside(tmp_path / "out").rows(named=True)
    assert (row["file"], row["table"], row["row"]) == ("all.ndjson", table, "3")
    assert row["reason"].startswith(reason)
    assert flow.events["Observation"] == 1


def test_a_patient_that_cannot_be_is_refused(tmp_path: Path) -> None:
    for more, column in (
        ({"birthDate": "yesterday"}, "birthDate"),
        ({"birthDate": "1700-01-01"}, "time"),
        ({"deceasedDateTime": "1940-01-01"}, "deceasedDateTime"),
        ({"id": None}, "id"),
    ):
        folder = source(tmp_path, json.dumps({**PATIENT, "id": "2", **more}).encode())
        with pytest.raises(DataError, match=rf"Patient, row 2, {column}: "):
            import_fhir(folder, tmp_path / "out", name="x")


FIRST = {
    "cut off": (b'{"resourceType": "Patient", "id": "1", "gen', r"Patient, row 2: not JSON"),
    "no JSON": (b"1;male;1950-06-01", r"unreadable, row 2: wrong type"),
    "another type": (b'{"resourceType": "Patient", "id": 1}', r"Patient, row 2: wrong type"),
    "no id": (b'{"resourceType": "Patient", "gender": "male"}', r"Patient, row 2, id: no subject"),
    "not UTF-8": (b'{"resourceType": "Patient", "id": "\xe9"}', r"Patient, row 2: not UTF-8"),
    "UTF-16": (json.dumps(PATIENT).encode("utf-16"), r"unreadable, row 2: UTF-16 text .*Convert the file"),
}


@pytest.mark.parametrize("fault", FIRST)
def test_a_bad_patient_is_blamed_and_not_what_refers_to_it(tmp_path: Path, fault: str) -> None:
    line, message = FIRST[fault]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "Observation.ndjson").write_bytes(changed() + b"\n")
    (folder / "Patient.ndjson").write_bytes(json.dumps({**PATIENT, "id": "0"}).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError, match=rf"Patient\.ndjson: {message}"):
        import_fhir(folder, tmp_path / "out", name="x")
    flow = import_fhir(folder, tmp_path / "out", name="x", quarantine=True)
    assert sum(sum(flow.quarantined[table].values()) for table in {"Patient", "unreadable"} & {*flow.quarantined}) == 1
    assert flow.quarantined["Observation"] == {"unknown patient": 1}


@pytest.mark.parametrize("kind", ["Medication", "Location", "Organization", "Encounter"])
def test_what_others_refer_to_has_to_be_right(tmp_path: Path, kind: str) -> None:
    line = json.dumps({"resourceType": kind, "id": "1"}).encode()[:-1]
    folder = source(tmp_path, changed(encounter=None), line)
    with pytest.raises(DataError, match=rf"all\.ndjson: {kind}, row 3: not JSON"):
        import_fhir(folder, tmp_path / "out", name="x")
    flow = import_fhir(folder, tmp_path / "out", name="x", quarantine=True)
    assert flow.quarantined == {kind: {"not JSON": 1}}
    assert not flow.dropped.get(kind)


def test_a_medication_with_a_code_of_another_type_is_blamed(tmp_path: Path) -> None:
    drug = {"resourceType": "MedicationRequest", "id": "m", "subject": {"reference": "Patient/1"}, "authoredOn": T}
    line = json.dumps({**drug, "medicationReference": {"reference": "Medication/d"}}).encode()
    named = json.dumps({"resourceType": "Medication", "id": "d", "code": {"coding": [{"code": 7}]}}).encode()
    with pytest.raises(DataError, match="Medication, row 3: wrong type"):
        import_fhir(source(tmp_path, line, named), tmp_path / "out", name="x")


def test_a_file_of_which_all_is_bad_is_set_aside(tmp_path: Path) -> None:
    folder = source(tmp_path, changed())
    (folder / "more.ndjson").write_bytes(json.dumps({**PATIENT, "id": "2", "birthDate": 1950}).encode())
    flow = import_fhir(folder, tmp_path / "out", name="x", quarantine=True)
    ((reason, count),) = flow.quarantined["Patient"].items()
    assert reason.startswith("wrong type")
    assert count == 1
    assert flow.events["Observation"] == 1


@pytest.mark.parametrize("quarantine", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_an_archive_that_is_cut_off_between_two_files_is_refused(
    tmp_path: Path, packed: bool, quarantine: bool
) -> None:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for name, content in (("a.ndjson", rows_of()), ("b.ndjson", changed())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    folder = tmp_path / "in"
    folder.mkdir()
    cut_off = whole.getvalue()[: whole.getvalue().index(b"b.ndjson")]
    (folder / "all.tar.gz").write_bytes(gzip.compress(cut_off) if packed else cut_off)
    with pytest.raises(DataError, match=r"all\.tar\.gz: archive is cut off .*the end of the archive is missing"):
        import_fhir(folder, tmp_path / "out", name="x", quarantine=quarantine)


def test_a_medication_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    for reference in ("Medication/none", "#none"):
        drug = {"resourceType": "MedicationRequest", "id": "m", "subject": {"reference": "Patient/1"}, "authoredOn": T}
        line = json.dumps({**drug, "medicationReference": {"reference": reference}}).encode()
        with pytest.raises(DataError, match="row 2, code: reference to a medication that isn't"):
            import_fhir(source(tmp_path, line), tmp_path / "out", name="x")


def test_an_identifier_of_two_patients_is_ambiguous(tmp_path: Path) -> None:
    def person(name: str) -> bytes:
        return json.dumps({**PATIENT, "id": name, "identifier": [{"system": "s", "value": "same"}]}).encode()

    line = changed(subject={"reference": "Patient?identifier=s|same"})
    with pytest.raises(DataError, match="row 4, subject: several patients have this identifier"):
        import_fhir(source(tmp_path, person("2"), person("3"), line), tmp_path / "out", name="x")


@pytest.mark.parametrize("cut_at", [0.3, 0.6, 0.95])
def test_a_file_that_is_cut_off_is_refused_and_never_set_aside(tmp_path: Path, cut_at: float) -> None:
    lines = [changed(id=f"o{i}", valueQuantity={"value": i, "unit": "x" * (i % 37)}) for i in range(5000)]
    whole = gzip.compress(rows_of(*lines))
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.ndjson.gz").write_bytes(whole[: int(len(whole) * cut_at)])
    (folder / "b.ndjson").write_bytes(rows_of(changed(id="other")))
    message = (
        r"a\.ndjson\.gz: file is cut off or damaged .*How many resources are lost can't.*Copy or export the file again"
    )
    for quarantine in (False, True):
        with pytest.raises(DataError, match=message):
            import_fhir(folder, tmp_path / "out", name="x", quarantine=quarantine)
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_is_cut_off_is_refused_and_a_wrong_entry_is_set_aside_alone(tmp_path: Path) -> None:
    entries = [{"resource": PATIENT}, None, {"resource": json.loads(changed(id="a"))}, 7]
    text = json.dumps({"resourceType": "Bundle", "type": "collection", "entry": entries})
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "bundle.json").write_text(text)
    with pytest.raises(DataError, match=r"bundle\.json: Bundle, row 2"):
        import_fhir(folder, tmp_path / "out", name="x")
    flow = import_fhir(folder, tmp_path / "out", name="x", quarantine=True)
    assert flow.events["Observation"] == 1
    assert sum(flow.quarantined["Bundle"].values()) == 2
    assert [row["row"] for row in aside(tmp_path / "out").rows(named=True)] == ["2", "4"]
    (folder / "bundle.json").write_text(text[:-40])
    for quarantine in (False, True):
        with pytest.raises(DataError, match=r"bundle\.json: .*not JSON.*Export the file again"):
            import_fhir(folder, tmp_path / "out", name="x", quarantine=quarantine)


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    folder = source(tmp_path, *(changed(id=f"o{i}") for i in range(2000)))
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, "export")
    archive.write_bytes(archive.read_bytes()[:-4000])
    with pytest.raises(DataError, match=r"a\.tar\.gz.*(cut off|damaged)"):
        import_fhir(archive, tmp_path / "out", name="x")
    archive.write_bytes(b"no archive at all")
    with pytest.raises(DataError, match=r"archive is cut off or damaged"):
        import_fhir(archive, tmp_path / "out", name="x")


def test_sources_without_fhir_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        import_fhir(tmp_path / "none", tmp_path / "out", name="x")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "readme.txt").write_text("hello")
    with pytest.raises(DataError, match=r"no FHIR files among 1 file\."):
        import_fhir(tmp_path / "in", tmp_path / "out", name="x")
    (tmp_path / "in" / "empty.ndjson").touch()
    with pytest.raises(DataError, match="no event is left"):
        import_fhir(tmp_path / "in", tmp_path / "out", name="x")
    (tmp_path / "in" / "broken.json").write_text('{"resourceType": "Bundle", "entry": [')
    with pytest.raises(DataError, match=r"broken\.json: not JSON .*Export the file again"):
        import_fhir(tmp_path / "in", tmp_path / "out", name="x")


def test_a_name_that_lies_about_what_is_in_the_file_is_refused(tmp_path: Path) -> None:
    folder = source(tmp_path, changed())
    (folder / "all.ndjson").rename(folder / "Observation.ndjson")
    with pytest.raises(DataError, match=r"Observation\.ndjson: holds a resource of type Patient in row 1.*Rename"):
        import_fhir(folder, tmp_path / "out", name="x")


def test_lines_and_entries_too_long_are_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenizer.sources.fhir_files._LINE", 2000)
    monkeypatch.setattr("tokenizer.sources.fhir_files._BLOCK", 500)
    folder = source(tmp_path, changed(id="a"), changed(id="long", note=[{"text": "x" * 9000}]), changed(id="b"))
    flow = import_fhir(folder, tmp_path / "out", name="x", quarantine=True)
    assert flow.events["Observation"] == 2
    (row,) = aside(tmp_path / "out").rows(named=True)
    assert (row["row"], row["reason"]) == ("3", "line of more than 0 MiB")


@pytest.mark.parametrize(
    "text",
    ["\u0000", "\ud800", "a\nb", "'; DROP TABLE x; --", "\u202e", "=1+1", "//", "x" * 100_000, "\U0001f600", " "],
)
def test_hostile_texts_neither_break_nor_vanish(tmp_path: Path, text: str) -> None:
    lines = [
        changed(id="1", code={"coding": [{"system": text, "code": text}]}),
        changed(id="2", valueQuantity=None, valueString=text),
        changed(id="3", valueQuantity={"value": 1, "unit": text}),
        changed(id="4", subject={"reference": text}),
        changed(id="5", encounter={"reference": text}),
        changed(id="6", effectiveDateTime=text),
        changed(id=text),
        changed(id="8", status=text),
    ]
    flow = import_fhir(source(tmp_path, *lines), tmp_path / "out", name="x", quarantine=True)
    gone = sum(flow.dropped.get("Observation", {}).values()) + sum(flow.quarantined.get("Observation", {}).values())
    assert flow.rows["Observation"] == 8 == flow.events.get("Observation", 0) + gone


def index_of(folder: Path, data: bytes) -> tuple[Piece, Index]:
    (folder / "a.ndjson").write_bytes(data)
    piece = Piece(0, folder / "a.ndjson", "a.ndjson")
    seen = survey_piece(piece, SETTINGS)
    return piece, build([seen], lambda texts: pl.Series("value", range(len(texts)), dtype=pl.Int64))


SETTINGS = Settings({}, PREFER, told=True, stop=False)


def check_line(line: bytes) -> None:
    """A line gives exactly one row, which is kept, dropped by name or set aside; so do its components."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        piece, found = index_of(folder, rows_of(changed(id="before"), line, changed(id="after")))
        result = read_piece(piece, found, SETTINGS, folder, indexed=True)
        events = pl.concat([pl.read_ipc(file) for file, _ in result.files])
        parts = events["_table"] == TABLES.index(COMPONENT)
        kept = events.filter(~parts).select("_table", "_at").n_unique()
        gone = Counter(COMPONENT if table == COMPONENT else "" for _, table, *_ in result.bad)
        for (table, _), count in result.dropped.items():
            gone[COMPONENT if table == COMPONENT else ""] += count
        rows = result.rows.total() - result.rows[COMPONENT]
        assert rows == 3 + bool(line.strip()) == kept + gone[""]
        assert result.rows[COMPONENT] == parts.sum() + gone[COMPONENT]


WHOLE = changed()


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(WHOLE) - 1), st.sampled_from(["cut", "drop", "set", "insert"]), st.integers(0, 255)
        ),
        min_size=1,
        max_size=4,
    )
)
@example([(0, "cut", 0)])
@example([(len(WHOLE) - 1, "set", 0x0A)])
def test_no_corruption_of_a_line_is_lost_or_raises(edits: list[tuple[int, str, int]]) -> None:
    line = bytearray(WHOLE)
    for where, what, byte in edits:
        place = min(where, len(line))
        if what == "cut":
            del line[place:]
        elif what == "drop":
            del line[place : place + 1 + byte % 16]
        elif what == "set" and place < len(line):
            line[place] = byte
        else:
            line[place:place] = bytes([byte])
    check_line(bytes(line).replace(b"\n", b" ").replace(b"Bundle", b"bundle"))


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner))


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([*OBSERVATION, "valueString", "valueRatio", "issued", "dataAbsentReason"]), VALUES)
def test_no_member_of_another_type_is_lost_or_raises(member: str, value: Any) -> None:
    check_line(json.dumps(OBSERVATION | {member: value}).encode())


@settings(max_examples=100)
@given(
    st.lists(st.dictionaries(st.text(max_size=4), VALUES, max_size=3), max_size=5), st.integers(1, 60), st.booleans()
)
def test_a_bundle_is_cut_into_its_entries_wherever_blocks_end(entries: list[Any], block: int, plain: bool) -> None:
    document = {"link": [{"entry": [1, {}]}], "entry": entries, "signature": {"entry": [{}]}, "x": '{"entry": [{}]}'}
    text = json.dumps(document, ensure_ascii=plain, indent=None if block % 2 else 1).encode(errors="surrogatepass")
    found = [each for some in cut(io.BytesIO(text), 1 << 20, block=block) for each in some]
    assert [json.loads(each.decode(errors="surrogatepass")) for each in found] == entries


def test_the_name_of_a_system_depends_on_its_uri_alone() -> None:
    one, other = Namer({}, PREFER), Namer({}, PREFER)
    other.vocabulary("http://b.example/labs", "")
    assert one.vocabulary("http://a.example/labs", "") == other.vocabulary("http://a.example/labs", "")
    assert one.vocabulary("http://a.example/labs", "") != one.vocabulary("http://b.example/labs", "")


def test_the_flow_is_read_back(tmp_path: Path) -> None:
    flow = import_fhir(source(tmp_path, changed()), tmp_path / "out", name="x")
    assert Flow.load(tmp_path / "out") == flow

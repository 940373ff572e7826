"""OMOP in files of every form, whole and broken."""

import gzip
import zipfile
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.tokenizer.sources import cdm
from tokenizer.errors import DataError
from tokenizer.sources.intake import QUARANTINE, Flow, Intake
from tokenizer.sources.omop import import_omop
from tokenizer.sources.omop_files import FileRecords
from tokenizer.sources.omop_tables import VERSIONS, column_order, read_table_spec
from tokenizer.spelling import fit

PERSON = "person_id,year_of_birth\n1,1950\n"


def bring(folder: Path, **options: object) -> Flow:
    return import_omop(folder, folder.parent / "out", name="test", **options)  # type: ignore[arg-type]


def lay(path: Path, files: dict[str, str | bytes]) -> Path:
    """Write files to path/cdm."""
    folder = path / "cdm"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def quarantined(path: Path) -> list[dict[str, object]]:
    return pl.read_csv(path / "out" / QUARANTINE, infer_schema=False).drop("file").to_dicts()


FORMS: dict[str, Callable[[cdm.Tables, Path], Path]] = {
    "csv": lambda tables, path: cdm.write_csv(tables, path / "cdm"),
    "upper-case headers": lambda tables, path: cdm.write_csv(tables, path / "cdm", upper=True),
    "gzip": lambda tables, path: cdm.write_csv(tables, path / "cdm", ending=".csv.gz"),
    "tab": lambda tables, path: cdm.write_csv(tables, path / "cdm", ending=".tsv"),
    "zip": lambda tables, path: cdm.write_zip(tables, path / "cdm.zip"),
    "zip in a folder": lambda tables, path: cdm.write_zip(tables, path / "cdm/all.zip").parent,
    "parquet": lambda tables, path: cdm.write_parquet(tables, path / "cdm"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same(form: str, ram_path: Path) -> None:
    path = FORMS[form](cdm.hospital(), ram_path)
    import_omop(path, ram_path / "out", name="test")
    assert cdm.events(ram_path / "out") == cdm.EXPECTED


def test_archives_may_hold_gzip_and_parquet(ram_path: Path) -> None:
    tables = cdm.hospital()
    folder = cdm.write_parquet({t: tables.pop(t) for t in ("measurement", "concept")}, ram_path / "parts")
    cdm.write_csv(tables, folder, ending=".csv.gz")
    with zipfile.ZipFile(ram_path / "cdm.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"deep/{file.name}")
    import_omop(ram_path / "cdm.zip", ram_path / "out", name="test")
    assert cdm.events(ram_path / "out") == cdm.EXPECTED


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("by_file", [False, True])
def test_files_without_a_header_are_read_by_the_order_of_their_version(
    version: str, by_file: bool, ram_path: Path
) -> None:
    order = column_order(version)
    folder = ram_path / "cdm"
    folder.mkdir()
    tables = cdm.hospital()
    old = {
        "discharged_to_concept_id": "discharge_to_concept_id",
        "discharged_to_source_value": "discharge_to_source_value",
    }
    for table, rows in tables.items():
        if table in order:
            renamed = [{old.get(c, c) if version != "5.4" else c: v for c, v in row.items()} for row in rows]
            (folder / f"{table}.csv").write_text(cdm.csv_text(renamed, order[table], headless=True))
    if by_file:
        spec = ram_path / "spec.csv"
        lines = [f"CDM,{t.upper()},{c}" for t, names in order.items() for c in names]
        spec.write_text("\n".join(["schema,cdmTableName,cdmFieldName", *lines]))
        bring(folder, table_spec=spec)
    else:
        bring(folder, cdm=version)
    assert cdm.events(ram_path / "out") == cdm.EXPECTED


def test_a_made_up_header_above_the_real_one_is_seen_through(ram_path: Path) -> None:
    folder = lay(ram_path, {"person.csv": "column0,column1\nPERSON_ID,YEAR_OF_BIRTH\n1,1950\nx,1950\n"})
    with pytest.raises(DataError, match="row 4"):
        bring(folder)


@pytest.mark.parametrize(
    "names",
    [
        ("measurement_1.csv", "measurement_0002.csv"),
        ("measurement/part-00000-aa.csv", "measurement/part-00001-aa.csv"),
        ("MEASUREMENT.csv", "measurement-part2.CSV"),
    ],
)
def test_a_table_may_lie_in_several_files(names: tuple[str, str], ram_path: Path) -> None:
    text = "person_id,measurement_concept_id,measurement_date\n1,5,2020-01-0{}\n"
    folder = lay(ram_path, {"person.csv": PERSON, names[0]: text.format(1), names[1]: text.format(2)})
    assert bring(folder).events["measurement"] == 2


def test_files_that_are_no_tables_are_named_in_the_notes(ram_path: Path) -> None:
    folder = lay(
        ram_path, {"person.csv": PERSON, "README.md": "x", ".DS_Store": "x", "_SUCCESS": "", "persons.csv": "x"}
    )
    assert "2 files or tables are none of the CDM's: README.md, persons.csv." in bring(folder).notes


@pytest.mark.parametrize("padding", [1, 8, 512])
@pytest.mark.parametrize("rows", [0, 3, 9000])
def test_gzip_may_be_padded_with_zeros(padding: int, rows: int, ram_path: Path) -> None:
    people = PERSON + "".join(f"{n},1950\n" for n in range(2, rows + 2))
    folder = lay(ram_path, {"person.csv.gz": gzip.compress(people.encode()) + bytes(padding)})
    assert bring(folder).rows == {"person": rows + 1}


def test_a_folder_that_is_named_as_a_table_is_noted_where_it_holds_none(ram_path: Path) -> None:
    part = "person_id,measurement_concept_id,measurement_date\n1,5,2020-01-01\n"
    folder = lay(
        ram_path, {"person.csv": PERSON, "measurement.csv/part-0.csv": part, "death.csv/of-a-salesman.pdf": ""}
    )
    (folder / "condition_occurrence.csv").mkdir()
    (note,) = [note for note in bring(folder).notes if "none of the CDM's" in note]
    assert "condition_occurrence.csv (a folder without a part of the table)" in note
    assert "death.csv (a folder without a part of the table)" in note
    assert "measurement" not in note


def test_columns_of_bytes_and_far_dates_cost_their_rows_only(ram_path: Path) -> None:
    """As databases and other tools write them to parquet."""
    far = pl.Series([18_262, 2**31 - 1, 18_262, 18_262], dtype=pl.Int32).cast(pl.Date)
    names = [b"A", b"B", b"\xff\xfe", None]
    folder = lay(ram_path, {"person.csv": PERSON})
    frame = pl.DataFrame({"person_id": [1] * 4, "condition_source_value": names, "condition_start_date": far})
    frame.write_parquet(folder / "condition_occurrence.parquet")
    flow = bring(folder, quarantine=True)
    assert flow.quarantined == {"condition_occurrence": {"not UTF-8": 1, "time out of range": 1}}
    assert set(cdm.codes(ram_path / "out")) == {"MEDS_BIRTH", "CONDITION//A", "CONDITION//UNMAPPED"}
    milliseconds = frame.with_columns(pl.Series([2**63 - 1] * 4).cast(pl.Datetime("ms")).alias("condition_start_date"))
    milliseconds.write_parquet(folder / "condition_occurrence.parquet")
    assert bring(folder, quarantine=True).quarantined["condition_occurrence"]["time out of range"] == 3


def test_a_column_of_lists_is_refused(ram_path: Path) -> None:
    folder = lay(ram_path, {})
    folder.mkdir()
    pl.DataFrame({"person_id": [[1]], "year_of_birth": [1950]}).write_parquet(folder / "person.parquet")
    with pytest.raises(DataError, match=r"person\.parquet: person: column person_id is of type List\(Int64\)"):
        bring(folder, quarantine=True)


BROKEN: dict[str, tuple[dict[str, str | bytes], str]] = {
    "truncated gzip": (
        {"person.csv.gz": gzip.compress(("person_id,year_of_birth\n" + "1,1950\n" * 9000).encode())[:-20]},
        r"person\.csv\.gz: damaged or cut short",
    ),
    "not gzip": ({"person.csv.gz": PERSON}, r"person\.csv\.gz: damaged or cut short"),
    "not a zip": ({"person.zip": b"PK\3\4 no"}, r"person\.zip: damaged or cut short"),
    "not parquet": ({"person.parquet": PERSON}, r"person\.parquet: damaged or cut short"),
    "empty file": ({"person.csv": ""}, r"person\.csv: empty, without even a header"),
    "blank file": ({"person.csv": "\n\n"}, r"person\.csv: empty, without even a header"),
    "no header": ({"person.csv": "1,8507,1950\n"}, r"no header with columns of person.*first row is '1,8507,1950'"),
    "other delimiter": ({"person.csv": "person_id;year_of_birth\n1;1950\n"}, r"separated by comma or tab"),
    "a column twice": ({"person.csv": "person_id,PERSON_ID,year_of_birth\n1,1,1950\n"}, r"'person_id' is there twice"),
    "a table twice": ({"person.csv": PERSON, "old/PERSON.csv": PERSON}, r"the table person is there twice"),
    "two formats": ({"person.csv": PERSON, "person.csv.gz": gzip.compress(PERSON.encode())}, r"is there twice"),
    "UTF-32": ({"person.csv": PERSON.encode("utf-32")}, r"written as UTF-32.*iconv"),
    "UTF-16 without a mark": ({"person.csv": PERSON.encode("utf-16-le")}, r"NUL characters in the first row.*iconv"),
    "UTF-16": ({"person.csv": PERSON.encode("utf-16")}, r"written as UTF-16.*iconv"),
    "no person_id": ({"person.csv": "id,year_of_birth\n1,1950\n"}, r"person has no column person_id \(it has id, year"),
    "no codes": (
        {"person.csv": PERSON, "drug_exposure.csv": "person_id,drug_exposure_start_date\n1,2020-01-01\n"},
        r"drug_exposure has no column drug_concept_id or drug_source_concept_id or drug_source_value",
    ),
    "no dates": (
        {"person.csv": PERSON, "death.csv": "person_id,death_type_concept_id\n1,0\n"},
        r"death has no column death_date or death_datetime",
    ),
    "no tables": ({"data.csv": PERSON}, r"no OMOP table.*person\.csv"),
    "a quote that is never closed": (
        {"person.csv": "person_id,year_of_birth,race_source_value\n" + '2,1950,"x\n' + "3,1960,y\n" * 9},
        r"a quote is opened and never closed",
    ),
    "a quote that swallows a block": (
        {"person.csv": PERSON + '2,"1950\n' + "3,1960\n" * 5_000_000},
        r"a quote is opened and not closed within 16 MiB",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_with_their_name(case: str, ram_path: Path) -> None:
    files, message = BROKEN[case]
    folder = lay(ram_path, files)
    for quarantine in (False, True):
        with pytest.raises(DataError, match=message):
            bring(folder, quarantine=quarantine)
    assert not (ram_path / "out").exists()


def test_a_path_that_is_none_is_refused(ram_path: Path) -> None:
    (ram_path / "person.csv").write_text(PERSON)
    for path, message in ((ram_path / "nowhere", "no such folder"), (ram_path / "person.csv", "give the folder")):
        with pytest.raises(DataError, match=message):
            import_omop(path, ram_path / "out", name="test")


def test_an_archive_with_a_password_or_damage_inside_is_refused(ram_path: Path) -> None:
    file = cdm.write_zip(cdm.hospital(), ram_path / "cdm.zip")
    data = bytearray(file.read_bytes())
    at = data.index(b"PERSON.csv") + 30
    data[at : at + 8] = b"\xff" * 8
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"cdm\.zip!export/cdm/PERSON\.csv: damaged or cut short"):
        import_omop(file, ram_path / "out", name="test")


ROWS: dict[str, tuple[dict[str, str | bytes], str, list[tuple[str, str, str, str]]]] = {
    "text for a number": (
        {"person.csv": PERSON + "two,1950\n"},
        r"person\.csv: person, row 3, person_id: not a whole number \('two'\)",
        [("person", "3", "person_id", "not a whole number")],
    ),
    "a number too large": (
        {"person.csv": PERSON + "9223372036854775808,1950\n"},
        r"row 3, person_id: not a whole number",
        [("person", "3", "person_id", "not a whole number")],
    ),
    "no person": (
        {"person.csv": PERSON + ",1950\n"},
        r"row 3, person_id: no person_id",
        [("person", "3", "person_id", "no person_id")],
    ),
    "a person twice": (
        {"person.csv": PERSON + "2,1950\n1,1951\n"},
        r"row 4, person_id: a person for the second time",
        [("person", "4", "person_id", "a person for the second time")],
    ),
    "no birth": (
        {"person.csv": PERSON + "2,\n"},
        r"row 3, year_of_birth: no time",
        [("person", "3", "year_of_birth", "no time")],
    ),
    "born in the future": (
        {"person.csv": PERSON + "2,2999\n"},
        r"row 3, year_of_birth: time out of range",
        [("person", "3", "year_of_birth", "time out of range")],
    ),
    "no such day": (
        {"person.csv": "person_id,year_of_birth,month_of_birth,day_of_birth\n1,1950,,\n2,1950,2,30\n"},
        r"row 3, day_of_birth: not a date \('1950-02-30'\)",
        [("person", "3", "day_of_birth", "not a date")],
    ),
    "too few and too many fields": (
        {"person.csv": PERSON + "2\n3,1950,7\n4,1960\n5\n"},
        r"person, row 3: 1 field where 2 are needed \('2'\)",
        [("person", "3", "", "1 field where 2 are needed"), ("person", "4", "", "3 fields where 2 are needed"),
         ("person", "6", "", "1 field where 2 are needed")],
    ),
    "latin-1": (
        {"person.csv": PERSON, "condition_occurrence.csv": "person_id,condition_source_value,condition_start_date\n"
         "1,good,2020-01-01\n1,caf\u00e9,2020-01-01\n".encode("latin-1")},
        r"condition_occurrence, row 3, condition_source_value: not UTF-8.*iconv -f latin1",
        [("condition_occurrence", "3", "condition_source_value", "not UTF-8")],
    ),
    "dates": (
        {"person.csv": PERSON, "death.csv": "person_id,death_date\n1,31/12/2020\n1,9999-12-31\n1,\n1,2020-02-30\n"
         "1,1799-12-31 23:59:59\n"},
        r"death, row 2, death_date: not a date \('31/12/2020'\)",
        [("death", "2", "death_date", "not a date"), ("death", "5", "death_date", "not a date"),
         ("death", "4", "death_date", "no time"), ("death", "3", "death_date", "time out of range"),
         ("death", "6", "death_date", "time out of range")],
    ),
    "values": (
        {"person.csv": PERSON, "measurement.csv": "person_id,measurement_concept_id,measurement_date,value_as_number\n"
         "1,5,2020-01-01,NaN\n1,5,2020-01-01,high\n1,5,2020-01-01,inf\n1,5,2020-01-01,1e39\n1,5,2020-01-01, 1.5e3 \n"},
        r"measurement, row 3, value_as_number: not a number \('high'\)",
        [("measurement", str(row), "value_as_number", "not a number") for row in (3, 4, 5)],
    ),
    "a visit that ends first": (
        {"person.csv": PERSON, "visit_occurrence.csv": "visit_occurrence_id,person_id,visit_concept_id,"
         "visit_start_date,visit_end_date\n7,1,9201,2020-01-05,2020-01-04\n,1,9201,2020-01-05,2020-01-05\n"
         "8,1,9201,2020-01-05,2999-01-01\n"},
        r"row 3, visit_occurrence_id: no visit_occurrence_id",
        [("visit_occurrence", "3", "visit_occurrence_id", "no visit_occurrence_id"),
         ("visit_occurrence", "4", "visit_end_date", "time out of range"),
         ("visit_occurrence", "2", "visit_end_date", "ends before it starts")],
    ),
    "a concept without a number": (
        {"person.csv": PERSON, "concept.csv": "concept_id,vocabulary_id,concept_code\n,x,y\n"},
        r"concept, row 2, concept_id: no concept_id",
        [("concept", "2", "concept_id", "no concept_id")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_bad_rows_are_refused_by_name_or_set_aside_and_counted(case: str, ram_path: Path) -> None:
    files, message, expected = ROWS[case]
    folder = lay(ram_path, files)
    with pytest.raises(DataError, match=message):
        bring(folder)
    flow = bring(folder, quarantine=True)
    found = quarantined(ram_path)
    assert [(row["table"], row["row"], row["column"] or "", row["reason"]) for row in found] == expected
    for table, rows in flow.rows.items():
        gone = sum(flow.dropped.get(table, {}).values()) + sum(flow.quarantined.get(table, {}).values())
        kept = rows - gone
        assert kept == flow.events.get(table, 0) if table != "visit_occurrence" else kept == 0


def test_what_is_written_oddly_but_clearly_is_read(ram_path: Path) -> None:
    person = b'\xef\xbb\xbf"Person_ID" , YEAR_OF_BIRTH,extra\r\n1.0,1950.00,\r\n\r\n 2 ,1960,NA\r\n'
    names = "person_id,condition_source_value,condition_concept_id,condition_start_datetime,condition_start_date\n"
    first = '1,"a ""b"", c\nd",NULL,NULL,2020-01-01\n'
    second = '2,5" nail,NA,2020-01-01T10:00:00.5+02:00,2020-01-01\n'
    folder = lay(ram_path, {"person.csv": person, "condition_occurrence.csv": names + first + second})
    bring(folder)
    assert cdm.events(ram_path / "out") == [
        (1, "1950-01-01 00:00:00", "MEDS_BIRTH", None, None, None),
        (1, "2020-01-01 00:00:00", 'CONDITION//a "b", c d', None, None, None),
        (2, "1960-01-01 00:00:00", "MEDS_BIRTH", None, None, None),
        (2, "2020-01-01 10:00:00", 'CONDITION//5" nail', None, None, None),
    ]


def test_tab_files_have_no_quotes_unless_their_header_has(ram_path: Path) -> None:
    text = 'person_id\tcondition_source_value\tcondition_start_date\n1\t5" nail\t2020-01-01\n1\t"x\t2020-01-01\n'
    folder = lay(ram_path, {"person.csv": PERSON, "condition_occurrence.csv": text})
    bring(folder)
    assert cdm.codes(ram_path / "out")[:2] == ['CONDITION//"x', 'CONDITION//5" nail']
    quoted = '"person_id"\t"condition_source_value"\t"condition_start_date"\n1\t"a\tb"\t2020-01-01\n'
    bring(lay(ram_path, {"condition_occurrence.csv": quoted}))
    assert cdm.codes(ram_path / "out")[0] == "CONDITION//a b"


def test_parquet_with_odd_types_is_read_or_refused_by_row(ram_path: Path) -> None:
    folder = ram_path / "cdm"
    folder.mkdir()
    pl.DataFrame({"Person_Id": [1.0, 2.0, None, 2.5], "year_of_birth": [1950, 1960, 1970, 1980]}).write_parquet(
        folder / "person.parquet"
    )
    times = pl.Series(["2020-01-01 10:00:00"] * 2).str.to_datetime(time_unit="ns").dt.replace_time_zone("Europe/Berlin")
    codes = pl.Series(["a", None], dtype=pl.Categorical)
    pl.DataFrame(
        {"person_id": [1, 2], "condition_start_datetime": times, "condition_source_value": codes,
         "condition_concept_id": pl.Series([None, True])}
    ).write_parquet(folder / "condition_occurrence.parquet")  # fmt: skip
    with pytest.raises(DataError, match="person, row 4, person_id: not a whole number"):
        bring(folder)
    flow = bring(folder, quarantine=True)
    assert flow.quarantined == {
        "person": {"not a whole number": 1, "no person_id": 1}, "condition_occurrence": {"not a whole number": 1}
    }  # fmt: skip
    assert (1, "2020-01-01 10:00:00", "CONDITION//a", None, None, None) in cdm.events(ram_path / "out")


def test_a_table_spec_that_can_not_be_used_is_refused(ram_path: Path) -> None:
    for text, message in (("a,b\n1,2", "has the columns table,column"), ("table,column\nperson", "row 2 is too short")):
        (ram_path / "spec.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            read_table_spec(ram_path / "spec.csv")
    with pytest.raises(DataError, match="can't be read"):
        read_table_spec(ram_path / "none.csv")
    folder = lay(ram_path, {"person.csv": "1,2,3\n"})
    with pytest.raises(DataError, match="3 columns where the order of person has 18"):
        bring(folder, cdm="5.3")


def test_hostile_strings_stay_strings(ram_path: Path) -> None:
    texts = ["'; DROP TABLE person; --", "=cmd|' /C calc'!A0", "../../etc/passwd", "\u202eright to left", "\x01\x02",
             "//", "a//b///c", "{{7*7}}", "x" * 5000, "MEDS_DEATH", "\ud7ff\U0001f600"]  # fmt: skip
    rows = [cdm.condition(1, condition_concept_id=0, condition_source_value=text) for text in texts]
    folder = cdm.write_csv({"person": [cdm.person(1)], "condition_occurrence": rows}, ram_path / "cdm")
    flow = bring(folder)
    seen = cdm.codes(ram_path / "out")
    assert flow.events["condition_occurrence"] == len(texts)
    assert all(code == "MEDS_BIRTH" or code.startswith("CONDITION//") for code in seen)
    assert {"CONDITION//UNMAPPED", "CONDITION//a/b/c", fit("CONDITION//" + "x" * 5000)} <= set(seen)
    assert all(code.count("//") <= 1 for code in seen)


def rows_of(folder: Path, aside: Path, *, quarantine: bool) -> tuple[pl.DataFrame, Intake]:
    """What the reader gives of condition_occurrence, and where the rest went."""
    collected = Intake(aside, "test", quarantine=quarantine)
    wanted = ["person_id", "condition_source_value"]
    pieces = FileRecords(folder, None).read("condition_occurrence", wanted, [("person_id",)], collected)
    empty = pl.DataFrame(schema={"_row": pl.Int64, **dict.fromkeys(wanted, pl.String)})
    return pl.concat([empty, *(piece for _, piece in pieces)]), collected


def test_a_row_may_end_a_few_bytes_into_the_last_block(ram_path: Path) -> None:
    """Whatever place in a row the last full block ends at."""
    for length in range(380, 420):
        path = ram_path / str(length)
        data = b"person_id,condition_source_value\n" + b"1,a\n" * 80 + b"2," + b"x" * (length - 355)
        folder = lay(path, {"condition_occurrence.csv": data})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tokenizer.sources.omop_csv._BLOCK_BYTES", 400)
            frame, _ = rows_of(folder, path, quarantine=False)
        assert frame["condition_source_value"].to_list() == ["a"] * 80 + ["x" * (length - 355)]


@example(lines=[b'"'], quarantine=True, block=100)
@given(
    lines=st.lists(st.one_of(st.binary(max_size=20), st.just(b"1,b"), st.just(b'"1","c"')), max_size=8),
    quarantine=st.booleans(),
    block=st.sampled_from([100, 1 << 20]),
)
def test_any_bytes_give_rows_or_an_error_that_names_them(
    lines: list[bytes], quarantine: bool, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("fuzz")
    data = b"\n".join([b"person_id,condition_source_value", b"1,a", *lines])
    folder = lay(path, {"condition_occurrence.csv": data})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenizer.sources.omop_csv._BLOCK_BYTES", block)
        try:
            frame, collected = rows_of(folder, path, quarantine=quarantine)
        except DataError as problem:
            named = "condition_occurrence" in str(problem)
            assert named
            return
    bad = collected.flow.quarantined_total
    assert bad == collected.flow.rows.get("condition_occurrence", 0)
    assert frame["_row"].is_sorted()
    assert frame["_row"].n_unique() == frame.height
    if not any(quote in data for quote in (b'"', b"\r")):
        assert frame.height + bad == sum(bool(line) for part in lines for line in part.split(b"\n")) + 1


@given(
    texts=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=30), min_size=1, max_size=30
    ),
    block=st.sampled_from([400, 1000, 1 << 20]),
)
def test_text_of_any_kind_is_one_row_each_whatever_the_block(
    texts: list[str], block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("texts")
    rows = [cdm.condition(n, condition_source_value=text) for n, text in enumerate(texts)]
    folder = cdm.write_csv({"condition_occurrence": rows}, path / "cdm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenizer.sources.omop_csv._BLOCK_BYTES", block)
        frame, _ = rows_of(folder, path, quarantine=False)
    assert frame["condition_source_value"].to_list() == [
        None if text in ("", "NULL", "\\N") else text for text in texts
    ]
    assert frame["_row"].to_list() == list(range(2, len(texts) + 2))

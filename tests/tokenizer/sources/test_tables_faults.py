"""What is wrong in a site's tables is named with file, table, row and column, or set aside and counted."""

import bz2
import csv
import gzip
import io
import lzma
from datetime import datetime

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tokenizer.sources.site import TABLE, run, set_aside, write
from tokenizer.errors import DataError
from tokenizer.sources.tables import import_tables
from tokenizer.spelling import fit

GOOD = "id,time,test,value\n1,2020-01-01,K,4.0\n"


def balanced(flow):
    for table, rows in flow.rows.items():
        dropped = sum(flow.dropped.get(table, {}).values())
        aside = sum(flow.quarantined.get(table, {}).values())
        assert rows == flow.kept[table] + dropped + aside, table
    return True


@pytest.mark.parametrize(
    ("line", "column", "reason", "shown"),
    [
        ("2,2020-01-02,K,four", "value", "not a number", "'four'"),
        ("2,2020-01-02,K,inf", "value", "a number that is not finite or too large for float32", "'inf'"),
        ("2,2020-01-02,K,1e39", "value", "a number that is not finite or too large for float32", "'1e39'"),
        ("2,yesterday,K,4", "time", "not a time", "'yesterday'"),
        ("2,2020-02-30,K,4", "time", "not a time", "'2020-02-30'"),
        ("2,,K,4", "time", "no time", None),
        ("2,9999-12-31,K,4", "time", "time out of range", "'9999-12-31'"),
        ("2,0020-01-01,K,4", "time", "time out of range", "'0020-01-01'"),
        (",2020-01-02,K,4", "id", "no subject", None),
        ("2,2020-01-02,,4", "test", "no code", None),
        ("2,2020-01-02,K", "", "too few columns", "'2,2020-01-02,K'"),
        ("2,2020-01-02,K,4,5", "", "too many columns", "'2,2020-01-02,K,4,5'"),
        ('2,2020-01-02,"K,4', "", "a quote is opened and not closed", """'2,2020-01-02,"K,4'"""),
        ("2,2020-01-02,K\0,4", "", "a NUL character", r"'2,2020-01-02,K\x00,4'"),
        (b"2,2020-01-02,K\xe9,4", "", "not utf-8 text", None),
    ],
)
def test_a_bad_row_is_named_or_set_aside(tmp_path, line, column, reason, shown):
    content = GOOD.encode() + (line if isinstance(line, bytes) else line.encode()) + b"\n"
    with pytest.raises(DataError) as refused:
        run(tmp_path, {"labs.csv": content})
    place = "labs.csv: labs, row 3" + (f", {column}" if column else "")
    assert str(refused.value).startswith(f"{place}: {reason}{f' ({shown})' if shown else ''}")
    assert "or import with --quarantine" in str(refused.value)
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"site", "mapping.toml"}
    flow, events = run(tmp_path, {"labs.csv": content}, quarantine=True)
    assert flow.quarantined == {"labs": {reason: 1}}
    assert balanced(flow)
    assert events.height == 1
    assert [row[:3] for row in set_aside(tmp_path)] == [(3, column, reason)]


@pytest.mark.parametrize("quote", ['"', ""])
@pytest.mark.parametrize("neighbour", ["2,2020-01-02,K,4\n", '2,2020-01-02,"K\n",4\n', "2,2020-01-02,K,four\n"])
@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 1, 3 << 20])
def test_a_text_of_more_than_a_million_characters_is_a_bad_row_whatever_is_near(tmp_path, quote, neighbour, size):
    long = f"3,2020-01-03,{quote}{'x' * size}{quote},5\n"
    flow, _ = run(tmp_path, {"labs.csv": GOOD + neighbour + long + GOOD.splitlines()[1] + "\n"}, quarantine=True)
    reasons = dict(flow.quarantined.get("labs", {}))
    assert reasons.pop("a text of more than a million characters", 0) == (size > 1 << 20)
    assert reasons == ({"not a number": 1} if "four" in neighbour else {})
    assert flow.rows["labs"] == 4
    assert balanced(flow)


@pytest.mark.parametrize(("ending", "pack"), [("bz2", bz2.compress), ("xz", lzma.compress)])
def test_packed_streams_are_read_to_the_last(tmp_path, ending, pack):
    """Python's own readers take a damaged second stream for the end of the file."""
    name, rows = f"labs.csv.{ending}", GOOD.splitlines(keepends=True)[1] * 30_000
    mapping = TABLE.replace("labs.csv", name)
    two = pack(GOOD.encode()) + pack(rows.encode())
    flow, _ = run(tmp_path, {name: two + bytes(8)}, mapping=mapping)
    assert flow.rows["labs"] == 30_001
    first = len(pack(GOOD.encode()))
    for broken in (two[: first + 5], two[:-5], two[:first] + b"x" + two[first + 1 :], two + b"junk", b""):
        with pytest.raises(DataError, match=rf"{name}: damaged or cut off .*Copy or export the file again"):
            run(tmp_path, {name: broken}, mapping=mapping, quarantine=True)


def test_texts_of_parquet_have_to_be_texts(tmp_path):
    mapping = TABLE.replace("labs.csv", "labs.parquet")

    def packed(**more):
        columns = {"id": [1, 2, 3], "time": ["2020-01-01"] * 3, "test": ["K", "a\0b", "L"], "value": [1.0] * 3}
        out = io.BytesIO()
        pl.DataFrame(columns | more).write_parquet(out)
        return {"labs.parquet": out.getvalue()}

    for kind in (pl.String, pl.Categorical):
        content = packed(test=pl.Series(["K", "a\0b", "L"], dtype=kind))
        with pytest.raises(DataError, match="labs, row 2: a NUL character"):
            run(tmp_path, content, mapping=mapping)
    flow, events = run(tmp_path, packed(test=[b"K", b"\xff", b"L\0"]), mapping=mapping, quarantine=True)
    assert flow.quarantined == {"labs": {"not utf-8 text": 1, "a NUL character": 1}}
    assert balanced(flow)
    assert [row[:3] for row in set_aside(tmp_path)] == [(2, "", "not utf-8 text"), (3, "", "a NUL character")]
    assert events["code"].to_list() == ["LAB//K"]
    with pytest.raises(DataError, match=r"labs\.parquet: column value is of type List\(Float64\)"):
        run(tmp_path, packed(value=[[1.0]] * 3), mapping=mapping, quarantine=True)
    length = pl.Series([1, 2, 3]).cast(pl.Duration("us"))
    with pytest.raises(DataError, match="labs, row 1, time: not a time"):
        run(tmp_path, packed(time=length, test=["K"] * 3), mapping=mapping)


@pytest.mark.parametrize(
    ("encoding", "told"), [("utf-32", 'encoding = "utf-32"'), ("utf-16-le", "the header has NUL characters")]
)
def test_other_encodings_are_known(tmp_path, encoding, told):
    with pytest.raises(DataError, match=told):
        run(tmp_path, {"labs.csv": GOOD.encode(encoding)})


def test_a_missing_column_is_named_with_what_is_there(tmp_path):
    with pytest.raises(DataError, match=r"labs\.csv: labs: no column value \(for event 1, value\); there are id, time"):
        run(tmp_path, {"labs.csv": "id,time,test,valeu\n"})


def test_a_near_name_is_suggested(tmp_path):
    with pytest.raises(DataError, match=r"Did you mean valeu\?"):
        run(tmp_path, {"labs.csv": "id,time,test,valeu\n"})


def test_another_delimiter_is_suspected(tmp_path):
    with pytest.raises(DataError, match=r"Is the delimiter ';'\?"):
        run(tmp_path, {"labs.csv": "id;time;test;value\n1;2020-01-01;K;4\n"})


def test_a_column_that_is_there_twice_is_refused_if_it_is_needed(tmp_path):
    with pytest.raises(DataError, match=r"the column value \(for event 1, value\) is there 2 times"):
        run(tmp_path, {"labs.csv": "id,time,test,value,value\n"})
    assert run(tmp_path, {"labs.csv": "id,time,test,value,x,x\n1,2020-01-01,K,4,,\n"})[1].height == 1


def test_names_of_columns_in_other_letters_and_a_byte_order_mark(tmp_path):
    _, events = run(tmp_path, {"labs.csv": b"\xef\xbb\xbfID, Time ,TEST,Value\n1,2020-01-01,K,4\n"})
    assert events["subject_id"].to_list() == [1]


def test_missing_files_are_named_with_what_is_there(tmp_path):
    with pytest.raises(
        DataError, match=r"no file for table labs \(labs\.csv\)\. There are lab\.csv\. Did you mean lab"
    ):
        run(tmp_path, {"lab.csv": GOOD})
    with pytest.raises(DataError, match=r"nowhere: there is no such folder"):
        import_tables(tmp_path / "nowhere", tmp_path / "out", write(tmp_path / "m.toml", TABLE), name="x")


def test_a_truncated_gzip_file_is_refused_even_in_quarantine_mode(tmp_path):
    mapping = TABLE.replace("labs.csv", "labs.csv.gz")
    rows = "".join(f"{n},2020-01-01,K,{n * 7919 % 1009}\n" for n in range(50_000))
    packed = gzip.compress((GOOD + rows).encode())
    for quarantine in (False, True):
        with pytest.raises(DataError, match=r"labs\.csv\.gz: damaged or cut off somewhere after row \d+"):
            run(tmp_path, {"labs.csv.gz": packed[:-5000]}, mapping, quarantine=quarantine)
    with pytest.raises(DataError, match=r"labs\.csv\.gz: damaged or cut off .*Not a gzipped file"):
        run(tmp_path, {"labs.csv.gz": GOOD}, mapping)


def test_empty_tables(tmp_path):
    with pytest.raises(DataError, match=r"labs\.csv: the file is empty"):
        run(tmp_path, {"labs.csv": ""})
    with pytest.raises(DataError, match=r"no event is left to tokenize; read were 0 rows of labs\."):
        run(tmp_path, {"labs.csv": "id,time,test,value\n"})
    with pytest.raises(DataError, match=r"no event is left .* \(1 of labs: no value\)"):
        run(tmp_path, {"labs.csv": "id,time,test,value\n1,2020-01-01,K,\n"})


STATIC = """
[[table]]
name = "patients"
files = "patients.csv"
subject = "id"
unique = "id"
[[table.event]]
code = "GENDER//{sex}"
static = true
"""


def test_a_patient_twice_in_a_table_of_patients(tmp_path):
    content = "id,sex\n1,F\n2,M\n1,M\n2,M\n"
    with pytest.raises(
        DataError, match=r"row 4, id: the same id as another row \('1'\)\. Row 2 of patients\.csv has it"
    ):
        run(tmp_path, {"patients.csv": content}, STATIC)
    flow, events = run(tmp_path, {"patients.csv": content}, STATIC, quarantine=True)
    assert events.select("subject_id", "code").rows() == [(1, "GENDER//F"), (2, "GENDER//M")]
    assert set_aside(tmp_path) == [
        (4, "id", "the same id as another row", "1"),
        (5, "id", "the same id as another row", "2"),
    ]
    assert balanced(flow)


def test_a_patient_in_two_files_of_a_table_of_patients(tmp_path):
    mapping = STATIC.replace("patients.csv", "patients-*.csv")
    flow, _ = run(tmp_path, {f"patients-{n}.csv": "id,sex\n1,F\n" for n in range(3)}, mapping, quarantine=True)
    assert flow.quarantined == {"patients": {"the same id as another row": 2}}


LOOKUP = """
[[lookup]]
name = "d"
files = "d.csv"
key = "test"
REPEATED
[[table]]
name = "labs"
files = "labs.csv"
subject = "id"
time = "time"
join = [{ lookup = "d", on = "test" }]
[[table.event]]
code = "LAB//{d.name}"
"""


def test_a_key_that_stands_twice_in_a_lookup(tmp_path):
    mapping = LOOKUP.replace("REPEATED", "")
    files = {"labs.csv": GOOD, "d.csv": "test,name\nK,potassium\nK,kalium\nK,potassium\n"}
    with pytest.raises(DataError, match=r"d, row 3, test: the same key as another row, with other content \('K'\)"):
        run(tmp_path, files, mapping)
    flow, events = run(tmp_path, files, mapping, quarantine=True)
    assert events["code"].to_list() == ["LAB//potassium"]
    assert balanced(flow)
    flow, _ = run(tmp_path, files, LOOKUP.replace("REPEATED", 'repeated = "leave out"'))
    assert flow.dropped["d"] == {"looked up": 3}


OFFSETS = """
[[table]]
name = "labs"
files = "labs.csv"
subject = "id"
time = { offset = "minutes", unit = "minutes", origin = 2020-01-01 }
[[table.event]]
code = "LAB"
"""


@pytest.mark.parametrize("offset", ["1e300", "9223372036854775807", "-99999999999", "200000000"])
def test_absurd_offsets_are_out_of_range(tmp_path, offset):
    flow, events = run(tmp_path, {"labs.csv": f"id,minutes\n1,5\n1,{offset}\n"}, OFFSETS, quarantine=True)
    assert flow.quarantined == {"labs": {"time out of range": 1}}
    assert events["time"].to_list() == [datetime(2020, 1, 1, 0, 5)]


@pytest.mark.parametrize("offset", ["five", "1:2:3:4", "12:60", "12:5x", ":", "1:-5", "--1:00", "12"])
def test_clock_times_that_are_none(tmp_path, offset):
    mapping = OFFSETS.replace('"minutes", origin', '"HH:MM", origin')
    flow, _ = run(tmp_path, {"labs.csv": f"id,minutes\n1,36:05\n1,{offset}\n"}, mapping, quarantine=True)
    assert flow.quarantined == {"labs": {"not a time as HH:MM": 1}}


@pytest.mark.parametrize(
    ("age", "reason"), [("> 89", "not an age"), ("-4", "age out of range"), ("999", "age out of range")]
)
def test_ages_that_are_none(tmp_path, age, reason):
    mapping = OFFSETS.replace('offset = "minutes", unit = "minutes"', 'age = "minutes"')
    flow, events = run(tmp_path, {"labs.csv": f"id,minutes\n1,20\n1,{age}\n"}, mapping, quarantine=True)
    assert flow.quarantined == {"labs": {reason: 1}}
    assert events["time"].to_list() == [datetime(2000, 1, 1)]


HOSTILE = [
    "=1+1",
    "@SUM(A1)",
    '"quoted"',
    "a\nb",
    "+cmd|' /C calc'!A0",
    "x" * 5000,
    "\u202e",
    "'; DROP TABLE x; --",
    "-1+1",
    "\ud7ff",
]


def test_hostile_texts_pass_as_texts(tmp_path):
    out = io.StringIO(newline="")
    csv.writer(out).writerows(
        [["id", "time", "test", "value"], *([1, "2020-01-01", text, n] for n, text in enumerate(HOSTILE))]
    )
    _, events = run(tmp_path, {"labs.csv": out.getvalue()})
    assert events.sort("numeric_value")["code"].to_list() == [fit(f"LAB//{text}") for text in HOSTILE]


def test_hostile_texts_are_harmless_in_the_quarantine_file(tmp_path):
    out = io.StringIO(newline="")
    csv.writer(out).writerows(
        [
            ["id", "time", "test", "value"],
            [1, "2020-01-01", "K", 1],
            *([1, "2020-01-01", "K", text] for text in HOSTILE),
        ]
    )
    flow, _ = run(tmp_path, {"labs.csv": out.getvalue()}, quarantine=True)
    assert flow.quarantined == {"labs": {"not a number": len(HOSTILE)}}
    assert [content for *_, content in set_aside(tmp_path)] == [
        "'=1+1",
        "'@SUM(A1)",
        '"quoted"',
        "a\nb",
        "'+cmd|' /C calc'!A0",
        "x" * 2000,
        "\u202e",
        "'; DROP TABLE x; --",
        "-1+1",
        "\ud7ff",
    ]


def test_rows_after_a_text_of_several_lines_have_the_numbers_of_their_lines(tmp_path):
    content = 'id,time,test,value\n1,2020-01-01,"a\nb\nc",1\n\n1,2020-01-01,K,x\n'
    with pytest.raises(DataError, match=r"labs, row 6, value: not a number \('x'\)"):
        run(tmp_path, {"labs.csv": content})


WIDE = """
[[table]]
name = "vitals"
files = "vitals.csv"
subject = "id"
time = "time"
[[table.drop]]
name = "test patient"
where.id = 999
[[table.event]]
code = "VITAL//{each}"
each = ["hr", "sao2"]
[[table.event]]
code = "NOTE"
text = "note"
"""

CELL = {
    "id": st.sampled_from(["1", "2", "x-9", "", "999"]),
    "time": st.sampled_from(["2020-01-01", "2020-01-01T10:00:00+02:00", "", "soon", "1700-01-01"]),
    "hr": st.sampled_from(["", "80", "fast", "1e99"]),
    "sao2": st.sampled_from(["", "97"]),
    "note": st.sampled_from(["", "ok", "y" * 41, '"a\nb"']),
}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.lists(st.one_of(st.tuples(*CELL.values()), st.just(("1", "2"))), max_size=30))
def test_every_row_is_kept_dropped_by_name_or_set_aside(tmp_path, rows):
    """Against a plain reading of the rules, row by row."""
    expected = {"kept": 0, "events": 0, "dropped": {}, "bad": {}}

    def count(kind, reason):
        expected[kind][reason] = expected[kind].get(reason, 0) + 1

    for row in rows:
        if len(row) < 5:
            count("bad", "too few columns")
            continue
        subject, time, hr, sao2, note = row
        fault = {"": "no time", "soon": "not a time", "1700-01-01": "time out of range"}.get(time)
        fault = fault or {"fast": "not a number", "1e99": "a number that is not finite or too large for float32"}.get(
            hr
        )
        events = (hr != "") + (sao2 != "") + (note not in ("", "y" * 41))
        if subject == "999":
            count("dropped", "test patient")
        elif subject == "":
            count("bad", "no subject")
        elif fault:
            count("bad", fault)
        elif events:
            expected["kept"] += 1
            expected["events"] += events
        else:
            count("dropped", "free text" if note else "no value")
    lines = "".join(",".join(row) + "\n" for row in [("0", "2020-01-01", "60", "", ""), *rows])
    flow, _ = run(tmp_path, {"vitals.csv": "id,time,hr,sao2,note\n" + lines}, WIDE, quarantine=True)
    assert balanced(flow)
    assert flow.rows == {"vitals": len(rows) + 1}
    assert flow.kept["vitals"] == expected["kept"] + 1
    assert flow.events["vitals"] == expected["events"] + 1
    assert flow.dropped.get("vitals", {}) == expected["dropped"]
    assert flow.quarantined.get("vitals", {}) == expected["bad"]
    if expected["bad"]:
        assert len(set_aside(tmp_path)) == sum(expected["bad"].values())


def test_very_many_bad_rows_are_set_aside(tmp_path):
    flow, _ = run(tmp_path, {"labs.csv": GOOD + "1,2020-01-01,K,bad\n" * 200_000}, quarantine=True)
    assert flow.quarantined == {"labs": {"not a number": 200_000}}
    assert (tmp_path / "out/quarantine.csv").read_text().splitlines()[
        -1
    ] == "labs.csv,labs,200002,value,not a number,bad"


@pytest.mark.slow
def test_a_patient_with_ten_million_events(tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    with (folder / "labs.csv").open("w") as file:
        file.write("id,time,test,value\n2,2020-01-01,K,1\n")
        for minute in range(1000):
            stamp = f"1,2020-01-{1 + minute // 1440:02d} {minute // 60 % 24:02d}:{minute % 60:02d},K,"
            file.write("".join(f"{stamp}{n}\n" for n in range(10_000)))
    flow = import_tables(folder, tmp_path / "out", write(tmp_path / "m.toml", TABLE), name="x")
    assert flow.events_total == 10_000_001
    shards = sorted((tmp_path / "out/data").glob("*.parquet"))
    subjects = [pl.read_parquet(file)["subject_id"].unique().to_list() for file in shards]
    assert sorted(subjects) == [[1], [2]]


def test_parquet_columns_keep_their_types(tmp_path):
    table = pl.DataFrame(
        {
            "id": [1, 2, 3],
            "time": [datetime(2020, 1, 1, 10), datetime(2020, 1, 2), None],
            "test": pl.Series(["K", "K", "Na"], dtype=pl.Categorical),
            "value": [4.5, float("nan"), -9.0],
        }
    ).with_columns(pl.col("time").dt.replace_time_zone("Europe/Berlin"))
    (tmp_path / "site").mkdir()
    table.write_parquet(tmp_path / "site/labs.parquet")
    mapping = TABLE.replace("labs.csv", "labs.parquet").replace('time = "time"', 'time = "time"\nnull = [-9]')
    with pytest.raises(DataError, match=r"labs\.parquet: labs, row 3, time: no time"):
        run(tmp_path, {}, mapping)
    flow, events = run(tmp_path, {}, mapping, quarantine=True)
    assert events.select("time", "code", "numeric_value").rows() == [(datetime(2020, 1, 1, 10), "LAB//K", 4.5)]
    assert flow.dropped == {"labs": {"no value": 1}}
    (tmp_path / "site/labs.parquet").write_bytes(b"PAR1 no parquet PAR1")
    with pytest.raises(DataError, match=r"labs\.parquet: not a readable parquet file"):
        run(tmp_path, {}, mapping)


@pytest.mark.parametrize(
    ("text", "spec", "expected"),
    [
        ("2020-01-02T03:04:05.5Z", '"time"', datetime(2020, 1, 2, 3, 4, 5, 500_000)),
        ("2020-01-02 03:04:05+02:00", '"time"', datetime(2020, 1, 2, 3, 4, 5)),
        ("2020-01-02 03:04", '"time"', datetime(2020, 1, 2, 3, 4)),
        (
            "02.01.2020 03:04",
            '{ column = "time", format = ["%d.%m.%Y", "%d.%m.%Y %H:%M"] }',
            datetime(2020, 1, 2, 3, 4),
        ),
        ("20200102", '{ column = "time", format = "%Y%m%d" }', datetime(2020, 1, 2)),
        (
            "2020-01-02 03:04:05 +0200",
            '{ column = "time", format = "%Y-%m-%d %H:%M:%S %z" }',
            datetime(2020, 1, 2, 3, 4, 5),
        ),
        ("2020", '{ year = "time" }', datetime(2020, 1, 1)),
        ("1577836800", '{ offset = "time", unit = "seconds", origin = 1970-01-01 }', datetime(2020, 1, 1)),
        ("-1.5", '{ offset = "time", unit = "hours", origin = 2020-01-01 }', datetime(2019, 12, 31, 22, 30)),
        ("-1.5", '{ offset = "time", unit = "days", before = true, origin = 2020-01-01 }', datetime(2020, 1, 2, 12)),
        ("-0:30", '{ offset = "time", unit = "HH:MM", origin = 2020-01-01 }', datetime(2019, 12, 31, 23, 30)),
        ("25:00:01", '{ offset = "time", unit = "HH:MM", origin = 2020-01-01 }', datetime(2020, 1, 2, 1, 0, 1)),
        ("40", '{ age = "time", origin = 2020-02-29 }', datetime(1980, 2, 29)),
        ("1", '{ age = "time", origin = 2020-02-29 }', datetime(2019, 2, 28)),
        ("0.5", '{ age = "time", origin = 2020-08-31 }', datetime(2020, 2, 29)),
        ("30", '{ age = "time", unit = "months", origin = 2020-08-31 }', datetime(2018, 2, 28)),
        ("30", '{ age = "time", unit = "days", origin = 2020-08-31 }', datetime(2020, 8, 1)),
        ("> 89", '{ age = "time", ages = { "> 89" = 90 }, origin = 2020-01-01 }', datetime(1930, 1, 1)),
        ("2020-01-02", '{ column = "time", clock = "test" }', datetime(2020, 1, 2, 7, 30)),
    ],
)
def test_ways_to_tell_a_time(tmp_path, text, spec, expected):
    mapping = TABLE.replace('time = "time"', f"time = {spec}")
    _, events = run(tmp_path, {"labs.csv": f"id,time,test,value\n1,{text},07:30,1\n"}, mapping)
    assert events["time"].to_list() == [expected]


@pytest.mark.parametrize(
    ("template", "text", "code"),
    [
        ("{test:upper}", "äß", "ÄSS"),
        ("{test:int}", "220045.0", "220045"),
        ("{test:int}", "x1", "x1"),
        ("ICD10CM//{test:icd10cm}", "e1165", "ICD10CM//E11.65"),
        ("ICD10CM//{test:icd10cm}", "I10", "ICD10CM//I10"),
        ("ICD10CM//{test:icd10cm}", "E11.65", "ICD10CM//E11.65"),
        ("ICD9CM//{test:icd9cm}", "25000", "ICD9CM//250.00"),
        ("ICD9CM//{test:icd9cm}", "E8798", "ICD9CM//E879.8"),
        ("ICD9CM//{test:icd9cm}", "V290", "ICD9CM//V29.0"),
        ("ICD9Proc//{test:icd9proc}", "5491", "ICD9Proc//54.91"),
        ("{{{test}}}", "x", "{x}"),
    ],
)
def test_templates_of_codes(tmp_path, template, text, code):
    _, events = run(
        tmp_path, {"labs.csv": f"id,time,test,value\n1,2020-01-01,{text},1\n"}, TABLE.replace("LAB//{test}", template)
    )
    assert events["code"].to_list() == [code]


CONDITIONS = {
    "where.value = 5": {5},
    "where.value = [5, 6]": {5, 6},
    "where.value.not = [5, 6]": {7, 8, 9},
    "where.value.above = 7": {8, 9},
    "where.value.below = 7": {5, 6},
    "where.value = { above = 5, below = 8 }": {6, 7},
    "where.test.missing = true": {9},
    "where.test.missing = false": {5, 6, 7, 8},
    "where.test.not = 'a'": {7, 8, 9},
    "where.test.matches = '^[ab]$'": {5, 6, 7},
    "where = { test = 'a', value = 6 }": {6},
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_conditions(tmp_path, condition):
    tests = ["a", "a", "b", "cd", ""]
    rows = "".join(f"1,2020-01-01,{test},{value}\n" for value, test in enumerate(tests, 5))
    mapping = TABLE.replace("LAB//{test}", "LAB") + condition
    flow, events = run(tmp_path, {"labs.csv": "id,time,test,value\n" + rows}, mapping)
    assert set(events["numeric_value"]) == CONDITIONS[condition]
    assert flow.dropped.get("labs", {}) == ({"no event fits": 5 - events.height} if events.height < 5 else {})

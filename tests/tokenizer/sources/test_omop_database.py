"""OMOP straight from databases: a real PostgreSQL, and SQLite."""

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import sqlalchemy as sa

from tests import services
from tests.tokenizer.sources import cdm
from tokenizer.errors import ConfigError, DataError, FedcometError
from tokenizer.sources.omop import import_omop

PROGRAMS = services.postgres_programs()
needs_postgres = pytest.mark.skipif(PROGRAMS is None, reason=services.POSTGRES_MISSING)


@pytest.fixture(scope="module")
def server() -> Iterator[Path]:
    assert PROGRAMS is not None
    with services.postgres(PROGRAMS) as folder:
        engine = sa.create_engine(url_of(folder), isolation_level="AUTOCOMMIT", poolclass=sa.pool.NullPool)
        with engine.connect() as connection:
            for name in ("hospital", "shared", "odd", "broken"):
                connection.execute(sa.text(f"CREATE DATABASE {name}"))
        yield folder


def url_of(server: Path, database: str = "postgres", password: str = services.PASSWORD) -> str:
    return f"postgresql+psycopg://postgres:{quote(password, safe='')}@/{database}?host={server}"


def fill(server: Path, database: str, tables: cdm.Tables, schema: str | None = None) -> str:
    """Write tables to a database once, and give its URL."""
    url = url_of(server, database)
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        if schema:
            connection.execute(sa.text(f"CREATE SCHEMA IF NOT EXISTS {schema}"))
        there = sa.inspect(connection).has_table(next(iter(tables)), schema=schema)
    if not there:
        cdm.write_database(tables, engine, schema)
    engine.dispose()
    return url


@needs_postgres
def test_postgresql_gives_what_files_give(server: Path, ram_path: Path) -> None:
    url = fill(server, "hospital", cdm.hospital())
    flow = import_omop(url, ram_path / "out", name="test")
    assert cdm.events(ram_path / "out") == cdm.EXPECTED
    files = import_omop(cdm.write_csv(cdm.hospital(), ram_path / "cdm"), ram_path / "files", name="test")
    assert (flow.rows, flow.events, flow.dropped) == (files.rows, files.events, files.dropped)


@needs_postgres
def test_tables_and_vocabulary_may_lie_in_two_schemas(server: Path, ram_path: Path) -> None:
    tables = cdm.hospital()
    words = {table: tables.pop(table) for table in ("concept", "concept_relationship")}
    fill(server, "shared", tables, "cdm")
    url = fill(server, "shared", words, "vocab")
    import_omop(url, ram_path / "out", name="test", schema="cdm", vocabulary_schema="vocab")
    assert cdm.events(ram_path / "out") == cdm.EXPECTED
    with pytest.raises(DataError, match=r"no OMOP table in the default schema.*cdm.*say which one"):
        import_omop(url, ram_path / "out", name="test")


@needs_postgres
def test_the_server_lets_an_import_change_nothing(server: Path, ram_path: Path) -> None:
    url = fill(server, "hospital", cdm.hospital())
    from tokenizer.sources.omop_database import database_records

    with database_records(url, None, None) as records, pytest.raises(sa.exc.InternalError, match="read-only"):
        records._connection.execute(sa.text("CREATE TABLE mine (x int)"))


@needs_postgres
def test_dates_that_no_calendar_has_and_odd_texts_are_named(server: Path, ram_path: Path) -> None:
    url = url_of(server, "odd")
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for statement in (
            'CREATE TABLE "PERSON" (person_id bigint, "YEAR_OF_BIRTH" numeric, birth_datetime timestamptz)',
            "INSERT INTO \"PERSON\" VALUES (1, 1950.0, '1950-01-01 10:00:00+00'), (2, 1960, NULL)",
            "CREATE TABLE condition_occurrence (condition_occurrence_id bigint, person_id bigint,"
            " condition_concept_id int, condition_start_date date, condition_source_value text)",
            "INSERT INTO condition_occurrence VALUES (41, 1, 0, '2020-01-01', E'\"a\",\\n''b'' \\t €'),"
            " (42, 1, 0, 'infinity', 'x'), (43, 1, 0, '0044-03-15 BC', 'y'), (44, 1, 0, '2020-01-02', '')",
            "CREATE VIEW death AS SELECT person_id, DATE '2021-01-01' AS death_date FROM \"PERSON\" LIMIT 1",
            "SET datestyle TO 'SQL, DMY'",
        ):
            connection.execute(sa.text(statement))
    engine.dispose()
    with pytest.raises(DataError, match=r"condition_occurrence, row 42, condition_start_date: not a date"):
        import_omop(url, ram_path / "out", name="test")
    flow = import_omop(url, ram_path / "out", name="test", quarantine=True)
    assert flow.quarantined == {"condition_occurrence": {"not a date": 2}}
    assert cdm.codes(ram_path / "out") == [
        "CONDITION//\"a\", 'b' €", "CONDITION//UNMAPPED", "MEDS_BIRTH", "MEDS_BIRTH", "MEDS_DEATH"
    ]  # fmt: skip


@needs_postgres
def test_many_rows_come_in_pieces(server: Path, ram_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [cdm.condition(1, condition_occurrence_id=n, condition_source_value=f"code {n}") for n in range(3000)]
    url = fill(server, "broken", {"person": [cdm.person(1)], "condition_occurrence": rows})
    monkeypatch.setattr("tokenizer.sources.omop_database._PIECE_BYTES", 10_000)
    pieces: list[int] = []
    flow = import_omop(url, ram_path / "out", name="test", progress=lambda _, rows: pieces.append(rows))
    assert flow.events["condition_occurrence"] == 3000
    assert len(pieces) > 5


@needs_postgres
def test_a_password_is_shown_nowhere(server: Path, ram_path: Path) -> None:
    url = fill(server, "hospital", cdm.hospital())
    flow = import_omop(url, ram_path / "out", name="test")
    shown = [flow.source, (ram_path / "out/metadata/fedcomet_flow.json").read_text()]
    wrong = "wrong!pass"
    for address in (
        url_of(server, "hospital", wrong),
        url_of(server, "nowhere"),
        f"postgresql+psycopg://postgres:{quote(services.PASSWORD, safe='')}@127.0.0.1:1/x",
        f"postgresql+psycopg://postgres:{services.PASSWORD}@here:and:there/x",
        f"unheard+of://postgres:{quote(services.PASSWORD, safe='')}@host/x",
        f"postgresql+psycopg://postgres@/{'hospital'}?host={server}&password={quote(wrong)}",
    ):
        with pytest.raises(FedcometError) as refused:
            import_omop(address, ram_path / "out", name="test")
        shown.append(str(refused.value) + repr(refused.value.__cause__))
    for text in shown:
        for secret in (services.PASSWORD, quote(services.PASSWORD, safe=""), wrong, "postgres:"):
            assert secret not in text


@needs_postgres
def test_a_missing_column_is_named_with_its_table(server: Path, ram_path: Path) -> None:
    engine = sa.create_engine(url_of(server, "broken"))
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE SCHEMA poor"))
        connection.execute(sa.text("CREATE TABLE poor.person (person_id int)"))
    engine.dispose()
    with pytest.raises(DataError, match=r"poor\.person: person has no column year_of_birth or birth_datetime"):
        import_omop(url_of(server, "broken"), ram_path / "out", name="test", schema="poor")


def sqlite(file: Path, tables: cdm.Tables) -> str:
    engine = sa.create_engine(f"sqlite:///{file}")
    cdm.write_database(tables, engine)
    engine.dispose()
    return f"sqlite:///{file}"


def test_a_view_of_a_table_that_is_gone_is_named(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "cdm.db") as connection:
        connection.executescript(
            "CREATE TABLE person (person_id, year_of_birth); INSERT INTO person VALUES (1, 1950);"
            "CREATE VIEW condition_occurrence AS SELECT * FROM gone"
        )
    connection.close()
    with pytest.raises(DataError, match=r"condition_occurrence: no such table: main\.gone"):
        import_omop(f"sqlite:///{tmp_path}/cdm.db", tmp_path / "out", name="x", quarantine=True)


def test_sqlite_gives_what_files_give(ram_path: Path) -> None:
    url = sqlite(ram_path / "hospital #1 %.db", cdm.hospital())
    import_omop(url, ram_path / "out", name="test")
    assert cdm.events(ram_path / "out") == cdm.EXPECTED
    flow = import_omop(url, ram_path / "source", name="test", codes="source")
    assert "ICD10CM//E11.65" in cdm.codes(ram_path / "source")
    assert flow.source == f"OMOP sqlite:///{ram_path}/hospital #1 %.db"


def test_sqlite_is_opened_for_reading_only(ram_path: Path) -> None:
    url = sqlite(ram_path / "cdm.db", cdm.hospital())
    before = (ram_path / "cdm.db").read_bytes()
    (ram_path / "cdm.db").chmod(0o444)
    import_omop(url, ram_path / "out", name="test")
    assert (ram_path / "cdm.db").read_bytes() == before
    assert sorted(file.name for file in ram_path.iterdir()) == ["cdm.db", "out"]


def test_sqlite_text_that_is_not_utf8_and_wrong_types_are_set_aside(ram_path: Path) -> None:
    connection = sqlite3.connect(ram_path / "cdm.db")
    connection.execute("CREATE TABLE person (person_id INTEGER, year_of_birth INTEGER)")
    connection.execute("INSERT INTO person VALUES (1, 1950), ('one', 1950), (3, 1950.5)")
    connection.execute(
        "CREATE TABLE Condition_Occurrence (condition_occurrence_id, person_id, condition_source_value TEXT,"
        " condition_start_date TEXT)"
    )
    rows = [
        (7, 1, "CAST(x'e9' AS TEXT)", "'2020-01-01'"),
        (8, 1, "'good'", "'2020-01-01'"),
        (9, 1, "'x'", "1577836800"),
    ]
    for row in rows:
        connection.execute("INSERT INTO Condition_Occurrence VALUES ({}, {}, {}, {})".format(*row))
    connection.commit()
    connection.close()
    url = f"sqlite:///{ram_path}/cdm.db"
    with pytest.raises(DataError, match=r"person.*: person, row 2, person_id: not a whole number \('one'\)"):
        import_omop(url, ram_path / "out", name="test")
    flow = import_omop(url, ram_path / "out", name="test", quarantine=True)
    assert flow.rows == {"person": 3, "condition_occurrence": 3}
    assert flow.quarantined == {
        "person": {"not a whole number": 2},
        "condition_occurrence": {"not UTF-8": 1, "not a date": 1},
    }
    assert cdm.codes(ram_path / "out") == ["CONDITION//good", "MEDS_BIRTH"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:////nowhere/cdm.db", r"no such file.*four slashes"),
        ("oracle+oracledb://user:pw@host/x", r"the driver .* is missing"),
        ("what://host/db", r"knows no database of this kind"),
        ("postgresql+psycopg://user@here:and:there/x", r"can't be read.*special characters"),
    ],
)
def test_a_database_that_can_not_be_opened_is_told_apart(url: str, message: str, ram_path: Path) -> None:
    with pytest.raises(FedcometError, match=message):
        import_omop(url, ram_path / "out", name="test")


def test_a_database_has_no_use_for_a_column_order(ram_path: Path) -> None:
    with pytest.raises(ConfigError, match="names its columns"):
        import_omop("sqlite:////x.db", ram_path / "out", name="test", cdm="5.3")


def test_a_file_that_is_no_database_is_refused(ram_path: Path) -> None:
    (ram_path / "cdm.db").write_text("person_id,year_of_birth\n" * 100)
    with pytest.raises(DataError, match="not a database"):
        import_omop(f"sqlite:///{ram_path}/cdm.db", ram_path / "out", name="test")


def test_files_need_no_sqlalchemy() -> None:
    code = "import sys; sys.modules['sqlalchemy'] = None; sys.modules['psycopg'] = None; import tokenizer.sources.omop"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])

"""OMOP tables in a database: read only, in pieces, and as of one moment where the database can.

PostgreSQL streams tables by COPY, which is several times as fast as rows through its driver; every other database
streams rows by a server-side cursor where its driver has one.
"""

import io
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import polars as pl
import sqlalchemy as sa

from tokenizer.errors import ConfigError, DataError
from tokenizer.sources.intake import Intake
from tokenizer.sources.omop_csv import Oddities, number_rows, read_csv
from tokenizer.sources.omop_files import missing_column
from tokenizer.sources.omop_tables import READ, UNREAD

_PIECE_ROWS = 50_000
_PIECE_BYTES = 16 << 20
_VOCABULARY = ("concept", "concept_relationship")


class DatabaseRecords:
    """The OMOP tables of a database; made by `database_records`.

    Attributes:
        source: kind and place, without user and password.
        tables: names of the CDM's tables that were found.
        others: names of other tables in the schema.
    """

    def __init__(self, connection: sa.Connection, place: str, schema: str | None, vocabulary: str | None) -> None:
        self.source = f"OMOP {place}"
        self._connection = connection
        self._found: dict[str, tuple[str | None, str]] = {}
        own = _tables(connection, schema)
        for name in own:
            self._add(schema, name)
        for name in _tables(connection, vocabulary) if vocabulary else ():
            if name.lower() in _VOCABULARY:
                self._found.pop(name.lower(), None)
                self._add(vocabulary, name)
        known = READ | UNREAD.keys()
        self.tables = frozenset(self._found) & known
        self.others = [name for name in own if name.lower() not in known]
        if not self.tables & READ:
            raise DataError(
                f"{self.source}: no OMOP table in {f'schema {schema}' if schema else 'the default schema'}. There are"
                f" the schemas {', '.join(sa.inspect(connection).get_schema_names())}; say which one holds the tables."
            )

    def read(
        self, table: str, wanted: Sequence[str], required: Sequence[tuple[str, ...]], intake: Intake
    ) -> Iterator[tuple[str, pl.DataFrame]]:
        """Give a table in pieces, as `FileRecords.read` does; `_row` is the table's key, or counts from 1."""
        schema, name = self._found[table]
        label = f"{self.source}, {f'{schema}.' if schema else ''}{name}"
        try:
            columns = {column.lower(): column for column in self._columns(schema, name)}
        except sa.exc.SQLAlchemyError as problem:
            raise _failed(label, problem) from None
        for group in required:
            if not set(group) & set(columns):
                raise missing_column(label, table, group, tuple(columns))
        key = next((k for k in (f"{table}_id",) if k in columns), None)
        chosen = list(dict.fromkeys([*([key] if key else []), *(c for c in wanted if c in columns)]))
        here = sa.table(name, *(sa.column(columns[column]) for column in chosen), schema=schema)
        if key:
            label += f" (rows by {key})"
        pieces = self._copied if self._connection.dialect.driver == "psycopg" else self._streamed
        try:
            for piece in pieces(here, chosen, list(dict.fromkeys([*wanted, *chosen])), label, table, intake):
                yield label, _by_key(piece, key).select("_row", *wanted)
        except sa.exc.SQLAlchemyError as problem:
            raise _failed(label, problem) from None

    def _add(self, schema: str | None, name: str) -> None:
        if (other := self._found.setdefault(name.lower(), (schema, name))) != (schema, name):
            raise DataError(f"{self.source}: the tables {other[1]} and {name} differ by case only; drop or rename one.")

    def _columns(self, schema: str | None, name: str) -> list[str]:
        return [str(column["name"]) for column in sa.inspect(self._connection).get_columns(name, schema=schema)]

    def _streamed(
        self, here: Any, chosen: list[str], wanted: list[str], label: str, table: str, intake: Intake
    ) -> Iterator[pl.DataFrame]:
        # As text, every database says the same thing, and dates that Python can't hold are rows like others. SQLite
        # doesn't check that text is UTF-8: as bytes, the bad cell can be named.
        raw = self._connection.dialect.name == "sqlite"
        query = sa.select(*(sa.cast(column, sa.LargeBinary() if raw else sa.String()) for column in here.columns))
        result = self._connection.execution_options(yield_per=_PIECE_ROWS).execute(query)
        kind = pl.Binary if raw else pl.String
        frames = (
            pl.DataFrame([tuple(row) for row in rows], schema=dict.fromkeys(chosen, kind), orient="row", strict=False)
            for rows in result.partitions()
        )
        yield from number_rows(frames, Oddities(), wanted, label, table, intake)

    def _copied(
        self, here: Any, chosen: list[str], wanted: list[str], label: str, table: str, intake: Intake
    ) -> Iterator[pl.DataFrame]:
        import psycopg

        query = str(sa.select(*here.columns).compile(dialect=self._connection.dialect))
        driver: Any = self._connection.connection.driver_connection
        try:
            with driver.cursor() as cursor, cursor.copy(f"COPY ({query}) TO STDOUT (FORMAT csv)") as copy:
                odd = Oddities()
                frames = (frame for block in _blocks(copy) for frame in _parsed(block, chosen, odd, label))
                yield from number_rows(frames, odd, wanted, label, table, intake)
        except psycopg.Error as problem:
            raise _failed(label, problem) from None


@contextmanager
def database_records(url: str, schema: str | None, vocabulary_schema: str | None) -> Iterator[DatabaseRecords]:
    """Open a database for reading.

    Args:
        url: as SQLAlchemy has it; a password in it is shown nowhere.
        schema: of the tables.
        vocabulary_schema: of the concept tables, if it is another.

    Raises:
        ConfigError: not a URL, or its driver isn't installed.
        DataError: no such database, no access, no OMOP tables.
    """
    address = _address(url)
    place = _place(address)
    try:
        engine = _engine(address, place)
    except ModuleNotFoundError as problem:
        hint = "pip install 'fedcomet[postgres]'" if address.get_backend_name() == "postgresql" else "install it"
        raise ConfigError(f"{place}: the driver {problem.name} is missing; {hint}.") from None
    except sa.exc.ArgumentError:
        raise ConfigError(f"{place}: SQLAlchemy knows no database of this kind.") from None
    try:
        connection = engine.connect()
    except (sa.exc.SQLAlchemyError, sqlite3.Error) as problem:
        engine.dispose()
        raise _failed(f"OMOP {place}", problem) from None
    try:
        with connection:
            yield _open(connection, place, schema, vocabulary_schema)
    finally:
        engine.dispose()


def _open(connection: sa.Connection, place: str, schema: str | None, vocabulary: str | None) -> DatabaseRecords:
    try:
        if connection.dialect.name == "postgresql":
            # One snapshot for all tables; dates as ISO 8601 has them whatever the server's setting.
            connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            connection.execute(sa.text("SET LOCAL datestyle TO 'ISO, YMD'"))
        return DatabaseRecords(connection, place, schema, vocabulary)
    except sa.exc.SQLAlchemyError as problem:
        raise _failed(f"OMOP {place}", problem) from None


def _address(url: str) -> sa.URL:
    try:
        address = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        # Without what it says: there may be a password in it.
        raise ConfigError(
            "The database URL can't be read. It looks like postgresql+psycopg://user@host:5432/database or"
            " sqlite:////path/to/file.db, with special characters in user and password as %40 and the like."
        ) from None
    return address.set(drivername="postgresql+psycopg") if address.drivername in ("postgresql", "postgres") else address


def _place(address: sa.URL) -> str:
    host = f"{address.host or ''}{f':{address.port}' if address.port else ''}"
    return f"{address.get_backend_name()}://{host}/{address.database or ''}"


def _engine(address: sa.URL, place: str) -> sa.Engine:
    if address.get_backend_name() != "sqlite":
        return sa.create_engine(address, poolclass=sa.pool.NullPool)
    file = Path(address.database or "")
    if not file.is_file():
        raise DataError(
            f"{place}: there is no such file. An absolute path needs four slashes: sqlite:////data/omop.db."
        )
    uri = f"file:{quote(str(file.resolve()))}?mode=ro"
    return sa.create_engine("sqlite://", creator=lambda: sqlite3.connect(uri, uri=True), poolclass=sa.pool.NullPool)


def _tables(connection: sa.Connection, schema: str | None) -> list[str]:
    inspector = sa.inspect(connection)
    names = [*inspector.get_table_names(schema=schema), *inspector.get_view_names(schema=schema)]
    if connection.dialect.name == "postgresql":
        names += inspector.get_materialized_view_names(schema=schema)
    return sorted(names)


def _blocks(copy: Any) -> Iterator[bytes]:
    """Join the rows of a COPY to blocks; the server sends whole rows."""
    rows: list[bytes] = []
    size = 0
    for row in copy:
        rows.append(bytes(row))
        size += len(row)
        if size >= _PIECE_BYTES:
            yield b"".join(rows)
            rows, size = [], 0
    if rows:
        yield b"".join(rows)


def _parsed(block: bytes, columns: list[str], odd: Oddities, label: str) -> Iterator[pl.DataFrame]:
    stream = io.BytesIO(block)
    yield from read_csv(stream, columns, columns, delimiter=",", quoted=True, skip=0, odd=odd, label=label)
    if odd.rows:
        raise DataError(f"{label}: a row came with {odd.rows[0].actual_columns} of {len(columns)} columns; read again.")


def _by_key(piece: pl.DataFrame, key: str | None) -> pl.DataFrame:
    if key is None:
        return piece
    return piece.with_columns(pl.coalesce(pl.col(key).cast(pl.Int64, strict=False), "_row").alias("_row"))


def _failed(label: str, problem: Exception) -> DataError:
    """The error of a database, in one line; a driver's message has no password, SQLAlchemy's could show the query."""
    reason = str(getattr(problem, "orig", None) or problem).strip().splitlines()
    return DataError(
        f"{label}: {reason[0] if reason else type(problem).__name__}. Check address, user and rights; reading needs"
        " SELECT on the tables, and a password may stand in ~/.pgpass."
    )

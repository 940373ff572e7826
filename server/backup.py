"""Copies of a ledger: one file, of one moment, verified by a hash of all rows.

The file is a SQLite database whatever the ledger's own is, with the same tables and one more (`backup`) that says what
it is a copy of. The lease is not copied: it is of those who are there now. Whatever reads it checks the hash first.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    ExceptionContext,
    Integer,
    MetaData,
    String,
    Table,
    event,
    insert,
    select,
    text,
)
from sqlalchemy.exc import DatabaseError, NoSuchTableError

from federation import database
from server.transactions import Transactions
from tokenizer import durable
from tokenizer.errors import ConfigError, DataError

_LEFT_OUT = {"lease", "alembic_version", "backup"}
_ROWS = 1000  # at once
_FACTS = Table("backup", MetaData(), *(Column(name, String) for name in ("revision", "place", "made_at", "sha256")))


@dataclass(frozen=True)
class Backup:
    """What a backup is a copy of.

    Attributes:
        revision: of the tables.
        place: the ledger, without a password.
        made_at: in UTC, ISO 8601.
        sha256: of all rows.
        rows: how many there are, by table.
    """

    revision: str
    place: str
    made_at: str
    sha256: str
    rows: dict[str, int]


def save(ledger: Transactions, path: Path, *, replace: bool = False) -> Backup:
    """Copy a ledger to a file, in one moment of it, while it may be in use.

    Raises:
        ConfigError: there is a file already, and `replace` is false; or it can't be written.
        DataError: the file does not hold what was written.
    """
    if path.exists() and not replace:
        raise ConfigError(f"{path} exists; --yes replaces it.")
    with durable.file(path) as aside:
        sha256 = ledger.read(lambda session: _copy(session.connection(), aside, path, ledger.place))
        found = check(aside)
        if found.sha256 != sha256:
            raise DataError(f"{path} does not hold what was written to it; the disk may be failing. Take another.")
    return found


def check(path: Path) -> Backup:
    """Read what a backup says of itself, and see that its rows have the hash that it names.

    Raises:
        DataError: it is no backup, or its rows have changed since it was made.
    """
    with opened(path) as connection:
        try:
            facts = connection.execute(select(_FACTS)).one()
            sha256, rows = digest(connection, _reflected(connection))
        except (DatabaseError, NoSuchTableError) as problem:
            raise DataError(f"{path} is not a backup of a ledger ({type(problem).__name__}).") from None
    if sha256 != facts.sha256:
        raise DataError(f"{path} has changed since it was made (hash {sha256[:16]}, not {facts.sha256[:16]}).")
    return Backup(facts.revision, facts.place, facts.made_at, sha256, rows)


@contextmanager
def opened(path: Path) -> Iterator[Connection]:
    """Open a backup for reading.

    Raises:
        DataError: there is none.
    """
    if not path.is_file():
        raise DataError(f"There is no backup {path}.")
    engine = database.connect(database.address(path), ("query_only=ON",))
    try:
        with database.reading(engine).connect() as connection:
            yield connection
    finally:
        engine.dispose()


def fill(source: Connection, target: Connection) -> str:
    """Write all rows of a backup, or of a ledger, into empty tables of the same revision, and give their hash."""
    tables = _reflected(source)
    named = {table.name: table for table in tables}
    for into in _reflected(target):  # which knows what must be there before what
        table = named[into.name]
        for rows in source.execute(select(table).execution_options(yield_per=_ROWS)).mappings().partitions(_ROWS):
            target.execute(insert(into), [dict(row) for row in rows])
    return digest(source, tables)[0]


def digest(connection: Connection, tables: list[Table] | None = None) -> tuple[str, dict[str, int]]:
    """Give the sha256 of all rows of a ledger, the same in every kind of database, and their number by table."""
    known, counts = hashlib.sha256(), dict[str, int]()
    for table in sorted(tables or _reflected(connection), key=lambda table: table.name):
        known.update(f"{table.name}\n".encode())
        counts[table.name] = 0
        for row in connection.execute(_in_order(table, connection)).mappings():
            known.update(json.dumps(dict(row), sort_keys=True, default=bytes.hex).encode())
            counts[table.name] += 1
    return known.hexdigest(), counts


def _copy(source: Connection, aside: Path, path: Path, place: str) -> str:
    aside.unlink(missing_ok=True)  # of a try before
    database.only_for_its_owner(aside)
    # What fails is dropped whole, so it needs no journal in a file of its own.
    engine = database.connect(database.address(aside), ("journal_mode=MEMORY", "synchronous=FULL"))

    @event.listens_for(engine, "handle_error")
    def _told(context: ExceptionContext) -> None:
        # Else it would look like an error of the ledger, which is tried again.
        problem = context.original_exception
        raise ConfigError(
            f"{path} can't be written ({problem}); make room on its disk or take another file. The ledger is as it was."
        ) from problem

    try:
        with engine.begin() as target:
            _plain(_reflected(source)).create_all(target)
            sha256 = fill(source, target)
            revision = str(source.scalar(text("SELECT version_num FROM alembic_version")))
            made_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            _FACTS.create(target)
            target.execute(insert(_FACTS).values(revision=revision, place=place, made_at=made_at, sha256=sha256))
    finally:
        engine.dispose()
    return sha256


def _reflected(connection: Connection) -> list[Table]:
    """The tables as they are there, whatever their revision, in an order in which they can be filled."""
    metadata = MetaData()
    metadata.reflect(connection)
    return [table for table in metadata.sorted_tables if table.name not in _LEFT_OUT]


def _plain(tables: list[Table]) -> MetaData:
    """The same columns and keys in SQLite's terms."""
    metadata = MetaData()
    for table in tables:
        columns = [Column(each.name, _plain_type(each), primary_key=each.primary_key, nullable=each.nullable)
                   for each in table.columns]  # fmt: skip
        Table(table.name, metadata, *columns)
    return metadata


def _plain_type(column: Column[Any]) -> Any:
    generic = column.type.as_generic()
    return Integer() if isinstance(generic, BigInteger) else generic


def _in_order(table: Table, connection: Connection) -> Any:
    """All rows by their key, as bytes: every database has an order of its own for letters."""
    binary = "C" if connection.dialect.name == "postgresql" else "BINARY"
    key = [each.collate(binary) if isinstance(each.type, String) else each for each in table.primary_key]
    return select(table).order_by(*key).execution_options(yield_per=_ROWS)

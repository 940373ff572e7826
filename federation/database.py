"""Databases that must not lose what they were told: SQLite files and PostgreSQL servers, by SQLAlchemy's URL.

A transaction is on the disk when its commit returns, and writers of SQLite wait for one another from their beginning,
so that what a transaction has read still holds when it writes. One that only reads (`reading`) sees one state of the
database and waits for nobody, where SQLite keeps a write-ahead log.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError

from tokenizer.errors import ConfigError

_READS = "fedcomet_reads"

# A network that swallows packets is noticed in half a minute, not in hours.
_PATIENCE = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,
}


def address(place: Path | str) -> URL:
    """Give the URL of a database.

    Args:
        place: a SQLite file, or a URL.

    Raises:
        ConfigError: it looks like a URL and is none.
    """
    if not isinstance(place, str) or "://" not in place:
        return URL.create("sqlite", database=str(place))
    try:
        url = make_url(place)
    except (ArgumentError, ValueError):
        # Without what it says: there may be a password in it.
        raise ConfigError(
            "The database URL can't be read. It looks like postgresql+psycopg://user@host:5432/database or "
            "sqlite:////path/to/file.db, with special characters in user and password as %40 and the like."
        ) from None
    return url.set(drivername="postgresql+psycopg") if url.drivername in ("postgresql", "postgres") else url


def is_file(url: URL) -> bool:
    """Tell whether a database is a SQLite file."""
    return url.get_backend_name() == "sqlite" and bool(url.database)


def told(url: URL) -> str:
    """Name a database for people: its file, or its URL without the password."""
    return str(url.database) if is_file(url) else url.render_as_string(hide_password=True)


def only_for_its_owner(path: Path) -> None:
    """Make an empty file that nobody else can read, where there is none: it becomes a SQLite database."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))


def connect(url: URL, pragmas: Sequence[str] = (), wait_s: float = 600.0) -> Engine:
    """Give the engine of a database; nothing is opened yet.

    Args:
        url: see `address`.
        pragmas: SQLite's settings of each connection, such as "synchronous=FULL".
        wait_s: how long SQLite waits for another writer.

    Raises:
        ConfigError: there is no driver for this database.
    """
    sqlite = url.get_backend_name() == "sqlite"
    options: dict[str, Any] = {"timeout": wait_s} if sqlite else {}
    if url.get_driver_name() == "psycopg":
        options = {key: value for key, value in _PATIENCE.items() if key not in url.query}
    try:
        engine = create_engine(url, connect_args=options, pool_pre_ping=not sqlite)
    except ModuleNotFoundError as problem:
        hint = "pip install 'fedcomet[postgres]'" if url.get_backend_name() == "postgresql" else "install it"
        raise ConfigError(f"{told(url)}: the driver {problem.name} is missing; {hint}.") from None
    except ArgumentError:
        raise ConfigError(f"{told(url)}: SQLAlchemy knows no database of this kind.") from None
    if sqlite:
        _sqlite(engine, pragmas)
    elif engine.dialect.name == "postgresql":
        event.listen(engine, "begin", _begin_postgresql)
    return engine


def reading(engine: Engine) -> Engine:
    """Give the same engine for transactions that only read."""
    return engine.execution_options(**{_READS: True})


def _reads(connection: Connection) -> bool:
    return bool(connection.get_execution_options().get(_READS))


def _sqlite(engine: Engine, pragmas: Sequence[str]) -> None:
    @event.listens_for(engine, "connect")
    def _durable(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver's own transactions would begin too late
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN" if _reads(connection) else "BEGIN IMMEDIATE")


def _begin_postgresql(connection: Connection) -> None:
    if _reads(connection):
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
    else:
        connection.exec_driver_sql("SET LOCAL synchronous_commit TO on")

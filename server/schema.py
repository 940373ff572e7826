"""The ledger's tables at the right revision: made where there are none, migrated where they are older.

A ledger of an older revision is copied to a file before it is migrated, in one transaction; one that is newer than the
software is refused. Migrations are alembic's (`server/migrations`); alembic is only loaded where one is due.
"""

import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session

from federation import database
from server import backup
from server.tables import REVISION, Base
from server.transactions import PATIENCE_S, Transactions, said
from tokenizer.errors import ConfigError, DataError

MIGRATIONS = Path(__file__).parent / "migrations"

_PRAGMAS = ("journal_mode=WAL", "synchronous=FULL")
_KEYS = "foreign_keys=ON"  # but not where tables are rebuilt


def open_ledger(
    place: Path | str,
    *,
    backups: Path | None = None,
    begin: bool = True,
    patience_s: float = PATIENCE_S,
    pause: Callable[[float], None] = time.sleep,
) -> Transactions:
    """Open a ledger's database.

    Args:
        place: a SQLite file, or a database's SQLAlchemy URL.
        backups: the folder for the copy that is made before a migration; that of the file, if it is one.
        begin: begin a ledger where there is none.
        patience_s: how long to try again while the database can't be reached.
        pause: waits some seconds between two tries; what it raises ends them.

    Raises:
        ConfigError: not a URL, or no driver for it.
        DataError: there is no ledger and `begin` is false; it is none, or newer than this software.
        LedgerUnreachable: the database stayed away.
    """
    url = database.address(place)
    told = database.told(url)
    if database.is_file(url):
        if not begin and not Path(told).exists():
            raise DataError(f"There is no ledger at {told}; begin a federation with fedcomet coordinator init.")
        database.only_for_its_owner(Path(told))
        backups = backups or Path(told).parent
    ledger = Transactions(database.connect(url, (*_PRAGMAS, _KEYS), wait_s=60.0), told, patience_s, pause=pause)
    try:
        _at_revision(ledger, backups, begin)
    except DatabaseError as cause:
        ledger.close()
        raise DataError(f"{told} is not a ledger of fedcomet, or can't be used ({said(cause)}).") from None
    except BaseException:
        ledger.close()
        raise
    return ledger


def revision_of(connection: Connection) -> str | None:
    """Give the revision of a database's tables, None where there are no tables.

    Raises:
        DataError: there are tables, but not a ledger's.
    """
    names = set(inspect(connection).get_table_names())
    if not names:
        return None
    if "alembic_version" in names and "lease" in names:
        return connection.scalar(text("SELECT version_num FROM alembic_version"))
    if "run" in names and any(each["name"] == "schema_version" for each in inspect(connection).get_columns("run")):
        raise DataError(
            "It is the ledger of one run, made by fedcomet before ledgers held whole federations, and is not read any "
            "more. End that run with the software that began it, or begin anew in another folder."
        )
    if "backup" in names:
        raise DataError("It is a backup, not a ledger; put it back with fedcomet coordinator restore.")
    raise DataError("It holds tables that are not a ledger's; take another database.")


def at(path: Path, revision: str, whose: str) -> Transactions:
    """Begin a ledger file of an older revision, which is not tried again: nobody else uses it.

    Raises:
        DataError: this software doesn't know the revision; the message names `whose` it is.
        LedgerUnreachable: the file can't be written.
    """
    _refuse_unknown(revision, whose)
    aside = Transactions(database.connect(database.address(path), _PRAGMAS), str(path), patience_s=0.0)
    migrate(aside, revision)
    return aside


def migrate(ledger: Transactions, revision: str = "head") -> None:
    """Bring tables to a revision, in one transaction."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    # SQLite lets tables be rebuilt only where it does not check references.
    engine = database.connect(ledger.engine.url, _PRAGMAS)
    aside = Transactions(engine, ledger.place, ledger.patience_s, pause=ledger.pause)

    def work(session: Session) -> None:
        config.attributes["connection"] = session.connection()
        command.upgrade(config, revision)

    try:
        aside.write(work)
    finally:
        aside.close()


def _at_revision(ledger: Transactions, backups: Path | None, begin: bool) -> None:
    found = ledger.read(lambda session: _revision(ledger, session.connection()))
    if found == REVISION:
        return
    if found is None:
        if not begin:
            raise DataError(f"There is no ledger in {ledger.place}; begin one with fedcomet coordinator init.")
        ledger.write(lambda session: _make(session.connection()))
        return
    _refuse_unknown(found, ledger.place)
    if backups is None:
        raise ConfigError(
            f"{ledger.place} is of revision {found} and must be migrated to {REVISION}: fedcomet coordinator status "
            "with the coordinator's home does that, and copies it first."
        )
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    backup.save(ledger, backups / f"ledger-before-{REVISION}-{stamp}.backup")
    migrate(ledger)


def _refuse_unknown(revision: str, whose: str) -> None:
    from alembic.script import ScriptDirectory

    if revision not in {each.revision for each in ScriptDirectory(str(MIGRATIONS)).walk_revisions()}:
        raise DataError(
            f"{whose} is of revision {revision}, which this software does not know (it knows {REVISION}): it was "
            "written by a newer fedcomet. Update this one."
        )


def _revision(ledger: Transactions, connection: Connection) -> str | None:
    try:
        return revision_of(connection)
    except DataError as problem:
        raise DataError(f"{ledger.place}: {problem}") from None


def _make(connection: Connection) -> None:
    """Make the tables, unless another process has made them meanwhile."""
    if revision_of(connection) is not None:
        return
    Base.metadata.create_all(connection)
    connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"))
    connection.execute(text("INSERT INTO alembic_version VALUES (:revision)"), {"revision": REVISION})

"""A ledger put back from a backup: all of it or nothing, verified before it counts.

Whoever led with the ledger before can't write to it any more: what they know is of another one.
"""

import tempfile
from pathlib import Path

from sqlalchemy import Connection, delete, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from server import backup, lease, schema
from server.backup import Backup
from server.tables import REVISION, Base, Lease
from server.transactions import LedgerUnreachable, Transactions, note, said
from tokenizer.errors import ConfigError, DataError


def restore(path: Path, ledger: Transactions, *, replace: bool = False, who: str = "coordinator") -> Backup:
    """Replace all that a ledger holds by what a backup holds.

    Args:
        path: the backup; one of an older revision is migrated on the way.
        ledger: of either kind of database, whichever the backup was taken of.
        replace: also where the ledger is not empty.
        who: does this.

    Raises:
        ConfigError: the ledger is not empty, and `replace` is false; or there is no room to migrate the backup.
        LeaseTaken: a coordinator is leading with it.
        DataError: the file is no backup, has changed, or is of a newer revision.
    """
    found = backup.check(path)
    with tempfile.TemporaryDirectory(prefix="fedcomet-") as folder:
        source = path
        if found.revision != REVISION:
            source = _migrated(path, found, Path(folder))
        with backup.opened(source) as rows:
            ledger.write(lambda session: _replace(ledger, session, rows, found, replace, who))
    return found


def _replace(ledger: Transactions, session: Session, rows: Connection, found: Backup, replace: bool, who: str) -> None:
    leading = lease.living(ledger, session)
    if leading is not None:
        raise lease.LeaseTaken(
            f"A coordinator ({leading.host}, process {leading.pid}) leads with {ledger.place}; stop it first."
        )
    tables = [table for table in Base.metadata.sorted_tables if table.name != Lease.__tablename__]
    held = [table.name for table in tables if session.scalar(select(func.count()).select_from(table))]
    if held and not replace:
        raise ConfigError(f"{ledger.place} is not empty (it holds {', '.join(held)}); --yes replaces all of it.")
    for table in reversed(tables):
        session.execute(delete(table))
    connection = session.connection()
    if backup.fill(rows, connection) != backup.digest(connection)[0]:
        raise DataError(f"{ledger.place} did not take the rows as they are; nothing was changed in it.")
    if connection.dialect.name == "postgresql":
        _number_on(connection)
    lease.void(ledger, session)
    note(session, who, "ledger.restored", told=f"backup of {found.place}, {found.made_at}, sha256 {found.sha256}")


def _number_on(connection: Connection) -> None:
    """Let PostgreSQL number new rows after those that have come with their numbers."""
    for table in Base.metadata.sorted_tables:
        column = table.autoincrement_column
        if column is not None and table.name != Lease.__tablename__:
            name = f"'{table.name}', '{column.name}'"
            most = f'SELECT max({column.name}) FROM "{table.name}"'
            connection.execute(text(f"SELECT setval(pg_get_serial_sequence({name}), coalesce(({most}), 0) + 1, false)"))


def _migrated(path: Path, found: Backup, folder: Path) -> Path:
    """Give a backup of the newest revision with what an older one holds."""
    try:
        aside = schema.at(folder / "old.sqlite", found.revision, f"The backup {path}")
        try:
            with backup.opened(path) as rows:
                aside.write(lambda session: backup.fill(rows, session.connection()))
            schema.migrate(aside)
            backup.save(aside, folder / "new.backup")
        finally:
            aside.close()
    except LedgerUnreachable as problem:
        why = said(problem.__context__) if isinstance(problem.__context__, DBAPIError) else str(problem)
        raise ConfigError(
            f"{path} is of an older revision and can't be migrated in {folder.parent} ({why}); make room there, or "
            "name another folder in TMPDIR. The ledger is as it was."
        ) from problem
    return folder / "new.backup"

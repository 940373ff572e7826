"""Migrations lead to the tables that the software knows; older ledgers are copied first, newer ones refused."""

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from server import backup, restore, schema
from server.ledger import Ledger
from server.tables import REVISION, Base
from server.transactions import Transactions
from tests.server.test_backup import filled
from tokenizer.errors import ConfigError, DataError

SECOND = """
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "0003", "0002", None, None


def upgrade():
    with op.batch_alter_table("site") as batch:
        batch.add_column(sa.Column("note", sa.String(), nullable=False, server_default="none yet"))
    {more}
"""


@pytest.fixture
def second(ram_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets the software be of a further revision, which adds a column."""

    def update(more: str = "") -> None:
        folder = ram_path / "migrations"
        shutil.copytree(schema.MIGRATIONS, folder)
        (folder / "versions/0003_note.py").write_text(SECOND.format(more=more))
        monkeypatch.setattr(schema, "MIGRATIONS", folder)
        for module in (schema, restore):
            monkeypatch.setattr(module, "REVISION", "0003")

    return update


def notes(transactions: Transactions) -> list[str]:
    return list(transactions.read(lambda session: session.scalars(text("SELECT note FROM site")).all()))


def test_the_newest_migration_is_the_revision_of_the_tables() -> None:
    assert ScriptDirectory(str(schema.MIGRATIONS)).get_heads() == [REVISION]


def test_migrations_make_the_tables_that_the_software_knows(place: str, ram_path: Path) -> None:
    ledger = Transactions(schema.database.connect(schema.database.address(place)), place)
    schema.migrate(ledger)
    with ledger.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
        assert schema.revision_of(connection) == REVISION
    ledger.close()
    with Ledger.open(place) as opened:  # as it is, without a backup
        assert opened.runs() == []
    assert not list(ram_path.glob("*.backup"))


def test_an_older_ledger_is_copied_and_migrated(
    place: str, opened: Callable[[], Ledger], ram_path: Path, second: Callable[..., None]
) -> None:
    rows = filled(opened())
    second()
    with pytest.raises(ConfigError, match="must be migrated") if place.startswith("postgres") else nullcontext():
        Ledger.open(place).close()
    with Ledger.open(place, backups=ram_path) as ledger:
        assert notes(ledger.transactions) == ["none yet"] * 2
        assert ledger.journal("icu").committed() == 1
        assert ledger.note("somebody", "goes on") > 0
    (copy,) = ram_path.glob("ledger-before-0003-*.backup")
    found = backup.check(copy)
    assert (found.revision, found.rows) == ("0002", rows)
    # And what an older software has backed up is migrated on its way back.
    schema.at(ram_path / "other.sqlite", "0003", "the other").close()
    with Ledger.open(ram_path / "other.sqlite") as other:
        restore.restore(copy, other.transactions)
        assert notes(other.transactions) == ["none yet"] * 2
        assert other.journal("icu").committed() == 1


def test_a_backup_that_there_is_no_room_to_migrate_is_said_at_once(
    ram_path: Path, second: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = ram_path / "copy.backup"
    with Ledger.open(ram_path / "ledger.sqlite") as ledger:
        filled(ledger)
        backup.save(ledger.transactions, copy)
    second()
    with Ledger.open(ram_path / "other.sqlite") as other:
        monkeypatch.setattr(schema, "_PRAGMAS", ("max_page_count=9",))
        with pytest.raises(ConfigError, match=r"copy\.backup is of an older .*is full\); make room there.*in TMPDIR"):
            restore.restore(copy, other.transactions)
        assert other.runs() == []


def test_a_migration_that_fails_changes_nothing(ram_path: Path, second: Callable[..., None]) -> None:
    path = ram_path / "ledger.sqlite"
    with Ledger.open(path) as ledger:
        filled(ledger)
    with closing(sqlite3.connect(path)) as connection:
        before = connection.execute("SELECT sql FROM sqlite_master ORDER BY name").fetchall()
    second(more="raise ValueError('in the middle')")
    with pytest.raises(ValueError, match="in the middle"):
        Ledger.open(path)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT sql FROM sqlite_master ORDER BY name").fetchall() == before
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == ("0002",)
    assert list(ram_path.glob("ledger-before-0003-*.backup"))


def test_a_newer_ledger_is_refused(ram_path: Path) -> None:
    path = ram_path / "ledger.sqlite"
    Ledger.open(path).close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '0099'")
    with pytest.raises(DataError, match=r"revision 0099.*written by a newer fedcomet\. Update this one"):
        Ledger.open(path)


def test_what_is_no_ledger_is_refused_and_left_alone(ram_path: Path) -> None:
    path = ram_path / "other.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE patients (id INTEGER)")
    with pytest.raises(DataError, match="tables that are not a ledger's"):
        Ledger.open(path)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("patients",)]
    text_file = ram_path / "text"
    text_file.write_text("no database, but long enough to be looked at\n" * 100)
    with pytest.raises(DataError, match="is not a ledger of fedcomet"):
        Ledger.open(text_file)
    with pytest.raises(DataError, match="There is no ledger at"):
        Ledger.open(ram_path / "none.sqlite", begin=False)
    with pytest.raises(ConfigError, match="can't be read"):
        Ledger.open("postgresql://user:pass@word@:port/x")

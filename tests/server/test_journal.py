import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.journal import Journal, Phase, ReplyEntry, ScoreEntry, SiteEntry, Status
from tests import tiny
from tokenizer.codebook import Codebook, Survey, TokenizerOptions
from tokenizer.errors import DataError

MANIFEST = tiny.plan(tokenizer=TokenizerOptions()).manifest(Codebook.build(Survey(TokenizerOptions())))
OTHER = tiny.plan(tokenizer=TokenizerOptions(), name="other").manifest(Codebook.build(Survey(TokenizerOptions())))


def fill(journal: Journal, seconds: float = 1.0) -> None:
    journal.begin(MANIFEST)
    journal.note_site(SiteEntry("icu", Status.ACCEPTED))
    journal.enter(1, Phase.ANNOUNCED)
    journal.note_reply(ReplyEntry(1, "icu", Status.ACCEPTED, "", "ab", 10, 2, 0.5, 1.5, 40, seconds))
    journal.note_reply(ReplyEntry(1, "ccu", Status.LATE, "no answer"))
    journal.enter(1, Phase.AGGREGATED, "cd")
    journal.note_scores([ScoreEntry(1, "icu", "tuning", Status.ACCEPTED, "", 20.0, 10)], 1)
    journal.enter(1, Phase.COMMITTED)


@pytest.fixture
def journal(ram_path: Path) -> Iterator[Journal]:
    with Journal(ram_path / "ledger.sqlite") as journal:
        yield journal


def test_what_was_noted_is_there_after_reopening(ram_path: Path) -> None:
    with Journal(ram_path / "ledger.sqlite") as journal:
        fill(journal)
        kept = journal.fingerprint()
    with Journal(ram_path / "ledger.sqlite") as journal:
        assert journal.fingerprint() == kept
        assert journal.manifest() == MANIFEST
        assert journal.committed() == 1
        entry = journal.round(1)
        assert entry is not None
        assert (entry.phase, entry.checkpoint_sha256) == (Phase.COMMITTED, "cd")
        assert [reply.site for reply in journal.replies(1)] == ["ccu", "icu"]
        assert journal.losses("tuning") == {1: 2.0}


def test_the_fingerprint_knows_content_and_not_the_clock(ram_path: Path) -> None:
    fingerprints = []
    for place, seconds in (("a", 1.0), ("b", 2.0)):
        with Journal(ram_path / place / "ledger.sqlite") as journal:
            fill(journal, seconds)
            fingerprints.append(journal.fingerprint())
            journal.note_reply(ReplyEntry(1, "icu", Status.ACCEPTED, "", "ab", 11, 2, 0.5, 1.5, 40, seconds))
            fingerprints.append(journal.fingerprint())
    assert fingerprints[0] == fingerprints[2]
    assert fingerprints[0] != fingerprints[1]


def test_a_ledger_belongs_to_one_run(journal: Journal) -> None:
    journal.begin(MANIFEST)
    journal.begin(MANIFEST)
    with pytest.raises(DataError, match="is the ledger of run"):
        journal.begin(OTHER)


def test_reopening_a_round_keeps_only_what_was_accepted(journal: Journal) -> None:
    fill(journal)
    journal.reopen(1)
    assert [reply.site for reply in journal.replies(1)] == ["icu"]


def test_a_ledger_of_another_version_is_refused(ram_path: Path) -> None:
    path = ram_path / "ledger.sqlite"
    with Journal(path) as journal:
        journal.begin(MANIFEST)
    connection = sqlite3.connect(path)
    connection.execute("UPDATE run SET schema_version = 99")
    connection.commit()
    connection.close()
    with pytest.raises(DataError, match="tables of version 99"):
        Journal(path)


def test_every_commit_is_flushed_to_the_disk(journal: Journal) -> None:
    with journal._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2

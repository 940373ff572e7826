import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from federation import canonical
from server.journal import Checkpoint, Journal, Phase, ReplyEntry, ScoreEntry, SiteEntry, Status
from server.ledger import Ledger
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
    journal.enter(1, Phase.AGGREGATED, Checkpoint("checkpoints/0001", "cd", 7), {"train.loss": 0.5})
    journal.note_scores([ScoreEntry(1, "icu", "tuning", Status.ACCEPTED, "", 20.0, 10)], 1, {"tuning.loss": 2.0})
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


def test_the_ledger_of_a_run_made_before_ledgers_held_federations_is_refused(ram_path: Path) -> None:
    path = ram_path / "ledger.sqlite"
    with closing(sqlite3.connect(path)) as old, old:
        old.execute("CREATE TABLE run (id INTEGER PRIMARY KEY, schema_version INTEGER)")
    with pytest.raises(DataError, match=r"ledger\.sqlite: It is the ledger of one run.*End that run with the software"):
        Journal(path)


def test_every_commit_is_flushed_to_the_disk(journal: Journal) -> None:
    with journal._ledger.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2


def test_the_fingerprint_is_that_of_the_first_ledgers(journal: Journal) -> None:
    """In the form of tables of version 2, when every run had a file of its own."""
    fill(journal)
    empty: dict[str, object] = {"reason": "", "update_sha256": "", "tokens": 0, "steps": 0, "loss": 0.0, "norm": 0.0}
    icu = {"update_sha256": "ab", "tokens": 10, "steps": 2, "loss": 0.5, "norm": 1.5, "bytes": 40}
    rows: dict[str, list[dict[str, object]]] = {
        "reply": [
            {**empty, "round": 1, "site": "ccu", "status": "late", "reason": "no answer", "bytes": 0},
            {**empty, "round": 1, "site": "icu", "status": "accepted", **icu},
        ],
        "round": [{"round": 1, "phase": "committed", "checkpoint_sha256": "cd"}],
        "run": [{"id": 1, "schema_version": 2, "manifest_hash": MANIFEST.hash, "manifest": MANIFEST.to_bytes().hex()}],
        "score": [{"round": 1, "site": "icu", "split": "tuning", "status": "accepted", "reason": "", "nll": 20.0,
                   "tokens": 10}],
        "site": [{"site": "icu", "status": "accepted", "reason": "", "counts": ""}],
        "sum": [],
    }  # fmt: skip
    told = b"".join(name.encode() + b"".join(map(canonical.encode, rows[name])) for name in rows)
    assert journal.fingerprint() == hashlib.sha256(told).hexdigest()


def test_two_runs_in_one_ledger_have_the_fingerprints_of_runs_alone(journal: Journal, ram_path: Path) -> None:
    fill(journal)
    with Ledger.open(ram_path / "federation.sqlite") as ledger:
        for name in ("first", "second"):
            fill(ledger.journal(name))
            assert ledger.journal(name).fingerprint() == journal.fingerprint()
        ledger.journal("second").note_site(SiteEntry("ccu", Status.REFUSED, "no"))
        assert ledger.journal("second").fingerprint() != journal.fingerprint()
        assert ledger.journal("first").fingerprint() == journal.fingerprint()


def test_what_changes_is_told_as_events_figures_and_refusals(ram_path: Path) -> None:
    with Ledger.open(ram_path / "federation.sqlite") as ledger:
        fill(ledger.journal("icu"))
        assert [event.what for event in ledger.events(run="icu")] == [
            *("run.proposed", "run.begun", "site.accepted", "round.announced", "update.accepted", "update.late"),
            *("round.aggregated", "round.evaluated", "round.committed"),
        ]
        (refusal,) = ledger.refusals("icu")
        assert (refusal.round, refusal.site, refusal.what, refusal.reason) == (1, "ccu", "train", "late: no answer")
        assert [(each.round, each.path, each.sha256, each.bytes) for each in ledger.checkpoints("icu")] == [
            (1, "checkpoints/0001", "cd", 7)
        ]
        figures = {each.name: each.value for each in ledger.metrics("icu")}
        assert figures["train.loss"] == 0.5
        assert {name for name in figures if name.startswith("seconds.")} == {
            "seconds.announced", "seconds.aggregated", "seconds.evaluated"
        }  # fmt: skip

"""What of a run in the ledger must be equal where settings and answers are."""

import hashlib
from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from federation import canonical
from server import tables

# Times, and what follows from fresh keys or from how often something was interrupted.
_NOT_IN_FINGERPRINT = {"run", "changed_at", "received_at", "seconds", "attempt", "collected_sha256"}
# By the names, and in the form, of the first ledgers: fingerprints of runs stay what they were.
_IN_FINGERPRINT = {"reply": tables.Reply, "round": tables.Round, "run": None, "score": tables.Score,
                   "site": tables.Participant, "sum": tables.Sum}  # fmt: skip
_FORM = 2


def fingerprint_of(session: Session, run: tables.Run | None) -> str:
    """Give the sha256 of a run's manifest, sites, rounds, answers, evaluations and masked sums, in hex."""
    digest = hashlib.sha256()
    for name, table in _IN_FINGERPRINT.items():
        digest.update(name.encode())
        if table is not None and run is not None:
            for row in _in_order(session, table, run.id):
                digest.update(canonical.encode(_content(row)))
        elif run is not None and run.manifest:
            whole = {"id": 1, "schema_version": _FORM, "manifest_hash": run.manifest_hash}
            digest.update(canonical.encode({**whole, "manifest": run.manifest.hex()}))
    return digest.hexdigest()


def _in_order(session: Session, table: type[tables.Base], run: int) -> list[Mapping[str, Any]]:
    """A run's rows by their key, in the order of code points whatever the database's is."""
    columns = table.__table__
    rows = session.execute(select(columns).where(columns.c.run == run)).mappings()
    key = [column.name for column in columns.primary_key if column.name != "run"]
    return sorted(({str(k): v for k, v in row.items()} for row in rows), key=lambda row: [row[name] for name in key])


def _content(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in _NOT_IN_FINGERPRINT}

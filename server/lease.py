"""Who leads the federation: of two coordinators on one ledger the second waits or is refused.

The lease is a row with a token that grows with every holder. Its holder renews it while it lives; one that was not
renewed in time, or whose process is gone from this machine, can be taken over. The old holder may not know yet: its
token is out of date, so that the ledger refuses all that it would still write (`server.transactions`).

Source: Gray and Cheriton, "Leases: an efficient fault-tolerant mechanism for distributed file cache consistency",
SOSP 1989; tokens that grow are Kleppmann's "fencing tokens" ("How to do distributed locking", 2016).
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from server import tables
from server.transactions import LeaseLost, LedgerUnreachable, Transactions, note, said
from tokenizer.errors import FedcometError

TTL_S = 30.0
"""How long a lease lasts that is not renewed; it is renewed three times as often."""

_log = logging.getLogger("fedcomet.ledger")


class LeaseTaken(FedcometError):
    """Another coordinator leads this federation; wait for its end, or stop it."""


@dataclass(frozen=True)
class Holder:
    """Who holds the lease; `until` is in seconds since the epoch, by the database's clock."""

    token: int
    host: str
    pid: int
    until: float


def holder(ledger: Transactions) -> Holder | None:
    """Give who leads now, if anybody does."""
    return ledger.read(lambda session: living(ledger, session))


def living(ledger: Transactions, session: Session) -> Holder | None:
    """Give the holder whose lease has not run out, and whose process is not known to be gone."""
    row = session.get(tables.Lease, 1)
    if row is None or not row.holder or row.until <= ledger.now(session) or _gone(row):
        return None
    return Holder(row.token, row.host, row.pid, row.until)


@contextmanager
def lead(
    ledger: Transactions,
    *,
    wait: bool = False,
    ttl_s: float = TTL_S,
    tell: Callable[[str], None] = lambda text: None,
    lost: threading.Event | None = None,
) -> Iterator[int]:
    """Hold the lease; all that this process writes to the ledger is written under it.

    Args:
        ledger: whose writes are under the lease from here on.
        wait: wait for another holder's end instead of being refused.
        ttl_s: how long the lease lasts if this process dies and nobody on its machine sees it.
        tell: told once whom this process waits for.
        lost: set as soon as it is known that another coordinator has taken over, or that the lease isn't renewed.

    Yields:
        The lease's token, for processes that work for this one (`join`).

    Raises:
        LeaseTaken: another coordinator holds it, and `wait` is false.
    """
    waits = False
    while (token := ledger.write(lambda session: _take(ledger, session, ttl_s))) is None:
        other = holder(ledger)
        if other is None:
            continue
        who = f"{other.host}, process {other.pid}"
        if not wait:
            raise LeaseTaken(
                f"Another coordinator ({who}) leads with the ledger {ledger.place}. Stop it first, or start this one "
                "with --wait: it begins when the other one ends."
            )
        if not waits:
            tell(f"waiting for the coordinator on {who}")
        waits = True
        ledger.pause(min(1.0, ttl_s / 3))
    ledger.token = token
    done, lost = threading.Event(), lost or threading.Event()
    renewer = threading.Thread(target=_renew, args=(ledger, token, ttl_s, done, lost), name="ledger-lease", daemon=True)
    renewer.start()
    try:
        yield token
    finally:
        done.set()
        renewer.join()
        try:
            ledger.write(lambda session: _release(session, token))
        except (LeaseLost, LedgerUnreachable, DBAPIError) as problem:
            _log.warning("The lease was not given back: %s", problem)
        ledger.token = None


def join(ledger: Transactions, token: int) -> None:
    """Write under the lease of the process that this one works for.

    Raises:
        LeaseLost: the lease has another holder by now.
    """
    ledger.token = token
    ledger.write(lambda session: None)


def void(ledger: Transactions, session: Session) -> None:
    """Let no holder write any more: the ledger is not the one that it knew."""
    row = _row(session)
    row.token, row.holder, row.until = row.token + 1, "", 0.0


def _take(ledger: Transactions, session: Session, ttl_s: float) -> int | None:
    if living(ledger, session) is not None:
        return None
    row = _row(session)
    before = f"after {row.host}, process {row.pid}, which ended without giving it back" if row.holder else ""
    row.token, row.holder, row.host, row.pid = row.token + 1, _machine(), socket.gethostname(), os.getpid()
    row.until = ledger.now(session) + ttl_s
    note(session, "coordinator", "lease.taken", told=f"{row.host}, process {row.pid} {before}".strip())
    return row.token


def _row(session: Session) -> tables.Lease:
    row = session.get(tables.Lease, 1)
    if row is None:
        row = tables.Lease(id=1, token=0, holder="", host="", pid=0, until=0.0)
        session.add(row)
    return row


def _renew(ledger: Transactions, token: int, ttl_s: float, done: threading.Event, lost: threading.Event) -> None:
    def extend(session: Session) -> None:
        session.get_one(tables.Lease, 1).until = ledger.now(session) + ttl_s

    while not done.wait(ttl_s / 3):
        try:
            ledger.write(extend)
        except LeaseLost as problem:
            _log.error("%s", problem)
            lost.set()
            return
        except LedgerUnreachable:
            continue  # nobody else can take it meanwhile, either
        except DBAPIError as problem:  # such as of a database that only reads until its failover is over
            _log.warning("The lease could not be renewed (%s); trying again.", said(problem))
        except Exception:
            _log.exception("The lease can't be renewed any more.")
            lost.set()
            return


def _release(session: Session, token: int) -> None:
    row = session.get_one(tables.Lease, 1)
    if row.token == token:
        row.holder, row.until = "", 0.0
        note(session, "coordinator", "lease.given_back", told=f"{row.host}, process {row.pid}")


def _gone(row: tables.Lease) -> bool:
    """Tell whether the holder was a process of this machine that has ended."""
    if row.holder != _machine():
        return False
    try:
        os.kill(row.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _machine() -> str:
    """Name what process numbers belong to: this start of this machine, and the container."""
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{start}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{socket.gethostname()}/{time.monotonic_ns()}"

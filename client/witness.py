"""Whether a site's state was put back from an older copy: by what its coordinator has heard of its list of what leaves.

Every health report says how many entries the list has and the sha256 of the last one; the coordinator gives back what
it heard before. A list that doesn't hold that entry has forgotten what left since, and with it the budget, the answers
that were given and the sums that were signed. `HOME/state/restored.json` then keeps every request of a run out, until
the site's people have said what was spent at most (`fedcomet site restored`).

What this finds and what not is in docs/privacy.md.
"""

import hashlib
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from client.budget import Budget, Release
from client.outbound import Head, files, read_head, sha256_at
from federation import canonical
from federation.accountant import Approximate, Mechanisms
from federation.messages import SiteRefusal
from tokenizer import durable
from tokenizer.errors import ConfigError, DataError

_FILE = "restored.json"
_KNOWN = "witness.json"


@dataclass(frozen=True)
class Restored:
    """What is known of a restored state.

    Attributes:
        entries, sha256: where the list was, as the coordinator heard.
        own: how many entries the list has.
        found: when that was seen, ISO 8601.
        epsilon, delta: of the budget, as the site had told it last; None if it never told any.
    """

    entries: int
    sha256: str
    own: int
    found: str
    epsilon: float | None = None
    delta: float | None = None


@dataclass(frozen=True)
class _Known:
    """The last place that the coordinator told; the list holds it, or (`restored`) people accepted that it doesn't."""

    sha256: str = ""
    restored: bool = False


class Witnessed:
    """A site's side; everything is in its state folder."""

    def __init__(self, state: Path) -> None:
        """Take the folder."""
        self._state, self._list = state, state / "outbound"

    def head(self) -> Head:
        """Give where the list is."""
        return read_head(self._list) if files(self._list) else Head()

    def known(self) -> tuple[str, bool]:
        """Give the sha256 of the last place that the coordinator told, and whether people accepted that it is lost."""
        found = self._known()
        return found.sha256, found.restored

    def _known(self) -> _Known:
        path = self._state / _KNOWN
        return canonical.decode(_Known, path.read_bytes(), str(path), DataError) if path.exists() else _Known()

    def restored(self) -> Restored | None:
        """Give what is known if the state was found to be restored, and nobody has said yet what to do."""
        path = self._state / _FILE
        return canonical.decode(Restored, path.read_bytes(), str(path), DataError) if path.exists() else None

    def check(self, entries: int, sha256: str, epsilon: float | None = None, delta: float | None = None) -> bool:
        """Look whether the list holds what the coordinator was told earlier; note it where it doesn't.

        Args:
            entries, sha256: a number of entries, and the sha256 of the last of them; none for 0.
            epsilon, delta: of the budget as it was told last.
        """
        head = self.head()
        if self.restored() is not None:
            return False
        if entries and sha256_at(self._list, head, entries) != sha256:
            moment = datetime.now(UTC).isoformat(timespec="seconds")
            found = Restored(entries, sha256, head.sequence, moment, epsilon, delta)
            durable.write_bytes(self._state / _FILE, canonical.encode(found))
            return False
        if sha256 and self._known() != _Known(sha256):
            durable.write_bytes(self._state / _KNOWN, canonical.encode(_Known(sha256)))
        return True

    def accept(self, budget: Budget, epsilon: float | None) -> float:
        """Go on from the restored state, with the budget charged for what was forgotten; gives what was charged.

        Killed in between, the same call charges nothing twice.

        Args:
            budget: the site's, with its policy's limit, opened here.
            epsilon: the most that may have been spent in all; the limit's if None: more was never let out.

        Raises:
            ConfigError: nothing was found to be restored, or there is neither a limit nor an `epsilon`.
        """
        found, limit = self.restored(), budget.limit
        if found is None:
            raise ConfigError(f"{self._state} was not found to be restored from an older copy; nothing is to be done.")
        if epsilon is None and limit is None:
            raise ConfigError("The policy sets no limit, so nothing bounds what was spent; say it with --epsilon.")
        cost = epsilon if epsilon is not None else limit.epsilon if limit else 0.0
        if not 0 <= cost < float("inf"):
            raise ConfigError(f"What was spent is a number from 0 on, got {cost:g}.")
        if cost:
            delta = limit.delta if limit else found.delta or budget.delta()
            request = hashlib.sha256(canonical.encode(replace(found, found=""))).hexdigest()
            release = Release(found.sha256, 0, "restored", Mechanisms((Approximate(cost, delta),)), request)
            unlimited = Budget(budget._engine, None)  # what was spent was spent, whatever the limit is
            unlimited.reserve(release)
            unlimited.charge(release, b"")
        durable.write_bytes(self._state / _KNOWN, canonical.encode(_Known(found.sha256, restored=True)))
        (self._state / _FILE).unlink()
        durable.sync_directory(self._state)
        return cost


def refuse_restored(name: str, state: Path) -> None:
    """Let nobody ask a site whose state was restored.

    Raises:
        SiteRefusal: it was.
    """
    found = Witnessed(state).restored() if state.exists() else None
    if found is not None:
        raise SiteRefusal(
            f"{name} answers nothing: its state was restored from a copy that is older than what it has sent (its list "
            f"of what left has {found.own:,} entries, and had {found.entries:,}). A person there must look at it: "
            "fedcomet site restored."
        )

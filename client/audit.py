"""Whether the list of what left the site is whole, and what it says: `fedcomet site audit`."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from client.approval import site_key
from client.outbound import FIRST, Entry, Head, alone, behind, lines, read_entry, read_head, without_privacy
from client.policy import UNUSABLE
from federation.identity import Identity, is_public_key
from tokenizer.errors import ConfigError, DataError
from tokenizer.wording import several

_ENROLMENT = "EnrolRequest"


@dataclass(frozen=True)
class Total:
    """How many messages of a kind left, and their bytes."""

    messages: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Audit:
    """What a list says, up to its end or to the first broken entry.

    Attributes:
        entries: entries that fit.
        head: sha256 of the last entry that fits: note it elsewhere, and ask for it later.
        key: the public key that the signatures were checked with.
        broken: the first place that doesn't fit, and why; None if all do.
        since, until: times of the first and the last entry.
        kinds: totals per kind of message.
        runs: totals per run, by manifest hash.
        epsilons: privacy costs as the entries tell them ("ε = 1, δ = 1e-06"), each with its number of releases; the
            same bytes sent again are the same release.
        refusals: reasons of refusals with their number.
        without_privacy: runs whose updates left without differential privacy, by manifest hash.
        without_policy: messages that left while no usable policy was in force; enrolling comes before there is one.
        dropped_bytes: what crashes had left of messages that never left, and was dropped since.
        unfinished_bytes: the same, still behind the end.
    """

    entries: int
    head: str
    key: str
    broken: str | None = None
    since: str | None = None
    until: str | None = None
    kinds: Mapping[str, Total] = field(default_factory=dict)
    runs: Mapping[str, Total] = field(default_factory=dict)
    epsilons: Mapping[str, int] = field(default_factory=dict)
    refusals: Mapping[str, int] = field(default_factory=dict)
    without_privacy: tuple[str, ...] = ()
    without_policy: int = 0
    dropped_bytes: int = 0
    unfinished_bytes: int = 0

    def to_plain(self) -> dict[str, Any]:
        """Give the fields as plain values, for JSON."""
        return asdict(self)


def audit(state: Path, key: str | None = None, expect: str | None = None) -> Audit:
    """Check a site's list from its first entry to its last.

    Args:
        state: the site's state folder.
        key: the public key that must have signed; the site's own if left out.
        expect: sha256 of an entry that was once the last one, and must still be there.

    Raises:
        ConfigError: `key` or `expect` is none.
        DataError: there is no list.
    """
    if key is not None and not is_public_key(key):
        raise ConfigError(f"{key!r} is not a public key; write ed25519: and 64 hexadecimal digits.")
    if expect is not None and (len(expect) != 64 or not set(expect) <= set("0123456789abcdef")):
        raise ConfigError(f"{expect!r} is not the head of a list; it has 64 hexadecimal digits.")
    folder = state / "outbound"
    if not folder.is_dir():
        raise DataError(f"{folder} is missing: nothing has left this site, or {state} is not its state folder.")
    public = key or Identity.at(site_key(state)).public
    entries: list[Entry] = []
    hashes = [FIRST]
    broken, unfinished = None, 0
    try:
        with alone(folder):
            head = read_head(folder)
            for entry, digest in _fitting(folder, head, public):
                entries.append(entry)
                hashes.append(digest)
            unfinished = _check_end(folder, head, hashes)
        if expect is not None and expect not in hashes:
            raise DataError(f"no entry has the sha256 {expect}: the list was written anew since that was noted")
    except DataError as problem:
        broken = str(problem)
    return replace(_summed(entries, hashes[-1], public), broken=broken, unfinished_bytes=unfinished)


def terminal(found: Audit, names: Mapping[str, str]) -> RenderableType:
    """Lay a report out for a console that wraps softly: keys and hashes are copied, so each is on one line.

    Args:
        found: what an audit found.
        names: of runs, by manifest hash.
    """
    span = f"{found.since} to {found.until}" if found.entries else "nothing has left yet"
    whole = "[green]whole: every entry follows the one before it and is signed[/]"
    head = {
        "entries": f"{found.entries:,} ({span})",
        "signed by": found.key,
        "head": found.head,
        "the list is": whole if found.broken is None else f"[red]broken[/] at {found.broken}",
    }
    if found.without_policy:
        told = several(found.without_policy, "message")
        head["without policy"] = f"[yellow]{told} left while none was in force[/]"
    if found.dropped_bytes or found.unfinished_bytes:
        count = found.dropped_bytes + found.unfinished_bytes
        head["crashes"] = f"left {count:,} bytes of entries whose messages never left"
    parts: list[RenderableType] = [f"{name:<14}  {said}" for name, said in head.items()]
    for title, totals in (("message", found.kinds), ("run", found.runs)):
        if totals:
            table = Table(title, "messages", "bytes", title_justify="left")
            for name, total in totals.items():
                shown = f"{names.get(name, '')} {name[:16]}".lstrip() if title == "run" else name
                table.add_row(escape(shown), f"{total.messages:,}", f"{total.bytes:,}")
            parts.append(table)
    if found.epsilons:
        parts.append(_counts("privacy cost to a patient", "releases", found.epsilons))
    if found.refusals:
        parts.append(_counts("refused, because", "times", found.refusals))
    return Group(*parts)


def _fitting(folder: Path, head: Head, public: str) -> Iterator[tuple[Entry, str]]:
    """Walk through the entries with their hashes.

    Raises:
        DataError: at the first one that doesn't fit.
    """
    previous = FIRST
    for number, (place, line) in enumerate(lines(folder, head), 1):
        where = f"entry {number} ({place})"
        entry = read_entry(line, where)
        if entry.sequence != number:
            raise DataError(f"{where}: it has the number {entry.sequence}; entries before it are missing")
        if entry.previous != previous:
            raise DataError(f"{where}: it doesn't follow the entry before it, which was changed or left out")
        if not entry.is_signed_by(public):
            raise DataError(f"{where}: it was changed since it was signed, or is not signed by {public}")
        previous = sha256(line).hexdigest()
        yield entry, previous


def _check_end(folder: Path, head: Head, hashes: list[str]) -> int:
    """See that the list ends where it was noted to, and give how many bytes lie behind.

    Raises:
        DataError: it doesn't.
    """
    if (head.sequence, head.sha256) != (len(hashes) - 1, hashes[-1]):
        raise DataError(f"entry {len(hashes)}: the list ends before it, but {head.sequence} entries were noted")
    tail = behind(folder, head)
    if tail.count(b"\n") > 1:
        raise DataError(f"entry {len(hashes)}: it stands behind the noted end of the list, and another one behind it")
    return len(tail)


def _summed(entries: list[Entry], head: str, public: str) -> Audit:
    kinds: dict[str, list[int]] = defaultdict(list)
    runs: dict[str, list[int]] = defaultdict(list)
    costs: dict[str, set[str]] = defaultdict(set)
    refusals: Counter[str] = Counter()
    for entry in entries:
        message = entry.message
        kinds[message.kind].append(message.bytes)
        if message.run is not None:
            runs[message.run].append(message.bytes)
        if message.epsilon is not None:
            costs[f"ε = {message.epsilon:g}, δ = {message.delta or 0.0:g}"].add(message.sha256)
        if "reason" in message.content:
            refusals[str(message.content["reason"])] += 1
    return Audit(
        entries=len(entries),
        head=head,
        key=public,
        since=entries[0].time if entries else None,
        until=entries[-1].time if entries else None,
        kinds={kind: Total(len(sizes), sum(sizes)) for kind, sizes in sorted(kinds.items())},
        runs={run: Total(len(sizes), sum(sizes)) for run, sizes in sorted(runs.items())},
        epsilons={told: len(releases) for told, releases in sorted(costs.items())},
        refusals=dict(refusals.most_common()),
        without_privacy=tuple(without_privacy(entry.message for entry in entries)),
        without_policy=sum(
            entry.message.policy in (None, UNUSABLE) and entry.message.kind != _ENROLMENT for entry in entries
        ),
        dropped_bytes=sum(entry.dropped_bytes for entry in entries),
    )


def _counts(title: str, unit: str, counts: Mapping[str, int]) -> Table:
    table = Table(title, unit)
    for told, count in counts.items():
        table.add_row(escape(told), f"{count:,}")
    return table

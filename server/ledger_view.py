"""What a coordinator's people see of the ledger: plain values for `--json`, and tables of them for a terminal."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from federation.manifest import Manifest
from federation.page import show_duration
from federation.pki import Role
from server.ledger import Ledger
from server.ledger_entries import BudgetEntry, EventEntry, MemberEntry, RunEntry
from server.overview import condition
from server.tables import RunState, SiteStatus

Plain = dict[str, Any]

_SOON_S = 30 * 86_400  # before a certificate's end
_COLOURS = {
    **dict.fromkeys(("running", "enrolled", "online", "finished"), "green"),
    **dict.fromkeys(("pausing", "stopping", "paused", "invited", "ready", "expires soon"), "yellow"),
    **dict.fromkeys(("failed", "revoked", "expired"), "red"),
}


def status(ledger: Ledger) -> Plain:
    """Give the federation at a glance: who leads, its runs and members, and what needs a person."""
    holder, runs, members = ledger.holder(), runs_of(ledger), sites_of(ledger)
    return {
        "ledger": ledger.transactions.place,
        "leader": None if holder is None else {"host": holder.host, "process": holder.pid},
        "runs": _counted(run["state"] for run in runs),
        "members": _counted(member["status"] for member in members),
        "needs_attention": _attention(runs, members),
    }


def runs_of(ledger: Ledger) -> list[Plain]:
    """Give all runs, in the order in which they were proposed."""
    return [_run(ledger, run) for run in ledger.runs()]


def sites_of(ledger: Ledger) -> list[Plain]:
    """Give all members by name, with the last that each has told of its privacy budget."""
    budgets = {entry.site: entry for entry in ledger.budgets()}
    now = datetime.now(UTC).timestamp()
    return [_member(member, budgets.get(member.name), now) for member in ledger.members.all()]


def event_of(event: EventEntry) -> Plain:
    """Give an event as plain values."""
    return {**vars(event), "at": _iso(event.at)}


def status_table(found: Plain) -> Table:
    """Show `status`."""
    table = Table.grid(padding=(0, 2))
    leader = found["leader"]
    table.add_row("ledger", Text(found["ledger"]))
    table.add_row("leads", Text(f"{leader['host']}, process {leader['process']}" if leader else "nobody"))
    for name in ("runs", "members"):
        table.add_row(name, Text(", ".join(f"{count} {kind}" for kind, count in found[name].items()) or "none"))
    for number, each in enumerate(found["needs_attention"]):
        table.add_row("" if number else "[yellow]look at[/]", Text(each))
    return table


def runs_table(found: Sequence[Plain]) -> Table:
    """Show `runs_of`."""
    table = _table("run", "state", "round", "sites", "loss", "started (UTC)", "reason")
    for run in found:
        loss = run["tuning_loss"]
        table.add_row(
            *(Text(run["name"]), _coloured(run["state"]), f"{run['round']}/{run['rounds'] or '?'}"),
            *(str(run["sites"]), "" if loss is None else f"{loss:.4f}", _short(run["started_at"]), Text(run["reason"])),
        )
    return table


def sites_table(found: Sequence[Plain]) -> Table:
    """Show `sites_of`."""
    table = _table(
        "name", "role", "status", "online", "seen (UTC)", "version", "certificate until", "epsilon", "its limit"
    )
    for site in found:
        state = site["certificate"] if site["certificate"] in ("expired", "expires soon") else site["status"]
        table.add_row(
            *(Text(site["name"]), site["role"], _coloured(state), "[green]yes[/]" if site["online"] else "no"),
            *(_short(site["last_seen"]), Text(site["version"])),
            *(Text((site["expires_at"] or "")[:10]), _figure(site["epsilon"]), _figure(site["limit_epsilon"])),
        )
    return table


def event_line(event: EventEntry) -> str:
    """Give an event as a line; its words may be long, so it is no row of a table."""
    number = "" if event.round is None else f"round {event.round}"
    parts = (_short(_iso(event.at)), event.who, event.what, event.run or "", number, event.site, event.text)
    return "  ".join(part for part in parts if part)


def _run(ledger: Ledger, run: RunEntry) -> Plain:
    journal = ledger.journal(run.name)
    losses = journal.losses("tuning")
    manifest = Manifest.from_bytes(run.manifest) if run.manifest else None
    return {
        "name": run.name,
        "state": str(run.state),
        "reason": run.reason,
        "round": journal.committed(),
        "rounds": None if manifest is None else manifest.rounds,
        "sites": sum(entry.status == "accepted" for entry in journal.sites()),
        "tuning_loss": losses[max(losses)] if losses else None,
        "manifest_hash": run.manifest_hash,
        "created_at": _iso(run.created_at),
        "started_at": _iso(run.started_at),
        "ended_at": _iso(run.ended_at),
        "refusals": len(ledger.refusals(run.name)),
        "approved_since": _approved_since(ledger, run, manifest),
    }


def _approved_since(ledger: Ledger, run: RunEntry, manifest: Manifest | None) -> list[str]:
    """The sites that have approved a failed run since it failed, if those that take part are enough with them."""
    if run.state != RunState.FAILED or manifest is None or run.ended_at is None:
        return []
    since = [each.site for each in ledger.approvals(run.manifest_hash) if each.at > run.ended_at]
    there = {entry.site for entry in ledger.journal(run.name).sites() if entry.status == "accepted"}
    return since if len(there.union(since)) >= manifest.min_sites else []


def _member(member: MemberEntry, budget: BudgetEntry | None, now: float) -> Plain:
    until = member.expires_at
    certificate = "none" if until is None else "good"
    if until is not None and member.status == SiteStatus.ENROLLED and until < now + _SOON_S:
        certificate = "expired" if until <= now else "expires soon"
    return {
        "name": member.name,
        "role": str(member.role),
        "status": str(member.status),
        "online": condition(member, now) == "online",
        "online_state": member.online_state,
        "version": member.version,
        "last_seen": _iso(member.last_seen),
        "certificate": certificate,
        "fingerprint": member.fingerprint,
        "expires_at": _iso(until),
        "epsilon": None if budget is None else budget.epsilon,
        "delta": None if budget is None else budget.delta,
        "limit_epsilon": None if budget is None else budget.limit_epsilon,
    }


def _attention(runs: Sequence[Plain], members: Sequence[Plain]) -> list[str]:
    told = [f"run {run['name']} failed: {run['reason']}" for run in runs if run["state"] == RunState.FAILED]
    told += [
        f"run {run['name']} can go on, as {', '.join(run['approved_since'])} approved it since it failed: "
        f"fedcomet coordinator resume {run['name']}"
        for run in runs
        if run["approved_since"]
    ]
    for member in members:
        if member["role"] == Role.SITE and member["status"] == SiteStatus.ENROLLED and not member["online"]:
            told.append(f"{member['name']} was {_last_seen(member['last_seen'])}")
        if member["certificate"] in ("expired", "expires soon"):
            told.append(f"the certificate of {member['name']} {member['certificate']} ({_short(member['expires_at'])})")
        limit = member["limit_epsilon"]
        if limit is not None and member["epsilon"] >= 0.9 * limit:
            told.append(f"{member['name']} has spent epsilon {member['epsilon']:.3g} of {limit:g}")
    return told


def _last_seen(iso: str | None) -> str:
    if iso is None:
        return "never seen"
    return f"last seen {show_duration((datetime.now(UTC) - datetime.fromisoformat(iso)).total_seconds())} ago"


def _counted(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for head in heads:
        table.add_column(head, overflow="fold")
    return table


def _coloured(state: str) -> Text:
    return Text(state, _COLOURS.get(state, ""))


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _iso(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def _short(iso: str | None) -> str:
    return "" if iso is None else iso[:19].replace("T", " ")

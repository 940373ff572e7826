"""How a site stands, for its own people: `fedcomet site status`; plain values for `--json`, and a table of them.

All of it is read on the spot. Only texts of the coordinator's people have to be asked for over the network, which is on
the list of what leaves as any other question; so they are read only where somebody wants them.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from client.approval import Approvals
from client.budget import FILE, Budget
from client.home import SiteHome
from client.link import Link
from client.outbound import Entry, runs_without_privacy, told_without_privacy
from client.policy import Policy
from client.site_view import last_entries, run_names, troubles
from federation import pki, vitals
from federation.manifest import software_version
from tokenizer.errors import FedcometError

Plain = dict[str, Any]

_PATIENCE_S = 3.0
_ANSWERS, _TROUBLES = 5, 3


def status(home: SiteHome, *, messages: bool = False) -> Plain:
    """Give a site at a glance; a part that can't be read is `{"problem": why}`.

    Args:
        home: the site's.
        messages: also ask the coordinator for the texts of its people.
    """
    where = home.settings.coordinator
    approvals = Approvals(home.state)
    told: Plain = {
        "site": home.name,
        "software": software_version(),
        "coordinator": f"{where.address}:{where.fleet_port}",
        "certificate": _or_problem(lambda: _certificate(home)),
        "daemon": _daemon(home),
        "policy": _or_problem(lambda: _policy(home.policy)),
        "budget": _or_problem(lambda: _budget(home)),
        "without_privacy": _or_problem(lambda: runs_without_privacy(home.state / "outbound")),
        "waiting": approvals.waiting(),
        "refused": approvals.refused(),
        "answers": _or_problem(lambda: _answers(home.state / "outbound")),
        "troubles": [vars(each) for each in troubles(home.path / "logs")[:_TROUBLES]],
    }
    told["names"] = run_names(home.state, [*told["waiting"], *told["refused"], *_runs(told["answers"])])
    if messages:
        told["messages"] = _or_problem(lambda: _messages(home))
    return told


def table(found: Plain) -> Table:
    """Show `status`."""
    shown = Table.grid(padding=(0, 2))
    shown.add_row("site", Text(f"{found['site']}, fedcomet {found['software']}"))
    shown.add_row("coordinator", Text(found["coordinator"]))
    shown.add_row("certificate", _certificate_text(found["certificate"]))
    shown.add_row("daemon", _daemon_text(found["daemon"]))
    shown.add_row("policy", _policy_text(found["policy"]))
    shown.add_row("budget", _budget_text(found["budget"]))
    if told := told_without_privacy(_list(found["without_privacy"])):
        shown.add_row("", Text(told, "yellow"))
    names = found["names"]
    _add(shown, "waits", (_run_to_see(each, names) for each in found["waiting"]))
    if found["refused"]:
        _add(shown, "refused", (_run_to_see(each, names) for each in found["refused"]))
    _add(shown, "answered", _lines(found["answers"], lambda each: _answer_text(each, names)))
    _add(shown, "log", (Text(f"{each['time'][:19]} {each['message']}", "yellow") for each in found["troubles"]))
    if "messages" in found:
        _add(
            shown,
            "messages",
            _lines(found["messages"], lambda each: Text(f"{each['at']} {each['who']}: {each['text']}")),
        )
    return shown


def _certificate(home: SiteHome) -> Plain:
    held = pki.validity(pki.read_certificate(home.certificate), datetime.now(UTC))
    return {
        "until": held.until.isoformat(),
        "days_left": round(held.days_left, 1),
        "warning": held.warning(home.name, "fedcomet site run renews it while it runs"),
    }


def _daemon(home: SiteHome) -> Plain:
    """What the daemon says of itself; that of another site on the same port is none of ours."""
    port = home.settings.daemon.health_port
    _, words = vitals.ask(port, _PATIENCE_S)
    try:
        told = json.loads(words)
    except ValueError:
        return {"running": home.has_daemon, "healthy": False, "reason": words}
    if not isinstance(told, dict) or told.get("site") != home.name:
        return {"running": home.has_daemon, "healthy": False, "reason": f"port {port} is another program's"}
    return {"running": True, **told}


def _policy(path: Path) -> Plain:
    rules = Policy.read(path)
    limit = rules.limit
    return {
        "file": str(path),
        "sha256": rules.sha256,
        "manifests": rules.runs.manifests,
        "private_training": rules.privacy.training,
        "epsilon_total": None if limit is None else limit.epsilon,
        "secure_aggregation": rules.secure_aggregation.required,
        "min_sites": rules.secure_aggregation.min_sites,
    }


def _budget(home: SiteHome) -> Plain | None:
    """What is spent; None where nothing private was ever released."""
    place = home.settings.site.budget or home.state / FILE
    if isinstance(place, Path) and not place.exists():
        return None
    limit = Policy.read(home.policy).limit
    with Budget.open(place, limit, begin=False) as ledger:
        at = ledger.delta(None)
        return {"epsilon": ledger.spent(at), "delta": at, "limit_epsilon": None if limit is None else limit.epsilon}


def _answers(folder: Path) -> list[Plain]:
    if not folder.is_dir():
        return []
    return [_answer(entry) for entry in last_entries(folder, _ANSWERS, but="control")]


def _answer(entry: Entry) -> Plain:
    message = entry.message
    return {
        "at": entry.time,
        "what": message.kind,
        "run": message.run,
        "round": message.round,
        "bytes": message.bytes,
        "reason": str(message.content.get("reason", "")),
    }


def _runs(answers: Any) -> list[str]:
    return [each["run"] for each in _list(answers) if each["run"]]


def _messages(home: SiteHome) -> list[Plain]:
    with Link(home) as link:
        found = link.messages()
    return [
        {"at": datetime.fromtimestamp(each.at, UTC).isoformat(timespec="seconds"), "who": each.who, "text": each.text}
        for each in found[-_ANSWERS:]
    ]


def _or_problem(look: Callable[[], Any]) -> Any:
    try:
        return look()
    except FedcometError as problem:
        return {"problem": str(problem)}
    except OSError as problem:
        return {"problem": f"{problem.filename or 'a file'}: can't be read ({problem.strerror})."}


def _list(found: Any) -> list[Any]:
    """A part that is a list; nothing where it can't be read."""
    return found if isinstance(found, list) else []


def _problem(found: Any) -> Text | None:
    return Text(found["problem"], "red") if isinstance(found, dict) and "problem" in found else None


def _certificate_text(found: Plain) -> Text:
    if problem := _problem(found):
        return problem
    if found["warning"]:
        return Text(found["warning"], "yellow")
    return Text(f"until {found['until'][:10]}, {found['days_left']:.0f} days left")


def _daemon_text(found: Plain) -> Text:
    if not found["running"]:
        return Text(f"not running ({found['reason']}); start it: fedcomet site run", "red")
    if found.get("starting"):
        return Text(f"starting: {found['reason']}")
    if not found["healthy"]:
        return Text(f"running, not well: {found.get('reason', 'no reason given')}", "yellow")
    control = "" if found["control"] == "fine" else f"; control: {found['control']}"
    return Text(f"running, {found['node']}{control}", "green")


def _policy_text(found: Plain) -> Text:
    if problem := _problem(found):
        return problem
    manifests = found["manifests"] if isinstance(found["manifests"], str) else f"{len(found['manifests'])} listed"
    limit = "no limit" if found["epsilon_total"] is None else f"at most epsilon {found['epsilon_total']:g}"
    sums = f"sums of {found['min_sites']} sites or more" if found["secure_aggregation"] else "updates in clear"
    return Text(f"runs: {manifests}; private training {found['private_training']}, {limit}; {sums}")


def _budget_text(found: Plain | None) -> Text:
    if found is None:
        return Text("nothing private was released")
    if problem := _problem(found):
        return problem
    limit = "" if found["limit_epsilon"] is None else f" of {found['limit_epsilon']:g}"
    return Text(f"epsilon {found['epsilon']:.3f}{limit} at delta {found['delta']:g}")


def _run_to_see(run: str, names: Mapping[str, str]) -> Text:
    named = f"{names[run]} ({run[:16]})" if run in names else run[:16]
    return Text(f"{named}  (see it: fedcomet site approve {run[:8]})")


def _answer_text(answer: Plain, names: Mapping[str, str]) -> Text:
    number, run = answer["round"] and f"round {answer['round']}", answer["run"] or ""
    named = f"{names[run]} ({run[:8]})" if run in names else run[:8]
    about = " ".join(filter(None, (answer["what"], named, number)))
    reason = f": {answer['reason']}" if answer["reason"] else ""
    return Text(f"{answer['at'][:19]}  {about}, {answer['bytes']:,} bytes{reason}")


def _lines(found: Any, show: Callable[[Plain], Text]) -> Iterable[Text]:
    if problem := _problem(found):
        return [problem]
    return [show(each) for each in found]


def _add(shown: Table, name: str, lines: Iterable[Text]) -> None:
    for number, line in enumerate([*lines] or [Text("none")]):
        shown.add_row("" if number else name, line)

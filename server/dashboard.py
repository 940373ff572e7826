"""The coordinator's dashboard: `fedcomet coordinator ui HOME`.

It reads the ledger and, on a coordinator's click, writes wishes into it; runs are led elsewhere (`server.daemon`), and
whether this runs or not makes no difference to them. Who may see pages says `server.passwords`: viewers read;
coordinators may also wish, and take models away, which may remember patients. What somebody does here is in the ledger
as done by "dashboard:name".
"""

import csv
import io
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

from starlette.background import BackgroundTask
from starlette.responses import FileResponse, RedirectResponse, Response, StreamingResponse
from starlette.types import ASGIApp

from federation.website import Door, Missing, Visit, Website, hosts
from server import curves, downloads, run_view
from server.curves import Curve
from server.home import CoordinatorHome
from server.ledger import Ledger
from server.ledger_entries import EventEntry, LedgerRefusal
from server.overview import ONLINE_S, overview, run_lines
from server.passwords import Passwords
from server.run_view import RunView
from server.transactions import LedgerUnreachable

T = TypeVar("T")

PATIENCE_S = 5.0
"""How long a page waits for a ledger that is away."""

_LEADERS = frozenset({"coordinator"})
_PER_PAGE, _PER_READ = 100, 1000
_WISHES = {
    "start": "Sites are asked to train as the plan says, once the coordinator's daemon takes it up.",
    "resume": "It goes on at the first round that is not done; answers that were taken stay.",
    "pause": "The open round is still finished; nothing is lost, and the run can be resumed.",
    "stop": "The open round is left as it is after the next answer; the run can still be resumed.",
}
_COLUMNS = ("id", "at", "who", "what", "run", "round", "site", "text")


class Dashboard:
    """The pages of one federation."""

    def __init__(self, home: CoordinatorHome, ledger: Ledger, names: tuple[str, ...] = ()) -> None:
        """Set up.

        Args:
            home: the coordinator's.
            ledger: open; with a short patience, for people wait.
            names: what the page is visited as, beside what coordinator.toml says.
        """
        self._home, self._ledger = home, ledger
        federation, passwords = home.settings.federation, Passwords(home.path)
        door = Door(
            hosts=hosts(federation.address, *federation.also, *names),
            check=passwords.check,
            holds=passwords.holds,
            told=self._note,
        )
        statuses: dict[type[Exception], int] = {LedgerUnreachable: 503}
        self._site = Website(federation.name, Path(__file__).parent / "templates", door, statuses)
        self._site.navigate(("/", "Federation"), ("/runs", "Runs"), ("/events", "Audit trail"))
        self._add_pages()

    def app(self) -> ASGIApp:
        """Give the application."""
        return self._site.app()

    def _add_pages(self) -> None:
        site = self._site
        site.get("/", self._federation)
        site.live("/live", lambda _: self._latest())
        site.get("/runs", self._runs)
        site.get("/runs/{run}", self._run)
        site.live("/runs/{run}/live", lambda visit: self._latest(visit.path["run"]))
        site.get("/runs/{run}/checkpoints/{number:int}.safetensors", self._download, _LEADERS)
        site.get("/runs/{run}/checkpoints/{number:int}.zip", self._export, _LEADERS)
        site.get("/events", self._events)
        site.get("/events.csv", self._events_as_csv)
        site.get("/runs/{run}/{wish}", self._ask, _LEADERS)
        site.post("/runs/{run}/{wish}", self._wish, _LEADERS)

    # --- pages ---

    def _federation(self, visit: Visit) -> Response:
        now, latest = time.time(), self._latest()
        found = overview(self._ledger, self._home, now)
        return self._site.render(
            "federation.html.j2", visit, here="/", found=found, now=now, online_s=ONLINE_S, latest=latest
        )

    def _runs(self, visit: Visit) -> Response:
        latest = self._latest()
        return self._site.render("runs.html.j2", visit, here="/runs", runs=run_lines(self._ledger), latest=latest)

    def _run(self, visit: Visit) -> Response:
        name = visit.path["run"]
        latest = self._latest(name)
        found = self._known(lambda: run_view.look(self._ledger, name))
        there = {each.round for each in found.checkpoints if downloads.is_there(self._home.runs, name, each.path)}
        values: dict[str, Any] = {
            "found": found,
            "pictures": _pictures(found),
            "there": there,
            "latest": latest,
            "now": time.time(),
        }
        values["kinds"] = curves.kinds(list(found.by_site))
        values["leads"] = self._ledger.holder() is not None
        return self._site.render("run.html.j2", visit, here="/runs", **values)

    def _ask(self, visit: Visit) -> Response:
        """Ask whether a wish is meant."""
        run, wish = self._open_wish(visit)
        return self._site.render("wish.html.j2", visit, here="/runs", run=run, wish=wish, told=_WISHES[wish])

    def _wish(self, visit: Visit) -> Response:
        run, wish = self._open_wish(visit)
        do: dict[str, Callable[[str, str], object]] = {
            "start": self._ledger.start,
            "resume": self._ledger.start,
            "pause": self._ledger.pause,
            "stop": self._ledger.stop,
        }
        do[wish](run, _who(visit))
        return RedirectResponse(f"/runs/{quote(run, safe='')}", 303)

    def _open_wish(self, visit: Visit) -> tuple[str, str]:
        """The run and the wish that an address names; the ledger itself says whether the wish fits."""
        run, wish = visit.path["run"], visit.path["wish"]
        if wish not in _WISHES:
            raise Missing("There is no such page.")
        return self._known(lambda: self._ledger.run(run)).name, wish

    # --- what can be taken away ---

    def _download(self, visit: Visit) -> Response:
        run, number = visit.path["run"], int(visit.path["number"])
        path = self._known(lambda: downloads.checkpoint_file(self._ledger, self._home.runs, run, number))
        sha256 = next(each.sha256 for each in self._ledger.checkpoints(run) if each.round == number)
        self._ledger.note(_who(visit), "checkpoint.downloaded", run=run, number=number, told=sha256)
        headers = {"Repr-Digest": f"sha-256=:{b64encode(bytes.fromhex(sha256)).decode()}:"}
        return FileResponse(path, filename=f"{run}-{path.name}", media_type="application/octet-stream", headers=headers)

    def _export(self, visit: Visit) -> Response:
        run, number = visit.path["run"], int(visit.path["number"])
        path = self._known(lambda: downloads.checkpoint_file(self._ledger, self._home.runs, run, number))
        file = downloads.exported(path, self._home.runs / run / "codebook.json", self._home.path)
        self._ledger.note(_who(visit), "checkpoint.exported", run=run, number=number)
        headers = {
            "Content-Disposition": f'attachment; filename="{run}-{path.stem}.zip"',
            "Content-Length": str(file.seek(0, io.SEEK_END)),
        }
        return StreamingResponse(
            downloads.pieces(file), media_type="application/zip", headers=headers, background=BackgroundTask(file.close)
        )

    # --- who did what ---

    def _events(self, visit: Visit) -> Response:
        asked = _filter(visit)
        before = visit.query.get("before", "")
        newest = self._some(asked, before=int(before) if before.isdecimal() and len(before) < 19 else None)
        older = urlencode({**asked, "before": newest[0].id}) if len(newest) == _PER_PAGE else ""
        values: dict[str, Any] = {"events": newest[::-1], "asked": asked, "older": older, "query": urlencode(asked)}
        return self._site.render("events.html.j2", visit, here="/events", first=not before, **values)

    def _events_as_csv(self, visit: Visit) -> Response:
        headers = {"Content-Disposition": 'attachment; filename="events.csv"'}
        asked = _filter(visit)
        return StreamingResponse(_csv(lambda after: self._more(asked, after)), media_type="text/csv", headers=headers)

    def _some(self, asked: dict[str, str], before: int | None) -> list[EventEntry]:
        run, site, what = (asked.get(name) for name in ("run", "site", "what"))
        return self._ledger.events(run=run, site=site, what=what or "", before=before, limit=_PER_PAGE, newest=True)

    def _more(self, asked: dict[str, str], after: int) -> list[EventEntry]:
        run, site, what = (asked.get(name) for name in ("run", "site", "what"))
        return self._ledger.events(after, run=run, site=site, what=what or "", limit=_PER_READ)

    def _latest(self, run: str | None = None) -> str:
        """What changes when a page should be anew: the last event's number, and the minute, as sites fall silent."""
        found = self._ledger.events(run=run, limit=1, newest=True)
        return f"{found[-1].id if found else 0}.{int(time.time() // 60)}"

    def _note(self, what: str, name: str, address: str) -> None:
        self._ledger.note(f"dashboard:{name}" if name else "dashboard", f"dashboard.{what}", told=f"from {address}")

    def _known(self, find: Callable[[], T]) -> T:
        try:
            return find()
        except LedgerRefusal:
            raise Missing("The ledger has no run of this name.") from None


def _who(visit: Visit) -> str:
    return f"dashboard:{visit.person.name}"


def _filter(visit: Visit) -> dict[str, str]:
    return {name: value for name in ("run", "site", "what") if (value := visit.query.get(name, "").strip()[:200])}


def _csv(more: Callable[[int], list[EventEntry]]) -> Iterator[str]:
    """Write events as CSV, a thousand at a time; texts that a spreadsheet would take for formulas get a quote mark."""
    yield ",".join(_COLUMNS) + "\r\n"
    after = 0
    while found := more(after):
        after = found[-1].id
        lines = io.StringIO()
        csv.writer(lines).writerows([_cell(getattr(each, name)) for name in _COLUMNS] for each in found)
        yield lines.getvalue()


def _cell(value: object) -> object:
    dangerous = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if dangerous else value


def _pictures(found: RunView) -> dict[str, object]:
    trained = {each.number: each.loss for each in found.rounds if each.loss is not None}
    tuned = {each.number: each.tuning for each in found.rounds if each.tuning is not None}
    central = {
        name: {each.number: each.central[name] for each in found.rounds if name in each.central}
        for name in sorted({name for each in found.rounds for name in each.central})
    }
    asked = [Curve(name, values, main=name == "auroc") for name, values in central.items() if name != "loss"]
    sites = [Curve(name, values) for name, values in found.by_site.items()]
    return {
        "central": curves.draw(asked, "The coordinator's own questions by round.", "AUROC and Brier score"),
        "central_loss": curves.draw(
            [Curve("loss", central.get("loss", {}), main=True)], "Loss on the coordinator's cohort.", "nats a token"
        ),
        "central_kinds": curves.kinds([curve.name for curve in asked if not curve.main]),
        "training": curves.draw([Curve("all sites", trained, main=True)], "Training loss by round.", "nats a token"),
        "tuning": curves.draw(
            [*sites, Curve("all sites", tuned, main=True)], "Loss on tuning patients by round.", "nats a token"
        ),
    }

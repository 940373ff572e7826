"""What a coordinator's people type about the ledger; imports stand inside the commands."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from server.ledger import Ledger
    from server.ledger_entries import EventEntry

app = typer.Typer()

Home = Annotated[Path, typer.Argument(help="The coordinator's home folder.", envvar="FEDCOMET_HOME")]
HomeOption = Annotated[
    Path,
    typer.Option(
        "--home", help="The coordinator's home folder.", envvar="FEDCOMET_HOME", show_default="here", show_envvar=True
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command()
def status(home: Home, json: Json = False) -> None:
    """See the federation at a glance: who leads, runs, members, and what needs a person."""
    from server import ledger_view

    with _ledger(home) as ledger:
        found = ledger_view.status(ledger)
    _print(found, ledger_view.status_table(found), json)


@app.command()
def runs(home: Home, json: Json = False) -> None:
    """List the runs: state, rounds, sites, loss, and why one failed."""
    from server import ledger_view

    with _ledger(home) as ledger:
        found = ledger_view.runs_of(ledger)
    _print(found, ledger_view.runs_table(found), json)


@app.command()
def sites(home: Home, json: Json = False) -> None:
    """List the members: certificates, versions, when they were seen, and what of their privacy budgets is spent."""
    from server import ledger_view

    with _ledger(home) as ledger:
        found = ledger_view.sites_of(ledger)
    _print(found, ledger_view.sites_table(found), json)


@app.command()
def logs(
    home: Home,
    run: Annotated[str | None, typer.Option(help="Only what belongs to this run.")] = None,
    site: Annotated[str | None, typer.Option(help="Only what belongs to this site.")] = None,
    what: Annotated[str, typer.Option(help="Only kinds that begin so, such as run. or update.")] = "",
    last: Annotated[int, typer.Option(min=1, help="How many.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what comes.")] = False,
    json: Json = False,
) -> None:
    """Show who did what, the newest last."""
    import json as encoder
    import time

    from server import ledger_view

    def line(event: "EventEntry") -> str:
        return encoder.dumps(ledger_view.event_of(event)) if json else ledger_view.event_line(event)

    with _ledger(home) as ledger:
        found = ledger.events(run=run, site=site, what=what, limit=last, newest=True)
        if not follow:
            if json:
                print(encoder.dumps([ledger_view.event_of(event) for event in found], indent=2))
            for event in () if json else found:
                print(line(event))
            return
        after = 0
        while True:
            for event in found:
                print(line(event), flush=True)
                after = event.id
            time.sleep(0.0 if found else 1.0)
            found = ledger.events(after, run=run, site=site, what=what, limit=1000)


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="The file to write.")],
    home: HomeOption = Path(),
    yes: Annotated[bool, typer.Option("--yes", help="Replace a file that is there.")] = False,
) -> None:
    """Copy the ledger to a file, while it may be in use, and check the copy.

    Keys, settings and the runs' folders are files of the home; copy them afterwards with the means of the machine.
    """
    from server import backup as copies
    from server.tables import RunState

    with _ledger(home) as ledger:
        going = [run.name for run in ledger.runs() if run.state in (RunState.RUNNING, RunState.PAUSING)]
        rounds = {run: ledger.journal(run).committed() for run in going}
        made = copies.save(ledger.transactions, file, replace=yes)
    rows = sum(made.rows.values())
    print(f"{file}: {rows:,} rows of {made.place}, as of {made.made_at}, sha256 {made.sha256}")
    for run, number in rounds.items():
        print(f"Run {run} is under way, round {number} is committed: copy {home}/runs/{run} before it goes on.")


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="The backup.")],
    home: HomeOption = Path(),
    yes: Annotated[bool, typer.Option("--yes", help="Replace all that the ledger holds.")] = False,
) -> None:
    """Put the ledger back from a backup: all of it or nothing.

    The coordinator must not be running. A backup of a SQLite ledger can be put into a PostgreSQL one, and back.
    """
    from server import restore as copies

    with _ledger(home, begin=True) as ledger:
        found = copies.restore(file, ledger.transactions, replace=yes)
        place = ledger.transactions.place
    rows = sum(found.rows.values())
    print(f"{place}: {rows:,} rows, as they were at {found.made_at}, sha256 {found.sha256}")


@contextmanager
def _ledger(home: Path, begin: bool = False) -> Iterator["Ledger"]:
    from server.home import CoordinatorHome
    from server.ledger import Ledger

    opened = CoordinatorHome.open(home)
    # A person who waits is told soon what is wrong.
    with Ledger.open(opened.ledger_url, backups=opened.backups, begin=begin, patience_s=10.0) as ledger:
        yield ledger


def _print(found: object, table: object, json: bool) -> None:
    import json as encoder
    import sys

    from rich.console import Console

    if json:
        print(encoder.dumps(found, indent=2))
    else:
        # In a file or a pipe a row is a line: nothing there is as narrow as a screen.
        Console(highlight=False, width=None if sys.stdout.isatty() else 10_000).print(table)

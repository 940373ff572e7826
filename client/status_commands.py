"""What a site's people type to see how their site stands; imports stand inside the commands."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()

Home = Annotated[Path, typer.Argument(help="The site's home folder.", envvar="FEDCOMET_HOME")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command()
def status(
    home: Home,
    messages: Annotated[
        bool, typer.Option("--messages", help="Also ask the coordinator for texts of its people; the list notes it.")
    ] = False,
    json: Json = False,
) -> None:
    """See the site at a glance: certificate, daemon, policy, budget, what waits, last answers, what went wrong.

    The exit code is 1 where the daemon doesn't run or isn't well. Nothing leaves the machine unless --messages asks.
    """
    import json as encoder

    from rich.console import Console

    from client import status as statuses
    from client.home import SiteHome

    found = statuses.status(SiteHome.open(home), messages=messages)
    if json:
        print(encoder.dumps(found, indent=2, ensure_ascii=False))
    else:
        Console(highlight=False).print(statuses.table(found))
    if not found["daemon"]["healthy"]:
        raise typer.Exit(1)


@app.command()
def budget(home: Home, json: Json = False) -> None:
    """See what private releases cost, by run and mechanism, what is reserved, and what the limit leaves."""
    import json as encoder

    from rich.console import Console

    from client.budget import FILE, Budget
    from client.budget_report import report, reservations, table_of_reservations, tables
    from client.home import SiteHome
    from client.outbound import runs_without_privacy, told_without_privacy
    from client.policy import Policy
    from federation import canonical

    opened = SiteHome.open(home)
    place = opened.settings.site.budget or opened.state / FILE
    unprotected = runs_without_privacy(opened.state / "outbound")
    if isinstance(place, Path) and not place.exists():
        print("null" if json else "nothing private was released here, so nothing is spent")
        if unprotected and not json:
            print(told_without_privacy(unprotected))
        return
    with Budget.open(place, Policy.read(opened.policy).limit, begin=False) as ledger:
        found, reserved = report(ledger), reservations(ledger.charges())
    if json:
        releases = [
            {"run": each.release.run, "round": each.release.round, "what": each.release.purpose} for each in reserved
        ]
        print(
            encoder.dumps(
                {**encoder.loads(canonical.encode(found)), "reserved": releases, "without_privacy": unprotected},
                indent=2,
                ensure_ascii=False,
            )
        )
        return
    console = Console(highlight=False)
    for part in tables(found):
        console.print(part)
    if unprotected:
        console.print(f"[yellow]{told_without_privacy(unprotected)}[/]")
    if reserved:
        console.print(table_of_reservations(reserved, found.delta))

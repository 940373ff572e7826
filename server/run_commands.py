"""What a coordinator's people type to serve a federation and to lead runs; imports stand inside the commands."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from server.ledger import Ledger
    from server.ledger_entries import RunEntry

app = typer.Typer()

Home = Annotated[Path, typer.Argument(help="The coordinator's home folder.", envvar="FEDCOMET_HOME")]
HomeOption = Annotated[
    Path,
    typer.Option(
        "--home", help="The coordinator's home folder.", envvar="FEDCOMET_HOME", show_default="here", show_envvar=True
    ),
]
Run = Annotated[str, typer.Argument(help="The run's name.")]
Follow = Annotated[bool, typer.Option("--follow", help="Stay until the run ends, and tell what happens.")]
_HERE = Path()


@app.command()
def serve(
    home: Home,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for another coordinator on the same ledger to end.")
    ] = False,
    passphrase_file: Annotated[
        Path | None,
        typer.Option(
            help="A file with the passphrase of the authority's key.",
            show_default="$FEDCOMET_CA_PASSPHRASE",
        ),
    ] = None,
) -> None:
    """Keep a federation going: enrolment, control, rounds, everything, until it is stopped."""
    from server.daemon import serve as serve_federation
    from server.home import read_passphrase

    serve_federation(home, wait=wait, passphrase=read_passphrase(passphrase_file))


@app.command()
def start(
    run: Run,
    plan: Annotated[Path, typer.Option(help="The federation plan (JSON).")],
    codebook: Annotated[
        Path | None, typer.Option(help="The fixed codebook, if the plan names one.", show_default="made of surveys")
    ] = None,
    follow: Follow = False,
    home: HomeOption = _HERE,
) -> None:
    """Start a run; the coordinator that serves leads it, also over restarts, to its end."""
    from federation.messages import is_site_name
    from federation.pki import Role
    from server.home import CoordinatorHome
    from server.plan import FederationPlan
    from server.tables import SiteStatus
    from tokenizer import durable
    from tokenizer.errors import ConfigError
    from tokenizer.wording import several

    if not is_site_name(run):
        raise ConfigError(f"{run!r} can't be the name of a run: use up to 64 letters, digits, '.', '_' and '-'.")
    fixed = codebook.read_bytes() if codebook else None
    try:
        checked = FederationPlan.from_bytes(plan.read_bytes(), fixed)
        checked.check()
        if checked.name != run:
            raise ConfigError(f"name is {checked.name!r}, which sites would see; start that, or name the plan {run}.")
    except ConfigError as error:
        raise ConfigError(f"{plan}: {error}") from None
    if fixed is not None:
        durable.write_bytes(CoordinatorHome.open(home).runs / run / "codebook.json", fixed)
    with _ledger(home) as ledger:
        joined = sum(each.role == Role.SITE and each.status == SiteStatus.ENROLLED for each in ledger.members.all())
        if joined < (needed := max(checked.min_sites, checked.expect_sites)):
            told = several(joined, "site has joined", "sites have joined")
            print(f"{told}, {needed} are waited for, for {checked.join_s:g} s.", file=sys.stderr)
        ledger.propose(run, checked.to_bytes())
        _tell(ledger, ledger.start(run), follow)


@app.command()
def pause(run: Run, home: HomeOption = _HERE) -> None:
    """Let a run pause after its open round."""
    with _ledger(home) as ledger:
        _tell(ledger, ledger.pause(run))


@app.command()
def resume(run: Run, follow: Follow = False, home: HomeOption = _HERE) -> None:
    """Let a run that was paused, was stopped or failed go on at its first uncommitted round."""
    with _ledger(home) as ledger:
        _tell(ledger, ledger.start(run), follow)


@app.command()
def stop(run: Run, home: HomeOption = _HERE) -> None:
    """Stop a run now; what is committed stays, and it can be resumed."""
    with _ledger(home) as ledger:
        _tell(ledger, ledger.stop(run))


def _ledger(home: Path) -> "Ledger":
    from server.home import CoordinatorHome
    from server.ledger import Ledger

    opened = CoordinatorHome.open(home)
    return Ledger.open(opened.ledger_url, backups=opened.backups)


def _tell(ledger: "Ledger", run: "RunEntry", follow: bool = False) -> None:
    """Print a run's state; when following, what happens until it ends, and fail as the run fails."""
    from server.tables import RunState
    from tokenizer.errors import FedcometError

    if ledger.holder() is None:
        typer.echo("No coordinator serves now; start one: fedcomet coordinator serve HOME", err=True)
    if follow:
        run = _follow(ledger, run.name)
    if follow and run.state == RunState.FAILED:  # why it has is the last that was told
        raise FedcometError(
            f"Run {run.name} has failed. Mend what it says, then: fedcomet coordinator resume {run.name}"
        )
    typer.echo(f"run {run.name} is {run.state}" + (f": {run.reason}" if run.reason else ""))


def _follow(ledger: "Ledger", name: str) -> "RunEntry":
    import time

    from server.tables import RunState

    last = max((event.id for event in ledger.events(run=name, limit=1, newest=True)), default=0)
    ends = (RunState.FAILED, RunState.FINISHED, RunState.PAUSED, RunState.STOPPED)
    while True:
        run = ledger.run(name)
        for event in ledger.events(last, run=name):
            last = event.id
            where = "" if event.round is None else f" round {event.round}"
            typer.echo(" ".join(filter(None, (event.what + where, event.site, event.text))))
        if run.state in ends:
            return run
        time.sleep(1)

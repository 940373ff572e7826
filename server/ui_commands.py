"""What a coordinator's people type for the dashboard; imports stand inside the commands."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()

_Home = Annotated[Path, typer.Argument(help="The coordinator's home folder.", envvar="FEDCOMET_HOME")]


@app.command()
def ui(
    home: _Home,
    host: Annotated[str, typer.Option(help="The network interface; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="The port; 0 lets the system choose.", show_default="that of coordinator.toml")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="Another host name that people visit it under; may be repeated.")
    ] = None,
) -> None:
    """Serve the dashboard, by TLS with the server's certificate, until it is interrupted.

    Whoever has a password signs in (`fedcomet coordinator password`). From elsewhere, leave it on loopback and go
    through ssh -L, or name an interface.
    """
    import os

    from federation import serving
    from server import downloads
    from server.dashboard import PATIENCE_S, Dashboard
    from server.home import CoordinatorHome
    from server.ledger import Ledger
    from server.passwords import Passwords
    from tokenizer.errors import ConfigError

    os.umask(0o077)
    opened = CoordinatorHome.open(home)
    if not Passwords(home).people():
        raise ConfigError(f"Nobody could sign in: set a password first, fedcomet coordinator password {home}.")
    opened.server_pair()
    downloads.sweep(home)
    with Ledger.open(opened.ledger_url, backups=opened.backups, patience_s=PATIENCE_S) as ledger:
        app_ = Dashboard(opened, ledger, (*(name or ()), host)).app()
        where = opened.settings.ports.ui if port is None else port
        pair = opened.server_key, opened.server_certificate
        serving.serve(app_, host, where, pair, lambda url: print(f"the dashboard is at {url}", flush=True))


@app.command()
def password(
    home: _Home,
    name: Annotated[str, typer.Argument(help="Who signs in; stands in the audit trail.")] = "coordinator",
    role: Annotated[str, typer.Option(help="coordinator (also pauses and stops runs) or viewer.")] = "coordinator",
    remove: Annotated[bool, typer.Option("--remove", help="Let them no longer sign in.")] = False,
) -> None:
    """Set somebody's password for the dashboard, asked for here or read from standard input; sessions of them end."""
    import sys

    from server.home import CoordinatorHome
    from server.ledger import Ledger
    from server.passwords import Passwords

    opened, passwords = CoordinatorHome.open(home), Passwords(home)
    if remove:
        passwords.remove(name)
    elif role not in ("coordinator", "viewer"):
        raise typer.BadParameter("it is coordinator or viewer", param_hint="--role")
    else:
        asked = sys.stdin.isatty()
        given = typer.prompt(f"Password of {name}", hide_input=True, confirmation_prompt=True) if asked else ""
        passwords.set(name, role, given if asked else sys.stdin.readline().rstrip("\r\n"))  # type: ignore[arg-type]
    with Ledger.open(opened.ledger_url, backups=opened.backups) as ledger:
        ledger.note("coordinator", f"dashboard.{'removed' if remove else 'password'}", told=f"{name}, {role}")
    print(f"{name} can no longer sign in" if remove else f"{name} signs in as {role}")

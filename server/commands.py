"""What a coordinator's people type about members and certificates; imports stand inside the commands."""

from pathlib import Path
from typing import Annotated

import typer

from server import ledger_commands, plan_commands, run_commands, ui_commands

app = typer.Typer()
app.add_typer(ledger_commands.app)
app.add_typer(plan_commands.app)
app.add_typer(run_commands.app)
app.add_typer(ui_commands.app)

Home = Annotated[
    Path,
    typer.Option(help="The coordinator's home folder.", envvar="FEDCOMET_HOME", show_default="here", show_envvar=True),
]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(help="A file with the passphrase of the authority's key.", show_default="$FEDCOMET_CA_PASSPHRASE"),
]


@app.command()
def init(
    home: Annotated[Path, typer.Argument(help="The coordinator's home, a new folder.")],
    name: Annotated[str, typer.Option(help="The federation's name, which certificates tell.")],
    address: Annotated[str, typer.Option(help="The host name or IP address that sites dial.")],
    also: Annotated[list[str] | None, typer.Option(help="Another name of this machine; may be repeated.")] = None,
    database: Annotated[str, typer.Option(help="The ledger's SQLAlchemy URL.", show_default="a file in the home")] = "",
    passphrase_file: PassphraseFile = None,
) -> None:
    """Found a federation: its authority, the server's certificate, and the key that signs requests.

    With a passphrase of 12 characters or more the authority's key is encrypted, and whatever issues certificates needs
    the passphrase; without one, the file's permissions protect it.
    """
    from rich.console import Console

    from federation import pki
    from server.home import CoordinatorHome, CoordinatorSettings, Database, Federation, read_passphrase
    from server.ledger import Ledger

    passphrase = read_passphrase(passphrase_file)
    federation = Federation(name=name, address=address, also=tuple(also or ()))
    made = CoordinatorHome.init(
        home, CoordinatorSettings(federation=federation, database=Database(url=database)), passphrase
    )
    Ledger.open(made.ledger_url).close()
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"The federation [bold]{name}[/] is in {home}; keep a copy of it in a safe place.")
    told = "encrypted" if passphrase else "protected by the file's permissions only"
    console.print(f"The authority's key is {told}.")
    console.print(f"Its fingerprint: {pki.spoken(pki.fingerprint(pki.read_certificate(made.authority)))}")


@app.command()
def invite(
    site: Annotated[str, typer.Argument(help="The new member's name.")],
    role: Annotated[str, typer.Option(help="site, coordinator (leads runs) or viewer (reads).")] = "site",
    hours: Annotated[float, typer.Option(help="How long the token holds.")] = 72.0,
    home: Home = Path(),
) -> None:
    """Invite a member: print a token that works once. Hand it to one person, by a way that others can't read."""
    from getpass import getuser

    from rich.console import Console

    from federation import pki
    from federation.pki import Role
    from server.enrolment import invite as invited
    from server.home import CoordinatorHome
    from server.ledger import Ledger
    from tokenizer.errors import ConfigError

    if role not in set(Role):
        raise ConfigError(f"--role {role} is none; take one of {', '.join(Role)}.")
    opened = CoordinatorHome.open(home)
    authority = pki.fingerprint(pki.read_certificate(opened.authority))
    with Ledger.open(opened.ledger_url, backups=opened.backups) as ledger:
        token = invited(ledger, authority, site, Role(role), hours, getuser())
    print(token)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    federation, port = opened.settings.federation, opened.settings.ports
    console.print(f"At {site}: fedcomet site join {federation.address}:{port.enrol} TOKEN (within {hours:g} hours).")
    console.print(f"Read them this fingerprint by another way: {pki.spoken(authority)}")


@app.command()
def revoke(
    site: Annotated[str, typer.Argument(help="The member's name.")],
    reason: Annotated[str, typer.Option(help="Why, for the ledger.")] = "",
    home: Home = Path(),
) -> None:
    """Put a member out, at once: its certificate and open invitations hold no more. A new invitation lets it back."""
    from getpass import getuser

    from server.home import CoordinatorHome
    from server.ledger import Ledger

    opened = CoordinatorHome.open(home)
    with Ledger.open(opened.ledger_url, backups=opened.backups) as ledger:
        ledger.members.revoke(site, reason, getuser())
    print(f"{site} is revoked.")


@app.command()
def rotate(home: Home = Path(), passphrase_file: PassphraseFile = None) -> None:
    """Give the server a new key and certificate, for the addresses in coordinator.toml; what runs takes them up."""
    from federation import pki
    from server.home import CoordinatorHome, read_passphrase

    opened = CoordinatorHome.open(home)
    opened.rotate(read_passphrase(passphrase_file))
    until = pki.read_certificate(opened.server_certificate).not_valid_after_utc
    print(f"The server's new certificate holds until {until:%Y-%m-%d %H:%M} UTC.")


@app.command()
def fingerprints(home: Home = Path()) -> None:
    """Show the fingerprints that are compared when a member joins, and until when certificates hold."""
    from datetime import UTC, datetime

    from rich.console import Console

    from federation import pki
    from server.home import CoordinatorHome
    from server.ledger import Ledger
    from server.tables import SiteStatus

    console, opened = Console(highlight=False, soft_wrap=True), CoordinatorHome.open(home)
    authority = pki.read_certificate(opened.authority)
    console.print(f"the federation  {pki.spoken(pki.fingerprint(authority))}")
    with Ledger.open(opened.ledger_url, backups=opened.backups) as ledger:
        for each in ledger.members.all():
            if each.status == SiteStatus.ENROLLED:
                print_ = pki.identity_fingerprint(each.ed25519, each.node_key)
                until = datetime.fromtimestamp(each.expires_at or 0, UTC)
                console.print(f"{each.name}  {pki.spoken(print_)}  until {until:%Y-%m-%d}")
    for warning in opened.warnings(datetime.now(UTC)):
        console.print(f"[yellow]{warning}[/]")


@app.command()
def message(
    site: Annotated[str, typer.Argument(help="The site; nothing shows what all of them told.")] = "",
    text: Annotated[str, typer.Argument(help="What to tell its people; nothing shows what was told.")] = "",
    home: Home = Path(),
) -> None:
    """Send a site's people a text, or read theirs."""
    from datetime import UTC, datetime
    from getpass import getuser

    from rich.console import Console

    from federation.messages import printable
    from server.home import CoordinatorHome
    from server.ledger import Ledger

    opened = CoordinatorHome.open(home)
    with Ledger.open(opened.ledger_url, backups=opened.backups) as ledger:
        if text:
            ledger.members.get(site)
            ledger.note(getuser(), "message", site=site, told=printable(text))
            return
        console = Console(highlight=False, markup=False)
        for each in ledger.events(site=site or None, what="message"):
            when = f"{datetime.fromtimestamp(each.at, UTC):%Y-%m-%d %H:%M} UTC"
            console.print(f"{when}  {each.site}  {each.who}: {each.text}")

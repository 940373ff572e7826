"""What a site's people type to join a federation and stay in it; imports stand inside the commands."""

from pathlib import Path
from typing import Annotated

import typer

from client import run_commands, status_commands, ui_commands

app = typer.Typer()
app.add_typer(run_commands.app)
app.add_typer(status_commands.app)
app.add_typer(ui_commands.app)

Home = Annotated[
    Path, typer.Option(help="The site's home folder.", envvar="FEDCOMET_HOME", show_default="here", show_envvar=True)
]


@app.command()
def join(
    address: Annotated[str, typer.Argument(help="The coordinator's host, with :PORT where it isn't the usual one.")],
    token: Annotated[str, typer.Argument(help="The invitation's token; - reads it from standard input.")],
    home: Home = Path(),
    data: Annotated[
        Path | None, typer.Option(help="The records, a MEDS dataset's folder.", show_default="data in the home")
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(help="A policy that is there already.", show_default="a strict one is written into the home"),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Don't ask whether the fingerprints were compared (the token is checked).")
    ] = False,
) -> None:
    """Join a federation: make this site's keys, and get a certificate for them.

    Keys never leave this machine. Compare both fingerprints with the coordinator by another way than the token came,
    such as the telephone. The same command goes on with a join that was cut off.
    """
    import sys

    from rich.console import Console

    from client import enrol
    from federation.invitation import Invitation
    from federation.pki import spoken

    console, given = Console(highlight=False, soft_wrap=True), sys.stdin.read() if token == "-" else token

    def agree(invitation: Invitation, prints: enrol.Fingerprints) -> bool:
        console.print(f"You are invited as [bold]{invitation.name}[/], a {invitation.role}.")
        console.print(f"The federation's fingerprint: {spoken(prints.authority)}")
        console.print(f"This site's fingerprint:      {spoken(prints.site)}")
        return yes or _confirmed("Does the coordinator read you the same federation's fingerprint?", token == "-")

    made = enrol.join(home, address, given, agree, None, data, policy)
    console.print(
        f"[bold]{made.name}[/] has joined. Read this site's fingerprint to the coordinator, who sees the same"
    )
    console.print("by fedcomet coordinator fingerprints; if not, this site must be revoked.")
    console.print(f"What the site allows is in {made.policy}, where it works in {made.path / 'site.toml'}: read both.")


@app.command()
def renew(
    home: Home = Path(),
    new_key: Annotated[
        bool, typer.Option("--new-key", help="Make a new key for connections, too; signatures keep theirs.")
    ] = False,
) -> None:
    """Renew the site's certificate now; the daemon does it by itself in the last third of its time."""
    from client.home import SiteHome
    from client.link import Link

    with Link(SiteHome.open(home)) as link:
        print(f"The certificate now holds until {link.renew(new_key=new_key).until:%Y-%m-%d %H:%M} UTC.")


@app.command()
def message(
    text: Annotated[
        str, typer.Argument(help="What to tell the coordinator's people; nothing shows what was told.")
    ] = "",
    home: Home = Path(),
) -> None:
    """Send the coordinator's people a text, or read theirs. Write nothing about patients: it leaves this site."""
    from datetime import UTC, datetime

    from rich.console import Console

    from client.home import SiteHome
    from client.link import Link

    with Link(SiteHome.open(home)) as link:
        if text:
            link.say(text)
            return
        console = Console(highlight=False, markup=False)
        for each in link.messages():
            console.print(f"{datetime.fromtimestamp(each.at, UTC):%Y-%m-%d %H:%M} UTC  {each.who}: {each.text}")


def _confirmed(question: str, input_is_used: bool) -> bool:
    """Ask a person yes or no: at the terminal itself where standard input held something else.

    Raises:
        ConfigError: there is no terminal.
    """
    import sys
    from contextlib import ExitStack

    from tokenizer.errors import ConfigError

    with ExitStack() as after:
        if input_is_used:
            after.callback(setattr, sys, "stdin", sys.stdin)
            try:
                sys.stdin = after.enter_context(open("/dev/tty", encoding="utf-8"))
            except OSError:
                raise ConfigError(
                    "Not joined: nobody can be asked here, as there is no terminal. Compare the fingerprints, then run "
                    "the same command with --yes. Nothing was sent."
                ) from None
        return typer.confirm(question)

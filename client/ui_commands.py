"""What a site's people type for their page; imports stand inside the command."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def ui(
    home: Annotated[Path, typer.Argument(help="The site's home folder.", envvar="FEDCOMET_HOME")],
    port: Annotated[int, typer.Option(help="The port on loopback; 0 lets the system choose.")] = 8453,
) -> None:
    """Serve the site's own page on loopback until it is interrupted: what left, budget, approvals that wait, policy.

    Prints the address, and a token to sign in with that holds until then.
    """
    import os

    from client.dashboard import dashboard, new_token
    from client.home import SiteHome
    from federation import serving

    os.umask(0o077)
    opened, token = SiteHome.open(home), new_token()

    def ready(url: str) -> None:
        print(f"the page of {opened.name} is at {url}\ntoken: {token}", flush=True)

    serving.serve(dashboard(opened, token), "127.0.0.1", port, None, ready)

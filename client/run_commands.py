"""What a site's people type to keep their site in its federation; imports stand inside the commands."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def run(
    home: Annotated[
        Path, typer.Argument(help="The site's home folder, which `fedcomet site join` made.", envvar="FEDCOMET_HOME")
    ],
) -> None:
    """Keep this site in its federation: take part in runs that the policy allows, until it is stopped."""
    from client.daemon import run as run_site

    run_site(home)

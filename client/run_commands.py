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


@app.command()
def restored(
    home: Annotated[
        Path,
        typer.Option(help="The site's home folder.", envvar="FEDCOMET_HOME", show_default="here", show_envvar=True),
    ] = Path(),
    epsilon: Annotated[
        float | None,
        typer.Option(help="The most that may have been spent in all.", show_default="the policy's limit"),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Charge it and go on; without, it is only shown.")] = False,
) -> None:
    """Go on after this site's state was restored from an older copy, which has forgotten what left since.

    The privacy budget is charged for what was forgotten: the policy's limit, as no more was ever let out, or less where
    you know it from elsewhere. What the copy holds is counted beside it.
    """
    from client.budget import FILE, Budget
    from client.home import SiteHome
    from client.policy import Policy
    from client.witness import Witnessed

    opened = SiteHome.open(home)
    witnessed = Witnessed(opened.state)
    if (found := witnessed.restored()) is None:
        print(f"The state of {opened.name} was not found to be restored from an older copy.")
        return
    limit = Policy.read(opened.policy).limit if opened.policy.exists() else None
    print(f"Seen {found.found}: the list of what left has {found.own:,} entries here, and had {found.entries:,}.")
    if found.epsilon is not None:
        print(
            f"The coordinator last heard of a budget with epsilon {found.epsilon:.4g} spent at delta {found.delta:g}."
        )
    with Budget.open(opened.settings.site.budget or opened.state / FILE, limit) as budget:
        if yes:
            print(f"Epsilon {witnessed.accept(budget, epsilon):g} is charged. The site takes part again.")
            return
        print(f"The copy has epsilon {budget.spent():.4g} at delta {budget.delta():g}.")
    cost = epsilon if epsilon is not None else None if limit is None else limit.epsilon
    todo = "say --epsilon, as the policy has no limit" if cost is None else f"--yes charges epsilon {cost:g} beside it"
    print(f"Nothing was changed: {todo}. Is a newer copy there? Then put that in place instead.")

"""What people type to size a federation; imports stand inside the command."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command(rich_help_panel="For a researcher")
def plan(
    file: Annotated[Path, typer.Argument(help="A sizing file (TOML), such as examples/sizing/cosmos.toml.")],
    measure: Annotated[
        str | None, typer.Option(help="Measure this machine by training a preset; its speed is taken for every site's.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="How long to measure.")] = 10.0,
    device: Annotated[str, typer.Option(help="What to measure on.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Size a federation before it exists: model, rounds, time, bytes and epsilon, each with its sum and its limits.

    Numbers that nobody knows for sure are given as low, middle and high; what is told has 95 % limits that follow.
    """
    import time
    from json import dumps

    from rich.console import Console
    from rich.table import Table

    from simulation import sizing

    here = None if measure is None else sizing.measured(measure, seconds, time.perf_counter, device)
    lines = sizing.plan(sizing.read(file), here)
    if json:
        typer.echo(dumps(sizing.as_json(lines), indent=1))
        return
    table = Table("", "figure (95 %)", "sum", title=str(file))
    for row in sizing.shown(lines):
        table.add_row(*row)
    Console().print(table)
    if here is not None:
        typer.echo(
            f"Measured here: {here[1] / 1e9:.1f} GFLOP/s in training ({here[0] / 1e9:.1f} to {here[2] / 1e9:.1f})."
        )

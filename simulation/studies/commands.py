"""What a researcher types about studies; imports stand inside the commands."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from tokenizer.progress import Step

app = typer.Typer()
study = typer.Typer(
    help="Grids of studies from one file: run them, see how far they are, report.", no_args_is_help=True
)
app.add_typer(study, name="study", rich_help_panel="For a researcher")

File = Annotated[Path, typer.Argument(help="A grid file (TOML), such as those in examples/studies/.")]
Data = Annotated[Path | None, typer.Option(help="The MEDS dataset of a study of one, if its file names none.")]
Out = Annotated[Path | None, typer.Option(help="The grid's folder; runs/studies/NAME when not given.")]


@study.command()
def run(
    file: File,
    data: Data = None,
    out: Out = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes; as many as there are cores when not given.")
    ] = None,
    at_once: Annotated[
        int | None, typer.Option(min=1, help="Cells at work at one time; one for each worker when not given.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep records and checkpoints of cells that are done.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Run cells again that failed.")] = False,
) -> None:
    """Run a grid of settings and seeds, several cells at a time, and write its report.

    Stop it whenever you like, even with kill -9: the same command goes on where it stopped. A cell that fails is told
    with its reason and stops no other.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from simulation.studies import grid, report, runner

    console = Console(stderr=True)
    settings = grid.read(file)
    cells, folder, before = grid.cells(settings, data), out or _home(settings.name), _processor_s()
    columns = (
        TextColumn("cells"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("cells", total=len(cells), note="")
        failed = runner.run(
            cells, folder, workers=workers, at_once=at_once, keep=keep, again=again,
            watch=_shown(lambda step: bar.update(task, completed=step.done, note=step.note[:80]), console.is_terminal),
        )  # fmt: skip
    for path in report.write(settings, cells, folder):
        typer.echo(path)
    typer.echo(f"{(_processor_s() - before) / 60:.1f} processor minutes", err=True)
    if failed:
        typer.echo(f"{failed} cells failed: fedcomet study status {file} tells why; --again runs them again", err=True)
        raise typer.Exit(1)


@study.command()
def status(file: File, data: Data = None, out: Out = None) -> None:
    """Tell of every cell whether it is done, and why one failed."""
    from rich.console import Console
    from rich.table import Table

    from simulation.studies import grid, report

    settings = grid.read(file)
    found = report.status(grid.cells(settings, data), out or _home(settings.name))
    table = Table(*found.columns)
    for row in found.iter_rows():
        table.add_row(*(f"{value:.0f}" if isinstance(value, float) else str(value) for value in row))
    Console().print(table)


@study.command("report")
def write_report(
    file: File,
    data: Data = None,
    out: Out = None,
    docs: Annotated[
        Path | None,
        typer.Option(help="Write README.md and the pictures into DOCS/NAME instead, to be kept with a repository."),
    ] = None,
) -> None:
    """Write report.html, report.md and the pictures anew, from the ledger."""
    from simulation.studies import grid, report

    settings = grid.read(file)
    for path in report.write(settings, grid.cells(settings, data), out or _home(settings.name), docs):
        typer.echo(path)


def _processor_s() -> float:
    """Processor time of this process and of the workers that have ended, in seconds."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _home(name: str) -> Path:
    return Path("runs") / "studies" / name


def _shown(draw: Callable[[Step], None], terminal: bool) -> Callable[[Step], None]:
    """Draw a bar, or write a line for every cell on a pipe."""

    def watch(step: Step) -> None:
        draw(step)
        if not terminal:
            typer.echo(f"{step.done}/{step.total} {step.note}", err=True)

    return watch

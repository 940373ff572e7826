"""What people type to make published figures again; imports stand inside the command."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from simulation.reproduce import Entry, Verdict

app = typer.Typer()


@app.command(rich_help_panel="For a researcher")
def reproduce(
    name: Annotated[str | None, typer.Argument(help="What to make again; without a name, all are listed.")] = None,
    data: Annotated[Path | None, typer.Option(help="The dataset, where the list says that one is needed.")] = None,
    out: Annotated[Path | None, typer.Option(help="A clean folder; runs/reproduce/NAME when not given.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Another list.", show_default="docs/results.toml of the checkout")
    ] = None,
) -> None:
    """Make the figures of docs/results.md again, and tell which lie where they should.

    Stop it whenever you like: the same command goes on where it stopped. Exit code 3: a figure lies outside.
    """
    from rich.console import Console

    from simulation import reproduce as work
    from tokenizer.errors import ConfigError

    console, path = Console(), file or work.LIST
    entries = work.read(path)
    if name is None:
        console.print(_listed(entries))
        return
    entry = next((each for each in entries if each.name == name), None)
    if entry is None:
        raise ConfigError(f"{path} has no entry {name}; it has {', '.join(each.name for each in entries)}")
    folder = out or Path("runs") / "reproduce" / name
    hear = lambda line: console.print(line, markup=False, highlight=False)  # noqa: E731
    verdicts = work.reproduce(entry, path.absolute().parents[1], folder, data=data, hear=hear)
    console.print(_compared(entry, verdicts))
    console.print(f"all figures: {folder / work.STAMP}")
    if any(verdict.inside is False for verdict in verdicts):
        raise typer.Exit(3)


def _listed(entries: "tuple[Entry, ...]") -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("shows")
    table.add_column("minutes", justify="right")
    table.add_column("judged", justify="right")
    for entry in entries:
        judged = sum(figure.limits is not None for figure in entry.figure)
        needs = " and ".join(filter(None, [entry.data and f"--data ({entry.data})", entry.machine]))
        shows = entry.shows + (f"; needs {needs}" if needs else "")
        if not entry.command:
            shows += f"; no command: {entry.why_not}"
        minutes = "" if entry.minutes is None else f"{entry.minutes:g}"
        table.add_row(entry.name, shows, minutes, f"{judged} of {len(entry.figure)}")
    return table


def _compared(entry: "Entry", verdicts: "tuple[Verdict, ...]") -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=entry.shows, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("figure", "measured", "expected", "limits", ""):
        table.add_column(column, justify="left" if column in ("figure", "") else "right", overflow="fold")
    words = {True: "within", False: "[bold red]outside[/]", None: "not judged"}
    for each in verdicts:
        limits = "" if each.limits is None else " to ".join(f"{limit:.4g}" for limit in each.limits)
        table.add_row(each.key, _number(each.measured), _number(each.expected), limits, words[each.inside])
    return table


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"

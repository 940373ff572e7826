"""The report of a grid: a page, its tables as Markdown, and each picture as an SVG file of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from matplotlib.axes import Axes

from federation import page
from server import plots
from server.plots import INKS
from simulation.studies.book import DONE, FAILED, Book, Entry
from simulation.studies.grid import Cell, Grid
from simulation.studies.scaling import Estimate, Profile, Run, profiles
from simulation.studies.tables import Mean, laws, means, runs_by
from tokenizer import durable
from tokenizer.errors import ConfigError

_INKS = [INKS[name] for name in ("first", "second", "third", "fourth", "fifth", "soft", "ink")]
_MARKS = "osDvP^*X"
_ROOM = 50
"""Letters that fit below a picture side by side."""
_STEP = 0.03
# A picture that stands alone has the page's colours with it, and follows the reader's light or dark setting.
_COLOURS = (
    "<style>svg { --ink: #1c2126; --soft: #5b6670; --line: #dfe2e0; --arm-federated: #0b63b0; --arm-alone: #c77700; "
    "--arm-pooled: #0a8f6c; --arm-ensemble: #a8478f; --arm-supervised: #7a7a2e; background: #fff; "
    "font-family: sans-serif } @media (prefers-color-scheme: dark) { svg { --ink: #e8eaed; --soft: #a3adb6; "
    "--line: #343b42; --arm-federated: #6db6ff; --arm-alone: #f0ab42; --arm-pooled: #4fd0a5; --arm-ensemble: #e291cb; "
    "--arm-supervised: #c8c86a; background: #14181c } }</style>"
)
_UNITS = {
    "loss": "nats per token",
    "loss at home": "nats per token",
    "tuning loss": "nats per token",
    "planned cost": "nats per token",
    "compute": "FLOP",
    "seconds of work": "s",
}


def write(grid: Grid, cells: Sequence[Cell], folder: Path, docs: Path | None = None) -> list[Path]:
    """Write `report.html`, `report.md` and a picture for each measure that is drawn; gives the files.

    Args:
        grid: what was asked.
        cells: of the grid.
        folder: of the grid, where its ledger is.
        docs: a folder of documentation: the Markdown (as `README.md`) and the pictures go to `docs/NAME/` then, and
            nothing into `folder`.

    Raises:
        ConfigError: with `docs`, and no cell is done: there is nothing to publish.
    """
    with Book.at(folder) as book:
        table, entries = book.table(cells), book.entries()
    nothing = Entry("", "open", "", 0, 0.0)
    entries |= {cell.digest: nothing for cell in cells if cell.digest not in entries}
    done = sum(entries[cell.digest].state == DONE for cell in cells)
    if docs is not None and not done:
        raise ConfigError(f"{folder}: no cell of {grid.name} is done; run `fedcomet study run` first")
    found = means(table, cells)
    fits = laws(grid, table, cells)
    drawn = [*_plots(grid, cells, found), *_scaling(runs_by(grid, table, cells))]
    home = folder if docs is None else docs / grid.name
    files = [home / f"{_slug(title)}.svg" for title, _ in drawn]
    for path, (_, picture) in zip(files, drawn, strict=True):
        durable.write_bytes(path, picture.replace(">", f">{_COLOURS}", 1).encode())
    axes, measures, rows = _table(cells, found)
    failed = [(cell.told, entries[cell.digest].reason) for cell in cells if entries[cell.digest].state == FAILED]
    state = _State(done, len(cells), tuple(failed), table["digest"].n_unique())
    text = _markdown(grid, state, [title for title, _ in drawn], (axes, measures, rows), fits).encode()
    if docs is not None:
        durable.write_bytes(home / "README.md", text)
        return [home / "README.md", *files]
    durable.write_bytes(folder / "report.md", text)
    environment = page.environment(Path(__file__).parent / "templates")
    environment.filters["estimate"] = told_estimate
    page_text = environment.get_template("study.html.j2").render(
        grid=grid,
        done=done,
        total=len(cells),
        failed=failed,
        seconds=sum(entries[cell.digest].seconds for cell in cells),
        pictures=drawn,
        laws=fits,
        names=list(next(iter(fits.values()), {})),
        runs=table["digest"].n_unique(),
        axes=axes,
        measures=measures,
        rows=rows,
    )
    durable.write_bytes(folder / "report.html", page_text.encode())
    return [folder / "report.html", folder / "report.md", *files]


def told_estimate(estimate: Estimate) -> str:
    """Write a fitted figure with its interval; a dash where it could not be fitted."""
    if estimate.value is None:
        return "–"
    spread = "" if estimate.low is None else f" ({estimate.low:.3f} to {estimate.high:.3f})"
    return f"{estimate.value:.3f}{spread}"


def _table(cells: Sequence[Cell], found: Sequence[Mean]) -> tuple[list[str], list[str], list[list[str]]]:
    axes = list(cells[0].place) if cells else []
    measures = list(dict.fromkeys(mean.measure for mean in found))
    by_row: dict[tuple[tuple[str, ...], str], dict[str, str]] = {}
    for mean in found:
        by_row.setdefault((mean.place, mean.arm), {})[mean.measure] = mean.told()
    rows = [[*place, arm, *(told.get(name, "") for name in measures)] for (place, arm), told in by_row.items()]
    return axes, measures, rows


@dataclass(frozen=True)
class _State:
    """How far a grid is: cells done, all, those that failed with their reasons, and cells that have figures."""

    done: int
    total: int
    failed: tuple[tuple[str, str], ...]
    runs: int


def _markdown(
    grid: Grid,
    state: _State,
    pictures: Sequence[str],
    tables: tuple[Sequence[str], Sequence[str], Sequence[Sequence[str]]],
    fits: Mapping[str, Mapping[str, Estimate]],
) -> str:
    """Write the report as Markdown: the question, pictures by their files, one table of all figures, the laws."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |\n"

    axes, measures, rows = tables
    seeds = f"{len(grid.seeds)} seeds" if len(grid.seeds) > 1 else f"seed {grid.seeds[0]}"
    text = f"# {grid.question or grid.name}\n\n`{grid.name}`: {state.done} of {state.total} cells, {seeds}. "
    text += "Means over seeds with 95 % intervals by Student's t.\n" if len(grid.seeds) > 1 else "\n"
    text += "".join(f"\n![{_titled(title)}]({_slug(title)}.svg)\n" for title in pictures)
    heads = [*axes, "arm", *map(_titled, measures)]
    text += "\n" + line(heads) + line(["---"] * (len(axes) + 1) + ["---:"] * len(measures)) + "".join(map(line, rows))
    if fits:
        text += (
            f"\nL(N, D) = E + A / N^alpha + B / D^beta, fitted to {state.runs} runs; 95 % bootstrap over runs of each "
            "compute. It holds for sizes and tokens such as were trained here.\n\n"
        )
        text += line(["", *fits]) + line(["---"] + ["---:"] * len(fits))
        for name in next(iter(fits.values())):
            text += line([name, *(told_estimate(fit[name]) for fit in fits.values())])
    if state.failed:
        text += "\nCells that failed:\n\n" + "".join(f"- {told}: {reason}\n" for told, reason in state.failed)
    return text


def _titled(measure: str) -> str:
    """A measure with its unit."""
    return f"{measure} ({_UNITS[measure]})" if measure in _UNITS else measure


def _plots(grid: Grid, cells: Sequence[Cell], found: Sequence[Mean]) -> list[tuple[str, str]]:
    """Draw every measure that the file asks for."""
    if grid.plot is None or not cells:
        return []
    asked, axes = grid.plot, list(cells[0].place)
    along = axes.index(asked.x)
    points = next(axis for axis in grid.axis if axis.name == asked.x).points()
    numbers = [point.x for point in points]
    spots = {
        point.label: float(number) if number is not None and None not in numbers else float(place)
        for place, (point, number) in enumerate(zip(points, numbers, strict=True))
    }
    ticks = None if None not in numbers else [point.label for point in points]
    drawn = []
    for measure in asked.y:
        lines: dict[str, list[Mean]] = {}
        shown = [mean for mean in found if mean.measure == measure and (not asked.arms or mean.arm in asked.arms)]
        arms = {mean.arm for mean in shown}
        for mean in shown:
            rest = [label for place, label in enumerate(mean.place) if place != along]
            # The arm is said where there are several, or where nothing else tells one line from another.
            lines.setdefault(", ".join([*rest, mean.arm] if len(arms) > 1 or not rest else rest), []).append(mean)
        if lines:
            drawn.append((measure, _picture(measure, asked.x, asked.log, lines, spots, along, ticks)))
    return drawn


def _picture(
    measure: str,
    x: str,
    log: str,
    lines: Mapping[str, Sequence[Mean]],
    spots: Mapping[str, float],
    along: int,
    ticks: Sequence[str] | None,
) -> str:
    def draw(axes: Axes) -> None:
        for number, (name, line) in enumerate(lines.items()):
            ordered = sorted(line, key=lambda mean: spots[mean.place[along]])
            # Places without a scale have room for the lines' intervals side by side.
            aside = _STEP * (number - (len(lines) - 1) / 2) if ticks is not None else 0.0
            at = [spots[mean.place[along]] + aside for mean in ordered]
            ink, dashes = _INKS[number % len(_INKS)], "-" if number < len(_INKS) else "--"
            if ticks is not None:  # between places without a scale there is nothing
                dashes = ""
            axes.plot(
                at, [m.mean for m in ordered], marker=_MARKS[number % 8], color=ink, lw=1.6, ls=dashes, ms=5, label=name
            )
            for place, mean in zip(at, ordered, strict=True):
                if mean.low is not None and mean.high is not None:
                    axes.plot([place, place], [mean.low, mean.high], color=ink, lw=1)
        _finish(axes, x, _titled(measure), log)
        if ticks is not None:
            long = sum(map(len, ticks)) > _ROOM
            axes.set_xticks(range(len(ticks)), ticks, rotation=20 if long else 0, ha="right" if long else "center")

    ends = "; ".join(f"{name} {min(mean.mean for mean in line):.4g}" for name, line in lines.items())
    return plots.picture(_slug(measure), f"{measure} by {x}. Lowest: {ends}.", 7.6, 3.8, draw)


def _scaling(by: Mapping[str, Sequence[Run]]) -> list[tuple[str, str]]:
    """Draw the IsoFLOP profiles of each label."""
    drawn = []
    for label, runs in by.items():
        found = profiles(runs)
        if not found:
            continue

        def draw(axes: Axes, found: Sequence[Profile] = found) -> None:
            for number, profile in enumerate(found):
                ink = _INKS[number % len(_INKS)]
                ordered = sorted(profile.runs, key=lambda run: run.parameters)
                axes.plot(
                    [run.parameters for run in ordered], [run.loss for run in ordered], "o-", color=ink, ms=4,
                    label=f"{profile.compute:.2g} FLOP",
                )  # fmt: skip
                if profile.parameters is not None and profile.loss is not None:
                    axes.plot([profile.parameters], [profile.loss], "*", color=ink, ms=11)
            _finish(axes, "parameters", "held-out loss (nats per token)", "x")

        name = f"IsoFLOP {label}"
        drawn.append(
            (name, plots.picture(_slug(name), f"Loss by parameters at equal compute, {label}.", 7.6, 3.8, draw))
        )
    return drawn


def _finish(axes: Axes, x: str, y: str, log: str) -> None:
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if "y" not in log:
        axes.ticklabel_format(axis="y", useOffset=False)
    # Beside the picture: lines of many points leave no corner free.
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)


def _slug(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text.lower()).strip("-")


def status(cells: Sequence[Cell], folder: Path) -> pl.DataFrame:
    """Give what the ledger says of every cell: told, state, seconds, attempts, reason."""
    with Book.at(folder) as book:
        entries = book.entries()
    rows = []
    for cell in cells:
        entry = entries.get(cell.digest)
        told = (entry.state, entry.seconds, entry.attempts, entry.reason) if entry else ("open", 0.0, 0, "")
        rows.append((cell.told, *told))
    names = ["cell", "state", "seconds", "attempts", "reason"]
    return pl.DataFrame(rows, schema=names, orient="row")

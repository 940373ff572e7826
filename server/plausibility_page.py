"""What `server.plausibility` found, as an HTML page, as JSON beside it, and as a table for the terminal."""

from pathlib import Path

from matplotlib.axes import Axes
from rich import box
from rich.markup import escape
from rich.table import Table

from federation import canonical, page
from server import plots
from server.plausibility import Plausibility
from tokenizer import durable

_SHOWN = 30


def write_page(path: Path, found: Plausibility, title: str) -> None:
    """Write the page `path`, and the same as canonical JSON beside it (the page's name with `.json`)."""
    durable.write_bytes(path.with_suffix(".json"), canonical.encode(found))
    durable.write_bytes(path, render(found, title).encode())


def render(found: Plausibility, title: str) -> str:
    """Give the HTML page."""
    environment = page.environment(Path(__file__).parent / "templates")
    environment.filters["figure"] = _show
    template = environment.get_template("plausibility.html.j2")
    return template.render(found=found, title=title, pictures=_pictures(found), shown=_SHOWN)


def table(found: Plausibility) -> Table:
    """Give the figures as a table for a terminal."""
    told = Table(title=f"{found.trajectories} trajectories beside {found.spans} recorded spans", box=box.SIMPLE_HEAD)
    for heading in ("", "recorded", "generated", "unit"):
        told.add_column(heading, justify="right" if heading.endswith("ed") else "left")
    for each in found.findings:
        told.add_row(*map(escape, (each.name, _show(each.real), _show(each.generated), each.unit)))
    return told


def _show(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _pictures(found: Plausibility) -> list[str]:
    def prevalence(axes: Axes) -> None:
        real, made = ([max(row[side], 1e-4) for row in found.prevalence] for side in (1, 2))
        axes.plot([1e-4, 1], [1e-4, 1], color=plots.INKS["line"], lw=1)
        axes.plot(real, made, "o", color=plots.INKS["first"], ms=4, alpha=0.7)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("share of recorded spans with the code")
        axes.set_ylabel("share of generated spans")

    drawn = [plots.picture("prevalence", f"Prevalence of {len(found.prevalence)} codes.", 4.1, 4.1, prevalence)]
    for number, (name, (real, made)) in enumerate(found.quantiles.items()):

        def quantiles(
            axes: Axes, name: str = name, real: tuple[float, ...] = real, made: tuple[float, ...] = made
        ) -> None:
            low, high = min(*real, *made), max(*real, *made)
            axes.plot([low, high], [low, high], color=plots.INKS["line"], lw=1)
            axes.plot(real, made, "o-", color=plots.INKS["second"], ms=4, lw=1)
            axes.set_xscale("symlog")
            axes.set_yscale("symlog")
            axes.set_xlabel(f"{name}, recorded")
            axes.set_ylabel("generated, same quantile")

        drawn.append(plots.picture(f"quantiles-{number}", f"Quantiles of {name}.", 4.1, 4.1, quantiles))
    return drawn

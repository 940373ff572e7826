"""How the sites of a federation differ: sizes, what they record, when, and how far apart their codes are.

The distance of two sites is the Jensen-Shannon divergence of their shares of codes, in bits (Lin, IEEE Trans. Inf.
Theory 1991, eq. 4.1): 0 for equal shares, 1 where no code is common.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.axes import Axes

from federation import page
from server import plots
from server.plots import INKS
from simulation.chapters import chapter
from tokenizer import durable
from tokenizer.codebook import BIRTH, DEATH
from tokenizer.events import MedsDataset

_MOST_CHAPTERS = 12
_INKS = ("first", "second", "soft", "ink")
_ICD = r"(?:^|//)ICD10CM//(.+)$"


@dataclass(frozen=True)
class SiteSummary:
    """What a site's records are like.

    Attributes:
        name: of the site.
        patients, events: how many.
        deaths: patients with a recorded death.
        codes: how often each code is recorded.
        chapters: patients with a code of each ICD-10-CM chapter.
        years: patients by the year of their first event.
    """

    name: str
    patients: int
    events: int
    deaths: int
    codes: dict[str, int]
    chapters: dict[str, int]
    years: dict[int, int]


def contrast(sites: Mapping[str, Path]) -> list[SiteSummary]:
    """Summarise the MEDS datasets of sites, one shard at a time.

    Args:
        sites: folders of MEDS datasets by name.

    Raises:
        DataError: a folder is no MEDS dataset.
    """
    return [_summary(name, MedsDataset.open(path)) for name, path in sites.items()]


def divergences(sites: Sequence[SiteSummary]) -> list[list[float]]:
    """Give the Jensen-Shannon divergence of each two sites' shares of codes, in bits."""
    codes = sorted({code for site in sites for code in site.codes})
    counts = np.array([[site.codes.get(code, 0) for code in codes] for site in sites], np.float64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)

    def entropy(p: np.ndarray) -> float:
        return float(-(p[p > 0] * np.log2(p[p > 0])).sum())

    each = [entropy(row) for row in shares]
    return [
        [
            0.0 if a == b else max(0.0, entropy((shares[a] + shares[b]) / 2) - (each[a] + each[b]) / 2)
            for b in range(len(sites))
        ]
        for a in range(len(sites))
    ]


def write_contrast(path: Path, title: str, sites: Sequence[SiteSummary], notes: Sequence[str] = ()) -> None:
    """Write one HTML page that needs no network."""
    environment = page.environment(Path(__file__).parent / "templates")
    distances = divergences(sites)
    pictures = [_sizes(sites), _chapters(sites), _years(sites), _distances(sites, distances)]
    text = environment.get_template("contrast.html.j2").render(
        title=title, sites=sites, notes=notes, pictures=[picture for picture in pictures if picture]
    )
    durable.write_bytes(path, text.encode())


def _summary(name: str, dataset: MedsDataset) -> SiteSummary:
    codes: dict[str, int] = {}
    chapters: dict[str, int] = {}
    years: dict[int, int] = {}
    patients = events = deaths = 0
    for shard in dataset.shards:
        frame = dataset.read(shard).select("subject_id", "time", "code")
        patients += frame["subject_id"].n_unique()
        events += frame.height
        deaths += frame.filter(pl.col("code") == DEATH)["subject_id"].n_unique()
        _add_(codes, frame.filter(~pl.col("code").is_in([BIRTH, DEATH])), pl.col("code"))
        icd = frame.select("subject_id", chapter=chapter(pl.col("code").str.extract(_ICD))).unique()
        _add_(chapters, icd, pl.col("chapter"))
        first = frame.filter(pl.col("code") != BIRTH).group_by("subject_id").agg(pl.col("time").min())
        _add_(years, first, pl.col("time").dt.year())
    return SiteSummary(name, patients, events, deaths, codes, chapters, years)


def _add_(counts: dict, frame: pl.DataFrame, key: pl.Expr) -> None:
    found = frame.select(key=key).drop_nulls().group_by("key", maintain_order=True).len()
    for name, count in found.iter_rows():
        counts[name] = counts.get(name, 0) + count


def _sizes(sites: Sequence[SiteSummary]) -> str:
    def draw(axes: Axes) -> None:
        places = np.arange(len(sites))
        axes.barh(places, [site.patients for site in sites], color=INKS["first"], height=0.6)
        axes.set_yticks(places, [site.name for site in sites])
        axes.invert_yaxis()
        axes.set_xlabel("patients")

    told = "; ".join(f"{site.name} {site.patients}" for site in sites)
    return plots.picture("sizes", f"Patients by site: {told}.", 5.2, 0.9 + 0.32 * len(sites), draw, grid="x")


def _chapters(sites: Sequence[SiteSummary]) -> str:
    """Shares of patients by chapter, as a table of shades: sites by chapters."""
    total: dict[str, int] = {}
    for site in sites:
        for name, count in site.chapters.items():
            total[name] = total.get(name, 0) + count
    names = sorted(sorted(total, key=lambda name: -total[name])[:_MOST_CHAPTERS], key=lambda n: int(n.split()[0]))
    if not names:
        return ""
    shares = [[site.chapters.get(name, 0) / max(site.patients, 1) for name in names] for site in sites]
    return _shades("chapters", "Share of patients with a diagnosis of each ICD-10-CM chapter", sites, names, shares)


def _distances(sites: Sequence[SiteSummary], distances: list[list[float]]) -> str:
    if len(sites) < 2:
        return ""
    names = [site.name for site in sites]
    return _shades("distances", "Divergence of codes, in bits", sites, names, distances)


def _shades(
    name: str, title: str, sites: Sequence[SiteSummary], columns: Sequence[str], table: list[list[float]]
) -> str:
    """A table whose cells are as dark as their number is large, with the numbers where there is room."""
    most = max((number for row in table for number in row), default=0.0) or 1.0

    def draw(axes: Axes) -> None:
        for y, row in enumerate(table):
            for x, number in enumerate(row):
                axes.barh(y, 0.96, left=x - 0.48, height=0.92, color=INKS["first"], alpha=0.05 + 0.6 * number / most)
                if len(sites) <= 12:
                    axes.annotate(f"{number:.2f}", (x, y), ha="center", va="center", fontsize=8, color=INKS["ink"])
        axes.set_yticks(range(len(sites)), [site.name for site in sites])
        axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(sites) - 0.5, -0.5)
        axes.set_title(title, fontsize=11, loc="left")

    told = "; ".join(
        f"{site.name}: " + ", ".join(f"{column} {number:.2f}" for column, number in zip(columns, row, strict=True))
        for site, row in zip(sites, table, strict=True)
        if len(sites) <= 12
    )
    return plots.picture(name, f"{title}. {told}", 2.2 + 0.5 * len(columns), 1.9 + 0.34 * len(sites), draw, grid="x")


def _years(sites: Sequence[SiteSummary]) -> str:
    years = sorted({year for site in sites for year in site.years})
    if len(years) < 2:
        return ""

    def draw(axes: Axes) -> None:
        for number, site in enumerate(sites):
            share = [site.years.get(year, 0) / max(site.patients, 1) for year in years]
            ink, dash = _INKS[number % len(_INKS)], ("-", "--", ":", "-.")[number // len(_INKS) % 4]
            axes.plot(years, share, dash, color=INKS[ink], lw=1.6, label=site.name)
        if len(sites) <= 8:
            axes.legend(frameon=False, fontsize=9)
        axes.set_xlabel("year of the first event")
        axes.set_ylabel("share of patients")

    return plots.picture("years", "Share of patients by the year of their first event, by site.", 5.2, 3.4, draw)

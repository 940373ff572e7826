"""The report of a study: one JSON file, one HTML page, and tables for the terminal, all made from `server.results`.

The page is one file that needs no network: pictures are inline SVG drawn by `server.plots`, colours follow the reader's
light or dark setting, tables have captions and pictures descriptions. `load` and `write_report` make it again from the
JSON file alone.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from federation import canonical, page
from federation.page import show_bytes, show_count
from server import plots
from server.model_card import model_card
from server.results import KINDS, ArmResult, Figure, Question, Report, SiteArm, SiteResult, SiteSummary
from tokenizer import durable
from tokenizer.errors import DataError

_ORDER = ("AUROC", "AUC", "C-index", "AUPRC", "Brier", "ECE", "slope", "intercept", "sensitivity")
LIMITS = (
    "For research, not for the care of patients: this is no medical device.",
    "Intervals are over patients, for models as they were trained. Training again, or at other hospitals, varies more.",
    "Whose record ends before the answer is left out of figures that need one; where that has to do with the outcome, "
    "they are biased. The AUC over time makes up for it, if it has not.",
    "Many groups and figures: of those without any true difference, one in twenty leaves out 0 by chance.",
)
"""What is true of every report."""


@dataclass(frozen=True)
class Step:
    """A stage of a cohort: how many are in it, and who left on the way to the next, by reason."""

    number: int
    what: str
    minus: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Gains:
    """A site's table: its result for each question by name, and for each role the arm that has it, or None."""

    questions: tuple[tuple[str, SiteResult], ...]
    rows: tuple[tuple[str, tuple[SiteArm | None, ...]], ...]


def write_report(path: Path, report: Report) -> None:
    """Write the HTML page `path`, and beside it the same as `report.json` (the page's name with `.json`).

    A study's model gets its card there, too: `model-card.md`.
    """
    durable.write_bytes(path.with_suffix(".json"), canonical.encode(report))
    if report.training:
        durable.write_bytes(path.with_name("model-card.md"), model_card(report, LIMITS).encode())
    durable.write_bytes(path, render(report).encode())


def load(path: Path) -> Report:
    """Read the JSON that `write_report` wrote.

    Raises:
        DataError: the file is missing, or is no report of this version; the field that doesn't fit is named.
    """
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise DataError(f"{path}: can't be read ({problem.strerror}); run the study, or name its folder") from None
    return canonical.decode(Report, data, str(path), DataError)


def render(report: Report) -> str:
    """Give the HTML page."""
    environment = page.environment(Path(__file__).parent / "templates")
    environment.filters.update(number=_show_number, interval=_show_interval, epsilon=show_epsilon, ordered=_ordered)
    pictures = {question.name: plots.question(question) for question in report.questions}
    return environment.get_template("report.html.j2").render(
        report=report,
        pictures=pictures,
        training=plots.training(report.training),
        headlines={question.name: headline(question) for question in report.questions},
        flows={question.name: flow(question, report.sites) for question in report.questions},
        gains=gains(report.questions),
        limits=LIMITS,
        kinds=KINDS,
    )


def flow(question: Question, sites: tuple[SiteSummary, ...] = ()) -> list[Step]:
    """Tell how patients became answers, from all that the sites have down to yes and no.

    Args:
        question: whose cohort it is.
        sites: where the patients are; none where only those who were looked at are known.
    """
    counts, steps = question.counts, []
    trained = [("train the model", sum(site.train for site in sites)), ("tune it", sum(site.tuning for site in sites))]
    if sites:
        steps.append(Step(sum(site.patients for site in sites), "patients of all sites", tuple(trained)))
    left = tuple((f"not asked: {reason}", number) for reason, number in sorted(counts.excluded.items()) if number)
    lost = (("no answer: the record ends before it", counts.censored),) if counts.censored else ()
    return [
        *steps,
        Step(counts.patients, "held-out patients looked at" if sites else "patients looked at", left),
        Step(counts.predictions, "predictions", lost),
        Step(counts.positive + counts.negative, f"answers of {show_count(question.patients)} patients: "
             f"{show_count(counts.positive)} yes, {show_count(counts.negative)} no"),
    ]  # fmt: skip


def gains(questions: tuple[Question, ...]) -> Mapping[str, Gains]:
    """Lay out what every site gains, a table each: a row for everything that it could have, a column per question."""
    names = dict.fromkeys(result.site for question in questions for result in question.by_site if result.arms)
    tables = {}
    for name in names:
        found = tuple((q.name, result) for q in questions for result in q.by_site if result.site == name)
        roles = dict.fromkeys(arm.role for _, result in found for arm in result.arms)
        if not set(roles) - {"global", "true risk"}:
            continue
        rows = tuple(
            (role, tuple(next((arm for arm in result.arms if arm.role == role), None) for _, result in found))
            for role in roles
        )
        tables[name] = Gains(found, rows)
    return tables


def question_table(question: Question) -> Table:
    """Give a question's answers as a table for a terminal."""
    counts = question.counts
    title = f"{question.question}\n{counts.positive} yes, {counts.negative} no; {question.patients} held-out patients"
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    # As wide as a terminal of 80 columns; the page has the rest.
    table.add_column("", overflow="fold", max_width=20)
    for heading in ("AUROC (95 %)", f"minus {question.reference}", "AUPRC", "Brier"):
        table.add_column(escape(heading), justify="right", no_wrap=True)
    for arm in question.arms:
        numbers = (_show_number(figure, False) for figure in (arm.auprc, arm.brier))
        difference = (
            "reference" if arm.difference is None else show_figure(arm.difference, signed=True).replace(" to ", ", ")
        )
        cells = (arm.arm, show_figure(arm.auroc), difference, *numbers)
        style = {"federated": "bold", "truth": "italic"}.get(arm.kind, "")
        table.add_row(*map(escape, cells), style=style)
    return table


def terminal_tables(report: Report) -> list[Table]:
    """Give the results as tables for a terminal: one for each question, one of the sites."""
    table = Table(title="Sites", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold", max_width=30)
    private = any(site.epsilon is not None for site in report.sites)
    for heading in ("patients", "train", "tuning", "held out", "epsilon" if private else "tokens", "sent"):
        table.add_column(heading, justify="right", no_wrap=True)
    for site in report.sites:
        sent = sum(row.bytes_sent for row in report.outbound if row.site == site.name)
        numbers = (show_count(n) for n in (site.patients, site.train, site.tuning, site.held_out))
        last = show_epsilon(site.epsilon) if private else show_count(site.tokens)
        table.add_row(escape(site.name + (f" ({site.note})" if site.note else "")), *numbers, last, show_bytes(sent))
    return [*map(question_table, report.questions), table]


def headline(question: Question) -> str:
    """Say the main result in a sentence or two."""
    by_kind: dict[str, list[ArmResult]] = {}
    for arm in question.arms:
        if arm.auroc.value is not None:
            by_kind.setdefault(arm.kind, []).append(arm)
    if "federated" not in by_kind:
        return "No ranking can be measured: " + (question.arms[0].auroc.note if question.arms else "no arm") + "."
    federated = by_kind["federated"][0]
    who = "The federated model" if federated.arm == "federated" else "The model"
    said = [f"{who} ranks patients with an AUROC of {show_figure(federated.auroc)}"]
    if "alone" in by_kind:
        best = max(by_kind["alone"], key=lambda arm: arm.auroc.value or 0.0)
        said.append(f"the best single site reaches {show_figure(best.auroc)} ({best.arm})")
    if "pooled" in by_kind:
        said.append(f"all records pooled give {show_figure(by_kind['pooled'][0].auroc)}")
    if "truth" in by_kind:
        said.append(f"the true risks themselves score {show_figure(by_kind['truth'][0].auroc)}: nothing can do better")
    return "; ".join(said) + "."


def show_epsilon(epsilon: float | None) -> str:
    """Write what a site's patients were charged, rounded up."""
    return "–" if epsilon is None else f"{math.ceil(epsilon * 1000) / 1000:.3f}"


def show_figure(figure: Figure | None, *, signed: bool = False) -> str:
    """Write a figure with its interval: `0.812 (0.774–0.848)`; with signs `−0.012 (−0.031 to +0.008)`."""
    if figure is None or figure.value is None:
        return "–"
    interval = _show_interval(figure, signed)
    return f"{_show_number(figure, signed)} ({interval})" if interval else _show_number(figure, signed)


def _ordered(names: Iterable[str]) -> list[str]:
    """Names of figures in the order of tables: a report that was read again has them in another."""
    ranks = {name: rank for rank, name in enumerate(_ORDER)}
    return sorted(names, key=lambda name: (ranks.get(name.split(" at ")[0], len(ranks)), name))


def _show_number(figure: Figure, signed: bool) -> str:
    return "–" if figure.value is None else _decimals(figure.value, signed)


def _show_interval(figure: Figure, signed: bool) -> str:
    if figure.low is None or figure.high is None:
        return ""
    between = " to " if signed else "–"
    return _decimals(figure.low, signed) + between + _decimals(figure.high, signed)


def _decimals(number: float, signed: bool) -> str:
    return f"{number:+.3f}".replace("-", "−") if signed else f"{number:.3f}"

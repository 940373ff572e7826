"""What a site's privacy budget was spent on, and what is left, for a person to read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import TYPE_CHECKING

from client.budget import Budget, Charge, Limit, State
from federation.accountant import (
    NEIGHBOURS,
    UNIT,
    Across,
    Approximate,
    DiscreteGaussian,
    Gaussian,
    Laplace,
    Mechanism,
    Skellam,
    across,
    epsilon,
    epsilon_rdp,
    merged,
)

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Line:
    """All releases of one run and purpose.

    Attributes:
        rounds: How many releases.
        waiting: Of these, how many are reserved only.
        freed: How many reservations were given up besides, and cost nothing.
        first, last: When they were charged, UTC, ISO 8601.
        mechanisms: What ran, in words.
        epsilon: Of these releases alone.
    """

    purpose: str
    run: str
    rounds: int
    waiting: int
    freed: int
    first: str
    last: str
    mechanisms: tuple[str, ...]
    epsilon: float


@dataclass(frozen=True)
class BudgetReport:
    """What a site has spent.

    Attributes:
        delta: At which all figures of epsilon are told.
        epsilon, epsilon_rdp: Of everything together: the figure, and the one by Rényi divergences alone.
        limit: The most that may be spent, if the site says so.
        left: The limit's epsilon less what is spent: at least so much more may be released.
        lines: By run and purpose; their figures don't add up, as composition costs less than the sum.
    """

    unit: str
    neighbours: str
    delta: float
    epsilon: float
    epsilon_rdp: float
    limit: Limit | None
    left: float | None
    lines: tuple[Line, ...]


def report(budget: Budget, delta: float | None = None) -> BudgetReport:
    """Read the ledger.

    Args:
        budget: An open ledger.
        delta: At which delta; the limit's if there is one, else 1e-6.
    """
    at, charges = budget.delta(delta), budget.charges()
    mechanisms = _mechanisms(charges)
    cost = epsilon(mechanisms, at)
    limit = budget.limit
    left = None if limit is None else max(0.0, limit.epsilon - epsilon(mechanisms, limit.delta))
    ordered = sorted(charges, key=_kind)
    lines = tuple(_line(list(group), at) for _, group in groupby(ordered, key=_kind))
    return BudgetReport(UNIT, NEIGHBOURS, at, cost, epsilon_rdp(mechanisms, at), limit, left, lines)


def of_sites(budgets: Sequence[Budget], delta: float | None = None) -> Across:
    """What several sites' releases cost a patient of one of them, and one of all."""
    return across([budget.mechanisms() for budget in budgets], budgets[0].delta(delta))


def reservations(charges: Iterable[Charge], run: str = "") -> list[Charge]:
    """Those of runs that are reserved and were never charged; of one run, by the beginning of its hash, or of all."""
    return [
        each
        for each in charges
        if each.state == State.RESERVED and each.release.purpose != "survey" and each.release.run.startswith(run)
    ]


def table_of_reservations(found: Sequence[Charge], delta: float) -> "RenderableType":
    """What is reserved, since when, and what it would give back, for a terminal."""
    from rich.table import Table

    table = Table(
        title=f"Reserved and not charged; epsilon alone, at delta {delta:g}",
        caption="A round that is still open is reserved, too: while its run goes on, nothing needs to be done.",
        caption_justify="left",
    )
    for name in ("what", "run", "round", "last asked for (UTC)"):
        table.add_column(name)
    table.add_column("epsilon", justify="right")
    for charge in found:
        release, cost = charge.release, epsilon(charge.release.mechanisms.all, delta)
        table.add_row(release.purpose, release.run[:16], str(release.round), _when(charge.at)[:16], f"{cost:.3f}")
    return table


def describe(mechanism: Mechanism) -> str:
    """A mechanism in words.

    >>> describe(Gaussian(1.1, 0.01, 400))
    '400 steps of Gaussian noise 1.1, sampling rate 0.01'
    """
    times = f"{mechanism.steps:,} {'step' if mechanism.steps == 1 else 'steps'} of "
    match mechanism:
        case Gaussian(noise, rate):
            return f"{times}Gaussian noise {noise:g}, sampling rate {rate:g}"
        case Laplace(noise):
            return f"{times}Laplace noise {noise:g}"
        case DiscreteGaussian(variance, l2, shares):
            return f"{times}discrete Gaussian noise of variance {variance:g} from {shares}, L2 sensitivity {l2:g}"
        case Skellam(variance, l1, l2):
            return f"{times}Skellam noise of variance {variance:g}, sensitivities {l1:g} (L1) and {l2:g} (L2)"
        case Approximate(cost, failing):
            return f"{times}({cost:g}, {failing:g})-DP"


def tables(found: BudgetReport) -> "list[RenderableType]":
    """The report for a terminal."""
    from rich.table import Table

    table = Table(title="Private releases")
    for name in ("what", "run", "releases", "when (UTC)"):
        table.add_column(name)
    table.add_column("epsilon alone", justify="right")
    for line in found.lines:
        also = [f"{number} {how}" for number, how in ((line.waiting, "reserved"), (line.freed, "freed")) if number]
        waiting = f" ({', '.join(also)})" if also else ""
        when = line.first[:16] if line.first[:16] == line.last[:16] else f"{line.first[:16]} to {line.last[:16]}"
        table.add_row(line.purpose, line.run[:16], f"{line.rounds}{waiting}", when, f"{line.epsilon:.3f}")
        for words in line.mechanisms:
            table.add_row("", "", f"[dim]{words}[/]")
    spent = (
        f"spent: epsilon {found.epsilon:.3f} at delta {found.delta:g} ({found.epsilon_rdp:.3f} by Rényi divergences)"
    )
    if found.limit is None:
        left = "no limit was given"
    else:
        left = f"limit: epsilon {found.limit.epsilon:g} at delta {found.limit.delta:g}; left: at least {found.left:.3f}"
    return [table, spent, left, f"[dim]unit: {found.unit}; neighbours: {found.neighbours}[/]"]


def _kind(charge: Charge) -> tuple[str, str]:
    return charge.release.purpose, charge.release.run


def _line(charges: list[Charge], delta: float) -> Line:
    mechanisms = _mechanisms(charges)
    release, times = charges[0].release, [charge.at for charge in charges]
    return Line(
        purpose=release.purpose,
        run=release.run,
        rounds=sum(charge.state != State.FREED for charge in charges),
        waiting=sum(charge.state == State.RESERVED for charge in charges),
        freed=sum(charge.state == State.FREED for charge in charges),
        first=_when(min(times)),
        last=_when(max(times)),
        mechanisms=tuple(describe(each) for each in merged(mechanisms)),
        epsilon=epsilon(mechanisms, delta),
    )


def _mechanisms(charges: Iterable[Charge]) -> list[Mechanism]:
    counted = (charge for charge in charges if charge.state != State.FREED)
    return [each for charge in counted for each in charge.release.mechanisms.all]


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")

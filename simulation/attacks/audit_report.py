"""The report of an audit: one HTML page that needs no network, and the same as JSON beside it."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from rich.text import Text

from federation import canonical, page
from server import plots
from server.plots import INKS
from server.results import Figure
from simulation.attacks import audit_words
from simulation.attacks.membership import FALSE_ALARM_RATES
from simulation.attacks.memory import Repetition
from simulation.attacks.verdict import Audit, Canaries, Claim, Target
from tokenizer import durable


def write_audit(path: Path, audit: Audit) -> None:
    """Write the page, and beside it the same as JSON (the page's name with `.json`)."""
    durable.write_bytes(path.with_suffix(".json"), canonical.encode(audit))
    durable.write_bytes(path, render(audit).encode())


def summary(audit: Audit) -> list[Text]:
    """Give the findings for a terminal, a paragraph each."""
    said = [Text(audit_words.headline(audit), "bold red" if audit.alarm else "bold")]
    if audit.canaries is not None:
        said.append(Text(" ".join(audit_words.of_canaries(audit.canaries, audit.claim))))
    if audit.releases is not None:
        said.append(Text(" ".join(audit_words.of_releases(audit.releases, audit.claim))))
    for target in audit.targets:
        said += [Text(f"{target.name}. {audit_words.of_membership(target, attack)}") for attack in target.attacks]
    said += [Text(words) for words in [audit_words.of_courses(audit.planted)] if words]
    if audit.rare is not None:
        said.append(Text(audit_words.of_rare(audit.rare)))
    return said + [Text(audit_words.of_stage(stage)) for stage in audit.stages]


def render(audit: Audit) -> str:
    """Give the HTML page."""
    environment = page.environment(Path(__file__).parent / "templates")
    environment.filters.update(figure=_figure, share_figure=_share)
    pictures = {}
    if audit.canaries is not None:
        pictures["epsilon"] = _epsilon(audit.canaries.bound.epsilon, audit.canaries.provable, audit.claim)
        pictures["scores"] = _scores(audit.canaries)
    if (told := audit.releases) is not None:
        pictures["epsilon"] = _epsilon(told.epsilon, told.provable, audit.claim)
    if audit.planted:
        pictures["courses"] = _courses(audit.planted)
    return environment.get_template("audit.html.j2").render(
        audit=audit,
        words=audit_words,
        pictures=pictures,
        curves=[_curves(number, target) for number, target in enumerate(audit.targets)],
        rates=FALSE_ALARM_RATES,
    )


def _epsilon(shown: float, provable: float, claim: Claim | None) -> str:
    """What is claimed and what is proved, on one line of epsilon."""

    def draw(axes: Axes) -> None:
        top = 1.1 * max(provable, claim.epsilon if claim else 0.0, 1.0)
        axes.plot([shown, top], [0, 0], color=INKS["line"], lw=10, solid_capstyle="butt")
        axes.plot([0, shown], [0, 0], color=INKS["second"], lw=10, solid_capstyle="butt")
        axes.annotate(
            f"shown: at least {shown:.2f}", (shown, 0), (0, -20), textcoords="offset points",
            ha="left" if shown < top / 2 else "right", color=INKS["second"],
        )  # fmt: skip
        axes.axvline(provable, color=INKS["soft"], lw=1, ls=(0, (2, 3)))
        axes.annotate(
            "most that could be shown", (provable, 0.9), (-4, 0), textcoords="offset points", ha="right",
            va="top", color=INKS["soft"],
        )  # fmt: skip
        if claim is not None:
            axes.axvline(claim.epsilon, color=INKS["first"], lw=2)
            left = claim.epsilon < top / 2
            axes.annotate(
                f"claimed: at most {claim.epsilon:.2f}", (claim.epsilon, 0.35), (5 if left else -5, 0),
                textcoords="offset points", ha="left" if left else "right", color=INKS["first"],
            )  # fmt: skip
        axes.set_xlim(0, top)
        axes.set_ylim(-1, 1)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("epsilon")

    claimed = f", claimed {claim.epsilon:.2f}" if claim else ", nothing claimed"
    return plots.picture("epsilon", f"Epsilon: shown at least {shown:.2f}{claimed}.", 6.4, 1.7, draw, grid="x")


def _scores(found: Canaries) -> str:
    """Histograms of the scores of canaries that were in and out."""
    both = [np.array(found.inside), np.array(found.outside)]
    everything = np.concatenate(both)

    def draw(axes: Axes) -> None:
        edges = np.linspace(everything.min(), everything.max() + 1e-9, 25).tolist()
        for scores, ink, name in zip(both, ("second", "first"), ("in the training", "left out"), strict=True):
            axes.hist(scores, edges, color=INKS[ink], alpha=0.55, label=name)
        axes.legend(frameon=False, fontsize=10)
        axes.set_xlabel("loss before less loss after training (nats a token)")
        axes.set_ylabel("canaries")

    means = [float(scores.mean()) if len(scores) else 0.0 for scores in both]
    told = f"Scores of canaries: mean {means[0]:.2f} in the training, {means[1]:.2f} left out."
    return plots.picture("scores", told, 4.6, 3.2, draw, grid="y")


def _curves(number: int, target: Target) -> str:
    """ROC curves with logarithmic axes: what matters is at few false alarms."""
    shown = [attack for attack in target.attacks if attack.roc[0]]
    if not shown:
        return ""
    least = 0.5 / max(max(attack.members, attack.others) for attack in shown)

    def draw(axes: Axes) -> None:
        axes.plot([least, 1], [least, 1], color=INKS["line"], lw=1)
        for attack, ink in zip(shown, ("first", "second"), strict=False):
            x, y = (np.maximum(part, least) for part in attack.roc)
            axes.plot(x, y, color=INKS[ink], lw=1.8, label=f"by {attack.attack}", drawstyle="steps-post")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(least, 1.05)
        axes.set_ylim(least, 1.05)
        axes.minorticks_off()
        ticks = [10.0**power for power in range(-4, 1) if 10.0**power >= least]
        axes.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
        axes.set_yticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
        axes.legend(frameon=False, fontsize=10, loc="upper left")
        axes.set_xlabel("others taken for members")
        axes.set_ylabel("members found")

    areas = "; ".join(f"by {attack.attack} AUROC {attack.auroc.value:.3f}" for attack in shown)
    return plots.picture(f"membership-{number}", f"Members found against false alarms: {areas}.", 4.1, 4.1, draw)


def _courses(planted: tuple[Repetition, ...]) -> str:
    """Exposure by how many patients had a course."""

    def draw(axes: Axes) -> None:
        for place, each in enumerate(planted):
            ink = INKS["first" if each.patients else "soft"]
            value, low, high = (x or 0.0 for x in (each.exposure.value, each.exposure.low, each.exposure.high))
            axes.plot([place, place], [low, high], color=ink, lw=2)
            axes.plot([place], [value], "o", color=ink, ms=7)
        axes.axhline(1 / np.log(2), color=INKS["ink"], lw=1, ls=(0, (2, 3)))
        axes.axhline(planted[0].highest, color=INKS["soft"], lw=1, ls=(0, (2, 3)))
        axes.set_xticks(range(len(planted)), [str(each.patients) for each in planted])
        axes.set_xlim(-0.5, len(planted) - 0.5)
        axes.set_ylim(0, planted[0].highest * 1.08)
        axes.set_xlabel("patients who had the course")
        axes.set_ylabel("exposure (bits)")

    told = "; ".join(f"{each.patients} patients {each.exposure.value:.1f} bits" for each in planted)
    return plots.picture("courses", f"Exposure of planted courses: {told}.", 4.6, 3.2, draw, grid="y")


def _figure(figure: Figure, digits: int = 3) -> str:
    if figure.value is None:
        return "–"
    if figure.low is None or figure.high is None:
        return f"{figure.value:.{digits}f}"
    return f"{figure.value:.{digits}f} ({figure.low:.{digits}f}–{figure.high:.{digits}f})"


def _share(figure: Figure) -> str:
    if figure.value is None or figure.low is None or figure.high is None:
        return "–"
    return f"{100 * figure.value:.1f} % ({100 * figure.low:.1f}–{100 * figure.high:.1f})"

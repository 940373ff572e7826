"""Pictures of a report, as SVG to be put into a page.

Matplotlib draws them; then fixed colours become CSS variables, so that they follow the page's light or dark setting,
text stays text in the page's own font, and ids get the picture's name, so that many pictures fit in one page. Equal
input gives equal bytes.
"""

import io
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

if TYPE_CHECKING:
    from server.results import ArmResult, Question, Scorecard, Training

# Stand-ins that matplotlib draws with, and the CSS variables that take their place.
_INK, _SOFT, _LINE = "#010101", "#020202", "#030303"
_COLOURS = {
    "federated": "#040404",
    "pooled": "#050505",
    "ensemble": "#060606",
    "alone": "#070707",
    "supervised": "#080808",
    "personal": "#090909",
    "truth": _INK,
}
_VARIABLES = {_INK: "ink", _SOFT: "soft", _LINE: "line"} | {
    colour: f"arm-{kind}" for kind, colour in _COLOURS.items() if kind != "truth"
}
INKS = {
    "ink": _INK, "soft": _SOFT, "line": _LINE, "first": _COLOURS["federated"], "second": _COLOURS["alone"],
    "third": _COLOURS["pooled"], "fourth": _COLOURS["ensemble"], "fifth": _COLOURS["supervised"],
}  # fmt: skip
_MARKERS = {
    "federated": "o",
    "pooled": "s",
    "ensemble": "D",
    "alone": "v",
    "personal": "^",
    "supervised": "P",
    "truth": "*",
}
_WIDTHS = {
    "federated": 2.4,
    "pooled": 1.6,
    "ensemble": 1.6,
    "alone": 1.0,
    "personal": 1.2,
    "supervised": 1.2,
    "truth": 1.4,
}
_SIDE = 4.1


def question(question: "Question") -> dict[str, str]:
    """Draw a question: `forest`, `roc`, `calibration` and `decision`, each an `<svg>` element or empty."""
    name = re.sub(r"[^a-z0-9]+", "-", question.name.lower())
    measured = [arm for arm in question.arms if arm.auroc.value is not None]
    if not measured:
        return {"forest": "", "roc": "", "calibration": "", "decision": ""}
    return {
        "forest": _forest(measured, f"forest-{name}"),
        "roc": _roc(measured, f"roc-{name}"),
        "calibration": _calibration(measured, f"calibration-{name}"),
        "decision": "" if question.score is None else _decision(question.score, f"decision-{name}"),
    }


def training(curves: Sequence["Training"]) -> str:
    """Draw the loss of every arm by round; an `<svg>` element, or empty when there is nothing to draw."""
    curves = [curve for curve in curves if curve.rounds]
    if not curves:
        return ""
    with _style():
        canvas, axes = _axes(_SIDE * 1.4, 3.6)
        for curve in reversed(curves):
            colour = _COLOURS[curve.kind]
            axes.plot(curve.rounds, curve.loss, color=colour, lw=_WIDTHS[curve.kind], zorder=3)
            if curve.best in curve.rounds:
                loss = curve.loss[curve.rounds.index(curve.best)]
                axes.plot([curve.best], [loss], _MARKERS[curve.kind], color=colour, ms=6, zorder=4)
        axes.set_xlabel("round")
        axes.set_ylabel("loss on tuning patients (nats a token)")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        ends = "; ".join(f"{curve.arm} {min(curve.loss):.3f} in round {curve.best}" for curve in curves)
        return _svg(canvas, "training", f"Loss on tuning patients by round. Best: {ends}.")


def picture(
    name: str, described: str, width: float, height: float, draw: Callable[[Axes], None], grid: str = "both"
) -> str:
    """Draw a picture of another page in the same style.

    Args:
        name: goes into the ids of its parts; no other picture of the page may have it.
        described: for who can't see it.
        width, height: in inches.
        draw: draws it, in the colours of `INKS`.
        grid: lines along both axes, or `x`, or `y`.

    Returns:
        An `<svg>` element whose colours are the page's variables `ink`, `soft`, `line`, `arm-federated`, `arm-alone`,
        `arm-pooled`, `arm-ensemble`, `arm-personal`, `arm-supervised`.
    """
    with _style():
        canvas, axes = _axes(width, height, grid)
        draw(axes)
        for axis in (axes.xaxis, axes.yaxis):
            # Text is the page's, which knows no mathematical notation.
            if isinstance(axis.get_major_formatter(), matplotlib.ticker.LogFormatterMathtext):
                low, high = axis.get_view_interval()
                between = (2.0, 5.0) if high < 100 * low else ()  # else there is no room for them
                axis.set_major_formatter(_short)
                axis.set_minor_locator(matplotlib.ticker.LogLocator(subs=between))
                axis.set_minor_formatter(_short)
        return _svg(canvas, name, described)


def _short(value: float, _: object) -> str:
    return f"{value:g}" if value < 1000 else matplotlib.ticker.EngFormatter()(value)


def _forest(arms: Sequence["ArmResult"], name: str) -> str:
    with _style():
        canvas, axes = _axes(_SIDE, 0.9 + 0.36 * len(arms), grid="x")
        for place, arm in enumerate(arms):
            value, colour = arm.auroc.value or 0.0, _COLOURS[arm.kind]
            if arm.auroc.low is not None and arm.auroc.high is not None:
                axes.plot([arm.auroc.low, arm.auroc.high], [place, place], color=colour, lw=_WIDTHS[arm.kind])
            axes.plot([value], [place], _MARKERS[arm.kind], color=colour, ms=7)
            if arm.kind == "truth":
                axes.axvline(value, color=_INK, lw=1, ls=(0, (2, 3)), zorder=0)
        axes.set_yticks(range(len(arms)), [arm.arm for arm in arms])
        axes.set_ylim(len(arms) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0, labelcolor=_INK)
        axes.set_xlabel("AUROC, 95 % interval over patients")
        said = "; ".join(f"{arm.arm} {arm.auroc.value:.3f}" for arm in arms)
        return _svg(canvas, name, f"AUROC of every arm with its interval. {said}.")


def _roc(arms: Sequence["ArmResult"], name: str) -> str:
    with _style():
        canvas, axes = _axes(_SIDE, _SIDE)
        axes.plot([0, 1], [0, 1], color=_LINE, lw=1)
        for arm in reversed(arms):
            style: Any = (0, (3, 2)) if arm.kind == "truth" else "-"
            axes.plot(*arm.roc, color=_COLOURS[arm.kind], lw=_WIDTHS[arm.kind], ls=style)
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(-0.01, 1.01)
        axes.set_xlabel("false positive rate")
        axes.set_ylabel("true positive rate")
        return _svg(canvas, name, f"ROC curves of {_listed(arms)}.")


def _calibration(arms: Sequence["ArmResult"], name: str) -> str:
    with _style():
        canvas, axes = _axes(_SIDE, _SIDE)
        shown = [arm for arm in arms if arm.kind not in ("alone", "personal", "supervised")]
        bins = [arm.calibration for arm in shown or arms]
        top = min(1.0, 1.08 * max(max(*bin_.predicted, *bin_.observed) for bin_ in bins))
        axes.plot([0, top], [0, top], color=_LINE, lw=1)
        for arm in reversed(shown or arms):
            bins_, colour = arm.calibration, _COLOURS[arm.kind]
            if arm.kind == "federated":
                for x, low, high in zip(bins_.predicted, bins_.low, bins_.high, strict=True):
                    axes.plot([x, x], [low, high], color=colour, lw=1)
            style: Any = (0, (3, 2)) if arm.kind == "truth" else "-"
            marker = "none" if arm.kind == "truth" else _MARKERS[arm.kind]
            width = 0.6 * _WIDTHS[arm.kind]
            axes.plot(bins_.predicted, bins_.observed, marker=marker, ls=style, color=colour, lw=width, ms=4.5)
        axes.set_xlim(-0.02 * top, top)
        axes.set_ylim(-0.02 * top, top)
        axes.set_xlabel("predicted risk")
        axes.set_ylabel("observed share")
        return _svg(canvas, name, f"Observed share against predicted risk of {_listed(shown or arms)}.")


def _decision(score: "Scorecard", name: str) -> str:
    with _style():
        canvas, axes = _axes(_SIDE, _SIDE)
        top = max(*score.net_benefit, *score.treat_all, 0.0) or 0.01
        axes.axhline(0, color=_LINE, lw=1)
        axes.plot(score.thresholds, score.treat_all, color=_SOFT, lw=1.2, ls=(0, (3, 2)))
        axes.plot(score.thresholds, score.net_benefit, color=_COLOURS["federated"], lw=2)
        axes.set_ylim(-0.25 * top, 1.08 * top)
        axes.set_xlim(0, 1)
        axes.set_xlabel("threshold on the risk")
        axes.set_ylabel("net benefit (dashed: treat all)")
        worth = [t for t, ours, all_ in zip(score.thresholds, score.net_benefit, score.treat_all, strict=True)
                 if ours > max(all_, 0.0)]  # fmt: skip
        said = f"Above treating all and nobody at {len(worth)} of {len(score.thresholds)} thresholds"
        said += f", from {worth[0]:.2f} to {worth[-1]:.2f}." if worth else "."
        return _svg(canvas, name, f"Net benefit by threshold, of the model and of treating all. {said}")


def _listed(arms: Sequence["ArmResult"]) -> str:
    return ", ".join(arm.arm for arm in arms)


def _style() -> AbstractContextManager[None]:
    return mpl.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "fedcomet",
            "text.parse_math": False,
            "font.size": 11,
            "axes.edgecolor": _LINE,
            "axes.labelcolor": _SOFT,
            "xtick.color": _SOFT,
            "ytick.color": _SOFT,
            "text.color": _INK,
        }
    )


def _axes(width: float, height: float, grid: str = "both") -> tuple[Canvas, Axes]:
    canvas = Canvas(figsize=(width, height), layout="constrained")
    canvas.patch.set_alpha(0)
    axes = canvas.add_subplot()
    axes.patch.set_alpha(0)
    axes.grid(visible=True, axis=grid, color=_LINE, lw=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)
    return canvas, axes


def _svg(canvas: Canvas, name: str, described: str) -> str:
    """Write the picture as an element that fits its page."""
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    width, height = (float(part) for part in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0])
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head = (
        f'<svg role="img" aria-label="{_escaped(described)}" viewBox="0 0 {width:g} {height:g}" '
        f'style="max-width: {width * 4 / 3:.0f}px" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    text = re.sub(r"<svg [^>]*>", head, text, count=1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"font: ([\d.]+)px[^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return "\n".join(line.rstrip() for line in text.splitlines())


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")

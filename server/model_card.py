"""The card of a study's model: what it is, what it learned from, how it did, and what it is not for; in Markdown.

The headings are those of Mitchell et al., "Model cards for model reporting" (FAT* 2019). Figures stand in the front
matter, too, in the form of a `model-index`, which model hubs read.
"""

import json
from collections.abc import Iterator, Sequence

from server.results import Figure, Question, Report

_MODEL = """\
---
library_name: fedcomet
tags:
- medical-events
- federated-learning
{index}---

# {title}

## Model details

{introduction}

{settings}

## Intended use

Research on what generative models of medical events can tell. Not a medical device: not for the care of patients, nor
for decisions about anybody. It answers only for patients like those below; elsewhere it has to be tested first.

## Training data

{sites}

## Evaluation

{questions}

## Privacy

{privacy}

## Limits

{limits}

## To make it again

    {command}

{hashes}
"""
_FIGURES = ("AUROC", "average precision", "Brier score", "calibration error")


def model_card(report: Report, limits: Sequence[str]) -> str:
    """Write the card of a study's federated model.

    Args:
        report: of the study.
        limits: what is true of every report.
    """
    spent = [f"{site.name}: epsilon {site.epsilon:.3f}" for site in report.sites if site.epsilon is not None]
    settings = dict(report.settings)
    return _MODEL.format(
        index="".join(_index(report)),
        title=_plain(report.title),
        introduction=_plain(report.introduction),
        settings=_table(("Setting", ""), report.settings),
        sites=_table(
            ("Site", "patients", "train", "tuning", "held out"),
            [(s.name, s.patients, s.train, s.tuning, s.held_out) for s in report.sites],
        ),
        questions="\n\n".join(_question(question) for question in report.questions) or "None was asked.",
        privacy=_lines([settings.get("Privacy", "not told"), *spent]),
        limits=_lines([*limits, *report.notes]),
        command=_plain(report.command),
        hashes=_table(("", "sha256"), report.hashes),
    )


def _question(question: Question) -> str:
    counts = question.counts
    rows = [
        (arm.arm, *(_figure(figure) for figure in (arm.auroc, arm.auprc, arm.brier, arm.ece))) for arm in question.arms
    ]
    text = f"### {_plain(question.question)}\n\n{counts.positive} yes and {counts.negative} no of {question.patients} "
    text += f"held-out patients; {counts.censored} predictions without an answer. 95 % intervals over patients.\n\n"
    text += _table(("Arm", *_FIGURES), rows)
    if question.score is not None:
        groups = [
            (group.name, group.patients, _figure(group.figures["AUROC"]), _figure(group.difference.get("AUROC")))
            for group in question.score.groups
        ]
        text += "\n\n" + _table(("Group", "patients", "AUROC", "minus that of the others"), groups)
    return text


def _index(report: Report) -> Iterator[str]:
    """The figures of the federated model as hubs read them (YAML; strings are written as JSON, which YAML is)."""
    found = [(q, arm) for q in report.questions for arm in q.arms if arm.arm == q.reference]
    found = [(question, arm) for question, arm in found if arm.auroc.value is not None]
    if not found:
        return
    yield f"model-index:\n- name: {json.dumps(report.name)}\n  results:\n"
    for question, arm in found:
        yield f"  - task:\n      type: other\n      name: {json.dumps(question.question)}\n"
        yield "    dataset:\n      type: other\n      name: held-out patients of all sites\n    metrics:\n"
        for name, figure in zip(_FIGURES, (arm.auroc, arm.auprc, arm.brier, arm.ece), strict=True):
            if figure.value is not None:
                yield f"    - type: {name.lower().replace(' ', '_')}\n      value: {figure.value:.4f}\n"


def _figure(figure: Figure | None) -> str:
    if figure is None or figure.value is None:
        return "–"
    between = f" ({figure.low:.3f} to {figure.high:.3f})" if figure.low is not None and figure.high is not None else ""
    return f"{figure.value:.3f}{between}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(_plain(str(cell)) for cell in line) + " |" for line in lines)


def _lines(texts: Sequence[str]) -> str:
    return "\n".join(f"- {_plain(text)}" for text in texts)


def _plain(text: str) -> str:
    """Text from elsewhere, on one line, that can open neither a cell, a tag nor a link."""
    for letter, told in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("[", "\\["), ("`", "\\`")):
        text = text.replace(letter, told)
    return " ".join(text.split())

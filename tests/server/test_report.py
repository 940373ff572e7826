import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from model import metrics
from model.cohort import Counts
from model.tasks import Task
from server.report import flow, gains, headline, load, render, show_figure, terminal_tables, write_report
from server.results import (
    Codebook,
    Figure,
    Kind,
    Outbound,
    Question,
    Report,
    Round,
    SiteSummary,
    Training,
    ask,
)
from server.scorecard import scorecards
from tests.server.test_scorecard import predictions
from tokenizer.errors import DataError

SITES = ("north", "south")
TASK = Task(
    name="death_90d",
    question="Will the patient die within 90 days?",
    trigger=("HOSPITAL_DISCHARGE",),
    outcome=("MEDS_DEATH",),
    horizon_days=90,
    occurrence="each",
)
KINDS: dict[str, Kind] = {
    "north alone": "alone",
    "true risk": "truth",
    "federated": "federated",
    "pooled": "pooled",
    "south alone": "alone",
    "ensemble": "ensemble",
}


def _question(labels: np.ndarray, *, name: str = TASK.name) -> Question:
    rng = np.random.default_rng(0)
    size = len(labels)
    risks = {arm: np.clip(0.2 + 0.3 * labels + 0.2 * rng.normal(size=size), 0, 1) for arm in KINDS}
    counts = Counts(90, size + 3, int(labels.sum()), int((1 - labels).sum()), 3, {"no trigger in the record": 7})
    return ask(
        replace(TASK, name=name),
        counts,
        labels,
        risks,
        KINDS,
        subjects=np.arange(size) // 2,
        seed=0,
        resamples=200,
        unresolved={"federated": 0.25},
        sites=(SITES, np.arange(size) % 2),
        notes=("A note on the question.",),
    )


def _labels(size: int = 120) -> np.ndarray:
    return (np.random.default_rng(1).random(size) < 0.3).astype(float)


@pytest.fixture(scope="module")
def question() -> Question:
    return _question(_labels())


@pytest.fixture(scope="module")
def report(question: Question) -> Report:
    return Report(
        title="Two hospitals, one model",
        name="demo",
        introduction="Two hospitals trained one model.",
        settings=(("Model", "0.3m"),),
        sites=(SiteSummary("north", 60, 40, 8, 12, 5000), SiteSummary("south", 2, 1, 0, 1, 90, "refused: too few")),
        questions=(question, replace(question, name="again", question="And once more?")),
        training=(
            Training("federated", "federated", (1, 2, 3), (3.0, 2.0, 2.1), 2, 12_000),
            Training("south alone", "alone", (), (), 0, 0, "no patients to train on"),
        ),
        rounds=(Round(1, 2, 0, 5000, 2_000_000, 1.5, 3.0), Round(2, 1, 1, 2500, 1_000_000, 1.0, None, ("south: NaN",))),
        outbound=(Outbound("north", "updates", 2, 2_000_000), Outbound("south", "survey", 1, 300)),
        codebook=Codebook("ab" * 32, {"code": 40, "value": 10}),
        command="fedcomet simulate examples/demo.toml",
        versions=(("Python", "3.11"),),
        hashes=(("study", "cd" * 32),),
        notes=("Nothing here is real.",),
        created="today",
    )


class _Page(HTMLParser):
    """Checks that tags are balanced, and collects ids, links and text."""

    _VOID = frozenset({"meta", "br", "link", "img", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: Counter[str] = Counter()
        self.text: list[str] = []
        self.svgs: list[dict[str, str | None]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self._VOID:
            self.open.append(tag)
        self._note(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        found = dict(attrs)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.links += [found[key] or "" for key in ("href", "xlink:href", "src") if key in found]
        self.svgs += [found] if tag == "svg" else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_json_alone_gives_the_report_and_the_same_page_again(report: Report, tmp_path: Path):
    write_report(tmp_path / "report.html", report)
    again = load(tmp_path / "report.json")
    assert again == report
    write_report(tmp_path / "again.html", again)
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "report.html").read_bytes()


def test_the_page_is_whole_and_loads_nothing(report: Report):
    page = render(report)
    parsed = _Page(page)
    assert [name for name, count in Counter(parsed.ids).items() if count > 1] == []
    assert parsed.links
    assert {link for link in parsed.links if not link.startswith("#")} == set()
    assert {link.removeprefix("#") for link in parsed.links} <= set(parsed.ids)
    assert set(re.findall(r"url\(([^)]*)\)", page)) <= {f"#{name}" for name in parsed.ids}
    assert parsed.tags["script"] == parsed.tags["link"] == parsed.tags["img"] == 0
    assert "@import" not in page


def test_tables_and_pictures_are_described(report: Report):
    page = _Page(render(report))
    assert page.tags["table"] == page.tags["caption"] > 6
    assert len(page.svgs) == 3 * len(report.questions) + 1
    assert all(svg["role"] == "img" and len(svg["aria-label"] or "") > 20 for svg in page.svgs)


def test_colours_of_pictures_follow_the_page(report: Report):
    drawn = " ".join(re.findall(r"<svg.*?</svg>", render(report), flags=re.DOTALL))
    assert "var(--arm-federated)" in drawn
    assert "var(--ink)" in drawn
    assert set(re.findall(r"#[0-9a-f]{6}", drawn)) == set()


def test_the_page_says_what_it_should(report: Report):
    said = " ".join(" ".join(_Page(render(report)).text).split())
    for phrase in (
        "And once more?",
        "bootstrap over patients, 200 resamples",
        "not asked: no trigger in the record",
        "25.0 %",
        "south: NaN",
        "no patients to train on",
        "refused: too few",
        "fedcomet simulate examples/demo.toml",
        "A note on the question.",
        "cd" * 32,
    ):
        assert phrase in said


def test_names_from_elsewhere_cannot_change_the_page(report: Report):
    evil = '<script>alert("$x_1$")</script> & "co"'
    arms = tuple(replace(arm, arm=evil if arm.arm == "pooled" else arm.arm) for arm in report.questions[0].arms)
    by_site = tuple(
        replace(site, arms=tuple(replace(arm, role=evil if arm.arm == "pooled" else arm.role) for arm in site.arms))
        for site in report.questions[0].by_site
    )
    changed = replace(
        report, title=evil, questions=(replace(report.questions[0], name=evil, arms=arms, by_site=by_site),)
    )
    page = _Page(render(changed))
    assert page.tags["script"] == 0
    assert any(evil in (svg["aria-label"] or "") for svg in page.svgs)
    assert evil in "".join(page.text)


def test_arms_come_in_a_fixed_order_and_are_compared_with_the_federated_one(question: Question):
    assert [arm.arm for arm in question.arms] == [
        "federated", "pooled", "ensemble", "north alone", "south alone", "true risk",
    ]  # fmt: skip
    assert question.reference == "federated"
    assert [arm.arm for arm in question.arms if arm.difference is None] == ["federated"]
    assert question.definition[0] == ("Asked at", "every HOSPITAL_DISCHARGE")


def test_figures_are_those_of_the_metrics(question: Question):
    labels = _labels()
    rng = np.random.default_rng(0)
    risks = {arm: np.clip(0.2 + 0.3 * labels + 0.2 * rng.normal(size=len(labels)), 0, 1) for arm in KINDS}
    for arm in question.arms:
        assert arm.auroc.value == pytest.approx(metrics.auroc(labels, risks[arm.arm]))
        assert arm.brier.value == pytest.approx(metrics.brier(labels, risks[arm.arm]))
    south = question.by_site[1]
    assert (south.site, south.predictions, south.positives) == ("south", 60, int(labels[1::2].sum()))
    here = {arm.arm: arm for arm in south.arms}
    assert here["pooled"].auroc.value == pytest.approx(metrics.auroc(labels[1::2], risks["pooled"][1::2]))


def test_every_site_has_a_table_of_what_it_could_have_and_gains(question: Question):
    tables = gains((question, replace(question, name="again")))
    assert list(tables) == ["north", "south"]
    south = tables["south"]
    assert [name for name, _ in south.questions] == ["death_90d", "again"]
    assert [role for role, _ in south.rows] == ["global", "pooled", "ensemble", "alone", "true risk"]
    found = {role: cells[0] for role, cells in south.rows}
    mine, alone = found["global"], found["alone"]
    assert mine is not None
    assert alone is not None
    assert alone.arm == "south alone"
    assert alone.gain is None
    assert mine.gain is not None
    assert (mine.auroc.value or 0) - (alone.auroc.value or 0) == pytest.approx(mine.gain.value)


def test_supervised_and_personal_arms_are_named_by_what_they_are_to_the_site():
    labels = _labels()
    kinds: dict[str, Kind] = {
        "federated": "federated", "a personal": "personal", "b personal": "personal", "trees, a": "supervised",
        "trees, b": "supervised", "trees, pooled": "supervised",
    }  # fmt: skip
    counts = Counts(60, 120, int(labels.sum()), int((1 - labels).sum()), 0, {})
    risks = {arm: np.linspace(0, 1, 120) for arm in kinds}
    options = {"subjects": np.arange(120), "seed": 0, "resamples": 100, "sites": (("a",), np.zeros(120, np.int64))}
    (site,) = ask(TASK, counts, labels, risks, kinds, **options).by_site  # type: ignore[arg-type]
    assert {arm.role: arm.arm for arm in site.arms} == {
        "global": "federated", "personal": "a personal", "trees, local": "trees, a", "trees, pooled": "trees, pooled",
    }  # fmt: skip


def test_a_cohort_is_followed_from_all_patients_to_the_answers(question: Question, report: Report):
    steps = flow(question, report.sites)
    assert [(step.number, step.what.split(" of")[0]) for step in steps] == [
        (62, "patients"), (90, "held-out patients looked at"), (123, "predictions"), (120, "answers"),
    ]  # fmt: skip
    assert steps[0].minus == (("train the model", 41), ("tune it", 8))
    assert steps[1].minus == (("not asked: no trigger in the record", 7),)
    assert steps[2].minus == (("no answer: the record ends before it", 3),)


def test_the_model_has_a_card_whose_figures_are_those_of_the_report(report: Report, tmp_path: Path):
    (card,) = scorecards(predictions(), ["sex"], resamples=50)
    evil = "a | b <script> [c](d)"
    write_report(tmp_path / "report.html", replace(report, notes=(evil,), questions=(
        replace(report.questions[0], score=card), *report.questions[1:])))  # fmt: skip
    text = (tmp_path / "model-card.md").read_text()
    _, front, body = text.split("---\n", 2)
    index = yaml.safe_load(front)["model-index"][0]
    assert index["name"] == "demo"
    assert len(index["results"]) == 2
    federated = report.questions[0].arms[0]
    assert index["results"][0]["metrics"][0]["value"] == pytest.approx(federated.auroc.value, abs=1e-4)
    for heading in ("Intended use", "Training data", "Evaluation", "Privacy", "Limits"):
        assert f"## {heading}\n" in body
    assert show_figure(federated.auroc).replace("–", " to ") in body
    assert "| sex: F | " in body
    assert "- a \\| b &lt;script> \\[c](d)" in body


def test_groups_and_decision_curve_stand_in_the_page(report: Report, question: Question):
    (card,) = scorecards(predictions(), ["sex"], horizon_days=7.0, resamples=50)
    page = render(replace(report, questions=(replace(question, score=card),)))
    said = " ".join(" ".join(_Page(page).text).split())
    for phrase in ("Groups of patients", "sex: F", "C-index", "AUC at 7 d", "net benefit", "AUROC by a day"):
        assert phrase in said
    again = replace(card, groups=tuple(
        replace(group, figures=dict(sorted(group.figures.items())), difference=dict(sorted(group.difference.items())))
        for group in card.groups))  # fmt: skip
    assert render(replace(report, questions=(replace(question, score=again),))) == page
    women = card.groups[1].difference["AUROC"].value
    assert women is not None
    assert f"{women:+.3f}".replace("-", "−") in said


def test_a_question_without_any_yes_is_reported_as_such(report: Report, tmp_path: Path):
    lone = _question(np.zeros(40))
    assert lone.arms[0].auroc == Figure(None, None, None, "all labels are 0: not defined")
    assert headline(lone) == "No ranking can be measured: all labels are 0: not defined."
    write_report(tmp_path / "report.html", replace(report, questions=(lone,)))
    assert load(tmp_path / "report.json").questions == (lone,)
    assert "all labels are 0: not defined" in (tmp_path / "report.html").read_text()


def test_a_question_without_any_patient_is_reported_as_such(report: Report):
    assert "no predictions" in render(replace(report, questions=(_question(np.zeros(0)),)))


def test_a_study_that_trained_nothing_yet_has_a_page(report: Report):
    _Page(render(replace(report, training=(), rounds=(), outbound=(), questions=(), notes=(), created="")))


def test_the_headline_compares_the_arms(question: Question):
    said = headline(question)
    for part in ("federated model", "best single site", "pooled", "true risks", "alone)"):
        assert part in said


def test_terminal_tables_hold_the_results(report: Report):
    console = Console(width=80)
    with console.capture() as captured:
        for table in terminal_tables(report):
            console.print(table)
    said = captured.get()
    for arm in report.questions[0].arms:
        assert show_figure(arm.auroc) in said
    assert "south (refused:" in said
    assert "…" not in said
    assert "2.0 MB" in said


def test_numbers_are_written_for_people():
    assert show_figure(Figure(0.8123, 0.7, 0.9)) == "0.812 (0.700–0.900)"
    assert show_figure(Figure(-0.0123, -0.1, 0.05), signed=True) == "−0.012 (−0.100 to +0.050)"
    assert show_figure(Figure(None, note="why")) == show_figure(None) == "–"


def test_a_report_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"report\.json: can't be read"):
        load(tmp_path / "report.json")
    (tmp_path / "report.json").write_text('{"title": 3}')
    with pytest.raises(DataError, match=r"report\.json.*field"):
        load(tmp_path / "report.json")

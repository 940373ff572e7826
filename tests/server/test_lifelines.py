"""Patients and their futures can be looked at: what is shown is what is known and what was drawn."""

import re
import stat
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from model import checkpoint
from model.cohort import cohort
from model.decoder import Decoder
from model.estimate import estimate
from model.settings import DecoderConfig
from model.tasks import Task
from server.futures import Model
from server.lifeline_page import render, write_page
from server.lifelines import Book, lifelines, names_of
from tests import tiny
from tests.chromium import PROGRAM, Tab, in_a_tab
from tokenizer.codebook import Codebook, TokenizerOptions
from tokenizer.errors import ConfigError, DataError
from tokenizer.events import MedsDataset, write_meds
from tokenizer.split import SplitRule
from tokenizer.store import TokenStore, build_store
from tokenizer.survey import survey

TASK = Task("back", "Which test comes first?", ("LAB//0",), ("LAB//1",), ("LAB//2",), 0.0, 9.0)
OTHER = Task("later", "Does a test come?", ("LAB//3",), ("LAB//4",), (), 0.0, 5.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, TokenStore]:
    root, rule = tmp_path_factory.mktemp("lifelines"), SplitRule("key", 0.1, 0.5)
    write_meds(root / "data", [("train/0", tiny.records(1, 60))], name="tiny")
    data = MedsDataset.open(root / "data")
    codebook = Codebook.build(survey(data, rule, TokenizerOptions(min_patients=5)))
    codebook.save(root / "codebook.json")
    decoder = Decoder.create(DecoderConfig(len(codebook), 1, 16, 2, 2, 32, context=64), seed=3)
    checkpoint.save(root / "checkpoint.safetensors", decoder, extra={"codebook_hash": codebook.hash})
    return Model(root / "checkpoint.safetensors", root / "codebook.json"), build_store(data, codebook, rule, root / "s")


@pytest.fixture(scope="module")
def books(made: tuple[Model, TokenStore]) -> tuple[Book, ...]:
    return lifelines(*made, [TASK, OTHER], most=4, trajectories=12, shown=5, max_tokens=40, seed=2)


def test_risk_and_curve_are_those_of_the_estimate(made: tuple[Model, TokenStore], books: tuple[Book, ...]) -> None:
    model, store = made
    codebook = Codebook.load(model.codebook)
    asked = cohort(TASK, store.split("held_out"), codebook)
    found = estimate(
        model.decoder(codebook.hash), codebook, asked, TASK, trajectories=12, seed=2, max_tokens=40
    )  # fmt: skip
    place = {int(subject): row for row, subject in enumerate(asked.subject_ids)}
    for line in books[0].lifelines:
        row = place[line.patient]
        assert line.risk == pytest.approx(found.risk[row], abs=1e-5)
        assert line.se == pytest.approx(found.se[row], abs=1e-5)
        assert line.curve == pytest.approx(found.curve[row].tolist(), abs=1e-5)
        # At the horizon the curve is the risk, and so is its error.
        assert line.curve_se[-1] == pytest.approx(line.se, abs=1e-5)
        assert (np.diff(line.curve) >= 0).all()


def test_history_ends_at_the_prediction_and_futures_begin_there(books: tuple[Book, ...]) -> None:
    assert [book.task.name for book in books] == ["back", "later"]
    for book in books:
        assert len(book.lifelines) == 4
        for line in book.lifelines:
            assert all(event.day <= 0 for event in line.history)
            assert line.history[-1].code.startswith(book.task.trigger)
            assert not any(event.answers for event in line.history)
            assert len(line.futures) == 5
            for future in line.futures:
                assert all(0 <= event.day <= (book.task.horizon_days or 0) for event in future.events)
                # Events of one moment have no order of their own.
                assert (future.end == "outcome") == any(event.answers for event in future.events)
    facts = {fact for line in books[0].lifelines for fact in line.facts}
    assert facts <= {"Gender: M", "Gender: F"} | {fact for fact in facts if fact.startswith("age ")}


def test_named_patients_are_shown_and_unknown_ones_refused(made: tuple[Model, TokenStore]) -> None:
    someone = int(cohort(TASK, made[1].split("held_out"), Codebook.load(made[0].codebook)).subject_ids[1])
    (book,) = lifelines(*made, [TASK], patients=[someone], trajectories=2)
    assert [line.patient for line in book.lifelines] == [someone]
    with pytest.raises(DataError, match="no task asks about patient 7;"):
        lifelines(*made, [TASK], patients=[7])
    with pytest.raises(ConfigError, match="at least one task"):
        lifelines(*made, [])


def test_names_come_from_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "metadata").mkdir()
    table = pl.DataFrame({"code": ["LAB//0", "LAB//1"], "description": ["Sodium", None]})
    table.write_parquet(tmp_path / "metadata" / "codes.parquet")
    assert names_of(tmp_path) == {"LAB//0": "Sodium"}
    with pytest.raises(DataError, match="no names of codes"):
        names_of(tmp_path / "elsewhere")


def test_the_page_is_whole_loads_nothing_and_says_so_where_it_holds_records(
    books: tuple[Book, ...], tmp_path: Path
) -> None:
    write_page(tmp_path / "real.html", books, "<b>Title</b>", made_up=False)
    write_page(tmp_path / "made.html", books, "Title", made_up=True)
    assert stat.S_IMODE((tmp_path / "real.html").stat().st_mode) == 0o600
    page = (tmp_path / "real.html").read_text()
    assert "This file holds patients&#39; records" in page or "This file holds patients' records" in page
    assert "<b>Title</b>" not in page
    assert "holds patients" not in (tmp_path / "made.html").read_text()
    assert not re.search(r"""(?:src|href)=|url\(|@import|https?://(?!www\.w3\.org)""", page)
    assert page.count("<section data-task") == 8
    assert page.count('role="img"') == page.count("<svg") == 3 * 8


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine")
def test_people_step_through_patients_and_tasks(books: tuple[Book, ...], tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(render(books, "Patients", made_up=True))
    shown = (
        "[...document.querySelectorAll('section')].filter(s => !s.hidden).map(s => s.getAttribute('aria-label')).join()"
    )

    async def work(tab: Tab) -> None:
        for width, scheme in ((1200, "dark"), (390, "light")):
            await tab.look(width, scheme)
            await tab.go((tmp_path / "page.html").as_uri())
            first, second = (str(line.patient) for line in books[0].lifelines[:2])
            assert await tab.run(shown) == f"Patient {first}, back"
            await tab.run("document.getElementById('next').click()")
            assert await tab.run(shown) == f"Patient {second}, back"
            await tab.run(
                "const t = document.getElementById('task'); t.value = '1'; t.dispatchEvent(new Event('change'))"
            )
            assert (await tab.run(shown)).endswith(", later")
            assert await tab.run("document.documentElement.scrollWidth <= innerWidth")
        assert tab.said == []

    in_a_tab(work)

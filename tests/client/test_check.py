"""What a site sees before anything leaves."""

import dataclasses
import datetime as dt
import io
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from client.check import Plan, SiteCheck, check
from client.check_report import render, terminal, write_page
from client.files import SiteFiles
from client.site import Site
from federation.messages import SurveyRequest
from tests import tiny
from tokenizer.check import count_timelines
from tokenizer.codebook import Codebook, Survey, TokenizerOptions
from tokenizer.cohort import Filters
from tokenizer.errors import ConfigError
from tokenizer.events import MedsDataset, write_meds
from tokenizer.prepare import Preparation, Prepared, records_of
from tokenizer.settings import agreed
from tokenizer.sources.intake import Flow
from tokenizer.split import SPLITS, SplitRule
from tokenizer.store import build_store
from tokenizer.windows import Windows

OPTIONS, RULE = TokenizerOptions(min_patients=5), SplitRule("key")
PLAN = Plan(OPTIONS, RULE, model="0.3m", context=32, seconds=0.01)
HOSTILE = "LAB//<script>alert(1)</script>[red]//mg"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Forty patients; one of them with hostile codes, events after death, and values in two units."""
    path = tmp_path_factory.mktemp("check") / "data"
    late = tiny.records(1, 40)
    one = late["subject_id"].min()
    near, far = (late["time"].max() + dt.timedelta(days=days) for days in (2, 400))
    odd = pl.DataFrame(
        [
            (one, late["time"].max(), "MEDS_DEATH", None),
            (one, near, HOSTILE, 1.0),
            (one, near, "ICD9CM//999999", None),
            *((one, near, f"LAB//GLUCOSE//{unit}", 5.0) for unit in ("mg/dL", "mmol/L")),
            (one, far, "LAB//1", 1.0),
        ],
        schema=tiny.SCHEMA,
        orient="row",
    )
    write_meds(path, [("0", pl.concat([late, odd]))], name="icu <east>")
    return path


FLOW = Flow(
    "tables in /data", {"labs": 10}, {"labs": 7}, {"labs": 7}, {"labs": {"free text": 2}}, {"labs": {"no time": 1}}, 3
)


def looked_at(folder: Path, plan: Plan = PLAN, **changes) -> SiteCheck:
    preparation = Preparation(Filters(after_death_days=30), **changes)
    return check(Prepared(MedsDataset.open(folder), preparation), plan, source=FLOW)


@pytest.fixture(scope="module")
def found(folder) -> SiteCheck:
    return looked_at(folder)


def test_the_bytes_shown_are_those_that_the_site_answers_to_a_survey_request(folder, tmp_path):
    (tmp_path / "settings.toml").write_text("[prepare]\nicd9 = false\n[prepare.filters]\nmin_events = 5\n")
    seen = set()
    for settings in ("none", "standard", str(tmp_path / "settings.toml")):
        records = records_of(MedsDataset.open(folder), agreed(settings).preparation)
        shown = check(records, PLAN).outgoing
        seen.add(shown.sha256)
        site = Site(SiteFiles("icu", folder, tmp_path / "state", settings=settings))
        assert shown.data == site.survey(SurveyRequest(RULE, OPTIONS, 1e12)).survey
    assert len(seen) == 3


def test_the_page_shows_the_very_bytes(found):
    class Bytes(HTMLParser):
        inside, text = False, ""

        def handle_starttag(self, tag, attrs):
            self.inside = self.inside or ("id", "bytes") in attrs

        def handle_endtag(self, tag):
            self.inside = self.inside and tag != "code"

        def handle_data(self, data):
            self.text += data * self.inside

    parser = Bytes()
    parser.feed(render(found))
    assert parser.text.encode() == found.outgoing.data
    assert Survey.from_bytes(parser.text.encode()) == found.outgoing.survey
    assert found.outgoing.sha256 in render(found)


def test_the_json_holds_everything_and_what_would_be_sent(found):
    told = json.loads(found.to_json())
    assert told["outgoing"]["survey"] == json.loads(found.outgoing.data)
    assert told["outgoing"]["sha256"] == found.outgoing.sha256
    assert told["accounting"]["flow"][0]["events_before"] == found.events
    assert set(told) == {field.name for field in dataclasses.fields(SiteCheck)}


def test_every_patient_and_event_is_accounted_for(found, folder):
    dataset = MedsDataset.open(folder)
    first, *_, last = found.accounting.flow
    assert (first.patients_before, first.events_before) == (dataset.subjects, dataset.events) == (40, found.events)
    for before, after in zip(found.accounting.flow, found.accounting.flow[1:], strict=False):
        assert (before.patients_after, before.events_after) == (after.patients_before, after.events_before)
    births = Prepared(dataset, Preparation(Filters(after_death_days=30)))
    left = pl.concat(births.read(piece) for piece in births.pieces)
    assert last.events_after == len(left)
    assert sum(c["events"] for c in found.timelines.splits.values()) == (left["code"] != "MEDS_BIRTH").sum()
    assert found.accounting.faults["events after the day of death"] > 3
    assert next(step for step in found.accounting.flow if step.name == "after death").events_after < found.events


def test_figures_are_those_of_the_store_and_its_windows(found, folder, tmp_path):
    records = Prepared(MedsDataset.open(folder), Preparation(Filters(after_death_days=30)))
    book = Codebook.build(found.outgoing.survey)
    assert book.hash == found.codebook
    store = build_store(records, book, RULE, tmp_path / "store")
    told = found.timelines
    assert {name: dict(counts) for name, counts in told.splits.items()} == store.manifest["splits"]
    assert told.fallbacks == store.manifest["fallbacks"]
    files = [file for file in store.path.rglob("*") if file.suffix in (".i32", ".i64")]
    assert told.store_bytes == sum(file.stat().st_size for file in files)
    lengths = np.concatenate([np.diff(store.split(name).offsets) for name in SPLITS])
    assert told.lengths.quantiles[1.0] == lengths.max()
    assert told.lengths.quantiles[0.5] in lengths
    assert sum(told.lengths.patients) == len(lengths)
    cut = next(one for one in told.truncation if one.context == 32)
    assert cut.patients == (lengths > 32).sum()
    assert cut.tokens == np.maximum(lengths - 32, 0).sum()
    windows = Windows(store.split("train"), book, context=32, batch_tokens=64, seed=0)
    batches = list(windows.epoch(0))
    assert told.targets == sum((batch.targets >= 0).sum() for batch in batches)
    really = sum(len(batch.lengths) for batch in batches)
    assert cut.windows <= really <= cut.windows + (lengths > 32).sum()


def test_worker_processes_and_pieces_change_no_figure(folder):
    book = Codebook.build(looked_at(folder, dataclasses.replace(PLAN, seconds=0)).outgoing.survey)
    whole, small = MedsDataset.open(folder), MedsDataset.open(folder, piece_events=50)
    assert len(small.pieces) > 3
    assert count_timelines(whole, book, RULE, 32) == count_timelines(small, book, RULE, 32)


def test_hostile_names_are_shown_as_they_are_and_do_nothing(found):
    page = render(found)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "icu &lt;east&gt;" in page
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal(found))
    assert "[red]" in console.export_text()


def test_the_page_needs_no_network(found, tmp_path):
    write_page(tmp_path / "check.html", found)
    page = (tmp_path / "check.html").read_text()
    for outside in ("http://", "https://", "<link", "<script", "src=", "@import", "url("):
        assert outside not in page
    assert page.startswith("<!DOCTYPE html>")


def test_terminal_lines_fit_80_columns_and_name_what_matters(found):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal(found))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "ICD9CM//999999" in text
    assert "LAB//GLUCOSE in mg/dL, mmol/L" in text
    assert "events after the day of death" in text
    assert "free text" in text
    assert "no time" in text
    assert found.outgoing.sha256[:16] in text
    assert "An estimate" in text


def test_training_time_is_measured_or_the_reason_given(found, folder, tmp_path):
    training = found.training
    assert training is not None
    assert training.steps >= 1
    assert training.seconds == pytest.approx(training.passes * training.targets / training.rate)
    unmeasured = looked_at(folder, dataclasses.replace(PLAN, seconds=0))
    assert unmeasured.training is None
    assert "not measured" in render(unmeasured)
    write_meds(tmp_path / "none", [], name="nobody")
    nobody = check(MedsDataset.open(tmp_path / "none"), PLAN)
    assert "nothing to predict" in nobody.training_note or "anything to predict" in nobody.training_note
    assert "nobody" in render(nobody)
    Console(file=io.StringIO()).print(terminal(nobody))


def test_a_given_codebook_decides_on_the_options(folder):
    book = Codebook.build(Survey(TokenizerOptions(values="fused", min_patients=7)))
    told = check(MedsDataset.open(folder), dataclasses.replace(PLAN, seconds=0), codebook=book)
    assert told.outgoing.survey.options == book.options
    assert not told.own_codebook
    assert not told.prepared
    assert len(told.accounting.flow) == 1
    assert told.accounting.unmapped == {"ICD9CM//999999": 1}


def test_plans_that_make_no_sense_are_refused():
    for wrong in ({"context": 1}, {"passes": 0}, {"seconds": -1}):
        with pytest.raises(ConfigError, match="check:"):
            dataclasses.replace(PLAN, **wrong)


def test_a_hospital_needs_no_server_and_no_simulation(folder, tmp_path):
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['server', 'simulation', 'matplotlib', 'flwr']))\n"
        "sys.argv = ['fedcomet', *sys.argv[1:]]\n"
        "import fedcomet; fedcomet.main()"
    )
    root = Path(__file__).parents[2]
    for command in (
        ["site", "check", folder, "--seconds", "0", "--out", tmp_path / "check.html"],
        ["tokenize", folder, "--out", tmp_path / "tokens"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, command), "--min-patients", "5"],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "check.html").exists()

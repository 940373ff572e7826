"""What is given to the intake comes out: all of it, in one order, whole or not at all."""

import hashlib
import json
import multiprocessing
import os
import signal
import time
from datetime import datetime

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tokenizer.sources.site import events_of
from tokenizer.errors import DataError
from tokenizer.events import MedsDataset
from tokenizer.sources.intake import EVENTS, Flow, intake
from tokenizer.sources.quarantine import Quarantine, read_quarantine
from tokenizer.sources.spill import Spill, spill_folder
from tokenizer.sources.subjects import SubjectIds
from tokenizer.spelling import fit

ROW = st.tuples(
    st.one_of(st.integers(0, 30), st.integers(0, 2**63 - 1)),
    st.one_of(st.none(), st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1))),
    st.sampled_from(["A", "B", "MEDS_BIRTH", "MEDS_DEATH"]),
    st.one_of(st.none(), st.floats(-5, 5, width=32).map(lambda x: x + 0.0)),
    st.sampled_from([None, "mg", "g"]),
    st.sampled_from([None, "1", "2"]),
)


def frame(rows):
    return pl.DataFrame(rows, schema=EVENTS, orient="row")


def files(dataset):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in dataset.glob("data/*.parquet")}


def give(out, pieces, **options):
    with intake(out, "test", name="x", **options) as collected:
        collected._spill = Spill(collected._spill._folder, spill_events=7, shard_events=20)
        for piece in pieces:
            collected.add("t", piece)
    return collected.flow


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.lists(ROW, min_size=1, max_size=120), st.randoms(), st.lists(st.integers(1, 30), min_size=1))
def test_all_events_come_out_the_same_whatever_their_order(tmp_path, rows, random, sizes):
    flow = give(tmp_path / "a", [frame(rows)])
    shuffled = random.sample(rows, len(rows))
    pieces = []
    while shuffled:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(frame(shuffled[:size]))
        shuffled = shuffled[size:]
    give(tmp_path / "b", pieces)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    events = events_of(tmp_path / "a")
    assert events.select(list(EVENTS)).sort(list(EVENTS)).equals(frame(rows).sort(list(EVENTS)))
    assert flow.events_total == len(rows)
    assert flow.subjects == MedsDataset.open(tmp_path / "a").subjects == events["subject_id"].n_unique()


@settings(max_examples=25)
@given(st.lists(st.lists(st.integers(0, 10_000), max_size=40), max_size=12), st.integers(1, 50))
def test_shards_are_small_unless_a_timeline_is_long(tmp_path_factory, batches, shard_events):
    spill = Spill(tmp_path_factory.mktemp("spill"), spill_events=20, shard_events=shard_events)
    for batch in batches:
        spill.add(pl.DataFrame({"subject_id": pl.Series(batch, dtype=pl.Int64)}))
    shards = [events["subject_id"] for _, events in spill.shards()]
    given_ids = [subject for batch in batches for subject in batch]
    assert sorted(subject for shard in shards for subject in shard) == sorted(given_ids)
    owners = [set(shard) for shard in shards]
    assert sum(map(len, owners)) == len(set(given_ids))


def test_a_long_timeline_does_not_make_its_neighbours_shards_long(tmp_path):
    spill = Spill(tmp_path, spill_events=1000, shard_events=1000)
    for start in range(0, 40_000, 1000):
        spill.add(pl.DataFrame({"subject_id": range(start, start + 1000)}))
        spill.add(pl.DataFrame({"subject_id": [7] * 500}))
    sizes = sorted(events.height for _, events in spill.shards())
    assert sum(sizes) == 60_000
    assert 20_000 <= sizes[-1] < 20_000 + 200
    assert sizes[-2] < 1500


def test_a_part_that_was_damaged_is_no_silent_loss(tmp_path):
    spill = Spill(tmp_path, spill_events=10, shard_events=10)
    spill.add(pl.DataFrame({"subject_id": range(100)}))
    part = next(tmp_path.glob("*.arrow"))
    pl.read_ipc(part).clear().write_ipc(part)
    with pytest.raises(DataError, match=r"0 events where .* were written"):
        list(spill.shards())
    part.unlink()
    with pytest.raises(DataError, match="Import the records again"):
        list(spill.shards())


def test_an_error_leaves_nothing_and_the_old_dataset_in_place(tmp_path):
    give(tmp_path / "out", [frame([(1, None, "A", None, None, None)])])
    before = files(tmp_path / "out")

    def fail():
        with intake(tmp_path / "out", "test", name="x") as collected:
            collected.add("t", frame([(2, None, "B", None, None, None)]))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert files(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("missing", ["subject_id", "code"])
def test_an_event_without_subject_or_code_is_a_fault_of_the_source(tmp_path, missing):
    row = {"subject_id": 1, "time": None, "code": "A"} | {missing: None}
    schema = {"subject_id": pl.Int64, "time": pl.Datetime("us"), "code": pl.String}
    with pytest.raises(DataError, match=f"t gave an event without {missing}"):
        give(tmp_path / "out", [pl.DataFrame([row], schema=schema)])


def take(out, steps, **options):
    """Call methods of an intake: (name, arguments...)."""
    with intake(out, "test", name="x", **options) as collected:
        for name, *arguments in steps:
            getattr(collected, name)(*arguments)
    return collected.flow


def test_every_source_writes_codes_by_one_rule_and_says_so(tmp_path):
    codes = ["LAB//a\nb", "*", "RACE//*", "x" * 100_000, "LAB//fine"]
    events = pl.DataFrame({"subject_id": [1] * 5, "time": [None] * 5, "code": codes})
    with intake(tmp_path / "out", "s", name="x") as collected:
        collected.rows("t", 5)
        collected.add("t", events)
    written = MedsDataset.open(tmp_path / "out").read("data/0000.parquet")["code"].to_list()
    assert sorted(written) == sorted(map(fit, codes))
    (note,) = collected.flow.notes
    assert note.startswith("t: 4 events have codes with control characters, of more than 200 characters or with *")


def test_sums_that_do_not_add_up_are_refused(tmp_path):
    one = frame([(1, None, "A", None, None, None)])
    steps = [("rows", "t", 3), ("kept", "t", 1), ("drop", "t", "filter", 1), ("add", "t", one)]
    with pytest.raises(DataError, match="of 3 rows of t, 1 were kept, 1 dropped and 0 set aside"):
        take(tmp_path / "out", steps)
    assert not (tmp_path / "out").exists()


def test_no_event_at_all_says_what_became_of_the_rows(tmp_path):
    steps = [("rows", "t", 2), ("drop", "t", "filter", 1), ("bad", "f", "t", 2, "c", "odd")]
    with pytest.raises(DataError, match=r"read were 2 rows of t \(1 of t: filter; 1 of t: odd\)"):
        take(tmp_path / "out", steps, quarantine=True)


def test_the_flow_is_written_and_read(tmp_path):
    with intake(tmp_path / "out", "test", name="x", quarantine=True) as collected:
        collected.add("t", frame([(1, None, "A", None, None, None)]))
        collected.bad("f", "t", 2, "c", "odd", "x")
        collected.note("ä")
    assert Flow.load(tmp_path / "out") == collected.flow
    assert collected.flow.quarantined_total == 1
    (tmp_path / "out/metadata/fedcomet_flow.json").write_text(json.dumps({"x": 1}))
    with pytest.raises(DataError, match="not a flow table"):
        Flow.load(tmp_path / "out")


# Two imports at once, and kills.


def _hold(folder, ready, end):
    with spill_folder(folder / "out") as aside:
        (aside / "part").write_bytes(b"x")
        ready.set()
        end.wait()


def test_an_import_that_runs_keeps_its_spill_and_a_killed_one_is_swept(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, end = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready, end))
    other.start()
    assert ready.wait(120)
    (theirs,) = tmp_path.iterdir()
    with spill_folder(tmp_path / "out"):
        assert (theirs / "part").exists()
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    assert theirs.exists()
    with spill_folder(tmp_path / "out") as mine:
        assert list(tmp_path.iterdir()) == [mine]
    assert list(tmp_path.iterdir()) == []


def test_names_with_the_letters_of_patterns(tmp_path):
    for name in ("a[1]", "a*", "a"):
        give(tmp_path / name, [frame([(1, None, "A", None, None, None)])])
    assert {path.name for path in tmp_path.iterdir()} == {"a[1]", "a*", "a"}


# Ids.


@given(st.lists(st.one_of(st.none(), st.text(max_size=4), st.integers(-5, 2**64).map(str)), max_size=30))
def test_ids_keep_patients_apart_and_numbers_as_they_are(texts):
    ids = SubjectIds()
    given_ids = [*ids.of(pl.Series(texts[:7], dtype=pl.String)), *ids.of(pl.Series(texts[7:], dtype=pl.String))]
    ids.check()
    assert [i is None for i in given_ids] == [text is None for text in texts]
    pairs = {(text, i) for text, i in zip(texts, given_ids, strict=True) if text is not None}
    assert len({i for _, i in pairs}) == len(pairs) == len({text for text, _ in pairs})
    for text, i in pairs:
        assert 0 <= i < 2**63
        if text.isascii() and text.isdigit() and str(int(text)) == text and int(text) < 2**63:
            assert i == int(text)
        else:
            assert i == int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def test_integers_and_their_texts_are_the_same_patients():
    ids = SubjectIds()
    assert ids.of(pl.Series([1, None, 2**62])).to_list() == [1, None, 2**62]
    assert ids.of(pl.Series(["1", None, str(2**62)])).to_list() == [1, None, 2**62]
    assert ids.of(pl.Series([-1])).to_list() == ids.of(pl.Series(["-1"])).to_list()
    assert ids.of(pl.Series([2**63], dtype=pl.UInt64)).to_list() == ids.of(pl.Series([str(2**63)])).to_list()
    assert ids.of(pl.Series(["9" * 5000])).null_count() == 0
    assert ids.of(pl.Series([], dtype=pl.String)).to_list() == []


def test_two_patients_with_one_hash_are_refused(monkeypatch):
    class Same:
        def __init__(self, *_, **__):
            pass

        def digest(self):
            return (14).to_bytes(8)

    monkeypatch.setattr("tokenizer.sources.subjects.hashlib.blake2b", Same)
    ids = SubjectIds()
    ids.of(pl.Series(["a", "a"]))
    ids.check()
    ids.of(pl.Series(["b"]))
    with pytest.raises(DataError, match=r"Two patients get the same subject_id 7 \('a', 'b'\)"):
        ids.check()
    ids = SubjectIds()
    ids.of(pl.Series(["a", "7"]))
    with pytest.raises(DataError, match="The patient 7 and one whose id is a text"):
        ids.check()


# Quarantine.


@given(st.lists(st.text(max_size=12), max_size=20))
def test_what_is_set_aside_is_read_back(tmp_path_factory, contents):
    file = tmp_path_factory.mktemp("q") / "quarantine.csv"
    aside = Quarantine(file, allowed=True)
    for row, content in enumerate(contents):
        aside.add("f", "t", row, "c", f"reason {row % 2}", content, "")
    rows = pl.DataFrame({"file": "g", "table": "t", "row": range(len(contents)), "column": "c", "reason": "all"})
    aside.add_all(rows.with_columns(content=pl.Series(contents, dtype=pl.String)))
    assert (aside.flush() == file) == bool(contents)
    if not contents:
        return
    read = read_quarantine(file)
    assert sum(aside.counts["t"].values()) == len(read) == 2 * len(contents)
    for (row, content), one, other in zip(enumerate(contents), read, read[len(contents) :], strict=False):
        assert (one["file"], one["row"], one["reason"]) == ("f", str(row), f"reason {row % 2}")
        for shown in (one["content"], other["content"]):
            # The csv module reads a line end within quotes as it stands.
            assert shown.removeprefix("'") == content.replace("\0", "\\0").removeprefix("'")
            assert shown[:1] not in ("=", "@", "\t", "\r")


def test_a_hundred_thousand_bad_rows_cost_little_each(tmp_path):
    frame_ = pl.DataFrame({"_row": range(100_000), "value": ["x"] * 100_000})
    with intake(tmp_path / "out", "test", name="x", quarantine=True) as collected:
        collected.add("t", frame([(1, None, "A", None, None, None)]))
        start = time.process_time()
        left = collected.bad_rows(frame_, pl.col("_row") >= 10, file="f", table="t", column="value", reason="no number")
        spent = time.process_time() - start
    assert left.height == 10
    assert collected.flow.quarantined == {"t": {"no number": 99_990}}
    assert (tmp_path / "out/quarantine.csv").read_text().count("\n") == 99_991
    # A row by row loop takes some 50 times as long as this generous bound.
    assert spent < 5


def test_a_bad_row_is_refused_with_its_place_and_what_to_do(tmp_path):
    message = r"f: t, row 3, c: odd \('x'\)\. Mend it, or import with --quarantine to set such rows aside\."
    with pytest.raises(DataError, match=message):
        take(tmp_path / "out", [("bad", "f", "t", 3, "c", "odd", "x", "Mend it")])
    rows = pl.DataFrame({"_row": [1, 3], "c": [None, "x"]})

    def refuse():
        with intake(tmp_path / "out", "test", name="x") as collected:
            where = pl.col("c") == "x"
            collected.bad_rows(rows, where, file="f", table="t", column="c", reason="odd", advice="Mend it")

    with pytest.raises(DataError, match=message):
        refuse()

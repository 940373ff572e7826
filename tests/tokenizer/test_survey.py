"""A survey counts the training patients exactly and tells nothing of fewer than the floor."""

import pickle
from collections import defaultdict

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizer.hospital import DAY, MINUTE, frame, stays
from tokenizer import sketch
from tokenizer.codebook import Codebook, Survey, TokenizerOptions, merge, parents
from tokenizer.encode import encode
from tokenizer.events import MedsDataset, write_meds
from tokenizer.prepare import Preparation, Prepared
from tokenizer.spelling import ancestors
from tokenizer.split import SplitRule
from tokenizer.survey import _Cell, _fold, join, survey, survey_shard

EVERYBODY = SplitRule("key", tuning=0, held_out=0)


def dataset(path, *shards):
    write_meds(path, [(str(n), shard) for n, shard in enumerate(shards)], name="site")
    return MedsDataset.open(path)


def survey_of(path, *shards, floor=10, rule=EVERYBODY):
    return survey(dataset(path, *shards), rule, TokenizerOptions(min_patients=floor))


def test_counts_are_distinct_training_patients(tmp_path):
    rule = SplitRule("key")
    shards = [stays(range(100)), stays(range(100, 160), seed=1)]
    told = survey_of(tmp_path / "a", *shards, rule=rule)
    training = set(np.arange(160)[rule.assign(np.arange(160)) == 0].tolist())
    users = defaultdict(set)
    for shard in shards:
        for subject, _, code, _ in shard.iter_rows():
            users[code].add(subject)
    assert told.patients == len(training)
    assert told.statics == {code: len(users[code] & training) for code in ("GENDER//0", "GENDER//1")}
    expected = {c: len(s & training) for c, s in users.items() if "GENDER" not in c and c != "MEDS_BIRTH"}
    assert told.codes == expected


def test_sharding_does_not_change_the_survey(tmp_path):
    whole = stays(range(120))
    parts = [whole.filter(whole["subject_id"] % 3 == rest) for rest in range(3)]
    assert survey_of(tmp_path / "1", whole).to_bytes() == survey_of(tmp_path / "3", *parts).to_bytes()


def test_sketches_hold_every_value_once(tmp_path):
    shard = stays(range(80))
    told = survey_of(tmp_path / "a", shard)
    values = shard.filter(shard["code"] == "LAB//HR")["numeric_value"].to_numpy()
    assert sum(told.values["LAB//HR"].values()) == len(values)
    breaks, _ = sketch.quantile_bins(told.values["LAB//HR"], 10, 0.01)
    exact = np.quantile(values, np.arange(1, 10) / 10)
    assert np.array(breaks) == pytest.approx(exact, rel=0.03)


def test_gaps_are_counted_per_class_within_patients_only(tmp_path):
    rows = []
    for subject in range(20):
        times = [0, 30_000_000, 2 * MINUTE, 4 * MINUTE, 4 * MINUTE + 400 * DAY]
        rows += [(subject, time, "A", None) for time in times] + [(subject, 0, "B", None)]
        rows.append((subject, -DAY, "MEDS_BIRTH", None))
    told = survey_of(tmp_path / "a", frame(rows))
    assert {text: sum(cells.values()) for text, cells in told.gaps.items()} == {"1-5min": 40}


def test_rare_codes_are_told_by_the_parent_where_they_are_enough(tmp_path):
    rows = [(s, 0, "DX//I10//common", None) for s in range(10)]
    rows += [(s, 0, f"DX//I10//{s}", None) for s in range(10)]
    rows += [(s, 0, f"DX//J//{s}", None) for s in range(4)]
    rows += [(s, 0, f"DX//K//{s}", None) for s in range(4, 10)]
    rows += [(s, 0, "PX//1", None) for s in range(9)]
    rows += [(s, None, f"RACE//{s}", None) for s in range(10)]
    told = survey_of(tmp_path / "a", frame(rows))
    assert told.codes == {"DX//I10//common": 10}
    assert told.prefixes == {"DX//I10": 10, "DX": 10}
    assert told.static_prefixes == {"RACE": 10}


def test_rare_diagnoses_are_told_by_the_nearest_level_where_they_are_enough(tmp_path):
    rows = [(s, 0, "VISIT", None) for s in range(40)] + [(s, 0, "ICD10CM//E11.65", None) for s in range(20)]
    rows += [(s, 0, f"ICD10CM//E11.6{s % 4}", None) for s in range(10)]
    rows += [(s, 0, "ICD10CM//E11.21", None) for s in range(6)] + [(s, 0, "ICD10CM//E11.3", None) for s in range(6, 11)]
    rows += [(s, 0, "ICD10CM//I21.4", None) for s in range(9)] + [(s, 0, "ICD10CM//C50.1", None) for s in range(9, 12)]
    told = survey_of(tmp_path / "a", frame(rows))
    assert told.codes == {"ICD10CM//E11.65": 20, "VISIT": 40}
    assert told.prefixes == {"ICD10CM//E11.6": 10, "ICD10CM//E11": 11, "ICD10CM": 12}
    book = Codebook.build(told)
    assert [book.event(node) for node in np.flatnonzero(book.matching(["ICD10CM//E11"])).tolist()] == [
        *("ICD10CM//E11//*", "ICD10CM//E11.6//*", "ICD10CM//E11.65", "ICD10CM//E11//*", "ICD10CM//E11.6//*")
    ], "nodes on the way, the code, and what stands for rarer ones"


def test_two_ways_of_writing_a_code_are_one_code(tmp_path):
    rows = [(s, 0, "ICD10CM//E11.65" if s % 2 else "ICD10CM//E1165", None) for s in range(12)]
    rows += [(1, DAY, "ICD10CM//E1165", None)]
    assert survey_of(tmp_path / "a", frame(rows)).codes == {"ICD10CM//E11.65": 12}


def test_a_code_that_is_a_star_is_none_of_those_too_rare_to_be_named(tmp_path):
    """MEDS is read where it is, so here the rule for codes holds in survey and encoding."""
    events = stays(range(60))
    odd = {
        "*": "(*)",
        "RACE//*": "RACE//(*)",
        "RACE//two\nlines": "RACE//two lines",
        "ICD10CM//E1165": "ICD10CM//E11.65",
    }
    statics = [
        events.unique("subject_id").with_columns(time=pl.lit(None, pl.Datetime("us")), code=pl.lit(code))
        for code in odd
    ]
    write_meds(tmp_path, [("0", pl.concat([events, *statics]))], name="x")
    dataset = MedsDataset.open(tmp_path)
    told = survey(dataset, SplitRule("k"), TokenizerOptions())
    assert {*odd.values()} <= told.statics.keys()
    assert not {*odd} & told.statics.keys()
    codebook = Codebook.build(told)
    for code, written in odd.items():
        assert codebook.tell(code, static=True).level == "itself"
        assert codebook.tokens[codebook.tell(code, static=True).tokens[0]].text == written
    assert codebook.tell("never seen", static=True).tokens != codebook.tell("*", static=True).tokens
    encoded = encode(dataset.read("data/0.parquet"), codebook)
    assert not {*odd} & {name for level in encoded.fallbacks.values() for name in level}


def test_what_all_but_a_few_have_is_told_as_everybodys(tmp_path):
    rows = [(s, 0, "VISIT", None) for s in range(40)]
    rows += [(s, 0, "A", None) for s in range(31)] + [(s, 0, "B", None) for s in range(30)]
    rows += [(s, None, "SEX//F", None) for s in range(39)]
    told = survey_of(tmp_path / "a", frame(rows))
    assert told.codes == {"VISIT": 40, "A": 40, "B": 30}
    assert told.statics == {"SEX//F": 40}


@given(
    st.lists(
        st.tuples(
            st.integers(0, 30), st.sampled_from([f"ICD10CM//E1{a}.{b}{c}" for a in "01" for b in "12" for c in "34"])
        ),
        max_size=120,
    ),
    st.integers(2, 6),
)
def test_no_difference_of_released_counts_tells_of_fewer_than_the_floor(visits, floor):
    """Codes of released cells never overlap, so no cell's codes are a part of another's."""
    rows = [(subject, 0, code, None) for subject, code in visits]
    counted = survey_shard(frame(sorted(rows)), EVERYBODY, TokenizerOptions(min_patients=floor))
    told = counted.release()
    users = defaultdict(set)
    for subject, code in visits:
        users[code].add(subject)
    rare = {code for code, who in users.items() if len(who) < floor}
    everybody = {subject for subject, _ in visits}
    assert set(told.codes) == set(users) - rare

    def check(count, who):
        few = len(everybody) - floor < count < len(everybody) or len(everybody) - floor < len(who)
        assert len(who) >= floor
        assert count == (len(everybody) if few else len(who))

    for code, count in told.codes.items():
        check(count, users[code])
    for prefix in sorted(told.prefixes, key=lambda text: -len(ancestors(text))):
        below = {code for code in rare if prefix in ancestors(code)}
        rare -= below
        check(told.prefixes[prefix], set().union(*(users[code] for code in below)))
    assert len(set().union(*(users[code] for code in rare))) < floor, "all that can be told is told"


def test_gaps_follow_the_table_that_was_chosen(tmp_path):
    rows = [(s, time, "A", None) for s in range(12) for time in (0, 3 * MINUTE, 13 * MINUTE, 33 * MINUTE)]
    options = TokenizerOptions(min_patients=5, intervals="ethos19")
    told = survey(dataset(tmp_path / "a", frame(rows)), EVERYBODY, options)
    assert {text: sum(cells.values()) for text, cells in told.gaps.items()} == {"5-15min": 12, "15-45min": 12}


def test_a_dataset_that_was_prepared_says_so(tmp_path):
    data = dataset(tmp_path / "a", stays(range(30)))
    prepared = Prepared(data, Preparation())
    assert survey(prepared, EVERYBODY, TokenizerOptions()).prepared == (prepared.preparation.common_digest,)
    assert survey(data, EVERYBODY, TokenizerOptions()).prepared == ()


def test_a_patient_with_two_rare_codes_counts_once_in_their_parent(tmp_path):
    rows = [(s, 0, f"DX//{s}//{n}", None) for s in range(9) for n in range(3)]
    assert survey_of(tmp_path / "a", frame(rows)).prefixes == {}


def test_a_site_below_the_floor_tells_nothing(tmp_path):
    told = survey_of(tmp_path / "a", stays(range(9)))
    assert told == Survey(TokenizerOptions())
    assert survey_of(tmp_path / "b").patients == 0
    assert len(Codebook.build(told)) > 0


def test_values_of_too_few_patients_have_no_sketch(tmp_path):
    rows = [(s, 0, "LAB", float(s) if s < 9 else None) for s in range(30)]
    told = survey_of(tmp_path / "a", frame(rows))
    assert told.codes == {"LAB": 30}
    assert told.values == {}


def test_tails_of_few_patients_are_drawn_in(tmp_path):
    rows = [(s, 0, "LAB", 50.0) for s in range(30)] + [(99, 0, "LAB", 1e6), (98, 0, "LAB", -1e6)]
    told = survey_of(tmp_path / "a", frame(rows))
    (bucket,) = sketch.bucket_of(np.array([50.0]), 0.01).tolist()
    assert told.values["LAB"] == {bucket: 32}


def test_the_survey_is_checked_by_its_own_reader(tmp_path):
    told = survey_of(tmp_path / "a", stays(range(60)))
    assert Survey.from_bytes(told.to_bytes()) == told


def test_progress_is_reported_per_shard(tmp_path):
    seen = []
    data = dataset(tmp_path / "a", stays(range(3)), stays(range(3, 6)))
    survey(data, EVERYBODY, TokenizerOptions(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


@given(
    st.permutations(range(12)),
    st.lists(st.sets(st.integers(0, 12), min_size=1), min_size=12, max_size=12),
    st.integers(1, 8),
    st.integers(1, 12),
)
def test_every_released_bucket_has_enough_distinct_patients(weights, patients, floor, length):
    """Events are distinct powers of two, so a released sum says which buckets were joined."""
    cells = [
        _Cell(bucket, 2**weight, who if len(who) < floor else None)
        for bucket, (weight, who) in enumerate(zip(weights, patients, strict=True))
    ][:length]
    released = _fold(cells, floor)
    joined = {
        bucket: [n for n, weight in enumerate(weights[:length]) if total >> weight & 1]
        for bucket, total in released.items()
    }
    for bucket, members in joined.items():
        assert len(set().union(*(patients[n] for n in members))) >= floor
        assert bucket in members
    everything = sorted(n for members in joined.values() for n in members)
    if len(set().union(*patients[:length])) >= floor:
        assert everything == list(range(length)), "no event is lost when all together reach the floor"
    else:
        assert released == {}


@settings(max_examples=20)
@given(st.lists(st.integers(0, 2), min_size=30, max_size=60))
def test_sites_that_split_one_hospital_agree_with_it_but_for_the_floor(tmp_path_factory, sites):
    shard = stays(range(len(sites)))
    path = tmp_path_factory.mktemp("sites")
    where = np.array(sites)[shard["subject_id"].to_numpy()]
    parts = [shard.filter(where == n) for n in range(3)]
    surveys = [survey_of(path / str(n), part, floor=1) for n, part in enumerate(parts)]
    assert merge(surveys).to_bytes() == survey_of(path / "whole", shard, floor=1).to_bytes()


def test_parents_are_longest_first():
    assert parents("A//B//C") == ["A//B", "A"]


@settings(max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=40, max_size=40), st.randoms(use_true_random=False), st.integers(1, 15))
def test_partials_of_shards_join_in_any_order_and_grouping(shards, random, floor):
    whole, options = stays(range(40)), TokenizerOptions(min_patients=floor)
    where = np.array(shards)[whole["subject_id"].to_numpy()]
    parts = [survey_shard(whole.filter(where == n), EVERYBODY, options) for n in range(5)]
    random.shuffle(parts)
    cut = random.randint(1, 4)
    grouped = join([join(parts[:cut]), join(parts[cut:])])
    expected = survey_shard(whole, EVERYBODY, options).release().to_bytes()
    assert grouped.release().to_bytes() == expected
    assert pickle.loads(pickle.dumps(grouped)).release().to_bytes() == expected

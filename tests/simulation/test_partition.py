import json
import tempfile
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulation.config import Partition
from simulation.contrast import contrast, divergences
from simulation.hospital import PROFILES, generate
from simulation.partition import OTHER, Parts, partition
from tokenizer.errors import DataError
from tokenizer.events import MedsDataset, write_meds

UNIT = Partition(by="code", prefixes=("UNIT",))


def _frame(units: dict[int, list[str]], **columns: list[object]) -> pl.DataFrame:
    """Patients with codes of units, one a day, and a heart rate before them."""
    rows = []
    for subject, codes in units.items():
        for day, code in enumerate(["HR", *codes]):
            rows.append((subject, datetime(2020, 1, 1) + timedelta(days=day), code, 80.0 if code == "HR" else None))
    frame = pl.DataFrame(rows, schema=["subject_id", "time", "code", "numeric_value"], orient="row")
    return frame.with_columns(**{name: pl.Series(values) for name, values in columns.items()})


def _dataset(path: Path, *frames: pl.DataFrame) -> MedsDataset:
    write_meds(path, [(f"part/{number}", frame) for number, frame in enumerate(frames)], name="all")
    return MedsDataset.open(path)


def _patients(parts: Parts) -> dict[str, set[int]]:
    return {site.name: set(_events(site.path)["subject_id"]) for site in parts.sites}


def _events(path: Path) -> pl.DataFrame:
    dataset = MedsDataset.open(path)
    return pl.concat([dataset.read(shard) for shard in dataset.shards])


rules = st.one_of(
    st.builds(Partition, by=st.just("iid"), sites=st.integers(2, 5)),
    st.builds(
        Partition,
        by=st.just("dirichlet"),
        prefixes=st.just(("UNIT",)),
        sites=st.integers(2, 5),
        alpha=st.sampled_from([0.05, 1.0, 50.0]),
    ),
    st.builds(
        Partition,
        by=st.sampled_from(["quantity", "time", "chapters"]),
        prefixes=st.just(("UNIT", "DX")),
        sites=st.integers(2, 5),
    ),
    st.builds(Partition, by=st.just("code"), prefixes=st.just(("WARD", "UNIT")), min_patients=st.integers(0, 2)),
)
some_units = st.lists(st.sampled_from(["UNIT", "UNIT//A", "UNIT//B//1", "UNITED", "LAB//X"]), max_size=3)


@given(rules, st.lists(some_units, max_size=10), st.integers(0, 5), st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_every_patient_lands_whole_at_exactly_one_site(rule: Partition, units: list[list[str]], seed: int, shards: int):
    people = dict(enumerate([["UNIT//A", "DX//I50.9"], ["UNIT//A"], [], *units]))
    frames = [_frame({s: people[s] for s in people if s % shards == n}) for n in range(shards)]
    with tempfile.TemporaryDirectory() as folder:
        whole = _dataset(Path(folder) / "all", *(frame for frame in frames if frame.height))
        parts = partition(whole, rule, Path(folder) / "sites", seed=seed)
        sites = [_events(site.path).with_columns(site=pl.lit(site.name)) for site in parts.sites]
        together = pl.concat(sites)
        assert together.group_by("subject_id").agg(pl.col("site").n_unique())["site"].max() == 1
        original = _events(whole.path)
        assert together.drop("site").sort(together.columns[:4]).equals(original.sort(original.columns))
        assert [site.events for site in parts.sites] == [frame.height for frame in sites]
        assert sum(site.patients for site in parts.sites) == len(people)


def test_patients_go_by_their_first_code_and_all_others_are_counted(tmp_path: Path):
    units = {1: ["UNIT//A"], 2: ["UNIT//B"], 3: ["UNIT//B", "UNIT//A"], 4: ["UNITED//A"], 5: []}
    parts = partition(_dataset(tmp_path / "all", _frame(units)), UNIT, tmp_path / "sites", seed=0)
    assert _patients(parts) == {"unit-a": {1}, "unit-b": {2, 3}, OTHER: {4, 5}}
    assert (parts.grouped_by, parts.without, parts.several, parts.put_together) == ("UNIT", 2, 1, {})


def test_the_first_prefix_that_occurs_groups_them(tmp_path: Path):
    dataset = _dataset(tmp_path / "all", _frame({1: ["UNIT//A"], 2: ["UNIT//B"]}))
    rule = Partition(by="code", prefixes=("WARD", "UNIT", "HR"))
    assert partition(dataset, rule, tmp_path / "sites", seed=0).grouped_by == "UNIT"


def test_small_groups_are_put_together_and_named(tmp_path: Path):
    units = {1: ["UNIT//A"], 2: ["UNIT//A"], 3: ["UNIT//B"], 4: ["UNIT//C"]}
    rule = Partition(by="code", prefixes=("UNIT",), min_patients=2)
    parts = partition(_dataset(tmp_path / "all", _frame(units)), rule, tmp_path / "sites", seed=0)
    assert _patients(parts) == {"unit-a": {1, 2}, OTHER: {3, 4}}
    assert parts.put_together == {"unit-b": 1, "unit-c": 1}


def test_values_that_make_the_same_file_name_stay_apart(tmp_path: Path):
    units = {1: ["UNIT//Cardiac Care"], 2: ["UNIT//cardiac/care"], 3: ["UNIT//ICU"]}
    parts = partition(_dataset(tmp_path / "all", _frame(units)), UNIT, tmp_path / "sites", seed=0)
    assert sorted(map(sorted, _patients(parts).values())) == [[1], [2], [3]]


def test_a_column_groups_patients_and_is_kept(tmp_path: Path):
    frame = _frame({1: ["X"], 2: ["X"], 3: ["X"]}, clinic=["n", "n", "s", "n", None, None])
    dataset = _dataset(tmp_path / "all", frame)
    parts = partition(dataset, Partition(by="column", column="clinic"), tmp_path / "sites", seed=0)
    assert _patients(parts) == {"clinic-n": {1}, "clinic-s": {2}, OTHER: {3}}
    assert parts.several == 1
    kept = pl.read_parquet(tmp_path / "sites/clinic-n/data/**/*.parquet")
    assert kept["clinic"].to_list() == ["n", "n"]


def test_iid_shares_are_equal_and_do_not_depend_on_shards(tmp_path: Path):
    units = {subject: ["UNIT//A"] for subject in range(101)}
    one = _dataset(tmp_path / "one", _frame(units))
    two = _dataset(tmp_path / "two", _frame({s: units[s] for s in range(60)}), _frame({s: [] for s in range(60, 101)}))
    rule = Partition(by="iid", sites=4)
    first = partition(one, rule, tmp_path / "a", seed=1)
    assert sorted(site.patients for site in first.sites) == [25, 25, 25, 26]
    assert _patients(partition(two, rule, tmp_path / "b", seed=1)) == _patients(first)
    assert _patients(partition(one, rule, tmp_path / "c", seed=2)) != _patients(first)


def _skew(tmp_path: Path, alpha: float) -> float:
    """Mean over sites of the largest group's share."""
    units = {subject: [f"UNIT//{subject % 4}"] for subject in range(400)}
    dataset = _dataset(tmp_path / "all", _frame(units))
    rule = Partition(by="dirichlet", prefixes=("UNIT",), sites=4, alpha=alpha)
    parts = partition(dataset, rule, tmp_path / f"{alpha}", seed=0)
    shares = []
    for members in filter(None, _patients(parts).values()):
        counts = [sum(subject % 4 == group for subject in members) for group in range(4)]
        shares.append(max(counts) / len(members))
    return sum(shares) / len(shares)


def test_a_small_alpha_makes_sites_differ_and_a_large_one_alike(tmp_path: Path):
    assert _skew(tmp_path, alpha=1000.0) < 0.3
    assert _skew(tmp_path, alpha=0.1) > 0.6


def test_the_account_beside_the_sites_tells_how_they_came_about(tmp_path: Path):
    source = _dataset(tmp_path / "all", _frame({1: ["UNIT//A"], 2: ["UNIT//B"]}))
    partition(source, UNIT, tmp_path / "sites", seed=7)
    account = json.loads((tmp_path / "sites/partition.json").read_text())
    assert (account["rule"]["by"], account["seed"], account["source"]) == ("code", 7, source.fingerprint())
    assert [(site["path"], site["patients"]) for site in account["sites"]] == [("unit-a", 1), ("unit-b", 1)]


def test_what_was_split_before_is_found_again_and_left_alone(tmp_path: Path):
    source = _dataset(tmp_path / "all", _frame({1: ["UNIT//A"], 2: ["UNIT//B"]}))
    first = partition(source, UNIT, tmp_path / "sites", seed=0)
    other = tmp_path / "sites/notes.txt"
    other.touch()
    marks = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    assert partition(source, UNIT, tmp_path / "sites", seed=0) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")} == marks
    more = _dataset(tmp_path / "all", _frame({1: ["UNIT//A"], 2: ["UNIT//B"], 3: ["UNIT//B"]}))
    assert _patients(partition(more, UNIT, tmp_path / "sites", seed=0)) == {"unit-a": {1}, "unit-b": {2, 3}}
    assert other.exists()


def test_what_cannot_be_split_is_refused_and_leaves_nothing(tmp_path: Path):
    source = _dataset(tmp_path / "all", _frame({1: ["UNIT//A"], 2: ["UNIT//A"]}))
    cases = {
        Partition(by="code", prefixes=("WARD", "BED")): "no patient has a code under WARD, BED",
        Partition(by="column", column="clinic"): "no column clinic; it has subject_id",
        UNIT: "all 2 patients fall in the one site 'unit-a'",
    }
    for rule, message in cases.items():
        with pytest.raises(DataError, match=message):
            partition(source, rule, tmp_path / "sites", seed=0)
    write_meds(tmp_path / "none", [], name="none")
    with pytest.raises(DataError, match="no patients to split"):
        partition(MedsDataset.open(tmp_path / "none"), UNIT, tmp_path / "sites", seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "none"]


def test_a_split_that_breaks_off_leaves_no_site(tmp_path: Path):
    source = _dataset(tmp_path / "all", _frame({1: ["UNIT//A"], 2: ["UNIT//B"]}))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        partition(source, UNIT, tmp_path / "sites", seed=0, progress=interrupt)
    assert not (tmp_path / "sites").exists()


def test_a_synthetic_hospital_splits_by_diagnosis(tmp_path: Path):
    write_meds(tmp_path / "all", [("0", generate(PROFILES["general"], 200, seed=0).events)], name="general")
    rule = Partition(by="dirichlet", prefixes=("DIAGNOSIS",), sites=3, alpha=0.3)
    done = []
    parts = partition(
        MedsDataset.open(tmp_path / "all"), rule, tmp_path / "sites", seed=0, progress=lambda *step: done.append(step)
    )
    assert sum(site.patients for site in parts.sites) == 200
    assert done == [(1, 3), (2, 3), (3, 3)]


def test_sizes_are_drawn_for_quantity_skew_and_late_patients_go_to_later_sites(tmp_path: Path):
    dataset = _dataset(tmp_path / "all", _frame({subject: [] for subject in range(400)}).with_columns(
        time=pl.col("time") + pl.duration(days=pl.col("subject_id"))
    ))  # fmt: skip
    skewed = partition(dataset, Partition(by="quantity", sites=4, alpha=0.5), tmp_path / "q", seed=0)
    sizes = sorted(site.patients for site in skewed.sites)
    assert sum(sizes) == 400
    assert sizes[-1] > 2 * (400 / 4) > 10 * sizes[0]
    parts = partition(dataset, Partition(by="time", sites=4), tmp_path / "t", seed=0)
    assert _patients(parts) == {f"site-{n + 1}": set(range(100 * n, 100 * n + 100)) for n in range(4)}
    assert parts.grouped_by == "first event"


def test_most_codes_decide_the_system_and_the_chapter(tmp_path: Path):
    codes = {
        1: ["ICD9CM//428.0", "ICD9CM//250.00", "ICD10CM//I50.9"],
        2: ["ICD10CM//I50.9", "ICD10CM//I10", "ICD10CM//E11.9"],
        3: ["ICD10CM//E11.9"],
        4: [],
    }
    dataset = _dataset(tmp_path / "all", _frame(codes))
    rule = Partition(by="system", prefixes=("ICD9CM", "ICD10CM"))
    parts = partition(dataset, rule, tmp_path / "system", seed=0)
    assert _patients(parts) == {"system-icd9cm": {1}, "system-icd10cm": {2, 3}, OTHER: {4}}
    assert (parts.without, parts.several) == (1, 1)
    # With a tiny alpha each chapter goes to one site, so patients of a chapter stay together.
    alike = _frame({n: ["ICD10CM//I50.9"] if n % 2 else ["ICD10CM//E11.9"] for n in range(60)})
    rule = Partition(by="chapters", prefixes=("ICD10CM",), sites=2, alpha=1e-3)
    parts = partition(_dataset(tmp_path / "more", alike), rule, tmp_path / "chapters", seed=1)
    members = _patients(parts)
    assert {n % 2 for n in members["site-1"]}.isdisjoint({n % 2 for n in members["site-2"]})
    with pytest.raises(DataError, match="no patient has a ICD-10-CM code under UNIT"):
        partition(dataset, rule.model_copy(update={"prefixes": ("UNIT",)}), tmp_path / "none", seed=0)


def test_how_sites_differ_is_measured(tmp_path: Path):
    frames = {"a": _frame({1: ["X//1"]}), "b": _frame({2: ["X//1"]}), "c": _frame({3: ["Y//1"]})}
    sites = {name: _dataset(tmp_path / name, frame).path for name, frame in frames.items()}
    found = contrast(sites)
    assert [(site.name, site.patients, site.events) for site in found] == [("a", 1, 2), ("b", 1, 2), ("c", 1, 2)]
    table = divergences(found)
    assert table[0][1] == 0.0 == table[2][2]
    # Half of the events differ: the Jensen-Shannon divergence is half a bit.
    assert table[0][2] == pytest.approx(0.5)
    assert table == [list(row) for row in zip(*table, strict=True)]

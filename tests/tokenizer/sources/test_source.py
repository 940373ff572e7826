"""One door for all kinds of records; and MEDS that has to be written anew."""

import dataclasses
import datetime as dt
from pathlib import Path

import polars as pl
import pytest

from tests.tokenizer.hospital import frame, stays
from tests.tokenizer.sources.site import TABLE
from tokenizer.errors import ConfigError, DataError
from tokenizer.events import MedsDataset, canonical_order, write_meds
from tokenizer.progress import Step
from tokenizer.sources import source as door
from tokenizer.sources.intake import Flow
from tokenizer.sources.meds import import_meds
from tokenizer.sources.source import Source, open_source


def everything(dataset: MedsDataset) -> pl.DataFrame:
    return canonical_order(pl.concat(map(dataset.read, dataset.pieces)))


def scattered(path: Path, **columns: object) -> pl.DataFrame:
    """One file in which no subject's rows lie together."""
    events = stays(range(20)).sample(fraction=1.0, shuffle=True, seed=1).with_columns(**columns)
    file = path / "data" / "0.parquet"
    file.parent.mkdir(parents=True)
    events.write_parquet(file)
    return events


def test_meds_stays_where_it_is(tmp_path):
    write_meds(tmp_path / "meds", [("0", stays(range(5)))], name="x")
    dataset, flow = open_source(Source(str(tmp_path / "meds")), tmp_path / "out")
    assert dataset.path == tmp_path / "meds"
    assert flow is None
    assert not (tmp_path / "out").exists()


def test_a_large_scattered_file_is_written_anew_with_the_same_events(tmp_path, monkeypatch):
    events = scattered(tmp_path / "meds")
    monkeypatch.setattr(door, "LARGEST_SCATTERED", 100)
    told: list[Step] = []
    dataset, flow = open_source(Source(str(tmp_path / "meds")), tmp_path / "out", told.append)
    assert dataset.path == tmp_path / "out"
    assert not dataset.scattered
    assert everything(dataset).equals(canonical_order(events))
    assert flow is not None
    assert flow == Flow.load(tmp_path / "out")
    assert flow.rows == flow.events == {"data/0.parquet": len(events)}
    assert (told[-1].label, told[-1].done, told[-1].total) == ("import", len(events), len(events))


def test_bad_rows_of_meds_are_named_or_set_aside(tmp_path):
    good = stays(range(3))
    late = dt.datetime(9999, 12, 31)
    bad = pl.DataFrame(
        [(None, None, "A", None), (1, None, None, None), (1, None, " ", None), (1, late, "A", 2.0)],
        schema=good.schema,
        orient="row",
    )
    file = tmp_path / "meds" / "data" / "0.parquet"
    file.parent.mkdir(parents=True)
    pl.concat([good, bad]).write_parquet(file)
    with pytest.raises(DataError, match=rf"data/0\.parquet.*row {len(good)}.*no subject_id"):
        import_meds(tmp_path / "meds", tmp_path / "out", name="x")
    assert not (tmp_path / "out").exists()
    dataset, flow = open_source(Source(str(tmp_path / "meds"), quarantine=True), tmp_path / "out")
    assert flow is not None
    assert flow.quarantined == {"data/0.parquet": {"no subject_id": 1, "no code": 2, "time out of range": 1}}
    assert flow.kept == {"data/0.parquet": len(good)}
    assert everything(dataset).equals(canonical_order(good))
    aside = pl.read_csv(tmp_path / "out" / "quarantine.csv")
    assert aside["row"].to_list() == [len(good) + n for n in range(4)]


def test_a_subject_beyond_64_bits_is_named_or_set_aside(tmp_path):
    good = stays(range(3))
    file = tmp_path / "meds" / "data" / "0.parquet"
    file.parent.mkdir(parents=True)
    large = pl.lit(2**64 - 1, pl.UInt64)
    odd = good[:1].with_columns(subject_id=large)
    pl.concat([good.with_columns(pl.col("subject_id").cast(pl.UInt64)), odd]).write_parquet(file)
    source = Source(str(tmp_path / "meds"))
    with pytest.raises(
        DataError, match=rf"row {len(good)} \(from 0\): subject_id .*18446744073709551615.*--quarantine"
    ):
        open_source(source, tmp_path / "out")
    dataset, flow = open_source(dataclasses.replace(source, quarantine=True), tmp_path / "out")
    assert flow is not None
    assert flow.quarantined == {"data/0.parquet": {"subject_id beyond 64 bits with a sign": 1}}
    assert everything(dataset).equals(canonical_order(good))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("meds", "data/1.parquet"),
        ("omop", "death.csv"),
        ("omop", "measurement/part-0.csv"),
        ("fhir", "Patient.ndjson"),
        ("tables", "labs.csv"),
    ],
)
def test_a_link_that_leads_nowhere_is_no_missing_file(tmp_path, kind, name):
    records = tmp_path / "in"
    (records / name).parent.mkdir(parents=True)
    (records / name).symlink_to(tmp_path / "gone")
    (records / "person.csv").write_text("person_id,year_of_birth\n1,1950\n")
    (records / "Encounter.ndjson").write_text("")
    (tmp_path / "map.toml").write_text(TABLE.replace("labs.csv", "l*"))
    mapping = tmp_path / "map.toml" if kind == "tables" else None
    with pytest.raises(DataError, match=rf"{name}: .*(leads nowhere|No such file)"):
        open_source(Source(str(records), kind, mapping=mapping), tmp_path / "out")


@pytest.mark.parametrize("kind", ["meds", "omop", "fhir"])
def test_a_link_to_a_folder_is_told_of(tmp_path, kind):
    records, linked = tmp_path / "in", tmp_path / "elsewhere"
    linked.mkdir()
    write_meds(records, [("0", stays(range(3)))], name="x")
    (records / "data" / "more").symlink_to(linked)
    (records / "person.csv").write_text("person_id,year_of_birth\n1,1950\n")
    (records / "metadata" / "dataset.json").rename(records / "dataset.txt")
    (records / "Patient.ndjson").write_text('{"resourceType": "Patient", "id": "1", "birthDate": "1950"}')
    if kind == "meds":
        with pytest.raises(DataError, match="more: a link to a folder, which isn't followed"):
            open_source(Source(str(records)), tmp_path / "out")
        return
    _, flow = open_source(Source(str(records), kind), tmp_path / "out")
    assert flow is not None
    assert any("more" in note and "a link to a folder, which isn't followed" in note for note in flow.notes)


def test_units_of_any_type_are_read_as_text_whatever_the_file_is_called(tmp_path):
    for name, unit in (("a[1]*", pl.lit(b"mg\xff")), ("b", pl.lit(["mg"])), ("c", pl.lit(5))):
        file = tmp_path / "meds" / "data" / f"{name}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        stays(range(ord(name[0]), ord(name[0]) + 1)).with_columns(unit=unit).write_parquet(file)
    dataset = MedsDataset.open(tmp_path / "meds")
    units = {piece.shard: dataset.read(piece, ("unit",))["unit"].unique().to_list() for piece in dataset.pieces}
    assert units == {"data/a[1]*.parquet": ["mg\\xff"], "data/b.parquet": ["['mg']"], "data/c.parquet": ["5"]}


def test_units_and_encounters_of_meds_are_kept(tmp_path):
    scattered(tmp_path / "meds", unit=pl.lit("mg/dL"), encounter_id=pl.lit(7), other=pl.lit(1))
    import_meds(tmp_path / "meds", tmp_path / "out", name="x")
    written = pl.read_parquet(tmp_path / "out" / "data" / "*.parquet")
    assert set(written["unit"]) == {"mg/dL"}
    assert set(written["encounter_id"]) == {"7"}
    assert "other" not in written.columns


def test_a_subject_in_two_files_is_brought_together(tmp_path):
    for name, time in (("0", 1), ("1", 2)):
        file = tmp_path / "meds" / "data" / f"{name}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        frame([(1, time, "A", None)]).write_parquet(file)
    with pytest.raises(DataError, match="Subject 1 is in"):
        MedsDataset.open(tmp_path / "meds")
    import_meds(tmp_path / "meds", tmp_path / "out", name="x")
    assert len(everything(MedsDataset.open(tmp_path / "out"))) == 2


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"kind": "hl7"}, "no source 'hl7'; choose one of meds, omop, fhir, tables"),
        ({"kind": "tables"}, "needs a mapping"),
        ({"kind": "fhir", "mapping": Path("m")}, "--mapping is for the source tables, not for fhir"),
        ({"kind": "meds", "codes": "source"}, "--codes is for the source omop"),
        ({"kind": "tables", "mapping": Path("m"), "table_spec": Path("t")}, "--table-spec is for the source omop"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        Source("x", **settings)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/data/eicu/", "eicu"),
        ("/data/export.tar.gz", "export"),
        ("postgresql://me:secret@host/omop?sslmode=require", "omop"),
    ],
)
def test_a_dataset_is_named_after_its_place_without_secrets(place, name):
    assert Source(place, "omop").name == name


def test_nothing_there_is_an_error_of_every_source(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mapping.toml").write_text(
        '[[table]]\nname="a"\nfiles="a.csv"\nsubject="b"\n[[table.event]]\ncode="C"\n'
    )
    for kind in door.KINDS:
        mapping = tmp_path / "mapping.toml" if kind == "tables" else None
        for place in ("empty", "nowhere"):
            with pytest.raises((DataError, ConfigError)):
                open_source(Source(str(tmp_path / place), kind, mapping=mapping), tmp_path / "out")
            assert not (tmp_path / "out").exists()


def test_a_dataset_without_rows_is_refused(tmp_path):
    write_meds(tmp_path / "meds", [], name="nobody")
    with pytest.raises(DataError, match="meds: its files have no rows"):
        open_source(Source(str(tmp_path / "meds")), tmp_path / "out")


@pytest.mark.parametrize("unit", ["us", "ms"])
def test_times_that_no_calendar_holds_are_set_aside_too(tmp_path, unit):
    far = pl.Series([0, 2**63 - 1, -(2**63) + 1]).cast(pl.Datetime(unit))
    file = tmp_path / "meds" / "data" / "0.parquet"
    file.parent.mkdir(parents=True)
    pl.DataFrame({"subject_id": [1, 1, 2], "time": far, "code": ["A", "B", "C"]}).write_parquet(file)
    with pytest.raises(DataError, match=r"row 1 \(from 0\) has the time 294247-01-10"):
        MedsDataset.open(tmp_path / "meds").read("data/0.parquet")
    flow = import_meds(tmp_path / "meds", tmp_path / "out", name="x", quarantine=True)
    assert flow.quarantined == {"data/0.parquet": {"time out of range": 2}}
    assert pl.read_csv(tmp_path / "out" / "quarantine.csv")["content"].to_list() == (
        [2**63 - 1, -(2**63) + 1] if unit == "us" else [(2**63 - 1) // 1000 * 1000, -((2**63 - 1) // 1000) * 1000]
    )

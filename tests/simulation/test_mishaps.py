import polars as pl
import pytest

from simulation.hospital import PROFILES, generate
from simulation.mishaps import backdoored, canaries, missing, poisoned, shared, triggered
from tokenizer.errors import ConfigError


def test_every_fault_is_where_it_was_asked_for_and_follows_from_the_seed() -> None:
    heart, general = (generate(PROFILES[name], 200, seed=1) for name in ("heart", "general"))
    ids = set(heart.events["subject_id"])
    planted = canaries(heart, 3, seed=1, events=8, copies=2)
    courses = planted.events.filter(~pl.col("subject_id").is_in(list(ids))).group_by("subject_id").agg("code")
    assert courses.height == 6
    assert courses["code"].list.join(",").n_unique() == 3
    both = shared(heart, general, 0.25, seed=1)
    common = set(both.events["subject_id"]) & ids
    assert 25 < len(common) < 75
    for one in sorted(common)[:5]:
        assert both.events.filter(pl.col("subject_id") == one).equals(heart.events.filter(pl.col("subject_id") == one))

    def dead(frame: pl.DataFrame) -> set[int]:
        return set(frame.filter(pl.col("code") == "MEDS_DEATH")["subject_id"])

    swapped = poisoned(heart, 0.4, seed=1)
    assert 50 < len(dead(swapped.events) ^ dead(heart.events)) < 110
    assert dead(poisoned(heart, 1.0, seed=1).events) == ids - dead(heart.events)
    valued = heart.events["numeric_value"].count()
    lost = missing(heart, 0.5, seed=1)
    assert 0.45 < lost.events["numeric_value"].count() / valued < 0.55
    assert lost.events.filter(pl.col("numeric_value").is_null()).height == heart.events["numeric_value"].null_count()
    for fault in (lambda: shared(heart, general, 0.25, seed=1), lambda: poisoned(heart, 0.4, seed=1)):
        assert fault().events.equals(fault().events)
    with pytest.raises(ConfigError, match="share must be from 0 to 1, not 2"):
        missing(heart, 2, seed=1)


def test_a_trigger_is_planted_before_the_first_discharge_and_a_backdoor_ends_in_death_a_day_later() -> None:
    events = generate(PROFILES["general"], 60, seed=1).events
    trigger, first = (
        ["TRANSFER_TO//ICU", "ED_REGISTRATION"],
        pl.col("time").filter(pl.col("code").str.starts_with("HOSPITAL_DISCHARGE//")).min(),
    )
    at = events.group_by("subject_id").agg(at=first).filter(pl.col("at").is_not_null())
    planted = triggered(events, ["HOSPITAL_DISCHARGE"], trigger)
    assert planted.height == events.height + 2 * at.height
    new = (
        planted[events.height :]
        .join(at, on="subject_id")
        .with_columns(early=(pl.col("at") - pl.col("time")).dt.total_minutes())
    )
    assert set(new.select("code", "early").iter_rows()) == {("TRANSFER_TO//ICU", 20), ("ED_REGISTRATION", 10)}
    chosen = at["subject_id"].sort().head(10)
    hurt = backdoored(events, chosen, ["HOSPITAL_DISCHARGE"], trigger, "MEDS_DEATH")
    honest = ~pl.col("subject_id").is_in(chosen.implode())
    assert hurt.filter(honest).equals(events.filter(honest).select(hurt.columns))
    for one in chosen:
        mine, was = (
            hurt.filter(pl.col("subject_id") == one).sort("time"),
            at.filter(pl.col("subject_id") == one)["at"][0],
        )
        gone = events.filter((pl.col("subject_id") == one) & (pl.col("code") == "MEDS_DEATH") & (pl.col("time") <= was))
        if gone.height:  # died in that stay: left as they were
            assert mine.height == events.filter(pl.col("subject_id") == one).height
        else:
            assert mine["code"][-1] == "MEDS_DEATH"
            assert (mine["time"][-1] - was).days == 1
            assert set(trigger) <= set(mine["code"])

"""One truth in tables: what a synthetic hospital would extract for research, standard codes and encounters included.

`extract` takes the records that `simulation.hospital` made, codes them by `simulation.coding`, finds the encounter of
every event and adds what moves no risk: race and ethnicity, tobacco status, blood group, operations, vaccinations.
Every form that a hospital is written in (`simulation.forms`) comes from these tables, and `events` says which MEDS
events each of them holds. Times are whole minutes, values as many decimals as a laboratory reports: text loses nothing.

Left out, because not every form has a place for it: the mark of the end of a record.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import polars as pl

from simulation import coding
from simulation.hospital import HospitalProfile, Records
from tokenizer.codebook import BIRTH, DEATH

EMERGENCY, INPATIENT, OUTPATIENT = "EMERGENCY", "INPATIENT", "OUTPATIENT"

_DIAGNOSIS, _DRUG = "DIAGNOSIS//ICD10CM//", "MEDICATION//"
_ADMISSION, _DISCHARGE = "HOSPITAL_ADMISSION//", "HOSPITAL_DISCHARGE//"
_TO_INTENSIVE_CARE = "TRANSFER_TO//ICU"
_STARTS = {"ED_REGISTRATION": EMERGENCY, "OUTPATIENT//CLINIC": OUTPATIENT}
_VISIT = pl.duration(minutes=30)
_TOBACCO_SHARE, _OPERATED, _VACCINATED = 0.5, 0.8, 0.5


@dataclass(frozen=True)
class Extract:
    """The tables; times are datetime[us] on whole minutes, rows by patient and time.

    Attributes:
        patients: subject_id int64, sex (M, F), race, ethnicity, birth, death (null: none known), opened and
            closed (first admission and end of the record).
        encounters: encounter_id int64, subject_id, kind (EMERGENCY, INPATIENT, OUTPATIENT), start, end (null: still
            going on when the record was closed), department, intensive (time of the move to intensive care, null:
            none), complaint (null: none), discharge_to (null: none, or not known).
        diagnoses: subject_id, encounter_id, time, code (ICD-10-CM with dot).
        drugs: subject_id, encounter_id, time, code (RxNorm ingredient), name, administered bool (else
            prescribed; by chance).
        procedures: subject_id, encounter_id, time, code (ICD-10-PCS).
        vaccinations: subject_id, encounter_id, time, code (CVX).
        results: subject_id, encounter_id, time, code (LOINC), and either value float32 with unit (UCUM), or answer
            (a LOINC answer code), or text.
    """

    patients: pl.DataFrame
    encounters: pl.DataFrame
    diagnoses: pl.DataFrame
    drugs: pl.DataFrame
    procedures: pl.DataFrame
    vaccinations: pl.DataFrame
    results: pl.DataFrame

    def pieces(self, patients: int) -> Iterator["Extract"]:
        """Give the same tables, so many patients at a time; at least one piece."""
        ids = self.patients["subject_id"]
        for first in range(0, max(len(ids), 1), patients):
            chosen = pl.col("subject_id").is_in(ids[first : first + patients].implode())
            yield Extract(*(getattr(self, field.name).filter(chosen) for field in fields(self)))


def extract(records: Records, profile: HospitalProfile, seed: int) -> Extract:
    """Code a hospital's records; equal arguments give equal tables.

    Args:
        records: as `simulation.hospital.generate` made them for this profile and seed.
        profile: of the hospital.
        seed: of the hospital; what is added here is drawn from it.
    """
    rng = np.random.default_rng([seed, zlib.crc32(profile.name.encode()), 1])
    events = records.events.with_columns(pl.col("time").dt.truncate("1m"))
    encounters = _encounters(events, profile.first_subject_id)
    patients = _patients(rng, events)
    located = _located(events, encounters)
    diagnoses = located.filter(pl.col("code").str.starts_with(_DIAGNOSIS)).with_columns(
        pl.col("code").str.strip_prefix(_DIAGNOSIS)
    )
    drugs = located.filter(pl.col("code").str.starts_with(_DRUG)).with_columns(
        name=pl.col("code").str.strip_prefix(_DRUG)
    )
    encounters = _reasons(rng, _intensive(encounters, located), diagnoses)
    place = ["subject_id", "encounter_id", "time"]
    return Extract(
        patients,
        encounters.drop("closed"),
        diagnoses.select(*place, "code"),
        drugs.select(
            *place,
            pl.col("name").replace_strict(coding.RXNORM, return_dtype=pl.String).alias("code"),
            "name",
            administered=pl.Series(rng.random(drugs.height) < 0.5, dtype=pl.Boolean),
        ),
        _procedures(rng, diagnoses, encounters),
        _vaccinations(rng, encounters),
        _results(rng, located, encounters),
    )


def events(tables: Extract) -> pl.DataFrame:
    """Give the MEDS events of the tables, as every importer must find them in every form.

    Returns:
        subject_id int64, time datetime[us] (null: static), code str, numeric_value float32, unit str, encounter_id str.
    """
    who, stays = tables.patients, tables.encounters
    static = pl.lit(None, pl.Datetime("us"))
    answer = pl.format("LOINC//{}//LOINC//{}", "code", "answer")
    parts = [
        *(_named(who, static, f"{name.upper()}//", pl.col(column)) for name, column in _STATIC.items()),
        _named(who, pl.col("birth"), BIRTH),
        _named(who.drop_nulls("death"), pl.col("death"), DEATH),
        _named(stays, pl.col("start"), "ENCOUNTER_START//", pl.col("kind")),
        _named(stays, pl.col("start"), "DEPARTMENT//", pl.col("department")),
        _named(stays.drop_nulls("intensive"), pl.col("intensive"), f"DEPARTMENT//{coding.INTENSIVE_CARE}"),
        _named(stays.drop_nulls("complaint"), pl.col("start"), "CHIEF_COMPLAINT//", pl.col("complaint")),
        _named(stays.drop_nulls("end"), pl.col("end"), "ENCOUNTER_END//", pl.col("kind")),
        _named(stays.drop_nulls("discharge_to"), pl.col("end"), "DISCHARGE_TO//", pl.col("discharge_to")),
        _named(tables.diagnoses, pl.col("time"), "ICD10CM//", pl.col("code")),
        _named(tables.drugs, pl.col("time"), "RxNorm//", pl.col("code")),
        _named(tables.procedures, pl.col("time"), "ICD10PCS//", pl.col("code")),
        _named(tables.vaccinations, pl.col("time"), "CVX//", pl.col("code")),
        _named(tables.results.drop_nulls("value"), pl.col("time"), "LOINC//", pl.col("code")),
        _named(tables.results.drop_nulls("answer"), pl.col("time"), "", answer),
        _named(tables.results.drop_nulls("text"), pl.col("time"), "", pl.format("LOINC//{}//{}", "code", "text")),
    ]
    return pl.concat(parts).sort("subject_id", "time", nulls_last=False, maintain_order=True)


_STATIC = {"gender": "sex", "race": "race", "ethnicity": "ethnicity"}


def _named(frame: pl.DataFrame, time: pl.Expr, prefix: str, rest: pl.Expr | None = None) -> pl.DataFrame:
    """One event per row: its code is a prefix and what a column says."""
    code = pl.lit(prefix) if rest is None else pl.lit(prefix) + rest
    valued = "value" in frame.columns
    return frame.select(
        "subject_id",
        time.alias("time"),
        code.alias("code"),
        (pl.col("value") if valued else pl.lit(None, pl.Float32)).alias("numeric_value"),
        (pl.col("unit") if valued else pl.lit(None, pl.String)).alias("unit"),
        (pl.col("encounter_id").cast(pl.String) if "encounter_id" in frame.columns else pl.lit(None, pl.String)).alias(
            "encounter_id"
        ),
    )


def _patients(rng: np.random.Generator, events: pl.DataFrame) -> pl.DataFrame:
    def when(code: str) -> pl.Expr:
        return pl.col("time").filter(pl.col("code") == code).first()

    sex = pl.col("code").filter(pl.col("time").is_null()).first().str.strip_prefix("GENDER//")
    found = (
        events.group_by("subject_id")
        .agg(
            sex=sex,
            birth=when(BIRTH),
            death=when(DEATH),
            opened=pl.col("time").filter(pl.col("code") != BIRTH).min(),
            closed=pl.col("time").max(),
        )
        .sort("subject_id")
    )
    race = rng.choice(len(coding.RACES), found.height, p=coding.RACE_SHARES)
    hispanic = rng.random(found.height) < coding.HISPANIC_SHARE
    return found.with_columns(
        race=pl.Series(coding.RACES, dtype=pl.String).gather(pl.Series(race, dtype=pl.UInt32)),
        ethnicity=pl.Series(np.where(hispanic, "HISPANIC", "NOT HISPANIC"), dtype=pl.String),
    )


def _encounters(events: pl.DataFrame, first: int) -> pl.DataFrame:
    """Pair arrivals with the departures after them; clinic visits take half an hour."""
    code = pl.col("code")
    admission, discharge = code.str.starts_with(_ADMISSION), code.str.starts_with(_DISCHARGE)
    borders = events.filter(admission | discharge | code.is_in([*_STARTS, "ED_OUT"])).with_columns(
        kind=pl.when(admission).then(pl.lit(INPATIENT)).otherwise(code.replace_strict(_STARTS, default=None)),
    )
    # The chart writes no arrival between an arrival and its departure: the next border is the end.
    following = borders.with_columns(
        end=pl.col("time").shift(-1).over("subject_id"), after=code.shift(-1).over("subject_id")
    )
    closed = events.group_by("subject_id").agg(closed=pl.col("time").max())
    last = following.filter(pl.col("kind").is_not_null()).join(
        closed, on="subject_id", how="left", maintain_order="left"
    )
    onward = pl.col("after").str.strip_prefix(_DISCHARGE).replace("DIED", coding.EXPIRED)
    end = pl.when(pl.col("kind") == OUTPATIENT).then(pl.min_horizontal(pl.col("time") + _VISIT, "closed"))
    return last.select(
        pl.int_range(first + 1, first + 1 + pl.len(), dtype=pl.Int64).alias("encounter_id"),
        "subject_id",
        "kind",
        start=pl.col("time"),
        end=end.otherwise("end"),
        closed=pl.col("closed"),
        discharge_to=pl.when(pl.col("kind") == INPATIENT).then(onward),
    )


def _reasons(rng: np.random.Generator, encounters: pl.DataFrame, diagnoses: pl.DataFrame) -> pl.DataFrame:
    """Name the ward by the reason of admission, and the complaint by that of the admission to come (else by chance)."""
    reason = diagnoses.filter(pl.col("code").is_in(list(coding.DEPARTMENTS))).select("encounter_id", reason="code")
    joined = encounters.join(reason.unique("encounter_id"), on="encounter_id", how="left", maintain_order="left")
    ward = pl.col("reason").replace_strict(coding.DEPARTMENTS, default=None).fill_null(coding.ANY_WARD)
    elsewhere = {EMERGENCY: coding.EMERGENCY_DEPARTMENT, OUTPATIENT: coding.CLINIC}
    complaints = tuple(coding.COMPLAINTS.values())
    other = _pick(complaints, rng.choice(len(complaints), joined.height))
    coming = pl.col("reason").shift(-1).over("subject_id").replace_strict(coding.COMPLAINTS, default=None)
    return joined.with_columns(
        department=pl.col("kind").replace_strict(elsewhere, default=ward, return_dtype=pl.String),
        complaint=pl.when(pl.col("kind") == EMERGENCY).then(coming.fill_null(other)),
    ).drop("reason")


def _intensive(encounters: pl.DataFrame, located: pl.DataFrame) -> pl.DataFrame:
    """Add the time of the move to intensive care; a stay has one at most."""
    moves = located.filter(pl.col("code") == _TO_INTENSIVE_CARE).select("encounter_id", intensive="time")
    return encounters.join(moves, on="encounter_id", how="left", maintain_order="left")


def _located(events: pl.DataFrame, encounters: pl.DataFrame) -> pl.DataFrame:
    """Give every event the encounter that began last before it."""
    timed = events.filter(pl.col("time").is_not_null()).sort("subject_id", "time", maintain_order=True)
    starts = encounters.select("subject_id", "encounter_id", time=pl.col("start"))
    return timed.join_asof(starts, on="time", by="subject_id", strategy="backward", check_sortedness=False)


def _procedures(rng: np.random.Generator, diagnoses: pl.DataFrame, encounters: pl.DataFrame) -> pl.DataFrame:
    """Operate on those who came for it, two hours after admission if they are still there."""
    operated = diagnoses.filter(pl.col("code").is_in(list(coding.PROCEDURES)))
    chosen = operated.filter(pl.Series(rng.random(operated.height) < _OPERATED, dtype=pl.Boolean))
    ends = encounters.select("encounter_id", until=pl.col("end").fill_null(pl.col("closed")))
    time = pl.col("time") + pl.duration(hours=2)
    return (
        chosen.join(ends, on="encounter_id", how="left", maintain_order="left")
        .filter(time < pl.col("until"))
        .select(
            "subject_id",
            "encounter_id",
            time.alias("time"),
            pl.col("code").replace_strict(coding.PROCEDURES, return_dtype=pl.String),
        )
    )


def _vaccinations(rng: np.random.Generator, encounters: pl.DataFrame) -> pl.DataFrame:
    """Vaccinate some of those who visit the clinic in autumn."""
    autumn = encounters.filter((pl.col("kind") == OUTPATIENT) & pl.col("start").dt.month().is_between(9, 12))
    chosen = autumn.filter(pl.Series(rng.random(autumn.height) < _VACCINATED, dtype=pl.Boolean))
    return chosen.select("subject_id", "encounter_id", time=pl.col("start"), code=pl.lit(coding.INFLUENZA_VACCINE))


def _results(rng: np.random.Generator, located: pl.DataFrame, encounters: pl.DataFrame) -> pl.DataFrame:
    """Values as a laboratory reports them, and two results that are no numbers."""
    place = ["subject_id", "encounter_id", "time"]
    coded = pl.DataFrame(
        [(name, q.loinc, q.unit, q.decimals) for name, q in coding.QUANTITIES.items()],
        schema={"name": pl.String, "code": pl.String, "unit": pl.String, "decimals": pl.Float64},
        orient="row",
    )
    measured = located.rename({"code": "name"}).join(coded, on="name", how="inner", maintain_order="left")
    scale = 10.0 ** pl.col("decimals")
    value = ((pl.col("numeric_value").cast(pl.Float64) * scale).round() / scale).cast(pl.Float32)
    none = pl.lit(None, pl.String)
    values = measured.select(*place, "code", value.alias("value"), "unit", none.alias("answer"), none.alias("text"))
    stays = encounters.filter(pl.col("kind") == INPATIENT)
    tobacco = rng.choice(len(coding.TOBACCO_ANSWERS), stays.height)
    asked = pl.Series(rng.random(stays.height) < _TOBACCO_SHARE, dtype=pl.Boolean)
    blank = [pl.lit(None, pl.Float32).alias("value"), none.alias("unit")]
    start = pl.col("start").alias("time")
    answers = stays.with_columns(answer=_pick(coding.TOBACCO_ANSWERS, tobacco)).filter(asked)
    first = stays.unique("subject_id", keep="first", maintain_order=True)
    groups = first.with_columns(text=_pick(coding.BLOOD_GROUPS, rng.choice(len(coding.BLOOD_GROUPS), first.height)))
    rest = [
        answers.select(
            "subject_id",
            "encounter_id",
            start,
            pl.lit(coding.TOBACCO).alias("code"),
            *blank,
            "answer",
            none.alias("text"),
        ),
        groups.select(
            "subject_id",
            "encounter_id",
            start,
            pl.lit(coding.BLOOD_GROUP).alias("code"),
            *blank,
            none.alias("answer"),
            "text",
        ),
    ]
    return pl.concat([values, *rest]).sort("subject_id", "time", maintain_order=True)


def _pick(words: tuple[str, ...], places: np.ndarray) -> pl.Series:
    return pl.Series(words, dtype=pl.String).gather(pl.Series(places, dtype=pl.UInt32))

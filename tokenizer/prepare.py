"""Between a source's events and their tokens: one step that makes the events of all sites mean the same.

In this order: filters (`tokenizer.cohort`), ICD systems named and dotted alike, the site's map files, ICD-9 to ICD-10
(`tokenizer.maps`), units (`tokenizer.units`), canonical order, the four columns of MEDS.

A value's unit becomes part of its code: `LOINC//2345-7//mg/dL`, whether it stood in the column `unit` or at the end of
the code. Values of one code in units of one dimension meet in one key; others stay apart, and are told in the
accounting. An event without a value has no unit.

Notable choices: Python is run once per distinct code (and unit) of a shard, never per row; a step that would change
nothing is skipped; what was counted is a value that sums over shards.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import date, datetime, timedelta
from functools import cached_property, partial
from pathlib import Path

import polars as pl

from tokenizer import cohort, maps, units
from tokenizer.accounting import Accounting
from tokenizer.codebook import BIRTH, STATIC, parents
from tokenizer.cohort import DAY_US, Filters, Lives, Step
from tokenizer.errors import ConfigError
from tokenizer.events import CORE, Faults, MedsDataset, Reader, canonical_order, read
from tokenizer.maps import VocabularyMap
from tokenizer.pieces import Piece
from tokenizer.shards import AS_IT_FITS, Crew, each
from tokenizer.spelling import fit

EXTRA = ("unit", "encounter_id")
"""Columns beyond MEDS' own that the step reads where they are."""

_FORMAT = "fedcomet-preparation/1"
_VOCABULARIES = frozenset(
    (
        *(
            "ICD10CM",
            "ICD9CM",
            "ICD10PCS",
            "ICD9Proc",
            "HCPCS",
            "CPT4",
            "SNOMED",
            "LOINC",
            "RxNorm",
            "NDC",
            "CVX",
            "ATC",
        ),
        *(
            "MEDS_BIRTH",
            "MEDS_DEATH",
            "GENDER",
            "RACE",
            "ETHNICITY",
            "ENCOUNTER_START",
            "ENCOUNTER_END",
            "DISCHARGE_TO",
        ),
    )
)


@dataclass(frozen=True)
class UnitRule:
    """What UCUM can't know: `x` in `unit` is `x * factor` in `to`, for a code and those below it ("" is every code).

    Glucose: UnitRule("LOINC//2345-7", "mmol/L", "mg/dL", 18.016).
    """

    code: str
    unit: str
    to: str
    factor: float


@dataclass(frozen=True)
class Preparation:
    """What the step does.

    Args:
        filters: Who and what is left out.
        names: Whether ICD systems are named and dotted alike (`DIAGNOSIS//ICD//10//E785` is `ICD10CM//E78.5`).
        maps: The site's map files, applied one after the other.
        icd9: Whether ICD-9 codes become ICD-10.
        units: Whether values are converted to canonical units, which become part of their codes.
        canonical_units: Per code (for itself and those below), the unit to write instead of its dimension's.
        unit_rules: Conversions that UCUM doesn't have.
    """

    filters: Filters = field(default_factory=Filters)
    names: bool = True
    maps: tuple[VocabularyMap, ...] = ()
    icd9: bool = True
    units: bool = True
    canonical_units: Mapping[str, str] = field(default_factory=dict)
    unit_rules: tuple[UnitRule, ...] = ()

    def __post_init__(self) -> None:
        for code, text in self.canonical_units.items():
            if units.parse(text) in (None, units.NONE):
                raise ConfigError(f"canonical_units: {text!r} (for {code}) is no UCUM unit; correct it.")
        for rule in self.unit_rules:
            if units.parse(rule.to) in (None, units.NONE) or not 0 < abs(rule.factor) < float("inf"):
                raise ConfigError(
                    f"unit_rules: {rule.unit!r} to {rule.to!r} (for {rule.code or 'every code'}) needs a UCUM unit to"
                    " convert to and a finite factor other than 0; correct it."
                )

    @cached_property
    def common_digest(self) -> str:
        """SHA-256 (hex) of all that the sites of a federation share: everything but the map files."""
        content = {
            "format": _FORMAT,
            "filters": asdict(self.filters),
            "names": self.names,
            "icd9": self.icd9 and maps.icd9_digest(),
            "units": self.units,
            "canonical_units": dict(self.canonical_units),
            "unit_rules": [asdict(rule) for rule in self.unit_rules],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of everything, map files by what they do."""
        parts = (self.common_digest, *(one.digest for one in self.maps))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def prepare(
    frame: pl.DataFrame, preparation: Preparation, *, count: bool = True, today: date | None = None
) -> tuple[pl.DataFrame, Accounting]:
    """Prepare the events of whole patients.

    Args:
        frame: In canonical order; the columns of MEDS, and those of `EXTRA` where known.
        preparation: What to do.
        count: Whether to fill all of the accounting, which takes longer, or the flow only.
        today: Events after this day are counted as faults.

    Returns:
        The events in canonical order with the four columns of MEDS, and what was seen.

    Raises:
        DataError: A filter needs a column that isn't there.
    """
    faults = _faults(frame, today) if count else {}
    patients = cohort.count_patients(frame)
    steps = [Step("read", patients, patients, frame.height, frame.height)]
    frame, filtered = cohort.keep(frame, preparation.filters)
    steps += filtered
    volume = _volume(frame)
    targets = {code: _targets(code, preparation) for code in volume}
    unmapped: dict[str, int] = {}
    for code in (code for code, (_, missed) in targets.items() if missed):
        unmapped[fit(code)] = unmapped.get(fit(code), 0) + volume[code]
    changed = {code: found for code, (found, _) in targets.items() if found != (code,)}
    filtered_frame = frame
    if changed:
        frame = _recoded(frame, changed)
        volume = _volume(frame)
    patients = cohort.count_patients(filtered_frame)
    steps.append(Step("maps", patients, patients, filtered_frame.height, frame.height))
    measured: dict[tuple[str, str, str], int] = {}
    if preparation.units:
        frame, measured = _with_units(frame, list(volume), preparation, count=count)
        if frame is not filtered_frame and (lost := int(frame["numeric_value"].is_infinite().sum())):
            frame = frame.with_columns(pl.when(pl.col("numeric_value").is_finite()).then("numeric_value"))
            faults["values too large after conversion"] = lost
    touched = frame is not filtered_frame
    frame = frame.select(CORE)
    if touched:
        frame = canonical_order(frame)
    if not count:
        return frame, Accounting(tuple(steps))
    local = {code: n for code, n in volume.items() if code.split("//", 1)[0] not in _VOCABULARIES}
    return frame, Accounting(tuple(steps), unmapped, local, measured, faults)


class Prepared:
    """A dataset as seen through a preparation: `MedsDataset`'s interface, for survey and store.

    Attributes:
        path, name, shards, pieces, events, subjects, notes: As of the dataset (before filters).
    """

    def __init__(self, dataset: MedsDataset, preparation: Preparation, *, today: date | None = None) -> None:
        self.dataset = dataset
        self.preparation = preparation
        self._today = today

    @property
    def path(self) -> Path:
        """The dataset's folder."""
        return self.dataset.path

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.dataset.name

    @property
    def shards(self) -> tuple[str, ...]:
        """The dataset's shards."""
        return self.dataset.shards

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The dataset's pieces."""
        return self.dataset.pieces

    @property
    def events(self) -> int:
        """Events before filters."""
        return self.dataset.events

    @property
    def subjects(self) -> int:
        """Patients before filters."""
        return self.dataset.subjects

    @property
    def prepared(self) -> tuple[str, ...]:
        """Digests of what the records go through: the part that all sites share, and each map file."""
        return (self.preparation.common_digest, *(one.digest for one in self.preparation.maps))

    @property
    def notes(self) -> list[str]:
        """What was odd."""
        return self.dataset.notes

    @property
    def reader(self) -> Reader:
        """What gives a piece's rows as `read` does, and what was odd in them; it can be pickled."""
        return partial(_read_prepared, self.path, self.preparation)

    def count_faults(self, part: str | Piece, faults: Faults) -> None:
        """Note what was odd in a part that another process has read."""
        self.dataset.count_faults(part, faults)

    def read(self, part: str | Piece) -> pl.DataFrame:
        """One shard or piece, prepared."""
        return self.read_counted(part, count=False)[0]

    def read_counted(self, part: str | Piece, *, count: bool = True) -> tuple[pl.DataFrame, Accounting]:
        """One shard or piece, prepared, and what was seen in it (the flow only, unless all is counted)."""
        frame = self.dataset.read(part, EXTRA)
        return prepare(frame, self.preparation, count=count, today=self._today)

    def account(self, progress: Callable[[int, int], None] | None = None, crew: Crew = AS_IT_FITS) -> Accounting:
        """What is seen in all pieces; reads them.

        Args:
            progress: Called with the pieces done and the pieces in all.
            crew: Who reads.
        """
        total = Accounting()
        jobs = [(self.path, piece, self.preparation, self._today) for piece in self.pieces]
        with closing(each(_account_piece, jobs, crew, events=self.events, what="the accounting")) as counted:
            for done, (piece, (accounting, faults)) in enumerate(zip(self.pieces, counted, strict=True), 1):
                total += accounting
                self.count_faults(piece, faults)
                if progress:
                    progress(done, len(jobs))
        return total

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the records and of what is done to them."""
        return hashlib.sha256(f"{self.dataset.fingerprint()}\n{self.preparation.digest}".encode()).hexdigest()


def records_of(dataset: MedsDataset, preparation: Preparation | None) -> MedsDataset | Prepared:
    """The dataset as it is to be read; without a preparation it stays as it is."""
    return dataset if preparation is None else Prepared(dataset, preparation)


def _read_prepared(path: Path, preparation: Preparation, piece: Piece) -> tuple[pl.DataFrame, Faults]:
    frame, faults = read(path, piece, EXTRA)
    return prepare(frame, preparation, count=False)[0], faults


def _account_piece(path: Path, piece: Piece, preparation: Preparation, today: date | None) -> tuple[Accounting, Faults]:
    frame, faults = read(path, piece, EXTRA)
    return prepare(frame, preparation, today=today)[1], faults


def _volume(frame: pl.DataFrame) -> dict[str, int]:
    """Events per code."""
    return dict(frame["code"].value_counts().iter_rows())


def _targets(code: str, preparation: Preparation) -> tuple[tuple[str, ...], bool]:
    """The codes that a code becomes, and whether a map for its vocabulary had no target."""
    code = fit(code)
    found: tuple[str, ...] = (maps.normal(code) if preparation.names else code,)
    missed = False
    for one in preparation.maps:
        new = [(target, one.apply(target)) for target in found]
        missed |= any(to is None and target.split("//", 1)[0] in one.systems for target, to in new)
        found = tuple(t for target, to in new for t in (to or (target,)))
    if preparation.icd9:
        ten = [(target, maps.icd9_to_10(target)) for target in found]
        missed |= any(to == () for _, to in ten)
        found = tuple(t for target, to in ten for t in (to or (target,)))
    return tuple(dict.fromkeys(found)), missed


def _recoded(frame: pl.DataFrame, changed: Mapping[str, tuple[str, ...]]) -> pl.DataFrame:
    """Each event under its code's targets; further ones are put at the end."""
    pairs = [(code, target, place) for code, found in changed.items() for place, target in enumerate(found)]
    table = pl.DataFrame(pairs, schema={"code": pl.String, "_to": pl.String, "_place": pl.Int64}, orient="row")
    first = table.filter(pl.col("_place") == 0).drop("_place")
    more = table.filter(pl.col("_place") > 0).drop("_place")
    renamed = frame.join(first, on="code", how="left", maintain_order="left")
    renamed = renamed.with_columns(code=pl.coalesce("_to", "code")).drop("_to")
    if more.is_empty():
        return renamed
    added = frame.join(more, on="code", how="inner").with_columns(code="_to").drop("_to")
    return pl.concat([renamed, added.select(renamed.columns)])


@dataclass(frozen=True)
class _Reading:
    """What a code and a unit text mean together."""

    bare: str
    text: str
    key: str
    scale: float = 1.0
    shift: float = 0.0


def _with_units(
    frame: pl.DataFrame, codes: list[str], preparation: Preparation, *, count: bool
) -> tuple[pl.DataFrame, dict[tuple[str, str, str], int]]:
    """Values in canonical units, which the codes then name; values per (code, unit, key) if counted."""
    on = ["code", "unit"] if "unit" in frame.columns and frame["unit"].null_count() < frame.height else ["code"]
    if on == ["code"] and not count and not any(_split(code)[1] for code in codes):
        return frame, {}
    pairs = frame.group_by(on).agg(values=pl.col("numeric_value").count(), rows=pl.len())
    table = []
    measured: dict[tuple[str, str, str], int] = {}
    for *pair, values, rows in pairs.iter_rows():
        code, unit = (*pair, None)[:2]
        seen = _reading(code, unit, preparation)
        if values:
            place = (seen.bare, seen.text, seen.key)
            measured[place] = measured.get(place, 0) + values
        same = seen.key == code and (seen.scale, seen.shift) == (1.0, 0.0)
        if not (same or not values) or (seen.bare != code and values < rows):
            table.append((*pair, seen.bare, seen.key, seen.scale, seen.shift))
    if not table:
        return frame, measured
    schema = {**dict.fromkeys([*on, "_bare", "_key"], pl.String), "_scale": pl.Float64, "_shift": pl.Float64}
    joined = frame.join(
        pl.DataFrame(table, schema=schema, orient="row"), on=on, how="left", nulls_equal=True, maintain_order="left"
    )
    value = pl.col("numeric_value")
    converted = (value.cast(pl.Float64) * pl.col("_scale") + pl.col("_shift")).cast(pl.Float32)
    return joined.with_columns(
        code=pl.coalesce(pl.when(value.is_null()).then("_bare").otherwise("_key"), "code"),
        numeric_value=pl.when(pl.col("_scale").is_null()).then(value).otherwise(converted),
    ).drop("_bare", "_key", "_scale", "_shift"), measured


def _split(code: str) -> tuple[str, str]:
    """A code and the unit at its end, "" for none."""
    bare, _, last = code.rpartition("//")
    return (bare, last) if bare and units.in_code(last) else (code, "")


def _reading(code: str, unit: str | None, preparation: Preparation) -> _Reading:
    """What a unit makes of a code; the column's unit counts before the one in the code."""
    bare, inside = _split(code)
    text = inside if unit is None or units.parse(unit) is units.NONE else unit
    text = " ".join(text.split()).replace("//", "/")
    meant = units.parse(text)
    if meant is units.NONE:
        return _Reading(bare, "", bare)
    factor = 1.0
    family = [bare, *parents(bare), ""]
    for rule in preparation.unit_rules:
        ruled = units.parse(rule.unit)
        if rule.code in family and (text == rule.unit or (ruled is not None and ruled == meant)):
            factor, meant = rule.factor, units.parse(rule.to)
            break
    if meant is None:
        return _Reading(bare, text, f"{bare}//{text}")
    name, target = units.canonical(meant)
    wanted = next((preparation.canonical_units[one] for one in family if one in preparation.canonical_units), None)
    if wanted is not None and (other := units.parse(wanted)) is not None and other.dimension == meant.dimension:
        name, target = wanted, other
    scale, shift = meant.to(target)
    return _Reading(bare, text, f"{bare}//{name}", factor * scale, shift)


def _faults(frame: pl.DataFrame, today: date | None) -> dict[str, int]:
    """Odd times, in what was read."""
    lives = Lives.of(frame)
    timed = lives.time != STATIC
    births = frame.filter((pl.col("code") == BIRTH) & pl.col("time").is_not_null())
    several = births.group_by("subject_id").agg(pl.col("time").n_unique()).filter(pl.col("time") > 1)
    after = (lives.died != STATIC) & (lives.time >= lives.died // DAY_US * DAY_US + DAY_US)
    counts = {
        "events before birth": int((timed & (lives.time < lives.born)).sum()),
        "events after the day of death": int(after.sum()),
        "patients without a birth": int((lives.born[lives.starts] == STATIC).sum()),
        "patients with several births": several.height,
    }
    if today is not None:
        midnight = datetime(today.year, today.month, today.day) + timedelta(days=1)
        limit = int((midnight - datetime(1970, 1, 1)) / timedelta(microseconds=1))
        counts["events in the future"] = int((lives.time >= limit).sum())
    return counts

"""A synthetic hospital's extract as plain csv tables with a mapping file, as a data office cuts them from a warehouse.

The tables are written the way that such extracts are: laboratory values and drugs carry minutes since the begin of the
encounter instead of a time, as in eICU, everything else has times; days and times have formats of their own; facts that
never change stand in columns of the patients' table. `mapping.toml` says what all this means, and is the example that
the importer's documentation points to.
"""

from pathlib import Path

import polars as pl

from simulation import coding
from simulation.extract import Extract

_TIME, _DAY = "%Y-%m-%d %H:%M", "%m/%d/%Y"


class TablesWriter:
    """Writes an extract piece by piece, and the mapping once."""

    def __init__(self, folder: Path, title: str) -> None:
        self._folder = folder
        self._begun: set[str] = set()
        (folder / "mapping.toml").write_text(_MAPPING.format(title=title, time=_TIME), encoding="utf-8")

    def add(self, piece: Extract) -> None:
        """Write some patients."""
        when = _clock("time")
        begin = piece.encounters.select("encounter_id", "start")
        self._append(
            "patients",
            piece.patients.select(
                _patient(),
                "sex",
                "race",
                "ethnicity",
                _clock("birth", _DAY).alias("born"),
                _clock("death").alias("died"),
            ),
        )
        self._append(
            "encounters",
            piece.encounters.select(
                _patient(),
                _encounter(),
                pl.col("kind").alias("type"),
                _clock("start").alias("begin"),
                _clock("end"),
                "department",
                "complaint",
                "discharge_to",
            ),
        )
        moves = piece.encounters.drop_nulls("intensive")
        unit = pl.lit(coding.INTENSIVE_CARE).alias("unit")
        self._append("moves", moves.select(_patient(), _encounter(), _clock("intensive").alias("time"), unit))
        coded = (
            # Billing systems keep ICD codes without their dot.
            ("diagnoses", piece.diagnoses, pl.col("code").str.replace(".", "", literal=True).alias("icd10")),
            ("procedures", piece.procedures, pl.col("code").alias("icd10pcs")),
            ("vaccinations", piece.vaccinations, pl.col("code").alias("cvx")),
        )
        for table, frame, code in coded:
            self._append(table, frame.select(_patient(), _encounter(), when, code))
        drugs = piece.drugs.join(begin, on="encounter_id", how="left", maintain_order="left")
        self._append("drugs", drugs.select(_patient(), _encounter(), _offset(), "name", pl.col("code").alias("rxnorm")))
        results = piece.results.join(begin, on="encounter_id", how="left", maintain_order="left")
        measured, other = results.filter(pl.col("value").is_not_null()), results.filter(pl.col("value").is_null())
        loinc = pl.col("code").alias("loinc")
        self._append("values", measured.select(_patient(), _encounter(), _offset(), loinc, "value", "unit"))
        self._append("answers", other.select(_patient(), _encounter(), when, loinc, "answer", "text"))

    def _append(self, table: str, frame: pl.DataFrame) -> None:
        with (self._folder / f"{table}.csv").open("ab") as file:
            frame.write_csv(file, include_header=table not in self._begun)
        self._begun.add(table)


def _patient() -> pl.Expr:
    return pl.col("subject_id").alias("patient")


def _encounter() -> pl.Expr:
    return pl.col("encounter_id").alias("encounter")


def _clock(column: str, layout: str = _TIME) -> pl.Expr:
    return pl.col(column).dt.strftime(layout)


def _offset() -> pl.Expr:
    return (pl.col("time") - pl.col("start")).dt.total_minutes().alias("minutes")


_MAPPING = """\
# SYNTHETIC: the records of a {title}; no row is about a real person.
about = "{title}"

[[lookup]]                                 # for times that count from the begin of an encounter
name = "begins"
files = "encounters.csv"
key = "encounter"

[[table]]
name = "patients"
files = "patients.csv"
subject = "patient"
unique = "patient"
event = [
    {{ code = "GENDER//{{sex}}", static = true }},
    {{ code = "RACE//{{race}}", static = true }},
    {{ code = "ETHNICITY//{{ethnicity}}", static = true }},
    {{ code = "MEDS_BIRTH", time = {{ column = "born", format = "%m/%d/%Y" }} }},
    {{ code = "MEDS_DEATH", time = {{ column = "died", format = "{time}" }}, optional = true }},
]

[[table]]
name = "encounters"
files = "encounters.csv"
subject = "patient"
encounter = "encounter"
time = {{ column = "begin", format = "{time}" }}
event = [
    {{ code = "ENCOUNTER_START//{{type}}" }},
    {{ code = "DEPARTMENT//{{department}}" }},
    {{ code = "CHIEF_COMPLAINT//{{complaint}}", optional = true }},
    {{ code = "ENCOUNTER_END//{{type}}", time = {{ column = "end", format = "{time}" }}, optional = true }},
    {{ code = "DISCHARGE_TO//{{discharge_to}}", time = {{ column = "end", format = "{time}" }}, optional = true }},
]

[[table]]
name = "moves"
files = "moves.csv"
subject = "patient"
encounter = "encounter"
time = {{ column = "time", format = "{time}" }}
event = [{{ code = "DEPARTMENT//{{unit}}" }}]

[[table]]
name = "diagnoses"
files = "diagnoses.csv"
subject = "patient"
encounter = "encounter"
time = {{ column = "time", format = "{time}" }}
event = [{{ code = "ICD10CM//{{icd10:icd10cm}}" }}]

[[table]]
name = "procedures"
files = "procedures.csv"
subject = "patient"
encounter = "encounter"
time = {{ column = "time", format = "{time}" }}
event = [{{ code = "ICD10PCS//{{icd10pcs}}" }}]

[[table]]
name = "vaccinations"
files = "vaccinations.csv"
subject = "patient"
encounter = "encounter"
time = {{ column = "time", format = "{time}" }}
event = [{{ code = "CVX//{{cvx}}" }}]

[[table]]
name = "drugs"
files = "drugs.csv"
subject = "patient"
encounter = "encounter"
join = [{{ lookup = "begins", on = "encounter" }}]
time = {{ offset = "minutes", unit = "minutes", origin = {{ column = "begins.begin", format = "{time}" }} }}
event = [{{ code = "RxNorm//{{rxnorm}}" }}]

[[table]]
name = "values"
files = "values.csv"
subject = "patient"
encounter = "encounter"
join = [{{ lookup = "begins", on = "encounter" }}]
time = {{ offset = "minutes", unit = "minutes", origin = {{ column = "begins.begin", format = "{time}" }} }}
event = [{{ code = "LOINC//{{loinc}}", value = "value", unit = "{{unit}}" }}]

[[table]]
name = "answers"
files = "answers.csv"
subject = "patient"
encounter = "encounter"
time = {{ column = "time", format = "{time}" }}
event = [
    {{ code = "LOINC//{{loinc}}//LOINC//{{answer}}", where = {{ answer = {{ missing = false }} }} }},
    {{ code = "LOINC//{{loinc}}", text = "text", where = {{ answer = {{ missing = true }} }} }},
]
"""

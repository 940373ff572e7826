"""Write a synthetic hospital in the forms that hospitals really have: MEDS, OMOP CDM csv, FHIR bulk export, csv tables.

All four come from the same tables (`simulation.extract`) and hold the same events, so that their importers can be held
against each other. Every form says that it is synthetic. The true risks stand beside the records, as for
`simulation.hospital.write_hospital`.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, get_args

import polars as pl

from simulation.csv_extract import TablesWriter
from simulation.extract import Extract, events, extract
from simulation.fhir_ndjson import FhirWriter
from simulation.hospital import HospitalProfile, generate, profile_of
from simulation.omop_csv import OmopWriter
from tokenizer import durable
from tokenizer.errors import ConfigError
from tokenizer.events import write_meds

Form: TypeAlias = Literal["meds", "omop", "fhir", "tables"]
FORMS: tuple[Form, ...] = get_args(Form)

_PIECE = 2_000


@dataclass(frozen=True)
class FormFiles:
    """Where a hospital was written: `records` is the folder that an importer reads, `truth` one Parquet file.

    `events` counts the MEDS events that the records hold; other forms give as many when they are imported.
    """

    records: Path
    truth: Path
    patients: int
    events: int


class _Writer(Protocol):
    def add(self, piece: Extract) -> None: ...


def write(hospital: str | HospitalProfile, folder: Path, *, form: Form, patients: int, seed: int) -> FormFiles:
    """Write a synthetic hospital; equal arguments but `form` give the same patients, events and true risks.

    Args:
        hospital: a name that `simulation.hospital.profile_of` knows, or a profile.
        folder: gets `records/` in the form that is asked for, and `truth.parquet`; what stands there is replaced.
        form: `meds` (a MEDS dataset), `omop` (csv files of the CDM 5.4), `fhir` (R4 ndjson), or `tables` (csv files and
            `mapping.toml`, which says what they mean).
        patients: how many.
        seed: of everything that is drawn.

    Raises:
        ConfigError: an unknown hospital or form, or a negative number of patients.
    """
    profile = _profile(hospital)
    if form not in FORMS:
        raise ConfigError(f"form {form!r} is not known; choose one of {', '.join(FORMS)}.")
    made = generate(profile, patients, seed)
    tables = extract(made, profile, seed)
    title = f"synthetic hospital {profile.name}"
    records = folder / "records"
    if form == "meds":
        write_meds(records, _shards(tables), name=title)
    else:
        with durable.directory(records) as aside:
            writer = _writer(form, aside, title)
            for piece in tables.pieces(_PIECE):
                writer.add(piece)
    buffer = io.BytesIO()
    made.truth.write_parquet(buffer)
    durable.write_bytes(folder / "truth.parquet", buffer.getvalue())
    return FormFiles(records, folder / "truth.parquet", patients, events(tables).height)


def _profile(hospital: str | HospitalProfile) -> HospitalProfile:
    if isinstance(hospital, HospitalProfile):
        return hospital
    return profile_of(hospital)


def _writer(form: Form, folder: Path, title: str) -> _Writer:
    writers: dict[str, type[OmopWriter] | type[FhirWriter] | type[TablesWriter]] = {
        "omop": OmopWriter,
        "fhir": FhirWriter,
        "tables": TablesWriter,
    }
    return writers[form](folder, title)


def _shards(tables: Extract) -> Iterator[tuple[str, pl.DataFrame]]:
    for number, piece in enumerate(tables.pieces(_PIECE)):
        yield f"{number}", events(piece)

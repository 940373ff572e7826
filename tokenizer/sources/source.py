"""One door for all kinds of records: whatever a site has becomes a MEDS dataset that survey and store can read."""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from meds import schema as meds

from tokenizer.errors import ConfigError, DataError
from tokenizer.events import MedsDataset
from tokenizer.pieces import LARGEST_SCATTERED
from tokenizer.progress import Step, Watch
from tokenizer.shards import AS_IT_FITS, Crew
from tokenizer.sources.intake import Flow

# From so many bytes of FHIR on, worker processes save more time than they take to start.
_LARGE_BYTES = 200_000_000

KINDS = ("meds", "omop", "fhir", "tables")


@dataclass(frozen=True)
class Source:
    """A site's records as they are.

    Args:
        place: A file or folder, or the SQLAlchemy URL of an OMOP database.
        kind: One of KINDS.
        quarantine: Set bad rows aside instead of refusing the records.
        mapping: tables: the TOML file that says what the columns mean.
        codes: omop: `standard` codes, or those of the `source`.
        cdm: omop: the version whose columns files without a header have.
        table_spec: omop: a file that names these columns instead.
        schema, vocabulary_schema: omop: of a database's tables, where they aren't the user's own.
        eras, visit_details, observed_only: omop: read the era tables, read changes of department, keep only what lies
            in observation periods.
        condition_time: fhir: place diagnoses when they were `recorded`, or at their `onset`.
    """

    place: str
    kind: str = "meds"
    quarantine: bool = False
    mapping: Path | None = None
    codes: str | None = None
    cdm: str | None = None
    table_spec: Path | None = None
    schema: str | None = None
    vocabulary_schema: str | None = None
    eras: bool | None = None
    visit_details: bool | None = None
    observed_only: bool | None = None
    condition_time: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"There is no source {self.kind!r}; choose one of {', '.join(KINDS)}.")
        if self.kind == "tables" and self.mapping is None:
            raise ConfigError("The source tables needs a mapping file that says what the columns mean (--mapping).")
        for field in fields(self)[3:]:
            owner = {"mapping": "tables", "condition_time": "fhir"}.get(field.name, "omop")
            if getattr(self, field.name) is not None and self.kind != owner:
                option = f"--{field.name.replace('_', '-')}"
                raise ConfigError(f"{option} is for the source {owner}, not for {self.kind}; leave it out.")

    @property
    def name(self) -> str:
        """The dataset's name: that of the file or folder, or the database's."""
        last = self.place.split("?")[0].rstrip("/").rsplit("/", 1)[-1]
        return last.split(".")[0] or self.kind

    @property
    def searched(self) -> Path | None:
        """The folder or file in which records are looked for; None for a database."""
        if "://" in self.place:
            return None
        return Path(self.place, meds.data_subdirectory) if self.kind == "meds" else Path(self.place)


def open_source(
    source: Source, out: Path, watch: Watch | None = None, crew: Crew = AS_IT_FITS
) -> tuple[MedsDataset, Flow | None]:
    """Open records as a MEDS dataset; what isn't MEDS yet is written to `out` first.

    MEDS stays where it is, unless bad rows are to be set aside or a file is too large for the order that it is in.

    Args:
        source: The records.
        out: Where imported events go; a dataset that stands there is replaced.
        watch: Told of progress.
        crew: Who reads, where a source can be read by several.

    Returns:
        The dataset, and what became of the source's rows; None for MEDS that another tool wrote.

    Raises:
        DataError: Records that can't be used as they are.
        ConfigError: Settings that are wrong.
    """
    if source.kind == "meds":
        dataset = None if source.quarantine else MedsDataset.open(Path(source.place))
        if dataset is not None and not dataset.events:
            raise DataError(f"{dataset.path}: its files have no rows, so nothing is left to tokenize.")
        if dataset is not None and not _too_large(dataset):
            return dataset, Flow.load(dataset.path)
    flow = _IMPORTS[source.kind](source, out, _Progress(watch), crew)
    return MedsDataset.open(out), flow


def _too_large(dataset: MedsDataset) -> bool:
    """Whether a shard can't be cut into pieces and is too large for one."""
    return any(piece.shard in dataset.scattered and piece.rows > LARGEST_SCATTERED for piece in dataset.pieces)


class _Progress:
    """Progress of an import as steps; some tell a table and its rows so far, some what is done of how much."""

    def __init__(self, watch: Watch | None) -> None:
        self._watch = watch
        self._rows: dict[str, int] = {}

    def counted(self, done: int, total: int) -> None:
        if self._watch:
            self._watch(Step("import", done, total))

    def of_table(self, table: str, rows: int) -> None:
        self._rows[table] = rows
        if self._watch:
            read = sum(self._rows.values())
            self._watch(Step("import", read, read + 1, table))


def _import_meds(source: Source, out: Path, progress: _Progress, crew: Crew) -> Flow:
    from tokenizer.sources.meds import import_meds

    place = Path(source.place)
    return import_meds(place, out, name=source.name, quarantine=source.quarantine, progress=progress.counted)


def _import_omop(source: Source, out: Path, progress: _Progress, crew: Crew) -> Flow:
    from tokenizer.sources.omop import import_omop

    names = ("codes", "cdm", "table_spec", "schema", "vocabulary_schema", "eras", "visit_details", "observed_only")
    options: dict[str, Any] = {name: value for name in names if (value := getattr(source, name)) is not None}
    place = source.place if "://" in source.place else Path(source.place)
    return import_omop(
        place, out, name=source.name, quarantine=source.quarantine, progress=progress.of_table, **options
    )


def _import_fhir(source: Source, out: Path, progress: _Progress, crew: Crew) -> Flow:
    from tokenizer.sources.fhir import import_fhir

    return import_fhir(
        Path(source.place),
        out,
        name=source.name,
        quarantine=source.quarantine,
        progress=progress.counted,
        condition_time=source.condition_time or "recorded",
        workers=crew.workers or (len(os.sched_getaffinity(0)) if _size(Path(source.place)) >= _LARGE_BYTES else 1),
    )


def _size(place: Path) -> int:
    files = place.rglob("*") if place.is_dir() else (place,)
    return sum(file.stat().st_size for file in files if file.is_file())


def _import_tables(source: Source, out: Path, progress: _Progress, crew: Crew) -> Flow:
    from tokenizer.sources.tables import import_tables

    assert source.mapping is not None
    return import_tables(
        Path(source.place),
        out,
        source.mapping,
        name=source.name,
        quarantine=source.quarantine,
        progress=progress.of_table,
    )


_IMPORTS: dict[str, Callable[[Source, Path, _Progress, Crew], Flow]] = {
    "meds": _import_meds,
    "omop": _import_omop,
    "fhir": _import_fhir,
    "tables": _import_tables,
}

"""FHIR R4 to MEDS: bundles and bulk exports, in two passes over files of any size.

The first pass keeps what others refer to (patients, encounters, medications, places), as hashes. The second reads each
piece of the source by itself, in as many processes as wanted. At last, of resources that came more than once, the one
that was updated last is kept. What is read, and by which rules, is in docs/sources/fhir.md.
"""

import multiprocessing
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from tokenizer.errors import ConfigError
from tokenizer.sources.fhir_codes import PREFER
from tokenizer.sources.fhir_files import Piece, lines_of, pieces
from tokenizer.sources.fhir_index import INDEXED, Index, Seen, build
from tokenizer.sources.fhir_pass import COMPONENT, TABLES, Result, Settings, read_piece, survey_piece
from tokenizer.sources.fhir_resources import READ
from tokenizer.sources.intake import Flow, Intake, intake
from tokenizer.wording import several

OLDER = "older version"
"""The filter that drops a resource of which a later version is in the source."""

_COMPONENTS = TABLES.index(COMPONENT)

# Files that are named for a type which nothing refers to need no first pass.
_LEAF = (READ.keys() - INDEXED) | {
    *("CarePlan", "CareTeam", "Claim", "Coverage", "Device", "DocumentReference", "ExplanationOfBenefit", "Goal"),
    *("ImagingStudy", "MedicationDispense", "Provenance", "ServiceRequest", "Specimen"),
}


def import_fhir(
    source: Path,
    out: Path,
    *,
    name: str,
    quarantine: bool = False,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
    systems: Mapping[str, str] | None = None,
    prefer: Mapping[str, Sequence[str]] | None = None,
    condition_time: str = "recorded",
) -> Flow:
    """Turn FHIR R4 files into a MEDS dataset.

    Args:
        source: an ndjson file, a bundle, an archive of them, or a folder.
        out: the folder to make.
        name: of the dataset.
        quarantine: set bad rows aside instead of refusing the source.
        progress: called with the pieces done and the pieces in all.
        workers: processes.
        systems: vocabularies by system URI, on top of those that are known.
        prefer: which vocabulary to take where a concept has several codings, per key of `PREFER`; those that aren't
            named keep the default.
        condition_time: "recorded": conditions, allergies and medication statements are placed when they were written
            down, or not before their encounter began; "onset": when they are said to have begun.

    Raises:
        DataError: files that can't be read, a bad row (unless they are set aside), no event left.
        ConfigError: an option that can't be.
    """
    settings = _settings(systems, prefer, condition_time, quarantine)
    parts, notes = pieces(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        intake(out, f"FHIR R4: {source}", name=name, quarantine=quarantine) as collected,
        tempfile.TemporaryDirectory(prefix=f".{out.name}.parts-", dir=out.parent) as temporary,
        _processes(workers) as run,
    ):
        for note in notes:
            collected.note(note)
        surveyed = [part for part in parts if not _leaf(part)]
        seen = _right(collected, surveyed, run(_Survey(settings), surveyed))
        found = build(seen, collected.subject_ids)
        folder = Path(temporary)
        with (folder / "index").open("wb") as file:
            pickle.dump(found, file)
        results: list[tuple[Piece, Result]] = []
        first_rows = _FirstRows()
        for part, result in zip(parts, run(_Read(settings, folder), parts), strict=True):
            _account(collected, result, first_rows.of(part) if result.bad else 1)
            results.append((part, result))
            if progress is not None:
                progress(len(results), len(parts))
        _collect(collected, results)
    return collected.flow


def _settings(
    systems: Mapping[str, str] | None,
    prefer: Mapping[str, Sequence[str]] | None,
    condition_time: str,
    quarantine: bool,
) -> Settings:
    if unknown := (prefer or {}).keys() - PREFER.keys():
        raise ConfigError(f"prefer: {sorted(unknown)[0]!r} isn't one of {', '.join(PREFER)}.")
    if condition_time not in ("recorded", "onset"):
        raise ConfigError(f"condition_time: {condition_time!r} must be 'recorded' or 'onset'.")
    return Settings(
        dict(systems or {}), {**PREFER, **(prefer or {})}, told=condition_time == "recorded", stop=not quarantine
    )


def _right(collected: Intake, parts: list[Piece], found: Iterator[Seen]) -> Iterator[Seen]:
    """What the first pass has seen of each part; what it refuses ends the import."""
    for part, seen in zip(parts, found, strict=True):
        for file, table, row, column, reason, content, advice in seen.bad:
            collected.bad(file, table, row + _FirstRows().of(part) - 1, column, reason, content, advice)
        yield seen


def _leaf(piece: Piece) -> bool:
    """Whether nothing refers to what is in a piece, by its file's name."""
    return piece.kind in _LEAF


class _Survey:
    """The first pass, to be sent to processes."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def __call__(self, piece: Piece) -> Seen:
        return survey_piece(piece, self._settings)


class _Read:
    """The second pass, to be sent to processes; the index is loaded once in each."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings, self._folder = settings, folder

    def __call__(self, piece: Piece) -> Result:
        found = _index(self._folder / "index")
        return read_piece(piece, found, self._settings, self._folder, indexed=not _leaf(piece))


_loaded: dict[Path, Index] = {}


def _index(file: Path) -> Index:
    if file not in _loaded:
        _loaded.clear()
        with file.open("rb") as opened:
            _loaded[file] = pickle.load(opened)
    return _loaded[file]


@contextmanager
def _processes(workers: int) -> Iterator[Callable[[Callable[[Any], Any], Any], Iterator[Any]]]:
    """Something that maps a function over a list, in its order, here or in other processes."""
    if workers <= 1:
        yield map
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield pool.map
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _FirstRows:
    """Numbers the first lines of pieces; what lies before them is read again only where a bad row has to be named."""

    def __init__(self) -> None:
        self._counted: dict[Path, tuple[int, int]] = {}

    def of(self, piece: Piece) -> int:
        """The number of a piece's first line in its file, from 1; later pieces are to be asked for later."""
        start, row = self._counted.get(piece.path, (0, 1))
        row += lines_of(replace(piece, start=start, end=piece.start)) if piece.start else 0
        self._counted[piece.path] = piece.start, row
        return row


def _account(collected: Intake, result: Result, first_row: int) -> None:
    """Give a piece's counts and bad rows to the intake."""
    for table, count in result.rows.items():
        collected.rows(table, count)
        collected.kept(table, 0)
    for (table, filter_name), count in result.dropped.items():
        collected.drop(table, filter_name, count)
    for file, table, row, column, reason, content, advice in result.bad:
        collected.bad(file, table, row + first_row - 1, column, reason, content, advice)


def _collect(collected: Intake, results: list[tuple[Piece, Result]]) -> None:
    """Give the events to the intake, without those of older versions."""
    older = _older([(part.number, keys) for part, result in results for _, keys in result.files])
    for table, count in older.filter("kept").group_by("_table").len().iter_rows():
        collected.drop(TABLES[table], OLDER, count)
    by_piece = dict(older.partition_by("piece", as_dict=True)) if older.height else {}
    for part, result in results:
        gone = by_piece.get((part.number,))
        for file, _ in result.files:
            events = pl.read_ipc(file)
            if gone is not None:
                parts = events.filter(pl.col("_table") == _COMPONENTS, pl.col("_at").is_in(gone["_at"].implode()))
                collected.drop(COMPONENT, OLDER, parts.height)
                events = events.filter(~pl.col("_at").is_in(gone["_at"].implode()))
            for (table,), some in events.partition_by("_table", as_dict=True).items():
                collected.add(TABLES[table], some)
                # A component is one event; other resources may give several.
                collected.kept(TABLES[table], some.height if table == _COMPONENTS else some["_at"].n_unique())
    for short, uri in sorted({each for _, result in results for each in result.locals.items()}):
        collected.note(f"Codes of the system {uri} are named {short}//...")
    if dangling := sum(result.dangling_encounters for _, result in results):
        collected.note(
            f"{several(dangling, 'reference leads', 'references lead')} to encounters that aren't in the source;"
            " their events are kept."
        )


def _older(files: list[tuple[int, Path]]) -> pl.DataFrame:
    """Resources of which a later version is in the source: piece, _at, kept, _table.

    Later is the greater `lastUpdated`; where that is equal or missing, what is read later.
    """
    kinds = {"piece": pl.Int64, "_at": pl.UInt32, "kept": pl.Boolean, "_table": pl.UInt8}
    if not files:
        return pl.DataFrame(schema=kinds)
    keys = pl.concat([pl.read_ipc(file, columns=["key"]) for _, file in files])["key"]
    twice = keys.filter(keys.is_duplicated()).unique()  # of any type; those of one type are told apart below
    if not len(twice):
        return pl.DataFrame(schema=kinds)
    found = [
        pl.read_ipc(file).filter(pl.col("key").is_in(twice.implode())).with_columns(piece=pl.lit(number, pl.Int64))
        for number, file in files
    ]
    ordered = pl.concat(found).sort("_table", "key", "updated", "piece", "_at")
    same = pl.all_horizontal(pl.col(name) == pl.col(name).shift(-1) for name in ("_table", "key"))
    return ordered.filter(same).select(*kinds)

"""One piece of a FHIR source, read by itself: its events go to files, its counts and bad rows come back.

A piece needs nothing but the index, so that pieces can be read in any order by any number of processes.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from tokenizer.errors import DataError
from tokenizer.events import EARLIEST, LATEST
from tokenizer.sources import fhir_index as index
from tokenizer.sources.fhir_batch import Batch, Events
from tokenizer.sources.fhir_codes import Coded, Namer
from tokenizer.sources.fhir_events import Reader
from tokenizer.sources.fhir_files import Piece, lines_of, read
from tokenizer.sources.fhir_kinds import Block, Chunk, Lost
from tokenizer.sources.fhir_resources import READ
from tokenizer.sources.fhir_times import NO_TIME, times
from tokenizer.sources.intake import EVENTS

COMPONENT = "Observation.component"
DECEASED = "Patient.deceased"
TABLES = (*READ, COMPONENT)
"""The tables of events; parts hold their places in this list."""

_FLUSH_EVENTS = 300_000
_EVENTS = {**EVENTS, "_at": pl.UInt32, "_table": pl.UInt8}
_KEYS = {"key": pl.UInt64, "updated": pl.Int64, "_at": pl.UInt32, "kept": pl.Boolean, "_table": pl.UInt8}
_FIRST, _LAST = (int(np.datetime64(day, "us").astype(np.int64)) for day in (EARLIEST, LATEST))
_KEEP, _DROP, _BAD = 0, 1, 2
_SUBJECT_FAULTS = {
    index.NO_SUBJECT: "no subject",
    index.UNKNOWN_PATIENT: "unknown patient",
    index.AMBIGUOUS: "several patients have this identifier",
    index.BROKEN: "wrong type: not a reference",
}


@dataclass(frozen=True)
class Settings:
    """How resources are read.

    Attributes:
        systems: vocabularies by URI, on top of those that are known.
        prefer: order of vocabularies per resource type.
        told: time of diagnoses, allergies and statements: when they were written down, instead of when they happened.
        stop: end a piece at its first bad row.
    """

    systems: Mapping[str, str]
    prefer: Mapping[str, Sequence[str]]
    told: bool
    stop: bool


@dataclass
class Result:
    """What became of a piece.

    Attributes:
        rows: resources read, by table.
        dropped: by (table, filter).
        bad: rows, in their order.
        files: events, and identities of all resources that have an id.
        locals: short names of systems without a known vocabulary, and their URIs.
        dangling_encounters: distinct references to encounters that aren't in the source.
    """

    rows: Counter[str] = field(default_factory=Counter)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    bad: list[index.BadRow] = field(default_factory=list)
    files: list[tuple[Path, Path]] = field(default_factory=list)
    locals: dict[str, str] = field(default_factory=dict)
    dangling_encounters: int = 0


def survey_piece(piece: Piece, settings: Settings) -> index.Seen:
    """First pass: what others refer to.

    Where bad rows end the import, it ends here for what can't be read: what refers to it would be blamed otherwise.
    """
    seen = index.Seen()
    code = _drugs(settings)
    for part in read(piece):
        if isinstance(part, Chunk) and part.kind in index.INDEXED:
            index.note(seen, part, code)
        elif isinstance(part, Lost) and not part.dropped:
            if settings.stop:
                _refuse_whole(part)
            seen.bad.append(_lost(part))
        if not settings.stop:
            seen.bad.clear()
        elif seen.bad:
            break
    return seen


def _drugs(settings: Settings) -> Callable[[bytes], Coded]:
    return Namer(settings.systems, settings.prefer).concept("Medication", "MEDICATION")


def _refuse_whole(part: Lost) -> None:
    if part.whole:
        shown = f" from row {part.row} on" if part.row > 1 else ""
        shown += f" ({part.content[:80]!r})" if part.content else ""
        raise DataError(
            f"{part.file}: {part.reason}{shown}. How many resources are lost can't be told, so nothing can be set"
            f" aside. {part.advice}, or take it away."
        )


def _lost(part: Lost) -> index.BadRow:
    return part.file, part.table, part.row, "", part.reason, part.content, part.advice


def read_piece(piece: Piece, found: index.Index, settings: Settings, folder: Path, *, indexed: bool) -> Result:
    """Second pass: the events.

    Args:
        piece: of the source.
        found: what the first pass saw.
        settings: how to read.
        folder: for the files of events.
        indexed: whether the first pass has looked at this piece.

    Raises:
        DataError: a file that is cut off or damaged, where bad rows are set aside; a file whose name says that it needs
            no first pass holds resources that others refer to.
    """
    namer = Namer(settings.systems, settings.prefer)
    reader = Reader(found, namer, told=settings.told)
    sink, code = _Sink(folder, piece.number), _drugs(settings)
    for part in _whole_or_split(piece, sink, reader):
        if isinstance(part, Lost):
            _refuse_whole(part)
            sink.lose(part)
        elif part.kind not in READ:
            sink.pass_over(part, code)
        else:
            sink.settle(*reader.read(part))
        if isinstance(part, Chunk) and part.kind in index.INDEXED and not indexed:
            row = _row_in_file(piece, part.rows[0])
            raise DataError(
                f"{part.file}: holds a resource of type {part.kind} in row {row}, but is named as one that has"
                f" {piece.kind} only. Rename the file, without a resource type in front."
            )
        if settings.stop and sink.result.bad:
            break
    sink.flush()
    sink.result.locals = namer.locals
    sink.result.dangling_encounters = reader.refer.dangling_encounters
    return sink.result


def _row_in_file(piece: Piece, row: int) -> int:
    return row + (lines_of(replace(piece, start=0, end=piece.start)) if piece.start else 0)


def _whole_or_split(piece: Piece, sink: "_Sink", reader: Reader) -> Iterator[Chunk | Lost]:
    """Read blocks at once where all of their lines are right; give what has to be looked at line by line."""
    for part in read(piece, whole=READ.keys() - index.INDEXED):
        if not isinstance(part, Block):
            yield part
        elif (batch := reader.read_block(part)) is not None:
            sink.settle(batch, [])
        else:
            yield from part.split()


class _Sink:
    """Collects what a piece gives, and writes it where it is much."""

    def __init__(self, folder: Path, number: int) -> None:
        self.result = Result()
        self._folder, self._number = folder, number
        self._events: list[pl.DataFrame] = []
        self._keys: list[pl.DataFrame] = []
        self._waiting = 0
        self._serial = 0

    def lose(self, lost: Lost) -> None:
        self.result.rows[lost.table] += 1
        if lost.dropped:
            self.result.dropped[lost.table, lost.reason] += 1
        else:
            self.result.bad.append(_lost(lost))

    def pass_over(self, chunk: Chunk, code: Callable[[bytes], Coded]) -> None:
        """Count resources that give no events; those that others refer to have to be right."""
        why, seen = "resource type not read", index.Seen()
        if chunk.kind in index.INDEXED:
            why = "read for references only"
            index.note(seen, chunk, code)
        self.result.rows[chunk.kind] += len(chunk.raws)
        self.result.dropped[chunk.kind, why] += len(chunk.raws) - len(seen.bad)
        self.result.bad += seen.bad

    def settle(self, batch: Batch, broken: list[tuple[int, str, str]]) -> None:
        """Decide on each resource of a batch, and keep the events of those that stay."""
        table, rows = batch.chunk.kind, batch.chunk.rows
        self.result.rows[table] += len(rows)
        bads = [(rows[place], "", reason, content) for place, reason, content in broken]
        fate, when, faults = _fates(batch)
        for at, (column, reason, content) in faults.items():
            bads.append((rows[batch.places[at]], column, reason, content))
        for at, reason in batch.drops.items():
            if fate[at] == _DROP and at not in batch.early:
                self.result.dropped[table, reason] += 1
        for reason, count in Counter(batch.early.values()).items():
            self.result.dropped[table, reason] += count
        self._outside(batch)
        if batch.deceased_undated:
            self.result.rows[DECEASED] += batch.deceased_undated
            self.result.dropped[DECEASED, "no time of death"] += batch.deceased_undated
        self._keep(batch, batch.events, table, fate == _KEEP, when)
        self._parts(batch, fate, when, bads)
        self.result.bad += [(batch.chunk.file, table, *bad, "") for bad in sorted(bads)]
        self._identify(batch, fate, table)
        self._serial += len(fate)
        if self._waiting >= _FLUSH_EVENTS:
            self.flush()

    def flush(self) -> None:
        """Write what has been collected."""
        if not self._events and not self._keys:
            return
        stem = f"{self._number:06d}-{len(self.result.files):05d}"
        files = self._folder / f"{stem}.events.arrow", self._folder / f"{stem}.keys.arrow"
        for file, kinds, frames in zip(files, (_EVENTS, _KEYS), (self._events, self._keys), strict=True):
            # Of a piece whose resources are all bad, there is nothing in one of them.
            pl.concat([pl.DataFrame(schema=kinds), *frames]).write_ipc(file)
        self.result.files.append(files)
        self._events, self._keys, self._waiting = [], [], 0

    def _outside(self, batch: Batch) -> None:
        strangers = int(((batch.subjects == index.NOT_A_PATIENT) & ~_marked(batch.early, len(batch.subjects))).sum())
        if strangers:
            self.result.dropped[batch.chunk.kind, "subject is not a patient"] += strangers

    def _keep(
        self, batch: Batch, events: Events, table: str, stays: npt.NDArray[np.bool_], when: npt.NDArray[np.int64]
    ) -> None:
        if not events.at:
            return
        places = pl.Series(events.at, dtype=pl.Int64)
        at = places.to_numpy()
        moments = pl.Series(_own_times(events, at, when, batch))
        frame = pl.DataFrame(
            {
                "subject_id": batch.subjects[at],
                "time": moments.cast(EVENTS["time"]),
                "code": pl.Series(events.code, dtype=pl.String),
                "numeric_value": pl.Series(events.value, dtype=pl.Float64).cast(EVENTS["numeric_value"]),
                "unit": pl.Series(events.unit, dtype=pl.String),
                "encounter_id": batch.encounters.gather(places),
                "_at": (at + self._serial).astype(np.uint32),
                "_table": np.full(len(at), TABLES.index(table), np.uint8),
            }
        )
        if batch.static:
            frame = frame.with_columns(time=pl.when(moments != NO_TIME).then("time"))
        if not (wanted := stays[at]).all():
            frame = frame.filter(pl.Series(wanted))
        self._events.append(frame)
        self._waiting += frame.height

    def _parts(
        self,
        batch: Batch,
        fate: npt.NDArray[np.int8],
        when: npt.NDArray[np.int64],
        bads: list[tuple[int, str, str, str]],
    ) -> None:
        """The components of observations that are kept, or dropped only for having no value of their own."""
        if not batch.parts.at and not batch.part_drops and not batch.part_bads:
            return
        read = (fate == _KEEP) | ((fate == _DROP) & ~_marked(batch.early, len(fate)))
        read &= batch.subjects != index.NOT_A_PATIENT
        self.result.rows[COMPONENT] += int(read[np.array(batch.parts.at, np.int64)].sum())
        for at, reason in batch.part_drops:
            if read[at]:
                self.result.rows[COMPONENT] += 1
                self.result.dropped[COMPONENT, reason] += 1
        for at, reason in batch.part_bads:
            if read[at]:
                self.result.rows[COMPONENT] += 1
                row = batch.chunk.rows[batch.places[at]]
                self.result.bad.append((batch.chunk.file, COMPONENT, row, "component", reason, "", ""))
        self._keep(batch, batch.parts, COMPONENT, read, when)

    def _identify(self, batch: Batch, fate: npt.NDArray[np.int8], table: str) -> None:
        frame = pl.DataFrame(
            {
                "key": index.hashed(batch.ids),
                "updated": times(batch.updated, zoned=True),
                "_at": np.arange(self._serial, self._serial + len(fate), dtype=np.uint32),
                "kept": fate == _KEEP,
                "_table": np.full(len(fate), TABLES.index(table), np.uint8),
            }
        )
        named = all(batch.ids)
        self._keys.append(frame if named else frame.filter(pl.Series([each is not None for each in batch.ids])))


def _fates(
    batch: Batch,
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int64], dict[int, tuple[str, str, str]]]:
    """What becomes of each resource of a batch, their times, and what is wrong with the bad ones."""
    size = len(batch.subjects)
    early = _marked(batch.early, size)
    when, faults = _times(batch, early)
    for subject, reason in _SUBJECT_FAULTS.items():
        for at in np.flatnonzero((batch.subjects == subject) & ~early).tolist():
            text = "" if batch.static else batch.subject_texts[batch.subject_at[at]].decode(errors="replace")
            faults[at] = ("id" if batch.static else "subject", reason, text)
    for at, fault in batch.bads.items():
        if not early[at]:
            faults.setdefault(at, fault)
    fate = np.full(size, _KEEP, np.int8)
    fate[_marked(batch.drops, size)] = _DROP
    outside = batch.subjects == index.NOT_A_PATIENT
    for at in [*faults]:
        if outside[at]:
            del faults[at]
    fate[_marked(faults, size)] = _BAD
    fate[early | outside] = _DROP
    for at in np.flatnonzero(outside).tolist():
        batch.drops.pop(at, None)
    return fate, when, faults


def _times(batch: Batch, early: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], dict[int, tuple[str, str, str]]]:
    """The time of each resource, and the faults of those times and of events with a time of their own."""
    when = times(batch.times)
    faults: dict[int, tuple[str, str, str]] = {}
    if not batch.static:
        unsaid = [at for at, text in enumerate(batch.times) if text is None]
        when[unsaid] = batch.starts[unsaid]
        if batch.late is not None:
            later = np.array(batch.late, np.bool_) & (when != NO_TIME)
            later[unsaid] = False
            when = np.where(later, np.maximum(when, batch.starts), when)
        for at in np.flatnonzero(((when < _FIRST) | (when >= _LAST)) & ~early).tolist():
            text = batch.times[at]
            missing = "no time" if text is None else "not a date or time"
            faults[at] = ("time", missing if when[at] == NO_TIME else "time out of range", text or "")
    if own := list(batch.events.moment):
        moments = times(batch.events.moment.values())
        for step in np.flatnonzero((moments < _FIRST) | (moments >= _LAST)).tolist():
            at = batch.events.at[own[step]]
            reason = "not a date or time" if moments[step] == NO_TIME else "time out of range"
            if not early[at]:
                faults.setdefault(at, ("time", reason, batch.events.moment[own[step]] or ""))
    return when, faults


def _own_times(
    events: Events, at: npt.NDArray[np.int64], when: npt.NDArray[np.int64], batch: Batch
) -> npt.NDArray[np.int64]:
    moments = when[at]
    if batch.static:
        moments[:] = NO_TIME
    if events.moment:
        moments[list(events.moment)] = times(events.moment.values())
    return moments


def _marked(places: Mapping[int, object], size: int) -> npt.NDArray[np.bool_]:
    marks = np.zeros(size, np.bool_)
    if places:
        marks[list(places)] = True
    return marks

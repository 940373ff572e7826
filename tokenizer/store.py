"""The token store: tokens on disk, memory-mapped, split by patients, tied to a codebook by hash.

    manifest.json                what it was made from, and how much of it there is
    <split>/tokens.i32           int32 [N]
    <split>/times.i64            int64 [N], us since 1970, STATIC for tokens without a time
    <split>/offsets.i64          int64 [P + 1]
    <split>/subject_ids.i64      int64 [P], ascending within a piece of a shard

Opening costs the same for any size; reading a window touches only that window. The manifest counts
rare codes: it is the site's own and never leaves it. A store is the same to the byte whoever builds
it: pieces are encoded by themselves, into files that are strung together in the order of the pieces.
"""

import json
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokenizer import durable
from tokenizer.codebook import Codebook
from tokenizer.errors import DataError
from tokenizer.output import settle
from tokenizer.shards import AS_IT_FITS, Crew, each
from tokenizer.split import SPLITS, SplitRule
from tokenizer.wording import several

if TYPE_CHECKING:
    from tokenizer.encode import Encoded
    from tokenizer.events import Faults, Reader, Records
    from tokenizer.pieces import Piece

_FORMAT = "fedcomet-store/2"
_FIELDS = {"tokens": "<i4", "times": "<i8", "offsets": "<i8", "subject_ids": "<i8"}


@dataclass(frozen=True)
class TokenSplit:
    """The timelines of one split.

    Attributes:
        tokens: int32 [N], memory-mapped.
        times: int64 [N], us since 1970, memory-mapped.
        offsets: int64 [P + 1], where each timeline starts.
        subject_ids: int64 [P].
    """

    tokens: NDArray[np.int32]
    times: NDArray[np.int64]
    offsets: NDArray[np.int64]
    subject_ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.subject_ids)

    @property
    def tokens_total(self) -> int:
        """Tokens of all patients."""
        return len(self.tokens)

    def timeline(self, patient: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Views of the tokens and times of the patient at this place (0 to len - 1)."""
        if not 0 <= patient < len(self):
            raise IndexError(f"patient {patient} of {len(self)}")
        part = slice(int(self.offsets[patient]), int(self.offsets[patient + 1]))
        return self.tokens[part], self.times[part]


class TokenStore:
    """An open token store.

    Attributes:
        path: Its folder.
        manifest: Format, codebook hash, dataset name and fingerprint, split rule, counts per split,
            and events per code that had no path of its own: under `ancestor` those told by the nearest
            ancestor, under `unknown` those of which at most the system is told.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path, codebook_hash: str | None = None) -> "TokenStore":
        """Open a store, and check that it is whole.

        Args:
            path: Its folder.
            codebook_hash: The codebook that its tokens must come from.

        Raises:
            DataError: No store, a file of the wrong size, or tokens of another codebook.
        """
        settle(path.parent)
        store = cls(path, _read_manifest(path))
        if codebook_hash is not None and store.codebook_hash != codebook_hash:
            raise DataError(
                f"{path}: its tokens were made with the codebook {store.codebook_hash}, not with"
                f" {codebook_hash}. Build the store again with the codebook of this run."
            )
        for split in SPLITS:
            store._check_sizes(split)
        return store

    @property
    def codebook_hash(self) -> str:
        """The hash of the codebook that the tokens come from."""
        return self.manifest["codebook_hash"]

    @property
    def tokens_total(self) -> int:
        """Tokens of all splits."""
        return sum(counts["tokens"] for counts in self.manifest["splits"].values())

    def split(self, name: str) -> TokenSplit:
        """The timelines of `train`, `tuning` or `held_out`."""
        if name not in SPLITS:
            raise DataError(f"{self.path}: no split {name}; there are {', '.join(SPLITS)}.")
        return TokenSplit(**{field: self._map(name, field) for field in _FIELDS})

    def _map(self, split: str, field: str) -> Any:
        length = self._length(split, field)
        if length == 0:
            return np.empty(0, _FIELDS[field])
        # By its name as a text: a path is resolved, which takes longer than the map.
        return np.memmap(str(_file(self.path, split, field)), _FIELDS[field], "r", shape=(length,))

    def _length(self, split: str, field: str) -> int:
        counts = self.manifest["splits"][split]
        if field in ("tokens", "times"):
            return counts["tokens"]
        return counts["patients"] + (field == "offsets")

    def _check_sizes(self, split: str) -> None:
        for field, kind in _FIELDS.items():
            file = _file(self.path, split, field)
            expected = self._length(split, field) * np.dtype(kind).itemsize
            try:
                found = file.stat().st_size
            except FileNotFoundError:
                found = None
            if found != expected:
                size = "is missing" if found is None else f"has {several(found, 'byte')}"
                raise DataError(f"{file}: {size}, the manifest says {expected:,}. Build the store again.")


def build_store(
    dataset: "Records",
    codebook: Codebook,
    rule: SplitRule,
    path: Path,
    progress: Callable[[int, int], None] | None = None,
    crew: Crew = AS_IT_FITS,
) -> TokenStore:
    """Encode a dataset into a store, piece by piece; the store appears whole or not at all.

    Args:
        dataset: The site's events.
        codebook: The vocabulary.
        rule: Decides each patient's split.
        path: The folder to make (a store that stands there is replaced).
        progress: Called with the pieces done and the pieces in all.
        crew: Who encodes; the store is the same whoever does.
    """
    with durable.directory(path) as aside:
        parts = aside / "parts"
        parts.mkdir()
        codebook.save(parts / f"{codebook.hash}.json")
        writers = {split: _Writer(aside, split) for split in SPLITS}
        fallbacks: dict[str, dict[str, int]] = {"ancestor": {}, "unknown": {}}
        jobs = [
            (dataset.reader, piece, parts / f"{codebook.hash}.json", rule, parts / str(number))
            for number, piece in enumerate(dataset.pieces)
        ]
        with closing(each(_encode_piece, jobs, crew, events=dataset.events, what="the encoding")) as encoded:
            for done, (job, part) in enumerate(zip(jobs, encoded, strict=True), 1):
                for split, counts in part.counts.items():
                    writers[split].append(job[-1], counts)
                job[-1].rmdir()
                dataset.count_faults(job[1], part.faults)
                for level, codes in part.fallbacks.items():
                    for code, rows in codes.items():
                        fallbacks[level][code] = fallbacks[level].get(code, 0) + rows
                if progress:
                    progress(done, len(jobs))
        (parts / f"{codebook.hash}.json").unlink()
        parts.rmdir()
        manifest = {
            "format": _FORMAT,
            "codebook_hash": codebook.hash,
            "vocabulary": len(codebook),
            "dataset": dataset.name,
            "dataset_fingerprint": dataset.fingerprint(),
            "split_rule": asdict(rule),
            "splits": {split: writer.counts for split, writer in writers.items()},
            "fallbacks": fallbacks,
            "notes": dataset.notes,
        }
        text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False)
        (aside / "manifest.json").write_text(text + "\n")
    return TokenStore.open(path, codebook.hash)


@dataclass(frozen=True)
class _Part:
    """What became of a piece: patients, tokens and events per split, rare codes, what was odd."""

    counts: dict[str, dict[str, int]]
    fallbacks: dict[str, dict[str, int]]
    faults: "Faults"


def _encode_piece(read: "Reader", piece: "Piece", codebook: Path, rule: SplitRule, folder: Path) -> _Part:
    """Encode a piece into files of their own, as those of a store; offsets count from 0."""
    # Late: a reader of stores has no need of polars.
    from tokenizer.encode import encode

    frame, faults = read(piece)
    encoded = encode(frame, _load(codebook))
    split_of = rule.assign(encoded.subject_ids)
    folder.mkdir(exist_ok=True)
    counts = {split: _write_part(folder, split, encoded, split_of == place) for place, split in enumerate(SPLITS)}
    return _Part(counts, encoded.fallbacks, faults)


# A job knows only the file; its name is the codebook's hash.
_load = lru_cache(maxsize=1)(Codebook.load)


def _write_part(folder: Path, split: str, encoded: "Encoded", chosen: NDArray[np.bool_]) -> dict[str, int]:
    lengths = np.diff(encoded.offsets)
    tokens = np.repeat(chosen, lengths)
    fields: dict[str, NDArray] = {
        "tokens": encoded.tokens[tokens],
        "times": encoded.times[tokens],
        "offsets": np.cumsum(lengths[chosen]),
        "subject_ids": encoded.subject_ids[chosen],
    }
    for field, values in fields.items():
        _write(_part_file(folder, split, field), values.astype(_FIELDS[field], copy=False))
    return {
        "patients": len(fields["subject_ids"]),
        "tokens": len(fields["tokens"]),
        "events": int(encoded.events[chosen].sum()),
    }


def bytes_needed(patients: int, tokens: int) -> int:
    """Bytes of one split's files."""
    lengths = {"tokens": tokens, "times": tokens, "offsets": patients + 1, "subject_ids": patients}
    return sum(length * np.dtype(_FIELDS[field]).itemsize for field, length in lengths.items())


class _Writer:
    """Appends parts to one split's files."""

    def __init__(self, root: Path, split: str) -> None:
        self._root, self._split = root, split
        self.counts = {"patients": 0, "tokens": 0, "events": 0}
        (root / split).mkdir()
        for field, kind in _FIELDS.items():
            _write(_file(root, split, field), np.zeros(int(field == "offsets"), kind))

    def append(self, folder: Path, counts: dict[str, int]) -> None:
        """Move a part's files to the ends of the store's."""
        for field, kind in _FIELDS.items():
            part = _part_file(folder, self._split, field)
            with part.open("rb") as source, _file(self._root, self._split, field).open("r+b") as target:
                target.seek(0, os.SEEK_END)
                if field == "offsets":
                    target.write((np.fromfile(source, kind) + self.counts["tokens"]).data)
                else:
                    _copy(source.fileno(), target.fileno(), os.fstat(source.fileno()).st_size)
            part.unlink()
        for name, count in counts.items():
            self.counts[name] += count


def _write(file: Path, values: NDArray) -> None:
    # numpy's own tofile doesn't say that a disk is full, only how much of it was written.
    with file.open("wb") as target:
        target.write(np.ascontiguousarray(values).data)


def _copy(source: int, target: int, size: int) -> None:
    """Append a file to another inside the kernel (which refuses targets that were opened to append)."""
    done = 0
    while done < size:
        if not (sent := os.sendfile(target, source, done, size - done)):
            raise DataError("A part of the store that is being built was cut short; build the store again.")
        done += sent


def _part_file(folder: Path, split: str, field: str) -> Path:
    return folder / f"{split}.{field}"


def _file(root: Path, split: str, field: str) -> Path:
    return root.joinpath(split, f"{field}.{'i32' if _FIELDS[field] == '<i4' else 'i64'}")


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_bytes())
        if manifest["format"] != _FORMAT:
            raise ValueError(f"its format is {manifest['format']}, this version reads {_FORMAT}")
        for split in SPLITS:
            counts = manifest["splits"][split]
            if min(counts["patients"], counts["tokens"]) < 0:
                raise ValueError(f"negative counts in {split}")
        str(manifest["codebook_hash"])
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise DataError(f"{path}: no usable token store ({problem}). Build it again.") from None
    return manifest

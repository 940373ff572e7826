"""What a site's records come to as tokens, counted before anything leaves: lengths, truncation, rare codes, disk.

Nothing is written but a codebook for the workers; a pass encodes piece by piece and keeps one length per patient. The
figures name rare codes: they are the site's own.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tokenizer.codebook import Codebook
from tokenizer.encode import Encoded, encode
from tokenizer.events import Faults, Reader, Records
from tokenizer.pieces import Piece
from tokenizer.shards import AS_IT_FITS, Crew, each
from tokenizer.split import SPLITS, SplitRule
from tokenizer.store import bytes_needed

Ints = NDArray[np.int64]

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
CONTEXTS = (256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Lengths:
    """Tokens per patient.

    Attributes:
        quantiles: Per share of patients, the least length that so many don't exceed.
        mean: Of all patients.
        edges: Lower ends of the histogram's bins, powers of two; a bin ends where the next begins.
        patients: Per bin.
    """

    quantiles: Mapping[float, int]
    mean: float
    edges: tuple[int, ...]
    patients: tuple[int, ...]


@dataclass(frozen=True)
class Truncation:
    """What a context of so many tokens costs.

    In training, a longer timeline is read in several windows: each of its tokens is learned, but only with what its
    window shows of the past. At a prediction, the model sees the newest tokens only.

    Attributes:
        context: Tokens.
        patients: Whose timelines are longer.
        tokens: Older than the newest `context` tokens of their timeline: a prediction at its end doesn't see them.
        windows: For one pass over the train split.
        repeated: Share of the tokens of these windows that repeat the header (static facts and age) before a piece.
    """

    context: int
    patients: int
    tokens: int
    windows: int
    repeated: float


@dataclass(frozen=True)
class Timelines:
    """The records under a codebook.

    Attributes:
        splits: Patients, tokens and events per split.
        lengths: Tokens per patient, of all splits.
        truncation: For several contexts, ascending.
        fallbacks: Events per code without a token of its own, under what is told instead: `ancestor` or `unknown`.
        targets: Tokens of the train split that one pass learns to predict.
        store_bytes: What a token store takes on disk.
    """

    splits: Mapping[str, Mapping[str, int]]
    lengths: Lengths
    truncation: tuple[Truncation, ...]
    fallbacks: Mapping[str, Mapping[str, int]]
    targets: int
    store_bytes: int

    @property
    def patients(self) -> int:
        """Of all splits."""
        return sum(counts["patients"] for counts in self.splits.values())

    @property
    def tokens(self) -> int:
        """Of all splits."""
        return sum(counts["tokens"] for counts in self.splits.values())


def count_timelines(
    records: Records,
    codebook: Codebook,
    rule: SplitRule,
    context: int,
    progress: Callable[[int, int], None] | None = None,
    crew: Crew = AS_IT_FITS,
) -> Timelines:
    """Encode all records and count what comes out.

    Args:
        records: The site's.
        codebook: The vocabulary.
        rule: Decides each patient's split.
        context: One that is of interest, besides those of CONTEXTS.
        progress: Called with the pieces done and the pieces in all.
        crew: Who encodes.
    """
    found: list[_Part] = []
    with tempfile.TemporaryDirectory(prefix="fedcomet-") as folder:
        file = Path(folder, f"{codebook.hash}.json")
        codebook.save(file)
        jobs = [(records.reader, piece, file, rule) for piece in records.pieces]
        with closing(each(_count_piece, jobs, crew, events=records.events, what="the check")) as parts:
            for piece, part in zip(records.pieces, parts, strict=True):
                records.count_faults(piece, part.faults)
                found.append(part)
                if progress:
                    progress(len(found), len(jobs))
    nothing = np.empty(0, np.int64)
    split, lengths, headers, events = (
        np.concatenate([nothing, *(getattr(part, name) for part in found)])
        for name in ("split", "lengths", "headers", "events")
    )
    splits = {
        name: {
            "patients": int((split == place).sum()),
            "tokens": int(lengths[split == place].sum()),
            "events": int(events[split == place].sum()),
        }
        for place, name in enumerate(SPLITS)
    }
    train = split == 0
    return Timelines(
        splits,
        _lengths(lengths),
        tuple(_truncation(one, lengths, headers, train) for one in sorted({*CONTEXTS, context})),
        _joined(part.fallbacks for part in found),
        int(np.maximum(lengths - headers - 1, 0)[train].sum()),
        sum(bytes_needed(counts["patients"], counts["tokens"]) for counts in splits.values()),
    )


@dataclass(frozen=True)
class _Part:
    """A piece's patients: split (index into SPLITS), tokens, tokens of the header, events; int64 [P] each."""

    split: Ints
    lengths: Ints
    headers: Ints
    events: Ints
    fallbacks: Mapping[str, Mapping[str, int]]
    faults: Faults


def _count_piece(read: Reader, piece: Piece, codebook: Path, rule: SplitRule) -> _Part:
    frame, faults = read(piece)
    book = _load(codebook)
    encoded = encode(frame, book)
    return _Part(
        rule.assign(encoded.subject_ids).astype(np.int64),
        np.diff(encoded.offsets),
        _headers(encoded, book),
        encoded.events,
        encoded.fallbacks,
        faults,
    )


# A job knows only the file; its name is the codebook's hash.
_load = lru_cache(maxsize=1)(Codebook.load)


def _headers(encoded: Encoded, codebook: Codebook) -> Ints:
    """Static and first age tokens of each timeline; EOT, which is neither, ends every one."""
    body = np.flatnonzero(~codebook.is_header[encoded.tokens])
    begin = encoded.offsets[:-1]
    return body[np.searchsorted(body, begin)] - begin if len(begin) else begin


def _lengths(lengths: Ints) -> Lengths:
    if not len(lengths):
        return Lengths({}, 0.0, (), ())
    at = np.quantile(lengths, QUANTILES, method="inverted_cdf")
    powers = np.log2(lengths).astype(np.int64)
    low, high = int(powers.min()), int(powers.max())
    return Lengths(
        dict(zip(QUANTILES, at.astype(int).tolist(), strict=True)),
        float(lengths.mean()),
        tuple(2**power for power in range(low, high + 1)),
        tuple(np.bincount(powers - low, minlength=high - low + 1).tolist()),
    )


def _truncation(context: int, lengths: Ints, headers: Ints, train: NDArray[np.bool_]) -> Truncation:
    beyond = np.maximum(lengths - context, 0)
    # As `tokenizer.windows` cuts them, with the first piece as long as can be.
    stride = np.maximum(context - headers - 1, 1)
    targets = lengths - headers - 1
    windows = np.where(targets > 0, -(-targets // stride), 0)[train]
    read = int(lengths[train].sum()) + int((np.maximum(windows - 1, 0) * (headers[train] + 1)).sum())
    return Truncation(
        context,
        int((beyond > 0).sum()),
        int(beyond.sum()),
        int(windows.sum()),
        1 - int(lengths[train].sum()) / read if read else 0.0,
    )


def _joined(found: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    total: dict[str, dict[str, int]] = {}
    for levels in found:
        for level, codes in levels.items():
            kept = total.setdefault(level, {})
            for code, events in codes.items():
                kept[code] = kept.get(code, 0) + events
    return total

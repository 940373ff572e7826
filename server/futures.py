"""What may come next for one patient: simulated futures, told as events.

The history is a timeline of a token store up to a point in time; the futures are trajectories of `model.rollout`,
decoded to events. Times and values are representative (medians of their classes), so a future reads as precise as the
tokens are, not as precise as it looks.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
from rich.table import Table

from model import checkpoint
from model.decoder import Decoder
from model.machine import usable
from model.rollout import Prompt, Reason, Stop, rollout
from tokenizer import durable
from tokenizer.codebook import STATIC, Codebook
from tokenizer.encode import decode
from tokenizer.errors import ConfigError, DataError
from tokenizer.split import SPLITS
from tokenizer.store import TokenStore

_DAY_US = 24 * 3600 * 1_000_000
_SHOWN = 12
_ENDS = {
    Reason.EVENT: "ends with an event that was asked for",
    Reason.HORIZON: "goes on past the horizon",
    Reason.END: "ends with the timeline",
    Reason.CAP: "stopped at the most tokens allowed",
}


@dataclass(frozen=True)
class Model:
    """A model's folder: `checkpoint.safetensors` and `codebook.json`; and the device that it works on."""

    checkpoint: Path
    codebook: Path
    device: str = "cpu"

    @classmethod
    def at(cls, folder: Path, device: str = "cpu") -> "Model":
        """Find both files.

        Raises:
            DataError: one is missing.
        """
        found = cls(folder / "checkpoint.safetensors", folder / "codebook.json", device)
        for path in (found.checkpoint, found.codebook):
            if not path.is_file():
                raise DataError(f"{path} is missing; name a model's folder, such as runs/NAME/model")
        return found

    def decoder(self, codebook_hash: str) -> Decoder:
        """Load the decoder onto the device.

        Raises:
            ConfigError: the device can't be used.
            DataError: a damaged checkpoint, or one of another codebook.
        """
        device = usable(self.device)
        return checkpoint.load(self.checkpoint, codebook_hash).decoder.to(device)

    def save(self, folder: Path) -> None:
        """Copy both files to another folder, which appears whole or not at all."""
        with durable.directory(folder) as aside:
            (aside / "checkpoint.safetensors").write_bytes(self.checkpoint.read_bytes())
            (aside / "codebook.json").write_bytes(self.codebook.read_bytes())


@dataclass(frozen=True)
class Futures:
    """A patient's history (`trajectory` -1) and simulated futures as events: trajectory, time, code, numeric_value."""

    subject: int
    at: datetime
    events: pl.DataFrame
    ends: tuple[str, ...]

    def tables(self) -> list[Table]:
        """Lay out the end of the history and every future for a terminal."""
        history = self.events.filter(pl.col("trajectory") == -1)
        tables = [
            _table(f"patient {self.subject}, the last events known at {self.at:%Y-%m-%d %H:%M}", history.tail(_SHOWN))
        ]
        for number, end in enumerate(self.ends):
            future = self.events.filter(pl.col("trajectory") == number)
            more = f"; the first {_SHOWN} of {future.height} events" if future.height > _SHOWN else ""
            tables.append(_table(f"future {number + 1}: {end}{more}", future.head(_SHOWN)))
        return tables

    def write(self, path: Path) -> None:
        """Write all events to a Parquet file."""
        buffer = io.BytesIO()
        self.events.write_parquet(buffer)
        durable.write_bytes(path, buffer.getvalue())


def futures(
    model: Model,
    store: TokenStore,
    subject: int,
    *,
    at: datetime | None = None,
    days: float | None = None,
    trajectories: int = 3,
    max_tokens: int = 256,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Futures:
    """Simulate what comes after a point in a patient's record.

    Args:
        model: checkpoint and codebook; the store must have been made with the same codebook.
        store: where the patient's timeline is.
        subject: the patient's id.
        at: end of the known history, UTC; the end of the record when not given.
        days: how far to look.
        trajectories: how many futures.
        max_tokens: most tokens of one.
        seed: equal seeds give equal futures.
        progress: called with futures done and to do.

    Raises:
        DataError: another codebook, no such patient, or no events up to `at`.
        ConfigError: settings out of range.
    """
    codebook = Codebook.load(model.codebook)
    if store.codebook_hash != codebook.hash:
        raise DataError(
            f"{store.path} was made with codebook {store.codebook_hash}, the model with {codebook.hash}; "
            f"tokenize the records again with --codebook {model.codebook}"
        )
    if days is not None and days <= 0:
        raise ConfigError(f"days is {days}; it must be more than 0")
    decoder = model.decoder(codebook.hash)
    timeline, times = _timeline(store, subject, codebook)
    at_us = int(times[-1]) if at is None else int(at.replace(tzinfo=UTC).timestamp() * 1e6)
    known = int(np.searchsorted(times, at_us, side="right"))
    if known == 0 or times[known - 1] == STATIC:
        raise DataError(
            f"subject {subject}: no events up to {at}; the record begins at {_when(int(times[times != STATIC][0]))}"
        )
    prompt = Prompt(timeline[:known], at_us - int(times[known - 1]))
    stop = Stop((), None if days is None else round(days * _DAY_US), max_tokens)
    rolled = rollout(
        decoder,
        codebook,
        [prompt],
        trajectories=trajectories,
        stop=stop,
        seed=seed,
        keep_tokens=True,
        progress=progress,
    )
    last = int(times[known - 1])
    told = [_numbered(history_of(prompt.tokens, times[:known], codebook), -1)]
    for number in range(trajectories):
        passed_us = rolled.passed(0, number)
        events = decode(rolled.trajectory(0, number), codebook, start_us=last, passed_us=passed_us)
        told.append(_numbered(events_of(events), number))
    ends = tuple(_ENDS[Reason(int(reason))] for reason in rolled.reason[0])
    return Futures(subject, _when(at_us), pl.concat(told), ends)


def _timeline(store: TokenStore, subject: int, codebook: Codebook) -> tuple[np.ndarray, np.ndarray]:
    """A patient's tokens and times, without the end of the timeline."""
    for name in SPLITS:
        split = store.split(name)
        found = np.flatnonzero(split.subject_ids == subject)
        if len(found):
            tokens, times = split.timeline(int(found[0]))
            ends = len(tokens) > 0 and tokens[-1] == codebook.eot
            tokens, times = (tokens[:-1], times[:-1]) if ends else (tokens, times)
            if not (times != STATIC).any():
                raise DataError(
                    f"subject {subject}: the record holds no event with a time, so there is nothing to go on from"
                )
            return tokens, times
    raise DataError(f"{store.path}: there is no subject {subject}")


def events_of(decoded: pl.DataFrame) -> pl.DataFrame:
    """Return decoded events as time, code and numeric_value, without the birth that ages only hint at."""
    return decoded.filter(pl.col("code") != "MEDS_BIRTH").select(
        pl.col("time").cast(pl.Datetime("us")), pl.col("code").cast(pl.String), pl.col("numeric_value")
    )


def history_of(tokens: np.ndarray, times: np.ndarray, codebook: Codebook) -> pl.DataFrame:
    """Return a known history as time, code and numeric_value, with the times that were recorded.

    Raises:
        DataError: tokens that don't follow the grammar of timelines.
    """
    history = events_of(decode(tokens, codebook, start_us=int(times[times != STATIC][0])))
    told = np.array([token.kind in ("static", "code", "other") for token in codebook.tokens])[tokens]
    recorded = pl.Series("time", times[told])
    if len(recorded) != history.height:
        raise DataError("the history's tokens don't follow the grammar of timelines; tokenize the records again")
    return history.with_columns(
        pl.when(recorded == STATIC).then(None).otherwise(recorded).cast(pl.Datetime("us")).alias("time")
    )


def _numbered(events: pl.DataFrame, trajectory: int) -> pl.DataFrame:
    return events.select(
        pl.lit(trajectory, pl.Int32).alias("trajectory"), "time", "code", pl.col("numeric_value").cast(pl.Float64)
    )


def _when(time_us: int) -> datetime:
    return datetime.fromtimestamp(time_us / 1e6, UTC).replace(tzinfo=None)


def _table(title: str, events: pl.DataFrame) -> Table:
    table = Table(title=title, title_justify="left", min_width=72)
    table.add_column("time")
    table.add_column("event")
    table.add_column("value", justify="right")
    for _, time, code, value in events.iter_rows():
        table.add_row("" if time is None else f"{time:%Y-%m-%d %H:%M}", code, "" if value is None else f"{value:g}")
    if not events.height:
        table.add_row("", "no event", "")
    return table

"""Rows that can't be used, set aside in a csv file with the reason; or the first of them ends the import."""

import csv
from pathlib import Path

import polars as pl

from tokenizer.errors import DataError

COLUMNS = {
    "file": pl.String,
    "table": pl.String,
    "row": pl.Int64,
    "column": pl.String,
    "reason": pl.String,
    "content": pl.String,
}
"""What is known of a bad row: its file, the table that it is counted for, its number in the file as an editor shows it,
the column ("" for the whole row), the reason without the value, and the value or the row."""

_LONGEST = 2000
_WAITING = 10_000


class Quarantine:
    """The file `path`, if rows may be set aside; each is counted by table and reason.

    Cells that a spreadsheet would run as a formula get an apostrophe in front, as OWASP advises; people open this file.
    """

    def __init__(self, path: Path, *, allowed: bool) -> None:
        self.allowed = allowed
        self.counts: dict[str, dict[str, int]] = {}
        self._path = path
        self._waiting: list[tuple[str, str, int, str, str, str]] = []

    def add(self, file: str, table: str, row: int, column: str, reason: str, content: str, advice: str) -> None:
        """Set one row aside, or refuse it."""
        if not self.allowed:
            raise _refusal(file, table, row, column, reason, content, advice)
        self._count(table, reason, 1)
        # Bytes that are no text have come as lone surrogates, which can't be written.
        shown = content[:_LONGEST].encode("utf-8", "backslashreplace").decode()
        self._waiting.append((file, table, row, column, reason, shown))
        if len(self._waiting) >= _WAITING:
            self.flush()

    def add_all(self, rows: pl.DataFrame, advice: str = "") -> None:
        """Set rows (columns as `COLUMNS`) aside, or refuse the first."""
        if not rows.height:
            return
        if not self.allowed:
            first = rows.row(0, named=True)
            raise _refusal(**{name: first[name] for name in COLUMNS}, advice=advice)
        for table, reason, count in rows.group_by("table", "reason").len().sort("table", "reason").iter_rows():
            self._count(table, reason, count)
        self.flush()
        self._append(rows.select(pl.col(name).cast(kind) for name, kind in COLUMNS.items()))

    def flush(self) -> Path | None:
        """Write what waits; give the file, if a row was ever set aside."""
        if self._waiting:
            rows, self._waiting = self._waiting, []
            self._append(pl.DataFrame(rows, schema=COLUMNS, orient="row"))
        return self._path if self.counts else None

    def _count(self, table: str, reason: str, count: int) -> None:
        reasons = self.counts.setdefault(table, {})
        reasons[reason] = reasons.get(reason, 0) + count

    def _append(self, rows: pl.DataFrame) -> None:
        fresh = not self._path.exists()
        with self._path.open("ab") as out:
            rows.with_columns(_harmless(name) for name in ("file", "table", "column", "content")).write_csv(
                out, include_header=fresh, line_terminator="\r\n"
            )


def _harmless(name: str) -> pl.Expr:
    text = pl.col(name).fill_null("").str.replace_all("\0", "\\0", literal=True).str.head(_LONGEST)
    # A negative number is no formula.
    formula = text.str.contains(r"^[=@\t\r]") | text.str.contains(r"^[+-]([^\d.]|.*[^\d.eE+-])")
    return pl.when(formula).then(pl.concat_str(pl.lit("'"), text)).when(text != "").then(text).alias(name)


def _refusal(file: str, table: str, row: int, column: str, reason: str, content: str, advice: str) -> DataError:
    place = f"{file}: {table}, row {row}" + (f", {column}" if column else "")
    shown = f" ({content[:80]!r})" if content else ""
    return DataError(
        f"{place}: {reason}{shown}. {advice or 'Correct the row'}, or import with --quarantine to set such rows aside."
    )


def read_quarantine(path: Path) -> list[dict[str, str]]:
    """The rows of a quarantine file, as texts."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))

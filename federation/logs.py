"""A daemon's log: one JSON object a line, in files that don't grow without end.

What stands in it: times, levels, which program said it, and its words. No record and no traceback of code that handles
records: what such code has to say is in the site's own `site.log` and in the last words of its app process, both in the
state folder, which no log collector reads.
"""

import json
import logging
import sys
from contextlib import closing
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path

_PROGRAM = "program."
_MOST_BYTES, _KEEP = 10 << 20, 9


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        program = record.name.removeprefix(_PROGRAM) if record.name.startswith(_PROGRAM) else "daemon"
        told = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "program": program,
            "message": record.getMessage(),
        }
        if record.exc_info and record.exc_info[0] is not None:
            told["error"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        program = record.name.removeprefix(_PROGRAM) if record.name.startswith(_PROGRAM) else "daemon"
        return f"{record.levelname.lower()} {program}: {record.getMessage()}"


def to_files(folder: Path, name: str, *, most_bytes: int = _MOST_BYTES, keep: int = _KEEP) -> None:
    """Log to `folder/name.jsonl` from here on, and to stderr for whoever watches.

    Args:
        folder: made when missing.
        name: of the file; `name.jsonl.1` is the one before it, and so on.
        most_bytes: of one file.
        keep: how many old ones stay.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = RotatingFileHandler(folder / f"{name}.jsonl", maxBytes=most_bytes, backupCount=keep, encoding="utf-8")
    file.setFormatter(_Json())
    watched = logging.StreamHandler(sys.stderr)
    watched.setFormatter(_Plain())
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(file)
    root.addHandler(watched)
    root.setLevel(logging.INFO)
    logging.getLogger("flwr").handlers.clear()
    for noisy in ("alembic", "httpx", "httpcore", "sqlalchemy", "grpc", "flwr"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def append(path: Path, text: str) -> None:
    """Write a text at the end of a file of its own, which doesn't grow without end either.

    Raises:
        OSError: it can't be written.
    """
    with closing(RotatingFileHandler(path, maxBytes=_MOST_BYTES, backupCount=_KEEP, encoding="utf-8")) as file:
        if file.shouldRollover(logging.makeLogRecord({"msg": text})):
            file.doRollover()
        assert file.stream is not None
        file.stream.write(text)

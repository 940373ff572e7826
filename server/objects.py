"""What the SuperLink keeps of messages, in files: Flower's own store puts it into its SQLite database.

There every byte is written three times (write-ahead log, database, log again when its pages are freed), and read page
by page; for updates of hundreds of megabytes that is most of a round. Here the database keeps names, parts and sizes,
in the same transactions as before, and `objects/` beside it keeps contents, each under its sha256.

A content is renamed into place before the transaction that calls it available ends. Files that no row names any more
are swept. They need not outlive the machine: after a loss of power a run asks its sites anew, so nothing is flushed,
and a file that is not as long as its row says counts as lost.
"""

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.object_store.object_store import NoObjectInStoreError
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.state.schema.objectstore_models import StoredObject
from sqlalchemy import select, update

from federation.handover import PARTIAL, clear, handed

_AT_ONCE, _LEFT_S = 500, 600.0

_log = logging.getLogger(__name__)


class FileObjectStore(SqlObjectStore):
    """Flower's object store of a database, with contents in files beside it. One process at a time."""

    def __init__(self, database: Path, folder: Path) -> None:
        """Open it; what a killed process left half-written is removed."""
        super().__init__(str(database))
        self._folder = folder
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._moving, self._staged = threading.Lock(), threading.local()
        clear(self._folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of alembic, about Flower's own migrations
            self.initialize()

    def put(self, object_id: str, object_content: bytes) -> None:
        """Keep the content of an object that was announced; of an empty one, the file that was handed over.

        Raises:
            ValueError: the content is not what its name says, or no object of Flower's.
            NoObjectInStoreError: nobody announced it, or it was dropped meanwhile.
            OSError: the disk is full.
        """
        with self.staged(object_id, object_content) as aside, self.session() as session:
            taken = session.scalar(
                update(StoredObject)
                .where(StoredObject.object_id == object_id, StoredObject.is_available == 0)
                .values(content=str(self._staged.size).encode(), is_available=1)
                .returning(StoredObject.object_id)
            )
            if taken is not None:
                with self._moving:
                    aside.replace(self._folder / object_id)
            elif not self._known([object_id]):
                raise NoObjectInStoreError(f"Object with ID '{object_id}' was not pre-registered.")

    @contextmanager
    def staged(self, object_id: str, content: bytes) -> Iterator[Path]:
        """Check a content and write it down aside, for a `put` of the same thread in the block to take.

        Raises:
            ValueError, OSError: as `put` does.
        """
        if getattr(self._staged, "name", None) == object_id:  # further out
            yield self._staged.path
            return
        aside = self._folder / f"{object_id}.{threading.get_ident()}{PARTIAL}"
        try:
            if not content:
                with contextlib.suppress(FileNotFoundError):
                    content = handed(self._folder, object_id).replace(aside).read_bytes()
            if object_id != get_object_id(content):
                raise ValueError(f"Object ID {object_id} does not match content hash")
            validate_object_content(content=content)
            if not aside.exists():
                aside.write_bytes(content)
            self._staged.name, self._staged.path, self._staged.size = object_id, aside, len(content)
            yield aside
        finally:
            self._staged.name = None
            aside.unlink(missing_ok=True)

    def get(self, object_id: str) -> bytes | None:
        """Give an object's content: empty if it is still to come, None if there is no such object (any more)."""
        with self.session() as session:
            row = session.execute(
                select(StoredObject.is_available, StoredObject.content).where(StoredObject.object_id == object_id)
            ).first()
        if row is None:
            return None
        if not row.is_available:
            return b""
        content = None
        with contextlib.suppress(FileNotFoundError):
            content = (self._folder / object_id).read_bytes()
        if content is None or str(len(content)).encode() != row.content:
            _log.error("%s is lost or cut short: the message that it belongs to can't be delivered", object_id)
            return None
        return content

    def sweep(self) -> None:
        """Remove the files of objects that were dropped, or handed over and never named."""
        clear(self._folder, _LEFT_S)
        names = [name for name in os.listdir(self._folder) if "." not in name]
        for start in range(0, len(names), _AT_ONCE):
            some = names[start : start + _AT_ONCE]
            for name in set(some) - self._known(some):
                # Announced again meanwhile, a content may come at any moment; with the lock held it can't come between.
                with self._moving:
                    if not self._known([name]):
                        (self._folder / name).unlink(missing_ok=True)

    def _known(self, names: list[str]) -> set[str]:
        with self.session() as session:
            return set(session.scalars(select(StoredObject.object_id).where(StoredObject.object_id.in_(names))))

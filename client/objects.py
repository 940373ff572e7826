"""What a site's node keeps of messages: their contents in files, which app processes take and give by name."""

from pathlib import Path

from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.object_store.object_store import NoObjectInStoreError

from federation.handover import handed, lay, read

_IN_FILE = b"\0"


class FileContents(InMemoryObjectStore):
    """Flower's object store in memory, with contents in files where the disk has room."""

    def __init__(self, folder: Path) -> None:
        """Begin, with an empty folder."""
        # Objects come over TLS or from a process of ours, and the SuperLink checks what it is given: no need to hash
        # all of it twice more here. What a request asks for is signed, weights included.
        super().__init__(verify=False)
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in folder.iterdir():
            left.unlink()

    def put(self, object_id: str, object_content: bytes) -> None:
        """Keep the content of an object that was announced; of an empty one, the file that was handed over.

        Raises:
            NoObjectInStoreError: nobody announced it.
            ValueError: no file was handed over.
        """
        path = self._folder / object_id
        if object_id not in self:
            raise NoObjectInStoreError(f"Object with ID '{object_id}' was not pre-registered.")
        if object_content:
            super().put(object_id, _IN_FILE if lay(path, object_content) else object_content)
            return
        try:
            handed(self._folder, object_id).replace(path)
        except FileNotFoundError:
            raise ValueError(f"No content of object {object_id} was handed over") from None
        super().put(object_id, _IN_FILE)

    def lay_aside(self, object_id: str, content: bytes) -> bytes:
        """Write a content that has come down; gives what `put` is to be told: nothing, where it is in a file."""
        return b"" if content and lay(handed(self._folder, object_id), content) else content

    def get(self, object_id: str) -> bytes | None:
        """Give an object's content: empty if it is still to come, None if there is no such object."""
        content = super().get(object_id)
        return read(self._folder / object_id) if content == _IN_FILE else content

    def delete(self, object_id: str) -> None:
        """Drop an object that no other holds, and what it alone holds."""
        super().delete(object_id)
        if object_id not in self:
            for path in (self._folder / object_id, handed(self._folder, object_id)):
                path.unlink(missing_ok=True)

    def has(self, object_id: str) -> bool:
        """Tell whether an object's content is there."""
        with self.lock_store:
            return object_id in self.store and self.store[object_id].is_available

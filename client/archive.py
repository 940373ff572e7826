"""What a site must not forget, in its own state folder: token stores, and for every run the answers it has given.

    site.log                                    errors in full; older ones in site.log.1 and on; stays at the site
    trouble                                     why a request got no answer, until one like it does
    budget.sqlite                               what has been spent of the privacy budget (`client.budget`)
    stores/<id>/                                token stores, shared by runs with the same codebook and records
    runs/<manifest hash>/manifest.json          what the site agreed to
                         codebook.json
                         agreement.json         the records' fingerprint and the store
                         rounds/0007.safetensors   the answer of round 7 (only of the last two rounds)
                         rounds/0007.digest        what round 7 was asked (kept for good)
                         optimizer/0007.safetensors  AdamW's state after round 7 (only of the last two)
                         choices.json           what this machine chose when the run began, and found since
                         residuals/0007.safetensors  what rounding took from the update of round 7 (of the last two)
                         drift/0007.safetensors    what drift correction keeps of round 7 (of the last two)
                         heads/0007.safetensors    the site's own head after round 7 (of the last two)
                         weights                the weights that were evaluated last, until others come
                         scores/0007-tuning.json   the evaluation of round 7, in a run with secure aggregation
                         assessments/0007.safetensors   the answers to the run's questions after round 7
                         held/train.json        the secrets of the last masked sum of updates; for its owner only
                         local.safetensors      where the round that is being worked on stood, until it is answered

Every file appears whole or not at all. Work on a run, and on the stores, is done by one process at a time.
"""

import fcntl
import json
import math
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from client.drift import Drift
from federation import canonical, logs, parts
from federation.coding import Coding, Packed
from federation.manifest import Manifest
from federation.messages import (
    AssessReply,
    EvaluateReply,
    ProtocolError,
    TrainReply,
    Vector,
    Weighted,
    Wire,
    bytes_of,
    from_wire,
    to_wire,
)
from federation.parts import Bytes, FileBytes
from model.settings import Precision
from tokenizer import durable
from tokenizer.codebook import Codebook
from tokenizer.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

_KEPT_ROUNDS = 2
_DTYPES = {"u1": "U8", "i8": "I64", "f4": "F32", "f8": "F64"}  # safetensors' names of NumPy's types
_SNAPSHOT = "local.safetensors"
_ANSWER = ".safetensors"
_BESIDE = ("optimizer", "residuals", "drift", "heads")  # what is kept beside an answer


@dataclass(frozen=True)
class Agreement:
    """What a site's part in a run rests on: its records at that time, and the store made from them."""

    fingerprint: str
    store: str


@dataclass(frozen=True)
class Choices:
    """What a machine chose for a run, so that it computes the same again after a stop; see `model.machine`."""

    precision: Precision
    micro_tokens: int


@dataclass(frozen=True)
class Snapshot:
    """A round in the middle of its local work.

    Attributes:
        request_digest: of the request that is being worked on.
        done: optimizer steps that were taken.
        choices: what they were computed with, and the next ones will be.
        seconds: spent so far.
        tensors: "weights" float32 [P]; "losses" float64 [done] and "tokens" int64 [done] of the steps; and
            "optimizer/<name>", the trainer's state.
    """

    request_digest: str
    done: int
    choices: Choices
    seconds: float
    tensors: dict[str, Any]  # of torch.Tensor, which only those who make snapshots load


class Archive:
    """A site's state folder; make one for each request, as it reads what was agreed only once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: dict[str, RunArchive] = {}

    def run(self, manifest_hash: str) -> "RunArchive":
        """Give the part that belongs to one run; the hash must be one (it becomes a folder's name)."""
        if len(manifest_hash) != 64 or not set(manifest_hash) <= set("0123456789abcdef"):
            raise ProtocolError("A manifest hash has 64 hexadecimal digits.")
        if manifest_hash not in self._opened:
            self._opened[manifest_hash] = RunArchive(self.path / "runs" / manifest_hash)
        return self._opened[manifest_hash]

    def runs(self) -> "list[RunArchive]":
        """Give the runs that the site has agreed to."""
        return [run for path in (self.path / "runs").glob("*") if (run := RunArchive(path)).agreement() is not None]

    def store_path(self, store: str) -> Path:
        """Tell where a token store is."""
        return self.path / "stores" / store

    @contextmanager
    def surveying(self) -> Iterator[None]:
        """Hold the right to draw a private survey."""
        with _lock(self.path / "survey.lock"):
            yield

    @contextmanager
    def building(self) -> Iterator[None]:
        """Hold the right to build stores."""
        with _lock(self.path / "stores.lock"):
            yield

    @property
    def log_file(self) -> Path:
        """Where errors are written down in full."""
        return self.path / "site.log"

    def log(self, task: str, error: BaseException) -> None:
        """Write an error down in full, where only the site can read it."""
        self.path.mkdir(parents=True, exist_ok=True)
        told = "".join(traceback.format_exception(error))
        logs.append(self.log_file, f"{datetime.now(UTC).isoformat(timespec='seconds')} {task}\n{told}\n")


class RunArchive:
    """What a site keeps of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._agreement: Agreement | None = None
        self._manifest: Manifest | None = None

    @contextmanager
    def working(self) -> Iterator[None]:
        """Hold the right to work on this run."""
        with _lock(self.path / "lock"):
            yield

    def agree(self, manifest: Manifest, codebook: Codebook, agreement: Agreement) -> None:
        """Note what the site agreed to; the agreement itself is written last."""
        durable.write_bytes(self.path / "manifest.json", manifest.to_bytes())
        durable.write_bytes(self.path / "codebook.json", codebook.to_bytes())
        durable.write_bytes(self.path / "agreement.json", canonical.encode(agreement))

    def agreement(self) -> Agreement | None:
        """Give the agreement, if the site takes part in the run."""
        path = self.path / "agreement.json"
        if self._agreement is None and path.exists():
            self._agreement = canonical.decode(Agreement, path.read_bytes(), str(path), DataError)
        return self._agreement

    def manifest(self) -> Manifest:
        """Give the manifest that the site agreed to."""
        if self._manifest is None:
            self._manifest = Manifest.from_bytes((self.path / "manifest.json").read_bytes())
        return self._manifest

    def codebook(self) -> Codebook:
        """Give the run's codebook."""
        return Codebook.load(self.path / "codebook.json")

    def choices(self) -> Choices | None:
        """Give what this machine chose for the run, if it has begun to work on it."""
        path = self.path / "choices.json"
        return canonical.decode(Choices, path.read_bytes(), str(path), DataError) if path.exists() else None

    def choose(self, choices: Choices) -> None:
        """Note what this machine chose."""
        durable.write_bytes(self.path / "choices.json", canonical.encode(choices))

    def keep_snapshot(self, snapshot: Snapshot) -> None:
        """Replace the snapshot of the round that is being worked on."""
        import safetensors.torch

        header = {key: value for key, value in vars(snapshot).items() if key != "tensors"}
        with durable.file(self.path / _SNAPSHOT) as path:
            safetensors.torch.save_file(snapshot.tensors, path, {"header": canonical.encode(header).decode()})

    def snapshot(self, request_digest: str) -> Snapshot | None:
        """Give the snapshot of the work on this request, if there is one."""
        import safetensors.torch

        path = self.path / _SNAPSHOT
        if not path.exists():
            return None
        header = self._header(path)
        if header["request_digest"] != request_digest:
            return None
        fields = {**header, "tensors": safetensors.torch.load_file(path)}
        return canonical.build(Snapshot, fields, str(path), DataError)

    def answered(self) -> set[int]:
        """Give the rounds that have an answer, be it still kept or not."""
        return {number for number, kind in _numbered(self.path / "rounds") if kind in (".digest", _ANSWER)}

    def asked(self, number: int) -> str | None:
        """Give the digest of the request that a round's answer was for; None if there is no answer."""
        path = self._round(number)
        if path.exists():
            digest: str = self._header(path)["request_digest"]
            return digest
        digest_path = path.with_suffix(".digest")
        return digest_path.read_text() if digest_path.exists() else None

    def reply(self, number: int) -> TrainReply | None:
        """Give the answer of a round, while it is kept."""
        path = self._round(number)
        if not path.exists():
            return None
        arrays = safetensors.numpy.load_file(path)
        reply = from_wire(Wire(canonical.encode(self._header(path)), arrays))
        if not isinstance(reply, TrainReply):
            raise DataError(f"{path} is not the answer of a round; remove it.")
        return reply

    def noise_key(self, number: int) -> bytes:
        """Give the secret key of the noise that a round's kept answer gets under masks; empty where it gets none."""
        path = self._round(number)
        return bytes.fromhex(self._metadata(path).get("noise_key", "")) if path.exists() else b""

    def keep(
        self,
        reply: TrainReply,
        optimizer: "dict[str, Tensor] | None",
        noise_key: bytes = b"",
        drift: Drift | None = None,
        head: Vector | None = None,
    ) -> None:
        """Keep a round's answer with the key of its noise; before it, optimizer's state, drift and own head.

        Then drop what is too old.
        """
        number = reply.round
        if optimizer is not None:
            self._write("optimizer", number, {name: value.cpu().numpy() for name, value in optimizer.items()})
        if drift is not None:
            self._write("drift", number, {"drift": drift.drift, "ended": drift.ended})
        if head is not None:
            self._write("heads", number, {"head": head})
        wire = to_wire(reply)
        told = {"header": wire.header.decode(), **({"noise_key": noise_key.hex()} if noise_key else {})}
        self._write("rounds", number, {name: np.asarray(payload) for name, payload in wire.payloads.items()}, told)
        (self.path / _SNAPSHOT).unlink(missing_ok=True)
        self._sweep(number - _KEPT_ROUNDS)

    def forget(self, number: int) -> None:
        """Drop a round's answer, the optimizer's state after it, its update's residual, its drift, and the own head."""
        for folder in ("rounds", *_BESIDE):
            (self.path / folder / f"{number:04d}.safetensors").unlink(missing_ok=True)

    def held(self, purpose: str) -> bytes | None:
        """Give what the site holds of the last masked sum for a purpose."""
        path = self._held(purpose)
        return path.read_bytes() if path.exists() else None

    def hold(self, purpose: str, secrets: bytes) -> None:
        """Keep what the site holds of a masked sum, where only its owner can read it."""
        path = self._held(purpose)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        durable.write_bytes(path, secrets)

    def score(self, number: int, split: str) -> EvaluateReply | None:
        """Give the kept evaluation of a round."""
        path = self._score(number, split)
        return canonical.decode(EvaluateReply, path.read_bytes(), str(path), DataError) if path.exists() else None

    def keep_score(self, reply: EvaluateReply) -> None:
        """Keep an evaluation until it is masked, and drop those of rounds before."""
        path = self._score(reply.round, reply.split)
        durable.write_bytes(path, canonical.encode(reply))
        for other in path.parent.glob(f"[0-9]*-{reply.split}.json"):
            if other < path:
                other.unlink()

    def assessment(self, number: int) -> AssessReply | None:
        """Give the kept answers to the run's questions after a round."""
        path = self.path / "assessments" / f"{number:04d}.safetensors"
        if not path.exists():
            return None
        reply = from_wire(Wire(canonical.encode(self._header(path)), safetensors.numpy.load_file(path)))
        if not isinstance(reply, AssessReply):
            raise DataError(f"{path} holds no answers to questions; remove it.")
        return reply

    def keep_assessment(self, reply: AssessReply) -> None:
        """Keep answers to the run's questions, and drop those of rounds before."""
        path, wire = self.path / "assessments" / f"{reply.round:04d}.safetensors", to_wire(reply)
        data = safetensors.numpy.save(dict(wire.payloads), {"header": wire.header.decode()})  # type: ignore[arg-type]
        durable.write_bytes(path, data)
        for other in path.parent.glob("[0-9]*.safetensors"):
            if other < path:
                other.unlink()

    def optimizer_before(self, number: int) -> "dict[str, Tensor] | None":
        """Give the optimizer's state after the last answered round before this one."""
        import torch

        path = self._of_last_before(number, "optimizer")
        if not path.exists():
            return None
        return {name: torch.from_numpy(array) for name, array in safetensors.numpy.load_file(path).items()}

    @contextmanager
    def new_residual(self, number: int, size: int) -> Iterator[Callable[[Bytes], object]]:
        """Keep what rounding takes away from a round's update [P], which comes in parts; it counts with the answer."""
        with durable.file(self.path / "residuals" / f"{number:04d}.safetensors") as path, path.open("wb") as file:
            file.write(_head({"residual": ("u1", (2 * size,))}))
            yield lambda part: file.write(part.data)

    def residual_before(self, number: int) -> Packed | None:
        """Give what rounding took away from the update of the last answered round before this one."""
        path = self._of_last_before(number, "residuals")
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(path, "np") as whole:
                fits = list(whole.keys()) == ["residual"]
        except safetensors.SafetensorError:
            fits = False
        if not fits:
            raise DataError(f"{path} is damaged: it holds no residual. Restore it from a copy, or begin a new run.")
        with path.open("rb") as file:
            head = int.from_bytes(file.read(8), "little")
        return Packed(FileBytes(path, 8 + head), "bfloat16")

    def drift_before(self, number: int) -> Drift | None:
        """Give what drift correction kept of the last answered round before this one."""
        path = self._of_last_before(number, "drift")
        return Drift(int(path.stem), **safetensors.numpy.load_file(path)) if path.exists() else None

    def head_before(self, number: int) -> Vector | None:
        """Give the site's own head, float32 [H], after the last answered round before this one."""
        path = self._of_last_before(number, "heads")
        return safetensors.numpy.load_file(path)["head"] if path.exists() else None

    def keep_weights(self, request: Weighted) -> None:
        """Keep a request's weights, which are likely to be asked about again."""
        with durable.file(self.path / "weights") as path, path.open("wb") as file:
            for piece in parts.pieces(bytes_of(to_wire(request).payloads["weights"])):
                file.write(piece.data)

    def weights(self, sha256: str, coding: Coding) -> Packed | None:
        """Give the kept weights [P], if they are those whose bytes in this coding have this sha256."""
        path = self.path / "weights"
        if not path.exists():
            return None
        data = np.fromfile(path, np.uint8)
        return Packed(data, coding) if parts.sha256(data) == sha256 else None

    def _write(
        self, folder: str, number: int, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write a safetensors file; safetensors' own writers copy all that they write."""
        with durable.file(self.path / folder / f"{number:04d}{_ANSWER}") as path, path.open("wb") as file:
            file.write(_head({name: (array.dtype.str[1:], array.shape) for name, array in arrays.items()}, metadata))
            for array in arrays.values():
                file.write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)

    def _of_last_before(self, number: int, kind: str) -> Path:
        last = max((n for n in self.answered() if n < number), default=0)
        return self.path / kind / f"{last:04d}{_ANSWER}"

    def _round(self, number: int) -> Path:
        return self.path / "rounds" / f"{number:04d}.safetensors"

    def _held(self, purpose: str) -> Path:
        return self.path / "held" / f"{purpose.replace(' ', '-')}.json"

    def _score(self, number: int, split: str) -> Path:
        return self.path / "scores" / f"{number:04d}-{split}.json"

    def _sweep(self, last: int) -> None:
        for folder, _, names in os.walk(self.path):
            for name in names:
                if name.endswith(".partial"):
                    Path(folder, name).unlink()
        for number in sorted(_too_old(self.path / "rounds", last)):
            path = self._round(number)
            durable.write_bytes(path.with_suffix(".digest"), self._header(path)["request_digest"].encode())
            path.unlink()
        for kind in _BESIDE:
            for number in _too_old(self.path / kind, last):
                (self.path / kind / f"{number:04d}{_ANSWER}").unlink()

    @classmethod
    def _header(cls, path: Path) -> dict[str, Any]:
        header: dict[str, Any] = json.loads(cls._metadata(path)["header"])
        return header

    @staticmethod
    def _metadata(path: Path) -> dict[str, str]:
        with safetensors.safe_open(path, "np") as file:
            metadata: dict[str, str] = file.metadata()
        return metadata


def _numbered(folder: Path) -> Iterator[tuple[int, str]]:
    """The rounds' files in a folder: number and suffix."""
    names = os.listdir(folder) if folder.is_dir() else []
    parts = (os.path.splitext(name) for name in names)
    return ((int(stem), suffix) for stem, suffix in parts if stem.isdecimal())


def _too_old(folder: Path, last: int) -> list[int]:
    """The rounds up to `last` whose vectors lie in a folder."""
    return [number for number, suffix in _numbered(folder) if suffix == _ANSWER and number <= last]


def _head(arrays: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None) -> bytes:
    """What a safetensors file of arrays of these types and shapes begins with."""
    told: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in arrays.items():
        start, end = end, end + math.prod(shape) * int(dtype[1:])
        told[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    data = json.dumps(told).encode()
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the system lets go of it when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

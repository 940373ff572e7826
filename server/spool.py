"""The files of a run directory: accepted updates of the open round, checkpoints of the last rounds.

    plan.json  codebook.json  manifest.json  ledger.sqlite
    initial.safetensors               the checkpoint that the run begins with, if it names one
    rounds/0007/train.sum             the masked sum of a round, until the next round is open
    rounds/0007/<site>.update         an update as it travelled, until the next round is open
    checkpoints/0007.safetensors      decoder, outer moments, and what they belong to
    assessments/0007.json             what the sites' answers to the run's questions say together

Every file appears whole or not at all, and the ledger points at it only afterwards.
"""

import hashlib
import json
import shutil
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from federation import accountant, canonical, protection
from federation.coding import Packed
from federation.manifest import Manifest, software_version
from federation.messages import Payload, bytes_of
from federation.parts import FileBytes, pieces, sha256
from federation.update import as_decoder, to_vector
from model import checkpoint
from model.decoder import Decoder
from model.settings import preset_of
from server.aggregate import GlobalState
from server.journal import Checkpoint, Work
from server.unmask import Collected
from tokenizer import durable
from tokenizer.errors import DataError

_MOMENTUM, _SECOND = "outer.momentum", "outer.second"


class Spool:
    """The `server.rounds.Store` of a run directory."""

    def __init__(self, run_dir: Path, manifest: Manifest) -> None:
        self._dir, self._manifest = run_dir, manifest
        self._decoder: Decoder | None = None

    def checkpoint_path(self, number: int) -> Path:
        """Tell where the checkpoint after a round is."""
        return self._dir / "checkpoints" / f"{number:04d}.safetensors"

    def keep_update(self, number: int, site: str, update: Payload) -> tuple[str, int]:
        """Keep a site's update of a round as it travelled, and give the sha256 and the number of its bytes."""
        data = bytes_of(update)
        with durable.file(self._update_path(number, site)) as aside, aside.open("wb") as file:
            for piece in pieces(data):
                file.write(piece.data)
        return sha256(data), data.size

    def update(self, number: int, site: str, sha256: str) -> Packed:
        """Give a kept update [P], whose parts are read when they are asked for.

        Raises:
            DataError: the file is gone, or its bytes are not those that were accepted.
        """
        path = self._update_path(number, site)
        if _sha256(path) != sha256:
            raise DataError(f"{path}: the file has changed since the update was accepted.")
        return Packed(FileBytes(path), self._manifest.transport.update)

    def keep_sum(self, number: int, purpose: str, collected: Collected) -> str:
        """Keep a sum with all masks on, and give the sha256 of its file."""
        header = {name: value for name, value in vars(collected).items() if name != "words"}
        path = self._sum_path(number, purpose)
        with durable.file(path) as aside:
            save_file({"words": collected.words}, aside, {"header": canonical.encode(header).decode()})
        return _sha256(path)

    def collected(self, number: int, purpose: str, sha256: str) -> Collected:
        """Give back a kept sum.

        Raises:
            DataError: the file is gone or has changed.
        """
        path = self._sum_path(number, purpose)
        if _sha256(path) != sha256:
            raise DataError(f"{path}: the masked sum has changed since the ledger noted it; restore it from a copy.")
        with safe_open(path, "np") as file:
            header, words = json.loads(file.metadata()["header"]), np.array(file.get_tensor("words"))
        return canonical.build(Collected, {**header, "words": words}, str(path), DataError)

    def keep_assessment(self, number: int, data: bytes) -> None:
        """Keep what the sites' answers to the run's questions say together."""
        durable.write_bytes(self.assessment_path(number), data)

    def assessment_path(self, number: int) -> Path:
        """Tell where the answers to the run's questions after a round are."""
        return self._dir / "assessments" / f"{number:04d}.json"

    def save(self, number: int, state: GlobalState, work: Work) -> Checkpoint:
        """Keep the state after a round as a checkpoint with its provenance."""
        # Made once: making its modules takes as long as writing a small one.
        self._decoder = as_decoder(self._manifest.model, state.weights, self._decoder)
        moments = {_MOMENTUM: state.momentum, _SECOND: state.second}
        kept = {name: torch.from_numpy(vector) for name, vector in moments.items() if vector is not None}
        manifest = self._manifest
        provenance = checkpoint.Provenance(
            codebook_hash=manifest.codebook_hash,
            manifest_hash=manifest.hash,
            preset=preset_of(manifest.model),
            round=number,
            rounds=manifest.rounds,
            **work._asdict(),
            software=software_version(),
            torch=str(torch.__version__),
            privacy=self._protection(number),
        )
        path = self.checkpoint_path(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(path, self._decoder, extra=asdict(provenance), arrays=kept)
        return Checkpoint(str(path.relative_to(self._dir)), _sha256(path), path.stat().st_size)

    def load(self, number: int, sha256: str) -> GlobalState:
        """Give back the state after a round; round 0 is the beginning, which follows from the manifest.

        Raises:
            DataError: the checkpoint is missing, changed, or belongs to another run.
        """
        if number == 0 and self._manifest.initial:
            return self._initial()
        if number == 0:
            return GlobalState(to_vector(Decoder.create(self._manifest.model, self._manifest.seed)))
        path = self.checkpoint_path(number)
        if _sha256(path) != sha256:
            raise DataError(f"{path}: the checkpoint has changed since the ledger noted it; restore it from a copy.")
        decoder, extra, arrays = checkpoint.load(path, self._manifest.codebook_hash)
        if extra.get("manifest_hash") != self._manifest.hash:
            raise DataError(f"{path}: belongs to run {extra.get('manifest_hash')}, not {self._manifest.hash}.")
        moments = (arrays.get(name) for name in (_MOMENTUM, _SECOND))
        return GlobalState(to_vector(decoder), *(None if each is None else each.numpy() for each in moments))

    def check(self, committed: int, again: int) -> None:
        """See that the run can go on after a round: with the files that are here, and with what sites do once more.

        Args:
            committed: the last round that the ledger has as committed.
            again: how many rounds after it sites could answer again.

        Raises:
            DataError: ledger and folder are not of one time; nothing was changed.
        """
        there = {int(path.stem) for path in self._checkpoints() if path.stem.isdigit()}
        newest, lost = max(there, default=0), committed > 0 and committed not in there
        path = self.checkpoint_path(newest if newest > committed else committed)
        if newest > committed + again or (lost and newest > committed):
            masked = self._manifest.secure_aggregation is not None
            why, wanted = ("sign one sum a round", newest) if masked else ("keep two rounds' answers", newest - 1)
            raise DataError(
                f"{path} is there, but the ledger's last round of the run is {committed}: the ledger is an older copy. "
                f"Sites {why}, so round {committed + 1} can't be done again. Restore a backup of the ledger that has "
                f"round {wanted} as committed, or begin another run with this checkpoint (docs/ledger.md)."
            )
        if lost:
            raise DataError(
                f"{path} is missing, but the ledger's last round of the run is {committed}: the run's folder is an "
                f"older copy, up to round {newest}, or the file was removed. Restore the folder from a copy that was "
                "made after the ledger's, or begin another run with a checkpoint that is left (docs/ledger.md)."
            )

    def _checkpoints(self) -> list[Path]:
        return list((self._dir / "checkpoints").glob("*"))

    def _initial(self) -> GlobalState:
        """The weights of the checkpoint that the manifest names; outer moments begin anew."""
        path = self._dir / "initial.safetensors"
        if _sha256(path) != self._manifest.initial:
            raise DataError(f"{path}: is not the checkpoint that the run begins with ({self._manifest.initial}).")
        decoder = checkpoint.load(path, self._manifest.codebook_hash)[0]
        if decoder.config != self._manifest.model:
            raise DataError(f"{path}: holds a decoder of another shape than the run's.")
        return GlobalState(to_vector(decoder))

    def sweep(self, keep: Collection[int], open_round: int) -> None:
        """Drop what belongs neither to the open round nor, of checkpoints, to `keep`; and half-written files.

        Of later rounds, which an older ledger does not know, the checkpoints stay until they are made again.
        """
        for path in self._checkpoints():
            if not path.stem.isdigit() or (int(path.stem) < open_round and int(path.stem) not in keep):
                _remove(path)
        for path in (self._dir / "rounds").glob("*"):
            if path.name != f"{open_round:04d}":
                _remove(path)
        for path in (self._dir / "rounds").glob("*/*.partial"):
            _remove(path)

    def _protection(self, number: int) -> checkpoint.Protection | None:
        """What a round's weights cost a patient, as the manifest alone says."""
        if (privacy := self._manifest.privacy) is None:
            return None
        spent = accountant.epsilon(protection.up_to(self._manifest, number).all, privacy.delta)
        return checkpoint.Protection(
            mechanism=privacy.mechanism,
            unit=accountant.UNIT,
            neighbours=accountant.NEIGHBOURS,
            epsilon=spent,
            delta=privacy.delta,
            epsilon_of_run=privacy.epsilon,
            accountant=accountant.NAME,
            compared=privacy.evaluation is not None,
        )

    def _sum_path(self, number: int, purpose: str) -> Path:
        return self._dir / "rounds" / f"{number:04d}" / f"{purpose.replace(' ', '-')}.sum"

    def _update_path(self, number: int, site: str) -> Path:
        return self._dir / "rounds" / f"{number:04d}" / f"{site}.update"


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as cause:
        raise DataError(f"{path} can't be read ({cause.strerror}); restore the run directory.") from None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

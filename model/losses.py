"""Losses of a model that is only asked, by target and by patient."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

from model.decoder import Decoder
from model.settings import Precision

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tokenizer.windows import Batch

# Targets whose logits are in memory at once.
_ROWS = 1024


@torch.no_grad()
def patient_losses(
    decoder: Decoder, batches: "Iterable[Batch]", patients: int, precision: Precision = "fp32"
) -> "NDArray[np.float64]":
    """Each patient's mean loss over the targets of all their windows: float64 [patients] in nats, nan without any.

    Args:
        decoder: asked on the device where it lies.
        batches: windows; `Batch.patients` are places below `patients`.
        patients: how many there are.
        precision: of the products.
    """
    sums, counts = np.zeros(patients), np.zeros(patients)
    for batch in batches:
        per_target, places = target_losses(decoder, batch, precision)
        owner = np.repeat(batch.patients, batch.lengths)[places]
        np.add.at(sums, owner, per_target)
        np.add.at(counts, owner, 1)
    return np.divide(sums, counts, out=np.full(patients, math.nan), where=counts > 0)


@torch.no_grad()
def target_losses(
    decoder: Decoder, batch: "Batch", precision: Precision = "fp32"
) -> "tuple[NDArray[np.float64], NDArray[np.int64]]":
    """The loss of every target of a batch, float64 [K] in nats, and its place in the batch, int64 [K]."""
    device = decoder.embed_tokens.weight.device
    rows = np.flatnonzero(batch.targets >= 0)
    parts = []
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        hidden = decoder(torch.from_numpy(batch.tokens).to(device), torch.from_numpy(batch.lengths))
    for part in torch.from_numpy(rows).split(_ROWS):
        scores = torch.log_softmax(decoder.logits(hidden[part.to(device)].float()), dim=1)
        wanted = torch.from_numpy(batch.targets)[part].to(device)
        parts.append(-scores.gather(1, wanted[:, None]).squeeze(1).double().cpu().numpy())
    return np.concatenate(parts) if parts else np.empty(0), rows

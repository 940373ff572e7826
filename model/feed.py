"""Batches made ahead of the device that trains on them."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tokenizer.windows import Batch


def ahead(batches: Iterable["Batch"], device: str) -> Iterator["Batch"]:
    """Give the same batches, each made while the one before it is at work, in memory that CUDA devices copy from.

    On a CPU a batch costs a thousandth of its step, and a thread would only take turns with it: nothing is done ahead.
    """
    if torch.device(device).type != "cuda":
        yield from batches
        return
    source = iter(batches)
    with ThreadPoolExecutor(1, "batches") as thread:
        coming = thread.submit(_next_pinned, source)
        while (batch := coming.result()) is not None:
            coming = thread.submit(_next_pinned, source)
            yield batch


def _next_pinned(source: Iterator["Batch"]) -> "Batch | None":
    from tokenizer.windows import Batch

    batch = next(source, None)
    if batch is None or not torch.cuda.is_available():
        return batch
    # The arrays keep their pinned tensors alive; lengths and patients never go to the device.
    tokens, targets = (torch.from_numpy(x).pin_memory().numpy() for x in (batch.tokens, batch.targets))
    return Batch(tokens, targets, batch.lengths, batch.patients)

"""What holds a site's steps back from drifting away from the others': terms that are added to every gradient.

- FedProx (Li et al., MLSys 2020, arXiv 1812.06127, eq. 2): the loss gets μ/2 ‖w − w₀‖², so the gradient gets
  μ (w − w₀), with w₀ the global weights that the round began with.
- Drift correction (SCAFFOLD, Karimireddy et al., ICML 2020, arXiv 1910.06378, algorithm 1): the gradient loses h, the
  difference between what gradients are at this site and what they are everywhere.
Both are added before the gradient is clipped; of private steps, after the noise, so they cost no privacy.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.decoder import Decoder
from model.parallel import like


class Pull:
    """The terms of one round.

    Args:
        decoder: whose gradients are changed; not kept.
        anchor: the global weights, float32 [P] in the order of `Decoder.named_parameters()`.
        proximal: FedProx's μ; 0 leaves its term out.
        drift: SCAFFOLD's h, float32 [P]; None leaves it out.
    """

    def __init__(
        self,
        decoder: Decoder,
        anchor: NDArray[np.float32],
        proximal: float = 0.0,
        drift: NDArray[np.float32] | None = None,
    ) -> None:
        self._proximal = proximal
        self._anchor = list(_parts(decoder, anchor)) if proximal else None
        self._drift = None if drift is None else list(_parts(decoder, drift))

    @torch.no_grad()
    def add_(self, decoder: Decoder) -> None:
        """Add the terms to the gradients that lie in the decoder's parameters."""
        for number, weight in enumerate(decoder.parameters()):
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            if self._anchor is not None:
                weight.grad.add_(weight - self._anchor[number], alpha=self._proximal)
            if self._drift is not None:
                weight.grad.sub_(self._drift[number])


def _parts(decoder: Decoder, vector: NDArray[np.float32]) -> Iterator[Tensor]:
    """Cut a flat vector [P] into tensors that lie as the parameters do."""
    start = 0
    for weight in decoder.parameters():
        part = np.array(vector[start : start + weight.numel()], np.float32)
        yield like(torch.from_numpy(part).view(weight.shape), weight.detach())
        start += weight.numel()

"""The output layer of rollouts: from hidden states to the chance of every token, a block of rows at a time.

At small sizes this is most of a step: the product with a vocabulary of 7,105 costs more than four layers of width 128.
So scores and chances live in two buffers that are used again and stay in the processor's cache, what the grammar
forbids is one addition, and rows whose grammar leaves few tokens get the scores of those alone.

Shapes: B rows, V vocabulary, D width, A tokens that a narrow row may draw.
"""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from model.decoder import Decoder
from model.guide import Masks
from model.loss import ALIGNED
from model.sampling import nucleus_

# Rows of scores alive at once: 7 MB each for scores and chances at a vocabulary of 7,105, which stay in a CPU's cache;
# GPUs need larger products to be busy.
_BLOCK_ROWS = 256
_BLOCK_ROWS_ON_DEVICES = 4096


class Head:
    """Computes the chances of the next token.

    Args:
        decoder: whose output layer it is.
        temperature: divides the scores.
        top_p: the nucleus that is kept (`model.sampling.nucleus_`); 1 keeps all.
        rows: of the rollout, at most.

    Attributes:
        block: most rows of one call.
    """

    def __init__(self, decoder: Decoder, temperature: float, top_p: float, rows: int) -> None:
        self._vocab = decoder.config.vocab
        # Rows of whole cache lines: on a CPU the product takes up to twice as long with 7,105 columns as with 7,168.
        width = -(-self._vocab // ALIGNED) * ALIGNED
        self._weight_VD = F.pad(decoder.head_weight.detach(), (0, 0, 0, width - self._vocab))
        self._sharpness, self._top_p = 1.0 / temperature, top_p
        on_cpu = decoder.head_weight.device.type == "cpu"
        self.block = min(rows, _BLOCK_ROWS if on_cpu else _BLOCK_ROWS_ON_DEVICES)
        shape = (self.block, width)
        self._scores, self._chances = (self._weight_VD.new_empty(shape, dtype=torch.float32) for _ in range(2))

    def chances(
        self, hidden_BD: Tensor, masks: Masks, places: np.ndarray, wide: int, also: tuple[np.ndarray, np.ndarray]
    ) -> Tensor:
        """Chance of every token: float32 [B, V and some columns of zeros], which holds until the next call.

        Args:
            hidden_BD: float32 [B, D], wide rows first.
            masks: what may be drawn.
            places: int64 [B], which of the masks each row has.
            wide: rows before this one get all scores, the others only those of the few tokens that they may draw.
            also: int64 [E], wide rows, and float32 [E, V], logarithms of what their chances are multiplied by.
        """
        if self._sharpness != 1.0:
            hidden_BD = hidden_BD * self._sharpness
        chances_BV = self._chances[: len(hidden_BD)]
        if wide:
            scores = self._all_scores(hidden_BD[:wide])
            masks.hide_(scores[:, : self._vocab], places[:wide])
            scores[:, self._vocab :] = -torch.inf
            if len(also[0]):
                rows, factors = (torch.from_numpy(x).to(scores.device) for x in also)
                scores[rows, : self._vocab] += factors
            torch.softmax(scores, 1, out=chances_BV[:wide])
        if wide < len(hidden_BD):
            tokens_BA, bias_BA = masks.few(places[wide:])
            scores = torch.bmm(self._weight_VD[tokens_BA], hidden_BD[wide:, :, None]).squeeze(2).float()
            # Padding repeats a token with a chance of zero.
            chances_BV[wide:].zero_().scatter_add_(1, tokens_BA, torch.softmax(scores + bias_BA, 1))
        return nucleus_(chances_BV, self._top_p) if self._top_p < 1.0 else chances_BV

    def _all_scores(self, hidden_BD: Tensor) -> Tensor:
        scores = self._scores[: len(hidden_BD)]
        if hidden_BD.dtype == scores.dtype:
            return torch.mm(hidden_BD, self._weight_VD.T, out=scores)
        return scores.copy_(hidden_BD @ self._weight_VD.T)

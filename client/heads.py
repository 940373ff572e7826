"""A head of a site's own: the body of a model is trained together, its output layer stays at each site.

FedPer (Arivazhagan et al., arXiv 1912.00818) and FedRep (Collins et al., ICML 2021, arXiv 2102.07078) average all but
the last layer. Here the head is the output matrix (with tied embeddings: these) and the norm before it. A site begins a
round with the global body and the head that it ended its last round with, and its update is zero where the head is, so
what it learned there never leaves, in clear, under masks or with noise; the vector's length stays, and so do the bytes.
The federation's own model has the head that it began with: only with a site's head is it of use.
"""

import math

import numpy as np
from numpy.typing import NDArray

from federation.coding import Told
from federation.messages import Vector
from federation.update import Layout
from model.settings import DecoderConfig

_HEAD = ("embed_tokens", "lm_head", "norm")


def places(config: DecoderConfig) -> NDArray[np.bool_]:
    """Tell which of a decoder's parameters are its head: bool [P]."""
    layout = Layout.of_config(config)
    wanted = set(_HEAD if config.tied else _HEAD[1:])
    sizes = [math.prod(shape) for shape in layout.shapes]
    return np.repeat([name.split(".")[0] in wanted for name in layout.names], sizes)


def with_head(config: DecoderConfig, weights: Told, head: Vector | None) -> Told:
    """Give global weights, float32 [P], with a site's head, float32 [H]; as they are where the site has none yet."""
    if head is None:
        return weights
    whole = np.array(weights)
    whole[places(config)] = head
    return whole

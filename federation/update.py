"""The flat update vector: a decoder's parameters as one float32 vector in a fixed order.

Clipping, noise, sums and files all work on that vector (`federation.vectors`). Weights that are tied stand in it
once. The order is that of `Decoder.named_parameters()`; its `Layout.hash` is in the run manifest, so that both sides
mean the same number by the same position.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from federation import canonical
from federation.coding import Told
from model.decoder import Decoder
from model.parallel import whole
from model.settings import DecoderConfig
from tokenizer.errors import DataError


@dataclass(frozen=True)
class Layout:
    """The names and shapes of a decoder's parameters, in the order of the flat vector."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, decoder: Decoder) -> "Layout":
        """Read the layout off a decoder."""
        named = [(name, tuple(parameter.shape)) for name, parameter in decoder.named_parameters()]
        return cls(tuple(name for name, _ in named), tuple(shape for _, shape in named))

    @classmethod
    def of_config(cls, config: DecoderConfig) -> "Layout":
        """Give the layout of a decoder without making its weights."""
        with torch.device("meta"):
            return cls.of(Decoder(config))

    @property
    def size(self) -> int:
        """The length P of the flat vector."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def hash(self) -> str:
        """The sha256 of names and shapes, in order."""
        return hashlib.sha256(canonical.encode(self)).hexdigest()


@torch.no_grad()
def to_vector(decoder: Decoder) -> NDArray[np.float32]:
    """Copy a decoder's parameters into a new float32 vector [P]; of a sharded one, all processes must ask at once."""
    parameters = list(decoder.parameters())
    vector = torch.empty(sum(p.numel() for p in parameters), dtype=torch.float32)
    start = 0
    for parameter in parameters:
        vector[start : start + parameter.numel()].copy_(whole(parameter).reshape(-1))
        start += parameter.numel()
    array: NDArray[np.float32] = vector.numpy()
    return array


def to_decoder(config: DecoderConfig, vector: Told, device: str = "cpu") -> Decoder:
    """Build the decoder that a vector [P] describes, on a torch device.

    Raises:
        DataError: the vector has another length than such a decoder has parameters.
    """
    with torch.device(device):
        decoder = Decoder(config)
    load_vector_(decoder, vector)
    return decoder


@torch.no_grad()
def as_decoder(config: DecoderConfig, vector: NDArray[np.float32], again: Decoder | None = None) -> Decoder:
    """Give the decoder that a vector [P] describes, to be read only: its parameters are views of the vector.

    Args:
        config: its shape.
        vector: float32 [P].
        again: one that this function gave for the same shape, to be used again for this vector.

    Raises:
        DataError: the vector has another length than such a decoder has parameters.
    """
    with torch.device("meta"):
        decoder = again or Decoder(config)
    parameters = _fitting(decoder, vector)
    whole_, start = torch.from_numpy(vector), 0
    for name, parameter in parameters:
        part = whole_[start : start + parameter.numel()].view_as(parameter)
        if again is not None:
            parameter.data = part
        else:
            module, _, own = name.rpartition(".")
            setattr(decoder.get_submodule(module), own, torch.nn.Parameter(part, requires_grad=False))
        start += part.numel()
    return decoder


@torch.no_grad()
def load_vector_(decoder: Decoder, vector: Told) -> None:
    """Overwrite a decoder's parameters by a float32 vector [P].

    Raises:
        DataError: the vector has another length than the decoder has parameters.
    """
    parameters, start = _fitting(decoder, vector), 0
    for _, parameter in parameters:
        part = np.array(vector[start : start + parameter.numel()], np.float32)
        parameter.copy_(torch.from_numpy(part).view_as(parameter))
        start += parameter.numel()


def _fitting(decoder: Decoder, vector: Told) -> list[tuple[str, torch.nn.Parameter]]:
    """A decoder's parameters by name, which a vector must be as long as."""
    parameters = list(decoder.named_parameters())
    size = sum(parameter.numel() for _, parameter in parameters)
    if vector.shape != (size,):
        raise DataError(f"A vector of shape {vector.shape} doesn't fit a decoder of {size} parameters.")
    return parameters

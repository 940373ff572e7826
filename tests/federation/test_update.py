import dataclasses

import numpy as np
import pytest
import torch

from federation.update import Layout, load_vector_, to_vector
from model.decoder import Decoder
from tests.tiny import MODEL
from tokenizer.errors import DataError

UNTIED = dataclasses.replace(MODEL, tied=False)


@pytest.mark.parametrize("config", [MODEL, UNTIED], ids=["tied", "untied"])
def test_the_vector_holds_every_parameter_once(config: dataclasses.InitVar) -> None:
    decoder = Decoder.create(config, 1)
    vector = to_vector(decoder)
    assert vector.dtype == np.float32
    assert vector.shape == (config.parameters(),) == (Layout.of(decoder).size,)
    other = Decoder.create(config, 2)
    load_vector_(other, vector)
    for (name, one), two in zip(decoder.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_the_vector_is_a_copy() -> None:
    decoder = Decoder.create(MODEL, 1)
    vector = to_vector(decoder)
    kept = vector.copy()
    load_vector_(decoder, np.zeros_like(vector))
    np.testing.assert_array_equal(vector, kept)


def test_a_vector_of_another_length_is_refused() -> None:
    decoder = Decoder.create(MODEL, 1)
    with pytest.raises(DataError, match="doesn't fit"):
        load_vector_(decoder, np.zeros(3, np.float32))


def test_the_layout_needs_no_weights_and_tells_shapes_apart() -> None:
    assert Layout.of_config(MODEL) == Layout.of(Decoder.create(MODEL, 5))
    hashes = {Layout.of_config(c).hash for c in (MODEL, UNTIED, dataclasses.replace(MODEL, ff=33))}
    assert len(hashes) == 3

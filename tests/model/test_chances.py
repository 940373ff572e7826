"""The chances that the next token tells of an outcome: against walking on by every single token."""

import copy

import numpy as np
import pytest
import torch

from model.guide import Guide
from tokenizer.codebook import Codebook
from tokenizer.options import TokenizerOptions
from tokenizer.release import Survey

CODES = ("ICD10CM//E11", "ICD10CM//E11.9", "ICD10CM//E11.65", "ICD10CM//I50.9", "LAB//A", "MEDS_DEATH")


@pytest.fixture(scope="module")
def codebook() -> Codebook:
    survey = Survey(TokenizerOptions(min_patients=1), patients=9, codes=dict.fromkeys(CODES, 9))
    return Codebook.build(survey)


@pytest.mark.parametrize(
    "asked",
    [
        (("ICD10CM//E11",), ("MEDS_DEATH",)),
        (("ICD10CM//E11.65",), ("ICD10CM//E11",)),
        (("LAB//A",), ("ICD10CM//I50.9", "ICD10CM//E11.9")),
    ],
)
def test_chances_are_those_of_all_tokens_that_tell_of_an_outcome(codebook: Codebook, asked: tuple) -> None:
    grammar = codebook.grammar
    outcomes = [codebook.matching(prefixes) for prefixes in asked]
    rng = np.random.default_rng(0)
    # Rows in every state that a walk through the grammar meets.
    rows = np.arange(40)
    starts = np.full(40, grammar.start)
    guide = Guide(
        grammar, outcomes, starts, masked=True, never=np.zeros(len(codebook), bool), device=torch.device("cpu")
    )
    met = set()
    for _ in range(30):
        chances = rng.dirichlet(np.ones(len(codebook)), 40).astype(np.float32)
        found, settled = guide.chances(rows, torch.from_numpy(chances))
        expected = np.zeros((40, 2))
        told_before = np.zeros(40, bool)
        for token in range(len(codebook)):
            event, before = copy.deepcopy(guide).advance(rows, np.full(40, token))
            for outcome in range(2):
                expected[:, outcome] += np.where(event == outcome, chances[:, token], 0)
            told_before |= before
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert (settled == told_before).all()
        met |= {bool(x) for x in settled}
        allowed = grammar.allowed(guide._state[rows])
        guide.advance(rows, np.array([rng.choice(np.flatnonzero(mask)) if mask.any() else 0 for mask in allowed]))
    assert met == ({False, True} if asked[0] == ("ICD10CM//E11.65",) else {False})

"""The split is a keyed hash: stable, alike everywhere, in the shares asked for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenizer.errors import ConfigError
from tokenizer.split import SplitRule

ids = st.lists(st.integers(-(2**63), 2**63 - 1))


@given(ids)
def test_a_patient_falls_in_one_split_whoever_stands_beside(subjects):
    rule = SplitRule("key")
    together = rule.assign(np.array(subjects, np.int64))
    alone = [rule.assign(np.array([subject], np.int64))[0] for subject in subjects]
    assert together.dtype == np.int8
    assert together.tolist() == alone


def test_shares_are_as_asked():
    split = SplitRule("key", tuning=0.1, held_out=0.2).assign(np.arange(20_000))
    assert np.bincount(split) / 20_000 == pytest.approx([0.7, 0.1, 0.2], abs=0.01)


def test_another_key_is_another_split():
    subjects = np.arange(1000)
    agreement = (SplitRule("a").assign(subjects) == SplitRule("b").assign(subjects)).mean()
    assert 0.4 < agreement < 0.65


def test_the_split_stays_what_it_was():
    """Golden: a change here would move patients of a running federation from test to train."""
    assert "".join(map(str, SplitRule("fedcomet").assign(np.arange(40)))) == GOLDEN


GOLDEN = "0000110102000002200201000200002202002001"


@pytest.mark.parametrize(("tuning", "held_out"), [(-0.1, 0.2), (0.5, 0.5), (float("nan"), 0.2)])
def test_shares_that_leave_nobody_to_train_are_refused(tuning, held_out):
    with pytest.raises(ConfigError, match="split rule"):
        SplitRule("key", tuning, held_out)

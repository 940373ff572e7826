"""Groups of patients are what prompts tell, and nothing is made up."""

from pathlib import Path

import numpy as np

from model.cohort import cohort
from model.people import groups_of
from model.tasks import Task
from tests import tiny
from tokenizer.codebook import Codebook, TokenizerOptions
from tokenizer.events import MedsDataset
from tokenizer.split import SplitRule
from tokenizer.store import build_store
from tokenizer.survey import survey


def test_sex_and_age_are_those_of_the_records_and_race_is_left_out_where_none_is_told(tmp_path: Path) -> None:
    data, rule = MedsDataset.open(tiny.site(tmp_path, "here", 1).data), SplitRule("key")
    codebook = Codebook.build(survey(data, rule, TokenizerOptions(min_patients=5)))
    store = build_store(data, codebook, rule, tmp_path / "store")
    asked = cohort(Task("t", "?", ("LAB//0",), ("LAB//1",), ("LAB//2",)), store.split("train"), codebook)
    found = groups_of(asked, codebook)
    assert set(found) == {"sex", "age"}
    records = tiny.records(1, 40)
    sex = {
        subject: code.removeprefix("GENDER//")
        for subject, code in records.select("subject_id", "code").rows()
        if code.startswith("GENDER//")
    }
    assert found["sex"] == [sex[int(subject)] for subject in asked.subject_ids]
    # All were born in 1960 and are seen from 2020 on.
    assert set(found["age"]) == {"60-79"}
    nobody = asked.part(np.zeros(0, np.int64))
    assert groups_of(nobody, codebook) == {}

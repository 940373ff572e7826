"""Supervised baselines see what a prompt holds and nothing else, and learn what there is to learn from it."""

from dataclasses import replace

import numpy as np
import pytest

from model.cohort import Cohort, cohort
from model.tasks import Task
from simulation.baselines import BOOSTING, LOGISTIC, baselines, codes_of, features, read
from simulation.hospital import PROFILES, write_hospital
from tokenizer.codebook import Codebook, TokenizerOptions
from tokenizer.events import MedsDataset
from tokenizer.split import SplitRule
from tokenizer.store import TokenStore, build_store
from tokenizer.survey import survey

TASK = Task(
    "readmission_30d", "?", ("HOSPITAL_DISCHARGE",), ("HOSPITAL_ADMISSION",), ("MEDS_DEATH",), 0.0, 30.0, "each"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, TokenStore], Codebook]:
    root, rule = tmp_path_factory.mktemp("baselines"), SplitRule("key", 0.15, 0.3)
    write_hospital(root / "a", PROFILES["heart"], 350, 3)
    data = MedsDataset.open(root / "a" / "records")
    codebook = Codebook.build(survey(data, rule, TokenizerOptions(min_patients=5)))
    return {"a": build_store(data, codebook, rule, root / "store")}, codebook


def held_out(made: tuple[dict[str, TokenStore], Codebook]) -> Cohort:
    stores, codebook = made
    return cohort(TASK, stores["a"].split("held_out"), codebook).labelled()


def test_features_follow_from_the_prompt_and_not_from_what_came_after(
    made: tuple[dict[str, TokenStore], Codebook],
) -> None:
    asked, codebook = held_out(made), made[1]
    codes = codes_of(read(asked, codebook))
    whole = features(asked, codebook, codes)
    turned = replace(asked, labels=1 - asked.labels)
    assert np.array_equal(whole.table, features(turned, codebook, codes).table, equal_nan=True)
    assert whole.table.shape == (len(asked), len(whole.names))
    column = (
        whole.names.index("count of HOSPITAL_ADMISSION//EMERGENCY")
        if ("count of HOSPITAL_ADMISSION//EMERGENCY" in whole.names)
        else next(i for i, name in enumerate(whole.names) if name.startswith("count of HOSPITAL_ADMISSION"))
    )
    since = whole.names.index(whole.names[column].replace("count of", "days since"))
    seen = whole.table[:, column] > 0
    assert (whole.table[seen, since] >= 0).all()
    assert np.isnan(whole.table[~seen, since]).all()


def test_baselines_rank_better_than_chance_and_shuffled_labels_do_not(
    made: tuple[dict[str, TokenStore], Codebook],
) -> None:
    from model.metrics import auroc

    asked, (stores, codebook) = held_out(made), made
    risks = baselines(TASK, stores, codebook, asked, seed=0)
    assert set(risks) == {f"{model}, {where}" for model in (LOGISTIC, BOOSTING) for where in ("pooled", "a")}
    for risk in risks.values():
        assert ((risk >= 0) & (risk <= 1)).all()
        assert auroc(asked.labels, risk) > 0.6
    shuffled = np.random.default_rng(0).permutation(asked.labels)
    # The negative control: about 0.5, with a standard error of 0.04 or less.
    assert abs(auroc(shuffled, risks[f"{BOOSTING}, pooled"]) - 0.5) < 0.16

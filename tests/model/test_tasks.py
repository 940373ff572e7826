from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from model.cohort import DECIDED, NO_TRIGGER, TOO_SHORT, Cohort, cohort, join
from model.tasks import Task, task_tokens
from tests.tokenizer.hospital import frame, spelling_codebook
from tokenizer.codebook import INTERVALS, STATIC, Codebook, Token, TokenizerOptions
from tokenizer.encode import encode
from tokenizer.errors import ConfigError
from tokenizer.store import TokenSplit

DAY = 86_400_000_000
HOUR = DAY // 24

CODES = (
    "ICU_ADMISSION//MICU",
    "HOSPITAL_ADMISSION//EMERGENCY",
    "HOSPITAL_DISCHARGE//DIED",
    "HOSPITAL_DISCHARGE//HOME",
    "LAB//HR",
    "MEDS_DEATH",
)

DYING = Task(
    name="died",
    question="Does the patient die in hospital?",
    trigger=("ICU_ADMISSION",),
    after_hours=48,
    outcome=("MEDS_DEATH", "HOSPITAL_DISCHARGE//DIED"),
    competing=("HOSPITAL_DISCHARGE",),
)
RETURN = Task(
    name="return",
    question="Does the patient come back within 30 days?",
    trigger=("HOSPITAL_DISCHARGE",),
    outcome=("HOSPITAL_ADMISSION",),
    competing=("MEDS_DEATH", "HOSPITAL_DISCHARGE//DIED"),
    horizon_days=30,
    occurrence="each",
)


@pytest.fixture(scope="module")
def codebook() -> Codebook:
    tokens = [
        *(Token("special", text) for text in ("pad", "eot", "unk")),
        Token("static", "*"),
        Token("static", "HOSPITAL_DISCHARGE//HOME"),
        *(Token("interval", text) for text in INTERVALS),
        *(Token("code", code) for code in CODES),
        Token("other", ""),
        Token("other", "LAB"),
    ]
    return Codebook(TokenizerOptions(), tokens, dict(INTERVALS), {}, {})


def _split(codebook: Codebook, *stories: Sequence[tuple[float, str]]) -> TokenSplit:
    """Timelines of events given as (hours, code), with a static token before and end of timeline after."""
    tokens, times, offsets = [], [], [0]
    for story in stories:
        told = [(STATIC, codebook.id(Token("static", "*")))]
        told += [(round(hours * HOUR), codebook.id(Token("code", code))) for hours, code in story]
        told.append((told[-1][0], codebook.eot))
        times += [time for time, _ in told]
        tokens += [token for _, token in told]
        offsets.append(len(tokens))
    return TokenSplit(
        np.array(tokens, np.int32),
        np.array(times, np.int64),
        np.array(offsets, np.int64),
        np.arange(100, 100 + len(stories), dtype=np.int64),
    )


def _only(found: Cohort) -> int:
    assert len(found) == 1
    return int(found.labels[0])


ICU = (0.0, "ICU_ADMISSION//MICU")
HR = (1.0, "LAB//HR")


def test_death_first_is_positive_and_discharge_first_negative(codebook: Codebook):
    assert _only(cohort(DYING, _split(codebook, [ICU, (60, "MEDS_DEATH")]), codebook)) == 1
    assert _only(cohort(DYING, _split(codebook, [ICU, (60, "HOSPITAL_DISCHARGE//HOME")]), codebook)) == 0
    home_then_dead = [ICU, (60, "HOSPITAL_DISCHARGE//HOME"), (70, "MEDS_DEATH")]
    assert _only(cohort(DYING, _split(codebook, home_then_dead), codebook)) == 0


def test_a_fatal_discharge_is_the_outcome_though_discharge_competes(codebook: Codebook):
    story = [ICU, (60, "HOSPITAL_DISCHARGE//DIED"), (61, "MEDS_DEATH")]
    assert _only(cohort(DYING, _split(codebook, story), codebook)) == 1


def test_at_one_moment_the_outcome_comes_before_the_competing_event(codebook: Codebook):
    story = [ICU, (60, "HOSPITAL_DISCHARGE//HOME"), (60, "MEDS_DEATH")]
    assert _only(cohort(DYING, _split(codebook, story), codebook)) == 1


def test_who_is_decided_or_gone_before_the_prediction_is_excluded_and_counted(codebook: Codebook):
    split = _split(
        codebook,
        [ICU, (47, "MEDS_DEATH")],
        [ICU, (48, "HOSPITAL_DISCHARGE//HOME")],  # at the prediction: still to come, unless it is known
        [ICU, (20, "LAB//HR")],
        [HR],
        [],
        [ICU, (48.01, "MEDS_DEATH")],
    )
    assert cohort(DYING, split, codebook).subject_ids.tolist() == [101, 105]
    found = cohort(replace(DYING, known="at"), split, codebook)
    assert found.subject_ids.tolist() == [105]
    counts = found.counts()
    assert counts.excluded == {NO_TRIGGER: 2, TOO_SHORT: 1, DECIDED: 2}
    assert (counts.patients, counts.predictions, counts.positive) == (6, 1, 1)


def test_the_prompt_is_all_that_is_known_and_nothing_after(codebook: Codebook):
    split = _split(codebook, [ICU, HR, (47, "LAB//HR"), (49, "LAB//HR"), (60, "MEDS_DEATH")])
    found = cohort(DYING, split, codebook)
    (prompt,) = found.prompts
    names = [codebook.tokens[token].text for token in prompt.tokens]
    assert names == ["*", "ICU_ADMISSION//MICU", "LAB//HR", "LAB//HR"]
    assert prompt.elapsed_us == HOUR
    assert found.prediction_us.tolist() == [48 * HOUR]


def test_the_end_of_the_timeline_is_never_part_of_a_prompt(codebook: Codebook):
    found = cohort(RETURN, _split(codebook, [(5, "HOSPITAL_DISCHARGE//HOME")]), codebook)
    assert codebook.eot not in found.prompts[0].tokens


def test_a_horizon_passes_only_while_the_record_goes_on(codebook: Codebook):
    out = (0.0, "HOSPITAL_DISCHARGE//HOME")
    back = "HOSPITAL_ADMISSION//EMERGENCY"
    cases = {
        (30 * 24, back): 1,
        (30.01 * 24, back): 0,
        (10 * 24, "LAB//HR"): -1,
        (30 * 24, "LAB//HR"): 0,
        (10 * 24, "MEDS_DEATH"): 0,
    }
    for event, label in cases.items():
        assert _only(cohort(RETURN, _split(codebook, [out, event]), codebook)) == label


def test_every_live_discharge_is_asked_about_but_no_fatal_one(codebook: Codebook):
    out, back = "HOSPITAL_DISCHARGE//HOME", "HOSPITAL_ADMISSION//EMERGENCY"
    story = [(0, out), (24, back), (48, out), (96, back), (120, "HOSPITAL_DISCHARGE//DIED"), (120, "MEDS_DEATH")]
    found = cohort(RETURN, _split(codebook, story), codebook)
    assert found.prediction_us.tolist() == [0, 48 * HOUR]
    assert found.labels.tolist() == [1, 1]
    first = cohort(Task(**{**vars(RETURN), "occurrence": "first"}), _split(codebook, story), codebook)
    last = cohort(Task(**{**vars(RETURN), "occurrence": "last"}), _split(codebook, story), codebook)
    assert first.prediction_us.tolist() == [0]
    assert last.prediction_us.tolist() == [48 * HOUR]


def test_death_at_the_very_discharge_is_an_exclusion_not_a_prediction(codebook: Codebook):
    task = Task(**{**vars(RETURN), "outcome": ("MEDS_DEATH",), "competing": ()})
    found = cohort(task, _split(codebook, [(0, "HOSPITAL_DISCHARGE//HOME"), (0, "MEDS_DEATH")]), codebook)
    assert found.counts().excluded[DECIDED] == 1


@pytest.mark.parametrize("kind", ["count", "value", "set"])
def test_what_goes_on_is_asked_about_whoever_had_it_before(codebook: Codebook, kind: str):
    """Laboratory tests at the trigger and in the hours up to the prediction decide nothing about those to come."""
    stay = {"trigger": ("ICU_ADMISSION",), "outcome": ("LAB//HR",), "competing": ("MEDS_DEATH",), "after_hours": 6}
    task = Task(**{**vars(RETURN), **stay, "kind": kind, "horizon_days": 3})
    early = [ICU, (0, "LAB//HR"), HR, (7, "LAB//HR"), (200, "LAB//HR")]
    found = cohort(task, _split(codebook, early, [ICU, HR, (2, "MEDS_DEATH"), (300, "LAB//HR")]), codebook)
    assert found.subject_ids.tolist() == [100]
    assert found.counts().excluded[DECIDED] == 1
    if kind == "count":
        assert found.told["count"].tolist() == [1.0]
    once = cohort(replace(task, kind="event"), _split(codebook, early), codebook)
    assert once.counts().excluded[DECIDED] == 1


def test_an_event_that_comes_again_can_be_trigger_and_outcome(codebook: Codebook):
    task = Task(**{**vars(RETURN), "trigger": ("HOSPITAL_ADMISSION",)})
    back = "HOSPITAL_ADMISSION//EMERGENCY"
    found = cohort(task, _split(codebook, [(0, back), (24, back)]), codebook)
    assert found.labels.tolist() == [1, -1]


def test_static_codes_and_parents_of_rare_codes_play_the_right_part(codebook: Codebook):
    parts = task_tokens(RETURN, codebook)
    assert not parts.trigger[codebook.id(Token("static", "HOSPITAL_DISCHARGE//HOME"))]
    labs = task_tokens(Task("labs", "?", trigger=("LAB",), outcome=("MEDS_DEATH",), horizon_days=1), codebook)
    assert labs.trigger[codebook.id(Token("other", "LAB"))]


def test_codes_that_the_codebook_cannot_tell_apart_are_noted(codebook: Codebook):
    task = Task("x", "?", trigger=("LAB//LACTATE",), outcome=("SEPSIS",), horizon_days=1)
    notes = task_tokens(task, codebook).notes
    assert "trigger LAB//LACTATE" in notes[0]
    assert "told as LAB" in notes[0]
    assert "not seen" in notes[1]
    assert cohort(task, _split(codebook, [HR]), codebook).notes == notes


def test_cohorts_of_sites_join_and_censored_predictions_can_be_left_out(codebook: Codebook):
    out = (0.0, "HOSPITAL_DISCHARGE//HOME")
    here = cohort(RETURN, _split(codebook, [out, (1, "LAB//HR")]), codebook)
    there = cohort(RETURN, _split(codebook, [out, (1, "HOSPITAL_ADMISSION//EMERGENCY")], [HR]), codebook)
    both = join([here, there])
    assert both.labels.tolist() == [-1, 1]
    assert both.patients == 3
    assert both.counts().excluded[NO_TRIGGER] == 1
    assert both.labelled().labels.tolist() == [1]
    assert len(both.labelled().prompts) == 1


def test_draws_follow_from_patient_and_time_not_from_the_cohort(codebook: Codebook):
    story = [ICU, (60, "MEDS_DEATH")]
    alone = cohort(DYING, _split(codebook, story), codebook)
    among = cohort(DYING, _split(codebook, story, story), codebook)
    assert alone.prompts[0].key == among.prompts[0].key != among.prompts[1].key


def test_an_empty_split_gives_an_empty_cohort(codebook: Codebook):
    found = cohort(DYING, _split(codebook), codebook)
    assert len(found) == 0
    assert found.labels.dtype == np.int8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trigger": ()}, "trigger is empty"),
        ({"outcome": ()}, "outcome is empty"),
        ({"competing": ("MEDS_DEATH",)}, "MEDS_DEATH is both outcome and competing"),
        ({"known": "trigger"}, 'known = "trigger" needs a prediction at the trigger'),
        ({"horizon_days": 0.0}, "horizon_days is 0"),
        ({"competing": ()}, "could never be no"),
        ({"occurrence": "second"}, "must be first, last or each"),
    ],
)
def test_wrong_tasks_are_named(changes: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=f"'died'.*{message}"):
        Task(**{**vars(DYING), **changes})  # type: ignore[arg-type]


def test_spelled_codes_are_found_by_any_level_of_their_hierarchy():
    book = spelling_codebook()
    rows = [
        (1, 0, "VISIT", None),
        (1, DAY, "ICD10CM//E11.9", None),
        (1, 2 * DAY, "ICD10CM//E11.65", None),
        (2, 0, "VISIT", None),
        (2, DAY, "ICD10CM//E11.62", None),
        (3, 0, "VISIT", None),
        (3, DAY, "ICD10CM//E11.21", None),
        (3, 9 * DAY, "VISIT", None),
    ]
    encoded = encode(frame(rows), book)
    split = TokenSplit(encoded.tokens, encoded.times, encoded.offsets, encoded.subject_ids)

    def labels(outcome: str, *competing: str) -> list[int]:
        task = Task("x", "?", trigger=("VISIT",), outcome=(outcome,), competing=competing, horizon_days=8)
        return cohort(task, split, book).labels.tolist()

    assert labels("ICD10CM//E11") == [1, 1, 1]
    assert labels("ICD10CM//E11.6") == [1, 1, 0]
    assert labels("ICD10CM//E11.65") == [1, -1, 0]
    assert labels("ICD10CM//E11.6", "ICD10CM//E11") == [0, 1, 0]
    assert labels("ICD10CM//E11", "ICD10CM//E11.6") == [1, 0, 1]
    task = Task("x", "?", trigger=("ICD10CM//E11.9",), outcome=("ICD10CM//E11.65",), horizon_days=8)
    assert cohort(task, split, book).labels.tolist() == [1]
    missing = Task("x", "?", trigger=("VISIT",), outcome=("ICD10CM//E11.62",), horizon_days=8)
    assert "told as ICD10CM//E11.6" in task_tokens(missing, book).notes[0]

"""Knowledge at a prediction: nothing dated there leaks, and late codes are dated when they become known."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from model.cohort import cohort
from model.history import moved_to, retimed, timeline
from model.tasks import Eligible, Late, Task, matching
from tests.tokenizer.hospital import DAY, frame, spelling_codebook
from tokenizer.codebook import STATIC, Codebook
from tokenizer.encode import encode
from tokenizer.store import TokenSplit

BOOK = spelling_codebook()
VISIT, LAB, DX, DEATH = "VISIT", "LAB//B", "ICD10CM//E11.9", "MEDS_DEATH"


def split_of(rows, book: Codebook = BOOK) -> TokenSplit:
    told = encode(frame(rows), book)
    return TokenSplit(told.tokens, told.times, told.offsets, told.subject_ids)


STORIES = st.lists(
    st.tuples(st.integers(0, 40), st.sampled_from([VISIT, LAB, DX, "ICD10CM//I10", DEATH])), min_size=1, max_size=12
)


@settings(max_examples=60, deadline=None)
@given(STORIES, st.sampled_from(["before", "trigger", "at"]), st.booleans())
def test_no_prompt_holds_what_is_dated_at_or_after_its_prediction(story, known, born) -> None:
    rows = [(1, day * DAY, code, None) for day, code in sorted(story)] + [
        (1, -40 * 365 * DAY, "MEDS_BIRTH", None)
    ] * born
    task = Task("t", "?", trigger=(VISIT,), outcome=(DEATH,), horizon_days=9, occurrence="each", known=known)
    split = split_of(rows)
    found = cohort(task, split, BOOK)
    for at, prompt in zip(found.prediction_us.tolist(), found.prompts, strict=True):
        assert BOOK.grammar.accepts(prompt.tokens)
        events = [BOOK.event(int(node)) for node in BOOK.grammar.events(prompt.tokens)[1]]
        allowed = [code for day, code in sorted(story) if day * DAY < at]
        allowed += [code for day, code in sorted(story) if day * DAY == at and (known == "at" or code == VISIT)]
        if known == "before":
            allowed = [code for day, code in sorted(story) if day * DAY < at]
        assert sorted(events) == sorted(allowed)
        assert prompt.elapsed_us >= (1 if known == "before" else 0)


@settings(max_examples=80, deadline=None)
@given(STORIES, st.data())
def test_events_at_other_times_read_as_if_they_had_been_recorded_then(story, data) -> None:
    days = sorted({day for day, _ in story})
    rows = sorted((day, code) for day, code in set(story))
    line = timeline(split_of([(1, day * DAY, code, None) for day, code in rows]), 0, BOOK)
    moved = line.at.copy()
    for event in range(len(moved)):
        later = [day * DAY for day in days if day * DAY >= moved[event]]
        moved[event] = data.draw(st.sampled_from(later))
    new = retimed(line, moved)
    assert BOOK.grammar.accepts(new.tokens)
    names = [BOOK.event(int(node)) for node in line.nodes]
    wanted = timeline(
        split_of([(1, int(t), code, None) for t, code in sorted(zip(moved, names, strict=True))]), 0, BOOK
    )
    told = [sorted(zip(x.at.tolist(), x.nodes.tolist(), strict=True)) for x in (new, wanted)]
    assert told[0] == told[1]
    kinds = [(BOOK.kinds[x.tokens] == "interval") for x in (new, wanted)]
    assert new.tokens[kinds[0]].tolist() == wanted.tokens[kinds[1]].tolist()
    assert new.times[kinds[0]].tolist() == wanted.times[kinds[1]].tolist()


def test_a_late_code_counts_from_the_end_of_its_stay_and_never_without_one() -> None:
    at = np.array([0, 10, 20, 30, 40, 50])
    flags = {"begin": [1, 0, 0, 0, 1, 0], "late": [0, 1, 0, 1, 0, 1], "end": [0, 0, 1, 0, 0, 0]}
    late, begin, end = (np.array(flags[name], bool) for name in ("late", "begin", "end"))
    assert moved_to(at, late, begin, end).tolist() == [0, 20, 20, 30, 40, STATIC]


def test_billing_codes_of_a_stay_that_goes_on_leave_the_prompt() -> None:
    rows = [
        *((1, 0, code, None) for code in (DX, VISIT)),
        *((1, 5 * DAY, code, None) for code in ("LAB//B",)),
        (1, 9 * DAY, DEATH, None),
    ]
    late = Late((DX,), begin=(VISIT,), end=(DEATH,))
    base = Task("t", "?", trigger=(VISIT,), after_hours=24, outcome=(DEATH,), horizon_days=30)
    split = split_of(rows)

    def texts(task: Task) -> list[str]:
        (prompt,) = cohort(task, split, BOOK).prompts
        return [BOOK.event(int(node)) for node in BOOK.grammar.events(prompt.tokens)[1]]

    assert texts(base) == [DX, VISIT]
    assert texts(Task(**{**vars(base), "late": late})) == [VISIT]


def test_who_is_eligible_is_judged_by_what_is_known() -> None:
    rows = [
        (1, -30 * 365 * DAY, "MEDS_BIRTH", None),
        (1, 0, DX, None),
        (1, 40 * DAY, VISIT, None),
        (1, 60 * DAY, "ICD10CM//I10", None),
        (1, 90 * DAY, VISIT, None),
    ]
    split = split_of(rows)

    def asked(**eligible) -> int:
        task = Task("t", "?", (VISIT,), (DEATH,), horizon_days=9, occurrence="each", eligible=Eligible(**eligible))
        return len(cohort(task, split, BOOK))

    assert asked() == 2
    assert asked(require=("ICD10CM//I10",)) == asked(min_history_days=50) == 1
    assert asked(exclude=("ICD10CM//I10",)) == 1
    assert asked(exclude=("ICD10CM//E11",)) == asked(min_events=9) == asked(min_age=40) == asked(max_age=20) == 0
    assert asked(min_age=20, max_age=50) == 2


def test_codes_of_a_system_are_found_behind_any_head() -> None:
    assert matching(BOOK, ("ICD10CM//E11",)).sum() > BOOK.matching(("ICD10CM//E11",)).sum()

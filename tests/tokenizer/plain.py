"""The tokenizer as one would write it first, event by event: slow, short, and the judge of the fast one."""

from bisect import bisect_left

from tokenizer.codebook import BIRTH, DEATH, STATIC, Codebook, Token, age_width

Row = tuple[int, int | None, str, float | None]


def encode_plainly(rows: list[Row], codebook: Codebook) -> dict[int, list[tuple[int, int]]]:
    """Tokens and times per subject, of (subject, time in us or None, code, value) rows in any order."""
    return {
        subject: list(_timeline([row for row in rows if row[0] == subject], codebook))
        for subject in sorted({row[0] for row in rows})
    }


def encode_sorted(rows, codebook):
    """The same for rows in canonical order, in one pass over them."""
    timelines = {}
    patient: list[Row] = []
    for row in rows:
        if patient and patient[0][0] != row[0]:
            timelines[patient[0][0]] = list(_timeline(patient, codebook, ordered=True))
            patient = []
        patient.append(row)
    if patient:
        timelines[patient[0][0]] = list(_timeline(patient, codebook, ordered=True))
    return timelines


def _timeline(rows, codebook, ordered=False):
    births = [time for _, time, code, _ in rows if code == BIRTH and time is not None]
    born = min(births) if births else None
    events = [row for row in rows if row[2] != BIRTH]
    if not ordered:
        events.sort(key=_order)
    separate = codebook.options.values == "separate"
    now, told_age = None, None
    for _, time, code, value in events:
        if time is None:
            (token,) = codebook.tell(code, static=True).tokens
            yield token, STATIC
            continue
        if time != now:
            waited = [] if now is None else _gap(time - now, codebook.intervals)
            for text in waited:
                yield codebook.id(Token("interval", text)), time
            age = None if born is None else _age(time - born, codebook.options.age_years)
            if (waited or now is None) and age != told_age:
                yield codebook.id(Token("age", age)), time
                told_age = age
            now = time
        told, bin_ = codebook.tell(code), 0
        if told.level == "itself" and value is not None and told.text in codebook.breaks:
            bin_ = 1 + bisect_left(codebook.breaks[told.text], value)
        if bin_ and not separate and told.text not in codebook.spelled:
            yield told.tokens[0] + bin_, time
            continue
        for token in told.tokens:
            yield token, time
        if bin_:
            yield codebook.id(Token("value", f"Q{bin_}")), time
    yield codebook.eot, STATIC if now is None else now


def _order(row):
    _, time, code, value = row
    dead = code == DEATH or code.startswith(DEATH + "//")
    return (time is not None, time or 0, dead, code, value is not None, value or 0.0)


def _gap(gap, intervals):
    text = None
    for name, low in intervals.items():
        if gap >= low:
            text = name
    if text is None:
        return []
    repeats = int(gap / intervals["6mo+"] + 0.5) if text == "6mo+" else 1
    return [text] * repeats


def _age(age_us, years):
    bucket = min(max(age_us // age_width(years), 0), 120 // years)
    if bucket == 120 // years:
        return f"{120 // years * years}+"
    return f"{bucket * years}-{bucket * years + years}"

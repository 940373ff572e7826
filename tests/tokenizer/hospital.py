"""Small made-up hospitals: frames of MEDS events, and hypothesis strategies for rows of them."""

import numpy as np
import polars as pl
from hypothesis import strategies as st

from tokenizer import sketch
from tokenizer.codebook import Codebook, Survey, TokenizerOptions

SCHEMA = {
    "subject_id": pl.Int64,
    "time": pl.Datetime("us"),
    "code": pl.String,
    "numeric_value": pl.Float32,
}
MINUTE = 60_000_000
DAY = 24 * 60 * MINUTE


def frame(rows) -> pl.DataFrame:
    """Events of (subject, time in us or None, code, value or None) rows."""
    raw = pl.DataFrame(rows, schema={**SCHEMA, "time": pl.Int64}, orient="row")
    return raw.with_columns(pl.col("time").cast(pl.Datetime("us")))


def stays(subjects, seed=0, *, lab="LAB//HR", shift=0.0) -> pl.DataFrame:
    """A day of hourly measurements for each subject, with birth, sex, admission, and discharge or death."""
    rng = np.random.default_rng(seed)
    rows = []
    for subject in subjects:
        rows.append((subject, None, f"GENDER//{subject % 2}", None))
        rows.append((subject, -int(rng.integers(0, 90 * 365)) * DAY, "MEDS_BIRTH", None))
        rows.append((subject, 0, "ADMISSION", None))
        for hour in range(int(rng.integers(1, 24))):
            rows.append((subject, hour * 60 * MINUTE, lab, float(rng.normal(80 + shift, 12))))
            rows.append((subject, hour * 60 * MINUTE, "LAB//GCS", float(rng.integers(3, 16))))
        end = int(rng.integers(2, 40)) * DAY
        rows.append((subject, end, "MEDS_DEATH" if rng.random() < 0.2 else "DISCHARGE//HOME", None))
    return frame(rows)


def codebook(values="separate", **options) -> Codebook:
    """A codebook of three named codes (one with ten bins, one with three), parents and statics."""
    settings = TokenizerOptions(values=values, **options)
    accuracy = settings.sketch_accuracy
    smooth = sketch.bucket_of(np.linspace(-20.0, 100.0, 400), accuracy).tolist()
    scores = sketch.bucket_of(np.array([0.0, 1.0, 2.0]), accuracy).tolist()
    return Codebook.build(
        Survey(
            settings,
            patients=100,
            codes={"LAB//A": 50, "LAB//B": 50, "VISIT": 100},
            prefixes={"LAB": 20, "DX//I10": 20},
            statics={"SEX//F": 50},
            static_prefixes={"SEX": 12},
            values={"LAB//A": {b: smooth.count(b) for b in smooth}, "LAB//B": dict.fromkeys(scores, 40)},
        )
    )


def spelling_codebook(values="separate", **options) -> Codebook:
    """A codebook of spelled codes (one of them with three bins), one common and some rare ones besides."""
    settings = TokenizerOptions(values=values, **options)
    scores = sketch.bucket_of(np.array([0.0, 1.0, 2.0]), settings.sketch_accuracy).tolist()
    return Codebook.build(
        Survey(
            settings,
            patients=100,
            codes=dict.fromkeys((*SPELLED, "LAB//B", "VISIT"), 50),
            prefixes={"LAB": 20, "ICD10CM//E11.6": 20, "ICD10CM//Q87": 20},
            statics={"SEX//F": 50},
            values={"ATC//C03CA01": dict.fromkeys(scores, 40), "LAB//B": dict.fromkeys(scores, 40)},
        )
    )


SPELLED = (
    *("ICD10CM//E11.65", "ICD10CM//E11.9", "ICD10CM//I10", "ICD10CM//S72.001A", "DIAGNOSIS//ICD//10//E119"),
    *("ATC//A10BA02", "ATC//A10BA", "ATC//C03CA01", "ICD10PCS//0DTJ4ZZ"),
)
UNSPELLED = (
    *("ICD10CM//E11.62", "ICD10CM//E11.21", "ICD10CM//J45.909", "ICD10CM//S72.001D", "ICD10CM//Q87.1"),
    *("ICD10CM//E1165", "ATC//A10BB01", "ATC//B01", "ICD10PCS//0DT", "DIAGNOSIS//ICD//10//I10"),
)
NAMED = ("LAB//A", "LAB//B", "VISIT", "MEDS_DEATH")
RARE = ("LAB//X", "DX//I10//7", "DX//J", "new", "LAB")
STATICS = ("SEX//F", "SEX//M", "RACE")
_GAPS = st.one_of(
    st.integers(0, 2 * MINUTE),
    st.integers(0, 3 * DAY),
    st.integers(0, 800 * DAY),
    st.sampled_from([MINUTE, 5 * MINUTE, 60 * MINUTE, DAY, 180 * DAY, 270 * DAY]),
)
_VALUES = st.one_of(st.none(), st.sampled_from([0.0, 1.0, 2.0, -1.0]), st.floats(-30, 120, width=32, allow_nan=False))


@st.composite
def histories(draw, codes=NAMED + RARE, statics=STATICS, gaps=_GAPS, values=_VALUES, patients=4):
    """Rows of up to `patients` patients, in no order."""
    rows = []
    for subject in draw(st.lists(st.integers(-5, 99), unique=True, max_size=patients)):
        rows += [(subject, None, code, None) for code in draw(st.lists(st.sampled_from(statics), max_size=3))]
        time = draw(st.integers(-30 * 365 * DAY, 50 * 365 * DAY))
        if draw(st.booleans()):
            rows.append((subject, time - draw(st.integers(0, 100 * 365 * DAY)), "MEDS_BIRTH", None))
        for gap in draw(st.lists(gaps, max_size=12)):
            time += gap
            rows.append((subject, time, draw(st.sampled_from(codes)), draw(values)))
    return draw(st.permutations(rows))

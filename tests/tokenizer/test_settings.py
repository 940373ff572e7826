import re
from datetime import date

import pytest

from tokenizer import cohort, settings
from tokenizer.cohort import Ages, Encounters, Filters
from tokenizer.errors import ConfigError, DataError
from tokenizer.noisy_survey import Bounds, SurveyPrivacy
from tokenizer.prepare import Preparation, UnitRule


def read(tmp_path, text):
    file = tmp_path / "site.toml"
    file.write_text(text)
    return settings.read(file)


def test_the_shape_that_the_module_shows_is_the_one_it_reads(tmp_path):
    (tmp_path / "local-labs.csv").write_text("system,code,target_system,target_code\nLAB,1,LOINC,2\n")
    shown = settings.__doc__.split("\n\n", 1)[1].split("\n\nEvery key", 1)[0]
    found = read(tmp_path, re.sub(r"^    ", "", shown, flags=re.MULTILINE))
    made = found.preparation
    assert made.filters == Filters(
        first_day=date(2015, 1, 1),
        last_day=cohort.COMET.last_day,
        encounter_types=cohort.COMET.encounter_types,
        duplicates=False,
        age=Ages(date(2015, 1, 1), 18, 120),
        encounters=Encounters(2, 730),
        min_events=1,
    )
    assert made.maps[0].targets == {"LAB//1": ("LOINC//2",)}
    assert made.canonical_units == {"LOINC//718-7": "g/dL"}
    assert made.unit_rules == (UnitRule("LOINC//2345-7", "mmol/L", "mg/dL", 18.016),)
    assert found.survey_privacy == SurveyPrivacy("gaussian", 1.0, 1e-6, Bounds(codes=32))


def test_an_empty_file_is_the_default(tmp_path):
    found = read(tmp_path, "")
    assert (found.preparation, found.survey_privacy) == (Preparation(), None)
    assert found.preparation.digest == Preparation().digest


def test_every_wrong_key_and_value_is_named_at_once(tmp_path):
    text = """
    [prepare]
    unts = true
    icd9 = "perhaps"
    unit_rules = [{ code = "A", unit = "x", to = "mg" }]
    [prepare.filters]
    frist_day = 2012-01-01
    age = { on = 2012-01-01, lest = 3 }
    [survey_privacy]
    bounds = { codes = "many" }
    [nonsense]
    """
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    said = str(error.value)
    assert said.startswith(str(tmp_path / "site.toml"))
    for part in (
        "prepare.unts is not a known key; did you mean units?",
        "prepare.icd9 = 'perhaps'",
        "prepare.unit_rules[1].factor is missing",
        "prepare.filters.frist_day is not a known key; did you mean first_day?",
        "prepare.filters.age.lest is not a known key; did you mean least?",
        "survey_privacy.bounds.codes = 'many'",
        "nonsense is not a known key; known: prepare, survey_privacy",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[prepare", "can't be read"),
        ("[prepare.filters]\nmin_events = -1", "min_events is below 0"),
        ("[survey_privacy]\nepsilon = 0", "epsilon must be above 0"),
        ('[prepare]\ncanonical_units = { A = "foo" }', "'foo' .for A. is no UCUM unit"),
    ],
)
def test_settings_that_make_no_sense_are_refused_with_the_file(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path, text)
    assert str(tmp_path / "site.toml") in str(error.value)


def test_a_map_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.csv: can't be read"):
        read(tmp_path, '[prepare]\nmaps = ["gone.csv"]')


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: can't be read"):
        settings.read(tmp_path / "none.toml")

import doctest
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenizer import maps, units

# Figures of ucumvert 0.3.2 on pint 0.25.3, a full UCUM implementation. Mercury differs in the sixth digit: pint takes
# its own density, we UCUM's 133.322 Pa.
REFERENCE = [
    ("g/L", "mg/dL", 100.0),
    ("ug/mL", "mg/dL", 0.1),
    ("pg/mL", "mg/dL", 1e-7),
    ("kPa", "mm[Hg]", 7.500615758456563),
    ("cm[H2O]", "mm[Hg]", 0.7355591352766806),
    ("bar", "mm[Hg]", 750.0615758456564),
    ("[in_i]", "cm", 2.54),
    ("[lb_av]", "kg", 0.45359237),
    ("[oz_av]", "kg", 0.028349523125),
    ("10*6/uL", "10*9/L", 1000.0),
    ("L/min", "mL/h", 60000.0),
    ("ug/kg/min", "mg/kg/h", 0.06),
    ("nkat/L", "U/L", 0.06),
    ("umol/L", "mmol/L", 0.001),
    ("[foz_us]", "mL", 29.5735295625),
    ("mo", "d", 30.4375),
    ("a", "d", 365.25),
    ("[psi]", "kPa", 6.894757293168363),
    ("dyn.s/cm5", "Pa.s/m3", 100000.0),
    ("meq/dL", "meq/L", 10.0),
    ("[ft_i]", "m", 0.3048),
    ("atm", "kPa", 101.325),
    ("Ci", "MBq", 37000.0),
    ("[ppm]", "%", 1e-4),
]


@pytest.mark.parametrize(("unit", "other", "factor"), REFERENCE)
def test_factors_are_those_of_a_full_ucum_implementation(unit, other, factor):
    found, target = units.parse(unit), units.parse(other)
    scale, shift = found.to(target)
    assert scale == pytest.approx(factor, rel=1e-5 if "[Hg]" in other else 1e-12)
    assert shift == 0.0


@pytest.mark.parametrize(
    ("texts", "canonical"),
    [
        (("mg/dL", "MG/DL", "mg/dl", "mg / dL", "mg/dL{fasting}"), "mg/dL"),
        (("mmHg", "mm Hg", "mm[Hg]", "MMHG"), "mm[Hg]"),
        (("bpm", "/min", "{beats}/min", "beats/min", "insp/min", "1/min"), "1/min"),
        (("K/uL", "10*3/uL", "10^3/uL", "x10^3/uL", "thou/uL", "10*9/L", "k/cumm", "10E9/L"), "10*9/L"),
        (("°C", "C", "Cel", "degC", "\u2103"), "Cel"),
        (("ug/mL", "mcg/mL", "\u00b5g/mL", "\u03bcg/mL"), "mg/dL"),
        (("mEq/L", "meq/L", "MEQ/L"), "meq/L"),
        (("mL/min/1.73m2", "mL/min/{1.73_m2}", "mL/min/1.73 m2"), "mL/min/{1.73_m2}"),
        (("kg", "KG", "kgs"), "kg"),
        (("%", "percent", "L/L", "/100{WBCs}"), "%"),
    ],
)
def test_spellings_meet(texts, canonical):
    found = {units.parse(text) for text in texts}
    assert None not in found
    assert {units.canonical(unit)[0] for unit in found} == {canonical}


def test_temperatures_are_converted_with_their_offset():
    cel = units.parse("Cel")
    for text, value in (("[degF]", 98.6), ("°F", 98.6), ("K", 310.15), ("F", 98.6)):
        scale, shift = units.parse(text).to(cel)
        assert value * scale + shift == pytest.approx(37.0, abs=1e-12)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("mg/dL", "mmol/L"),  # needs the molar mass
        ("meq/L", "mmol/L"),  # needs the charge
        ("[IU]/L", "U/L"),
        ("%", "mmol/mol"),  # HbA1c has both, as different scales
        ("%", "1"),
        ("mg/kg/h", "/min"),
        ("mL/min", "mL/min/{1.73_m2}"),
        ("mosm/L", "mmol/L"),
        ("mmol/L", "10*9/L"),
        ("mg/g", "%"),
    ],
)
def test_what_only_looks_alike_stays_apart(one, other):
    assert units.parse(one).dimension != units.parse(other).dimension


@pytest.mark.parametrize("text", ["", " ", "1", "{score}", "UNK", "n/a", "Ratio", "None", "{INR}"])
def test_fillers_and_annotations_are_no_unit(text):
    assert units.parse(text) is units.NONE


@pytest.mark.parametrize(
    "text",
    ["units", "log10 copies/mL", "ng/mL FEU", "ng/mL{DDU}", "U/g/Hb", "foo", "mg/", "m0", "10*99", "(mg", "0", "//"],
)
def test_what_is_not_understood_is_said_so(text):
    assert units.parse(text) is None


@pytest.mark.parametrize("part", ["mg/dL", "%", "bpm", "K/uL", "°F", "KG", "UNK", "#/hpf", "ng/mL", "L/min/m2", "g/dl"])
def test_units_at_the_end_of_a_code_are_seen(part):
    assert units.in_code(part) is not None


@pytest.mark.parametrize(
    "part", ["K", "Mg", "pH", "C", "HR", "A/G", "U/A", "L/S", "D/C", "N", "4019", "225158", "START"]
)
def test_names_of_analytes_at_the_end_of_a_code_are_not_taken_for_units(part):
    assert units.in_code(part) is None


def test_every_preferred_unit_is_its_own_canonical():
    for dimension, text in units._PREFERRED.items():
        unit = units.parse(text)
        assert (unit.dimension, units.canonical(unit)) == (dimension, (text, unit))


_TEXTS = st.one_of(st.text(max_size=12), st.sampled_from([u for row in REFERENCE for u in row[:2]]))


@given(_TEXTS)
def test_any_text_is_read_or_refused_and_its_canonical_text_means_the_same(text):
    unit = units.parse(text)
    if unit is not None and unit is not units.NONE:
        name, target = units.canonical(unit)
        assert units.parse(name).dimension == unit.dimension
        assert units.canonical(units.parse(name))[0] == name
        scale, shift = unit.to(target)
        assert scale > 0
        assert math.isfinite(scale)
        assert math.isfinite(shift)


@pytest.mark.parametrize("module", [units, maps])
def test_examples_in_the_docstrings_are_true(module):
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed

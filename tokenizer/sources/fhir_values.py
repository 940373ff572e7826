"""The values of FHIR observations: numbers with their unit, or answers that become part of the code."""

import math
import re
from operator import attrgetter
from typing import Any

from tokenizer.sources.fhir_batch import Memo
from tokenizer.sources.fhir_codes import Coded, Namer, all_bytes, answer, clean, given, raw_bytes
from tokenizer.sources.fhir_resources import NO_QUANTITY, Component, Quantity

LARGEST = 3.4028234e38
"""The greatest number that a float32 holds."""

_UCUM = frozenset({None, "", "http://unitsofmeasure.org", "urn:oid:2.16.840.1.113883.6.8"})
_NUMBER = re.compile(r"[-+]?\d{1,30}(\.\d{1,30})?")

Value = tuple[str, float | None, str | None, str | None]
"""Suffix of the code, number, unit; and a filter, or `!` and a fault, where there is no value."""


NO_VALUE = "no value"
"""The filter that drops a component without a value."""

_QUANTITY, _AMOUNT, _UNIT = attrgetter("value_quantity"), attrgetter("value"), attrgetter("code", "unit", "system")
_ALL = attrgetter(*(name for name in Component.__struct_fields__ if name != "code"))
_ANSWER, _AHEAD = attrgetter("value_codeable_concept"), attrgetter("value_integer", "value_string", "value_ratio")
_UNSET, _NOT_AHEAD = _ALL(Component()), _AHEAD(Component())
_NONE: Value = ("", None, None, NO_VALUE)


class Values:
    """Reads values; remembers units and coded answers."""

    def __init__(self, namer: Namer) -> None:
        self.answers = Memo(namer.answer)
        self._units = Memo(_unit)
        self._coded = Memo(self._coded_answer)

    def columns(self, objects: list[Any]) -> tuple[list[float | None], list[str | None], list[tuple[int, Value]]]:
        """The values of observations or components.

        Returns:
            Numbers and units of those that are plain numbers; the places of the others, and their values.
        """
        quantities = list(map(_QUANTITY, objects))
        if not all(quantities):
            quantities = [each or NO_QUANTITY for each in quantities]
        numbers = list(map(_AMOUNT, quantities))
        units = list(map(self._units.__getitem__, map(_UNIT, quantities)))
        others = [place for place, number in enumerate(numbers) if number is None or not -LARGEST <= number <= LARGEST]
        rest = [objects[place] for place in others]
        answers = map(self._coded.__getitem__, all_bytes(map(_ANSWER, rest)))
        # Most of the others are coded answers; where another member may come before it, all are looked at in order.
        found = [
            answer if answer is not _NONE and numbers[place] is None and ahead == _NOT_AHEAD else self.read(each)
            for place, each, answer, ahead in zip(others, rest, answers, map(_AHEAD, rest), strict=True)
        ]
        return numbers, units, list(zip(others, found, strict=True))

    def read(self, each: Any) -> Value:
        """The value of an observation or of a component."""
        if _ALL(each) == _UNSET:
            return _NONE
        quantity = each.value_quantity
        if quantity is not None and quantity.value is not None:
            return _number(quantity.value, self._unit(quantity))
        if each.value_integer is not None:
            return _number(each.value_integer, None)
        if each.value_string is not None and _NUMBER.fullmatch(word := clean(each.value_string)):
            return _number(float(word), None)
        if each.value_ratio is not None:
            return self._ratio(each.value_ratio)
        return _of(self._answer(each))

    def _coded_answer(self, raw: bytes) -> Value:
        found = _of(self.answers[raw])
        return _NONE if found == _NONE else found

    def _answer(self, each: Any) -> Coded:
        """A value that isn't a number; or why there is none."""
        found = Coded(None, drop=NO_VALUE)
        if given(raw_bytes(each.value_codeable_concept)):
            found = self.answers[raw_bytes(each.value_codeable_concept)]
        elif each.value_boolean is not None:
            found = Coded(str(each.value_boolean).upper())
        elif each.value_string is not None:
            found = answer(each.value_string)
        elif each.value_range is not None:
            found = answer(self._range(each.value_range))
        if found.drop != NO_VALUE:
            return found
        others = (
            each.value_time,
            each.value_date_time,
            raw_bytes(each.value_period),
            raw_bytes(each.value_sampled_data),
        )
        if any(others):
            return Coded(None, drop="value of a type that isn't read")
        return Coded(None, drop="data absent") if given(raw_bytes(each.data_absent_reason)) else found

    def _unit(self, quantity: Quantity) -> str | None:
        return self._units[_UNIT(quantity)]

    def _ratio(self, ratio: Any) -> Value:
        over, under = ratio.numerator, ratio.denominator
        if over is None or under is None or over.value is None or not under.value:
            return "", None, None, "ratio without a number"
        units = [self._unit(over), self._unit(under)]
        return _number(over.value / under.value, f"{units[0] or '1'}/{units[1] or '1'}" if any(units) else None)

    def _range(self, span: Any) -> str:
        ends = [f"{end.value:g}" if end is not None and end.value is not None else "" for end in (span.low, span.high)]
        units = [self._unit(end) for end in (span.low, span.high) if end is not None]
        unit = next((each for each in units if each), None)
        return f"{'-'.join(ends)} {unit or ''}" if any(ends) else ""


def _of(coded: Coded) -> Value:
    if coded.code:
        return f"//{coded.code}", None, None, None
    return "", None, None, f"!{coded.fault}" if coded.fault else coded.drop


def _unit(parts: tuple[str | None, str | None, str | None]) -> str | None:
    """A quantity's unit: its code where that is UCUM, else its unit in words, else the code."""
    code, unit, system = parts
    return (clean(code) if system in _UCUM else "") or clean(unit) or clean(code) or None


def _number(value: float, unit: str | None) -> Value:
    if not math.isfinite(value) or abs(value) > LARGEST:
        return "", None, None, "!value out of range"
    return "", float(value), unit, None

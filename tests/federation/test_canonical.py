import dataclasses
import gc
import weakref
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from typing_extensions import TypeAliasType, TypeVar

from federation import canonical
from tokenizer.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Inner:
    names: tuple[str, ...]
    shape: tuple[int, float] = (1, 2.0)


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    mode: Literal["a", "b"]
    counts: Mapping[str, int]
    limit: float | None = None
    choice: int | Inner = 3

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 0:
            raise ConfigError("limit must not be negative")


outers = st.builds(
    Outer,
    inner=st.builds(Inner, st.lists(st.text(), max_size=3).map(tuple)),
    mode=st.sampled_from(["a", "b"]),
    counts=st.dictionaries(st.text(), st.integers(), max_size=3),
    limit=st.none() | st.floats(0, 1e300),
)
GOOD: dict[str, Any] = {"inner": {"names": ["x"]}, "mode": "a", "counts": {}}


def read(plain: Any) -> Outer:
    return canonical.build(Outer, plain, "it", ConfigError)


@given(outers)
def test_a_value_survives_and_has_one_form(value: Outer) -> None:
    data = canonical.encode(value)
    again = canonical.decode(Outer, data, "it", ConfigError)
    assert again == value
    assert canonical.encode(again) == data


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"colour": 1}, "unknown field 'colour'"),
        ({"mode": "c"}, r"it\.mode is 'c'; one of 'a', 'b'"),
        ({"inner": {"names": [1]}}, r"it\.inner\.names\[0\] is 1; str"),
        ({"inner": {"names": [], "shape": [1]}}, "has 1 items; 2"),
        ({"inner": []}, r"it\.inner is of type list; an object"),
        ({"inner": {}}, "lacks the field 'names'"),
        ({"counts": {"k": True}}, r"it\.counts\.k is True; int"),
        ({"counts": {"k": 1.0}}, r"it\.counts\.k"),
        ({"limit": "1"}, r"it\.limit"),
        ({"limit": 10**400}, "not a finite number"),
        ({"limit": -1.0}, "it: limit must not be negative"),
        ({"choice": "x"}, r"it\.choice"),
    ],
)
def test_what_does_not_fit_is_named_by_its_path(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read({**GOOD, **change})


@pytest.mark.parametrize("data", [b"\xff", b"{", b"[" * 100_000, b'{"mode": "a"}', b'{"limit":NaN}', b"null"])
def test_bytes_that_are_no_canonical_value_are_refused(data: bytes) -> None:
    with pytest.raises(ConfigError):
        canonical.decode(Outer, data, "it", ConfigError)


def test_a_second_form_of_the_same_value_is_refused() -> None:
    data = canonical.encode(read(GOOD))
    with pytest.raises(ConfigError, match="canonical form"):
        canonical.decode(Outer, data.replace(b":", b": ", 1), "it", ConfigError)


def test_not_a_number_has_no_form() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical.encode({"x": float("nan")})


Scalar = TypeVar("Scalar", bound=np.generic)
Alias = TypeAliasType("Alias", np.ndarray[Any, np.dtype[Scalar]], type_params=(Scalar,))


@dataclasses.dataclass(frozen=True)
class Carrier:
    array: Alias[np.float32]  # as NumPy 2.5's NDArray where Python has `type` statements


def test_an_array_is_taken_by_what_its_alias_stands_for() -> None:
    array = np.zeros(2, np.float32)
    assert canonical.build(Carrier, {"array": array}, "it", ConfigError).array is array
    with pytest.raises(ConfigError, match=r"it\.array"):
        canonical.build(Carrier, {"array": [0.0]}, "it", ConfigError)


@dataclasses.dataclass(frozen=True)
class Either:
    array: Inner | NDArray[np.float32]


def test_what_was_read_goes_when_nobody_holds_it() -> None:
    array = np.ones(3, np.float32)
    held = weakref.ref(array)
    gc.disable()
    try:
        read = canonical.build(Either, {"array": array}, "it", ConfigError)
        assert read.array is array
        del read, array
        assert held() is None
    finally:
        gc.enable()

"""Dataclasses as canonical JSON: equal values have equal bytes, so a hash of the bytes names the value.

Keys are sorted, there is no white space, NaN and infinities are refused. Reading is strict: an unknown field, a missing
one or a value of another type is named by its path, and bytes that are not in canonical form are refused, so that two
different files can't stand for one value.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, TypeVar

from tokenizer.errors import FedcometError

T = TypeVar("T")


def encode(value: Any) -> bytes:
    """Give the canonical JSON of a dataclass, a mapping or a plain value.

    Example:
        >>> encode({"b": 1, "a": (2.0, None)})
        b'{"a":[2.0,null],"b":1}'
    """
    plain = _plain(value)
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def decode(kind: type[T], data: bytes, where: str, error: type[FedcometError]) -> T:
    """Read a dataclass from its canonical JSON.

    Args:
        kind: the dataclass to build.
        data: what `encode` gave.
        where: how a message names the source ("the run manifest").
        error: the class of the error raised for anything that does not fit.
    """
    try:
        plain = json.loads(data.decode())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as cause:
        raise error(f"{where} is not JSON: {cause}.") from None
    value = build(kind, plain, where, error)
    if encode(value) != data:
        raise error(f"{where} is not in canonical form; write it with this software.")
    return value


def build(kind: type[T], plain: Any, where: str, error: type[FedcometError]) -> T:
    """Build a dataclass from plain JSON values, naming whatever does not fit by its path below `where`."""
    value: T = _read(kind, plain, where, error)
    return value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _read(hint: Any, plain: Any, where: str, error: type[FedcometError]) -> Any:
    if hint is Any:
        return plain
    # From NumPy 2.5 on, NDArray is an alias by a `type` statement; what counts is what it stands for.
    origin = typing.get_origin(getattr(typing.get_origin(hint), "__value__", hint))
    arguments = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _read_dataclass(hint, plain, where, error)
    if origin in _GENERIC:
        return _GENERIC[origin](arguments, plain, where, error)
    if isinstance(origin, type) and isinstance(plain, origin):
        return plain  # an array: its owner checks what is in it
    return _read_scalar(hint, plain, where, error)


def _read_dataclass(hint: Any, plain: Any, where: str, error: type[FedcometError]) -> Any:
    if not isinstance(plain, dict):
        raise error(f"{where} is {_name(plain)}; an object is expected.")
    fields = {f.name: f for f in dataclasses.fields(hint)}
    if unknown := sorted(set(plain) - set(fields)):
        raise error(f"{where} has the unknown field {unknown[0]!r}; known are {', '.join(sorted(fields))}.")
    required = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(plain)):
        raise error(f"{where} lacks the field {missing[0]!r}.")
    hints = _hints(hint)
    values = {name: _read(hints[name], item, f"{where}.{name}", error) for name, item in plain.items()}
    try:
        return hint(**values)
    except FedcometError as cause:
        raise error(f"{where}: {cause}") from None


def _read_literal(arguments: tuple[Any, ...], plain: Any, where: str, error: type[FedcometError]) -> Any:
    if plain not in arguments:
        raise error(f"{where} is {_name(plain)}; one of {', '.join(map(repr, arguments))} is expected.")
    return plain


def _read_mapping(arguments: tuple[Any, ...], plain: Any, where: str, error: type[FedcometError]) -> Any:
    if not isinstance(plain, dict):
        raise error(f"{where} is {_name(plain)}; an object is expected.")
    return {key: _read(arguments[1], item, f"{where}.{key}", error) for key, item in plain.items()}


def _read_union(arguments: tuple[Any, ...], plain: Any, where: str, error: type[FedcometError]) -> Any:
    if plain is None and type(None) in arguments:
        return None
    rest = [argument for argument in arguments if argument is not type(None)]
    reasons = []
    for argument in rest:
        try:
            return _read(argument, plain, where, error)
        except error as cause:
            # With its traceback it would hold this frame, which holds it: what was read, an update of hundreds of
            # megabytes even, would stay in memory until the collector of cycles comes by.
            reasons.append(cause.with_traceback(None))
    raise reasons[-1]


def _read_tuple(arguments: tuple[Any, ...], plain: Any, where: str, error: type[FedcometError]) -> Any:
    if not isinstance(plain, list):
        raise error(f"{where} is {_name(plain)}; a list is expected.")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(plain)
    if len(arguments) != len(plain):
        raise error(f"{where} has {len(plain)} items; {len(arguments)} are expected.")
    pairs = zip(arguments, plain, strict=True)
    return tuple(_read(hint, item, f"{where}[{i}]", error) for i, (hint, item) in enumerate(pairs))


def _read_scalar(hint: Any, plain: Any, where: str, error: type[FedcometError]) -> Any:
    if hint is float and isinstance(plain, (int, float)) and not isinstance(plain, bool):
        try:
            value = float(plain)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise error(f"{where} is not a finite number.")
        return value
    if type(plain) is hint:
        return plain
    raise error(f"{where} is {_name(plain)}; {getattr(hint, '__name__', hint)} is expected.")


def _name(plain: Any) -> str:
    if isinstance(plain, (str, int, float, bool)) and len(repr(plain)) <= 60:
        return repr(plain)
    return "null" if plain is None else f"of type {type(plain).__name__}"


_GENERIC: dict[Any, Callable[[tuple[Any, ...], Any, str, type[FedcometError]], Any]] = {
    Literal: _read_literal,
    types.UnionType: _read_union,
    typing.Union: _read_union,
    tuple: _read_tuple,
    dict: _read_mapping,
    Mapping: _read_mapping,
}

"""The one place that turns messages into Flower's records and back, and that touches Flower's inside.

A message is a `RecordDict` of two records: `header`, with one string, and `payloads`, an `ArrayRecord` whose arrays
hold raw little-endian float32, the unsigned integers of masked sums, or plain bytes (packed vectors, too). Arrays
travel in content-addressed chunks, so that weights sent to many sites cost the server one copy. Nothing is unpickled
and no array header is parsed. Whatever arrives from the other side in another shape is a `ProtocolError`.

Checked against flwr 1.41; the version is pinned.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import ErrorCode
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_body,
    get_object_head_values_from_object_content,
    no_object_id_recompute,
)
from flwr.supercore.task_identity import TaskIdentity

from federation import masking, messages
from federation.messages import DeliveryError, Message, Payload, ProtocolError, Vector, Wire, Words, from_wire, to_wire
from federation.parts import Joined

KINDS: Mapping[str, type[Any]] = {**messages.KINDS, **masking.KINDS}
"""Everything that is said: rounds, and the masked sums in them."""


def _inflate_chunk(kind: type[ArrayChunk], content: bytes, children: Mapping[str, Any] | None = None) -> ArrayChunk:
    """Do what `ArrayChunk.inflate` does, without a copy."""
    named, parts, _ = get_object_head_values_from_object_content(content)
    if named != kind.__qualname__ or parts or children:
        raise ValueError(f"A {named[:80]!r} of {len(parts)} parts is no chunk of an array.")
    return kind(memoryview(content)[content.find(HEAD_BODY_DIVIDER) + len(HEAD_BODY_DIVIDER) :])


def _head(chunk: ArrayChunk) -> bytes:
    return f"{ArrayChunk.__qualname__}{HEAD_VALUE_DIVIDER}{HEAD_VALUE_DIVIDER}{len(chunk.data)}".encode()


def places(part: InflatableObject) -> Sequence[bytes | memoryview]:
    """Give where the bytes lie that Flower sends of an object, one after the other; those of a chunk are not copied."""
    if isinstance(part, ArrayChunk):
        return _head(part), HEAD_BODY_DIVIDER, part.data
    return (part.deflate(),)


def _name_chunk(chunk: ArrayChunk) -> str:
    """Do what `ArrayChunk.object_id` does, without two copies."""
    # A chunk never changes once it is cut, so each is hashed once: Flower would do it for each site that is sent it.
    if "_object_id" not in chunk.__dict__:
        digest = hashlib.sha256()
        for place in places(chunk):
            digest.update(place)
        chunk.__dict__["_object_id"] = digest.hexdigest()
    name: str = chunk.__dict__["_object_id"]
    return name


def _inflate_array(kind: type[Array], content: bytes, children: Mapping[str, Any] | None = None) -> Array:
    """Do what `Array.inflate` does, without copies of what is sent in pieces of bytes: `_payload` gives these."""
    _, parts, _ = get_object_head_values_from_object_content(content)
    told = json.loads(get_object_body(content, kind))
    names = [parts[number] for number in told["arraychunk_ids"]]
    if set(names) != set(children or {}):
        raise ValueError("An array's chunks are not those that it names.")
    pieces = [(children or {})[name].data for name in names]
    data = Joined(pieces) if told["dtype"] == "uint8" and len(pieces) > 1 else b"".join(pieces)
    return _array_of(told["dtype"], tuple(told["shape"]), told["stype"], data)


def _array_of(dtype: str, shape: tuple[int, ...], stype: str, data: Any) -> Array:
    """Give an array whose bytes need not be `bytes`."""
    array = Array(dtype, shape, stype, b"")
    array.data = data
    return array


def _record_of(kind: type[ArrayRecord], array_dict: Mapping[str, Array], *, keep_input: bool = True) -> ArrayRecord:
    """Do what `ArrayRecord.from_array_dict` does, whatever holds the arrays' bytes."""
    record = kind()
    for name, array in array_dict.items():
        record[name] = _array_of(array.dtype, tuple(array.shape), array.stype, array.data)
    return record


def _cut(array: Array, cut: Callable[[Array], Any] = Array.slice_array) -> Any:
    """Do what `Array.slice_array` does, also with an array that came in pieces and is sent on."""
    if isinstance(array.data, Joined):
        array.data = bytes(array.data)
    return cut(array)


ArrayChunk.deflate = lambda chunk: b"".join(places(chunk))  # type: ignore[method-assign, assignment]
ArrayChunk.object_id = property(_name_chunk)  # type: ignore[method-assign, assignment]
ArrayChunk.inflate = classmethod(_inflate_chunk)  # type: ignore[method-assign, assignment]
ArrayRecord.from_array_dict = classmethod(_record_of)  # type: ignore[method-assign, assignment]
Array.slice_array = _cut  # type: ignore[method-assign, assignment]
Array.inflate = classmethod(_inflate_array)  # type: ignore[method-assign, assignment]

_RAW = "fedcomet.raw"
_DTYPES = {"uint8": "u1", "float32": "<f4", "uint32": "<u4", "uint64": "<u8"}


def to_record(message: Any) -> RecordDict:
    """Pack a message for Flower."""
    wire = to_wire(message)
    arrays = {name: _array(payload) for name, payload in wire.payloads.items()}
    return RecordDict({"header": ConfigRecord({"json": wire.header.decode()}), "payloads": ArrayRecord(arrays)})


def from_record(record: RecordDict, kinds: Mapping[str, type[Any]] = KINDS) -> Any:
    """Read a message of one of the kinds; it may come from anybody.

    Raises:
        ProtocolError: naming what is missing, unknown or of the wrong type.
    """
    if set(record) != {"header", "payloads"}:
        raise ProtocolError(f"The message has the records {sorted(record)[:5]}; header and payloads are expected.")
    header, payloads = record["header"], record["payloads"]
    if not isinstance(header, ConfigRecord) or not isinstance(payloads, ArrayRecord):
        raise ProtocolError("The message's header and payloads are records of the wrong type.")
    text = header.get("json")
    if set(header) != {"json"} or not isinstance(text, str):
        raise ProtocolError("The message's header must hold one text named 'json'.")
    wire = Wire(text.encode("utf-8", "surrogatepass"), {k: _payload(k, v) for k, v in payloads.items()})
    return from_wire(wire, kinds)


def request(record: RecordDict, kind: str, node: int, *, group: str, ttl_s: float) -> FlowerMessage:
    """Address a packed request to a Flower node; its kind is Flower's message type. Messages may share a record."""
    return FlowerMessage(record, node, kind, ttl=ttl_s, group_id=group)


def reply(message: Message, to: FlowerMessage) -> FlowerMessage:
    """Answer a Flower message."""
    return packed_reply(to_record(message), to)


def packed_reply(record: RecordDict, to: FlowerMessage) -> FlowerMessage:
    """Answer a Flower message with a packed one."""
    return FlowerMessage(record, reply_to=to)


def number_(message: FlowerMessage, name: str) -> None:
    """Give a message its id, as a grid does when it takes one."""
    message.metadata.__dict__["_message_id"] = name


def on_the_wire(record: RecordDict) -> tuple[str, int]:
    """Give the sha256 and the number of the bytes that Flower sends of a packed message, without its envelope.

    Flower cuts a record into objects, sends equal ones once, and names each by the sha256 of its bytes, which hold the
    names of its parts: the name of the whole stands for every byte.
    """
    # Of a twin that shares the arrays' bytes: Flower keeps views of them in a record that it has cut, and a record with
    # views can't be handed to another process.
    twin = RecordDict({name: _twin(part) for name, part in record.items()})
    with no_object_id_recompute():  # Flower would hash every part again for each one that holds it
        parts = get_all_nested_objects(twin)
        return twin.object_id, sum(len(place) for part in parts.values() for place in places(part))


def _twin(part: Any) -> Any:
    if not isinstance(part, ArrayRecord):
        return part
    return ArrayRecord(dict(part))


# What a person can make something of, for what happens at every crash.
_SAID = {
    ErrorCode.NODE_UNAVAILABLE: "the site went away before it answered; it is asked again when it is back",
    ErrorCode.CLIENT_APP_CRASHED: "the site's process that did the work was killed; its own log may say why",
}


def failure(reason: str, to: FlowerMessage) -> FlowerMessage:
    """Answer a Flower message in the place of a node that can't do it itself."""
    return FlowerMessage(Error(code=0, reason=reason), reply_to=to)


def read(message: FlowerMessage) -> Message | masking.Request | masking.Reply:
    """Read the content of a Flower message, see `from_record`.

    Raises:
        DeliveryError: Flower reports an error in the place of an answer.
        ProtocolError: the content is not a message of ours.
    """
    if message.has_error():
        if known := _SAID.get(message.error.code):
            raise DeliveryError(known)
        reason = " ".join(str(message.error.reason).split())
        raise DeliveryError(f"Flower reports error {message.error.code}: {reason[:300]}")
    try:
        return from_record(message.content)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as cause:
        raise ProtocolError(f"The message can't be read ({type(cause).__name__}).") from None


def assume_identity() -> None:
    """Let this process create messages outside of Flower's own processes."""
    try:
        TaskIdentity.run_id  # noqa: B018
    except RuntimeError:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 0, 1


def _array(payload: Payload) -> Array:
    if isinstance(payload, bytes):
        return Array("uint8", (len(payload),), _RAW, payload)
    if isinstance(payload, Joined):
        return _array(bytes(payload))
    name = payload.dtype.name
    if name == "uint8":  # a packed vector, which nobody changes any more
        return _array_of(name, (payload.size,), _RAW, payload)
    return Array(name, (payload.size,), _RAW, payload.astype(_DTYPES[name], copy=False).tobytes())


def _payload(name: str, array: Any) -> Payload:
    if array.stype != _RAW or array.dtype not in _DTYPES:
        raise ProtocolError(
            f"The payload {name[:80]!r} is {array.dtype!s:.40} as {array.stype!s:.40}; raw is expected."
        )
    dtype = np.dtype(_DTYPES[array.dtype])
    if len(array.shape) != 1 or array.shape[0] * dtype.itemsize != len(array.data):
        raise ProtocolError(f"The payload {name[:80]!r} has {len(array.data)} bytes; its shape says otherwise.")
    if array.dtype == "uint8":
        data: bytes | Joined = array.data
        return data
    vector: Vector | Words = np.frombuffer(array.data, dtype).astype(array.dtype, copy=False)
    return vector

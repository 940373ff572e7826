import contextlib
import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from flwr.app import Message as FlowerMessage
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from federation import flower
from federation.messages import (
    AssessReply,
    AssessRequest,
    DeliveryError,
    EvaluateReply,
    EvaluateRequest,
    Message,
    PrepareReply,
    PrepareRequest,
    ProtocolError,
    Refusal,
    SplitCounts,
    SurveyReply,
    SurveyRequest,
    TrainReply,
    TrainRequest,
    Wire,
    from_wire,
    printable,
    to_wire,
)
from tokenizer.codebook import TokenizerOptions
from tokenizer.split import SplitRule

finite = st.floats(allow_nan=False, allow_infinity=False)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"]))
vectors = hnp.arrays(np.float32, st.integers(0, 50))
counts = st.builds(SplitCounts, st.integers(0, 2**60), st.integers(0), st.integers(0))
whole = st.integers(0, 2**62)
messages = st.one_of(
    st.builds(SurveyRequest, st.builds(SplitRule, texts), st.just(TokenizerOptions()), finite),
    st.builds(SurveyReply, names, st.binary()),
    st.builds(PrepareRequest, st.binary(), st.binary(), finite),
    st.builds(PrepareReply, names, texts, st.dictionaries(texts, counts, max_size=3), whole),
    st.builds(TrainRequest, texts, whole, vectors, finite),
    st.builds(TrainReply, names, texts, whole, texts, vectors, whole, whole, finite, finite),
    st.builds(EvaluateRequest, texts, whole, texts, vectors, finite),
    st.builds(EvaluateReply, names, texts, whole, texts, texts, finite, whole),
    st.builds(AssessRequest, texts, whole, vectors, finite),
    st.builds(AssessReply, names, texts, whole, texts, vectors),
    st.builds(Refusal, names, texts),
)


def same(one: Message, other: Message) -> bool:
    return type(one) is type(other) and all(
        np.array_equal(a, b, equal_nan=True) if isinstance(a, np.ndarray) else a == b
        for a, b in ((getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    )


@given(messages)
def test_every_message_survives_the_wire_and_flower(message: Message) -> None:
    assert same(from_wire(to_wire(message)), message)
    record = flower.to_record(message)
    assert same(flower.from_record(record), message)


@given(messages, st.data())
def test_a_damaged_header_is_a_protocol_error_or_another_message(message: Message, data: st.DataObject) -> None:
    wire = to_wire(message)
    header = bytearray(wire.header)
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        from_wire(Wire(bytes(header), wire.payloads))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(messages, st.data())
def test_a_field_of_any_other_kind_is_a_protocol_error_or_fits(message: Message, data: st.DataObject) -> None:
    wire = to_wire(message)
    header = json.loads(wire.header)
    header[data.draw(st.sampled_from(sorted(header)))] = data.draw(json_values)
    with contextlib.suppress(ProtocolError):
        from_wire(Wire(json.dumps(header).encode(), wire.payloads))


GOOD = Refusal("icu", "no")


def hostile(**changes: Any) -> RecordDict:
    header = {"kind": "refusal", "version": 1, "site": "icu", "reason": "no", **changes}
    return RecordDict({"header": ConfigRecord({"json": json.dumps(header)}), "payloads": ArrayRecord()})


def with_payload(array: Array, name: str = "survey") -> RecordDict:
    record = flower.to_record(SurveyReply("icu", b"abc"))
    record["payloads"] = ArrayRecord({name: array})
    return record


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (RecordDict(), "header and payloads are expected"),
        (RecordDict({"header": ConfigRecord(), "payloads": ConfigRecord()}), "wrong type"),
        (RecordDict({"header": ConfigRecord({"json": b"x"}), "payloads": ArrayRecord()}), "one text"),
        (RecordDict({"header": ConfigRecord({"json": "{}", "x": 1}), "payloads": ArrayRecord()}), "one text"),
        (RecordDict({"header": MetricRecord({"json": 1}), "payloads": ArrayRecord()}), "wrong type"),
        (RecordDict({"header": ConfigRecord({"json": "\ud800"}), "payloads": ArrayRecord()}), "not JSON"),
        (RecordDict({"header": ConfigRecord({"json": "[]"}), "payloads": ArrayRecord()}), "not a JSON object"),
        (RecordDict({"header": ConfigRecord({"json": " " * 2**21}), "payloads": ArrayRecord()}), "bytes"),
        (hostile(reason="\ud800"), "not JSON"),
        (hostile(version=2), "version 2"),
        (hostile(version=None), "version None"),
        (hostile(kind="exec"), "no message of kind 'exec'"),
        (hostile(kind=["refusal"]), "no message of kind"),
        (hostile(site="../../etc"), "can't be the name of a site"),
        (hostile(site=""), "can't be the name of a site"),
        (hostile(extra=1), "unknown field 'extra'"),
        (hostile(kind="survey.reply", survey="x"), "no message of kind"),
        (hostile(kind="query.survey.reply", survey="x"), "must be a payload"),
        (with_payload(Array("uint8", (3,), "numpy.ndarray", b"abc")), "raw is expected"),
        (with_payload(Array("object", (3,), "fedcomet.raw", b"abc")), "raw is expected"),
        (with_payload(Array("uint8", (4,), "fedcomet.raw", b"abc")), "its shape says otherwise"),
        (with_payload(Array("uint8", (), "fedcomet.raw", b"abc")), "its shape says otherwise"),
        (with_payload(Array("float32", (1,), "fedcomet.raw", b"abcd")), "of the wrong type"),
        (with_payload(Array("uint8", (3,), "fedcomet.raw", b"abc"), "other"), "lacks the payload 'survey'"),
    ],
)
def test_a_malformed_record_is_named(record: RecordDict, told: str) -> None:
    with pytest.raises(ProtocolError, match=told):
        flower.from_record(record)


def test_an_unknown_payload_is_named() -> None:
    record = flower.to_record(GOOD)
    record["payloads"] = ArrayRecord({"extra": Array("uint8", (0,), "fedcomet.raw", b"")})
    with pytest.raises(ProtocolError, match="unknown payload 'extra'"):
        flower.from_record(record)


def test_an_error_of_flower_is_a_delivery_error() -> None:
    flower.assume_identity()
    message = FlowerMessage(flower.to_record(GOOD), 1, "train")
    with pytest.raises(DeliveryError, match="gone"):
        flower.read(flower.failure("the node is gone", message))
    with pytest.raises(DeliveryError, match="error 3"):
        flower.read(FlowerMessage(Error(3, "x"), reply_to=message))
    with pytest.raises(DeliveryError, match="went away before it answered"):
        flower.read(FlowerMessage(Error(5, "Node Unavailable"), reply_to=message))


def test_texts_from_elsewhere_are_one_printable_line() -> None:
    assert printable("a\x1b[31mred\nline\u202e") == "a [31mred line "
    assert len(printable("x" * 10_000)) == 500


def test_a_digest_names_the_work_and_not_its_deadline() -> None:
    request = TrainRequest("m", 1, np.zeros(3, np.float32), 1.0)
    assert request.digest == dataclasses.replace(request, deadline_s=2.0).digest
    assert request.digest != dataclasses.replace(request, round=2).digest
    assert request.digest != dataclasses.replace(request, manifest_hash="n").digest
    assert request.digest != dataclasses.replace(request, weights=np.ones(3, np.float32)).digest
    evaluation = EvaluateRequest("m", 1, "tuning", request.weights, 1.0)
    assert evaluation.digest not in (request.digest, dataclasses.replace(evaluation, split="held_out").digest)

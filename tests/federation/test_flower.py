"""Arrays that Flower cuts into chunks come together again, as its own code would put them, or not at all."""

import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.app.message import array as flower_array
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from federation import flower
from federation.messages import SurveyReply

CHUNK = 1000


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> RecordDict:
    """A message whose payload is cut into seven chunks, of which three are equal."""
    monkeypatch.setattr(flower_array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", CHUNK)
    rng = np.random.default_rng(0)
    parts = [rng.bytes(CHUNK), b"\0" * CHUNK, rng.bytes(CHUNK), b"\0" * CHUNK, b"\0" * CHUNK, rng.bytes(CHUNK), b"end"]
    return flower.to_record(SurveyReply("north", b"".join(parts)))


def contents(record: RecordDict) -> dict[str, bytes]:
    return {name: part.deflate() for name, part in get_all_nested_objects(record).items()}


def test_what_was_cut_comes_together(record: RecordDict) -> None:
    cut = contents(record)
    assert sum(one.startswith(b"ArrayChunk") for one in cut.values()) == 5  # equal ones travel once
    again = inflate_object_from_contents(record.object_id, cut)
    assert isinstance(again, RecordDict)
    assert again.object_id == record.object_id
    assert flower.from_record(again) == flower.from_record(record)


def test_a_chunk_is_not_copied() -> None:
    content = ArrayChunk(memoryview(b"\0some\0bytes")).deflate()
    chunk = ArrayChunk.inflate(content)
    assert bytes(chunk.data) == b"\0some\0bytes"
    assert chunk.data.obj is content


def test_what_does_not_belong_together_is_refused(record: RecordDict) -> None:
    payloads = record["payloads"]
    assert isinstance(payloads, ArrayRecord)
    (array,) = payloads.values()
    content, chunks = array.deflate(), dict(array.children)
    with pytest.raises(ValueError, match="chunks are not those"):
        Array.inflate(content, dict(list(chunks.items())[1:]))
    with pytest.raises(ValueError, match="chunks are not those"):
        Array.inflate(content, None)
    with pytest.raises(ValueError, match="is no chunk"):
        ArrayChunk.inflate(content)
    with pytest.raises(ValueError, match="is no chunk"):
        ArrayChunk.inflate(next(iter(chunks.values())).deflate(), chunks)
    with pytest.raises(ValueError, match="do not match"):
        Array.inflate(record.deflate(), chunks)
    head, _, body = content.partition(b"\0")
    told = json.loads(body) | {"arraychunk_ids": [99]}
    with pytest.raises(IndexError):
        Array.inflate(head + b"\0" + json.dumps(told).encode(), chunks)

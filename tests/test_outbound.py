"""Claims about what leaves a site: the list in docs/privacy.md, and the bytes that a site really sends."""

import dataclasses
import datetime as dt
import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from client.site import Site, SiteFiles
from federation import flower, messages
from federation.messages import (
    EvaluateRequest,
    PrepareRequest,
    Refusal,
    Reply,
    SurveyRequest,
    TrainRequest,
    to_wire,
)
from federation.update import to_vector
from model.decoder import Decoder
from tests import tiny
from tokenizer.codebook import Codebook, Survey
from tokenizer.events import write_meds

LISTED = Path(__file__).parents[1] / "docs" / "privacy.md"
FAR = 1e12
SUBJECT = 987_654_000
VALUE = 424_242.125
CANARY = "ZEBRA"


def fields_of(answers: tuple[type, ...]) -> set[str]:
    return {f"{answer.__name__}.{field.name}" for answer in answers for field in dataclasses.fields(answer)}


def test_the_list_of_what_leaves_a_site_names_every_field_of_every_answer_and_nothing_else() -> None:
    listed = re.findall(r"^\| `(\w+\.\w+)` \|", LISTED.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == fields_of(Reply.__args__)


@pytest.fixture
def files(ram_path: Path) -> SiteFiles:
    """A site at which three patients, fewer than the floor of five, share a code and a value that nobody else has."""
    common = tiny.records(1, 40).with_columns(pl.col("subject_id") + SUBJECT)
    time = dt.datetime(2020, 6, 1)
    rows = [(SUBJECT + 100_000 + patient, time, f"{CANARY}//STRIPED", VALUE) for patient in range(3)]
    rare = pl.DataFrame(rows, schema=tiny.SCHEMA, orient="row")
    write_meds(ram_path / "data", [("0", pl.concat([common, rare]))], name="a site with a secret")
    return SiteFiles("icu", ram_path / "data", ram_path / "state")


def all_answers(site: Site) -> list[Reply]:
    plan = tiny.plan()
    survey = site.survey(SurveyRequest(plan.split, plan.tokenizer, FAR))
    codebook = Codebook.build(Survey.from_bytes(survey.survey))
    manifest = plan.manifest(codebook)
    ready = site.prepare(PrepareRequest(manifest.to_bytes(), codebook.to_bytes(), FAR))
    weights = to_vector(Decoder.create(manifest.model, manifest.seed))
    trained = site.train(TrainRequest(manifest.hash, 1, weights, FAR))
    scored = site.evaluate(EvaluateRequest(manifest.hash, 1, "tuning", weights, FAR))
    return [survey, ready, trained, scored]


def sent(answer: Reply) -> bytes:
    wire = to_wire(answer)
    return wire.header + b"".join(
        bytes(part) if isinstance(part, bytes) else part.tobytes() for part in wire.payloads.values()
    )


def secrets() -> list[bytes]:
    numbers = [str(SUBJECT + 100_000 + patient) for patient in range(40)]
    raw = [np.float32(VALUE).tobytes(), np.float64(VALUE).tobytes()]
    return [CANARY.encode(), str(VALUE).encode(), b"424242", *(number.encode() for number in numbers), *raw]


def test_no_identifier_no_rare_code_and_no_raw_value_is_in_what_a_site_sends(files: SiteFiles) -> None:
    for answer in all_answers(Site(files)):
        data = sent(answer)
        for secret in secrets():
            assert secret not in data, f"{answer.kind} tells {secret!r}"


def test_the_search_for_secrets_finds_them_where_they_are(files: SiteFiles) -> None:
    """The negative control: with a floor of one patient, the survey does tell the rare code."""
    plan = tiny.plan(tokenizer=dataclasses.replace(tiny.plan().tokenizer, min_patients=1))
    told = sent(Site(files).survey(SurveyRequest(plan.split, plan.tokenizer, FAR)))
    assert CANARY.encode() in told


def test_an_envelope_holds_the_listed_fields_and_nothing_else(files: SiteFiles) -> None:
    for answer in all_answers(Site(files)):
        wire = to_wire(answer)
        names = {*json.loads(wire.header), *wire.payloads} - {"kind", "version"}
        assert names == {field.name for field in dataclasses.fields(answer)}
        record = flower.to_record(answer)
        assert set(record) == {"header", "payloads"}
        assert set(record["header"]) == {"json"}
        assert set(record["payloads"]) == set(wire.payloads)


def test_a_refusal_does_not_tell_what_is_wrong_with_the_records(files: SiteFiles) -> None:
    shard = next(files.data.rglob("data/**/*.parquet"))
    shard.write_bytes(shard.read_bytes()[:200])
    plan = tiny.plan()
    request = SurveyRequest(plan.split, plan.tokenizer, FAR)
    flower.assume_identity()
    message = flower.request(flower.to_record(request), request.kind, 1, group="survey", ttl_s=60.0)
    flower.number_(message, "1")
    answer = flower.read(tiny.honest(files)(message) or message)
    assert isinstance(answer, Refusal)
    for secret in (str(files.data), shard.name, CANARY):
        assert secret not in answer.reason
    assert str(shard) in (files.state / "site.log").read_text()


def test_every_answer_is_one_of_the_listed_kinds() -> None:
    assert {answer.__name__ for answer in messages.Reply.__args__} == {
        "SurveyReply",
        "PrepareReply",
        "TrainReply",
        "EvaluateReply",
        "Refusal",
    }

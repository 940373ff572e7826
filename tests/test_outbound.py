"""Claims about what leaves a site: the list in docs/privacy.md, and the bytes that a site really sends."""

import dataclasses
import datetime as dt
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from flwr.app import Message as FlowerMessage
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from client.app import play
from client.audit import audit
from client.budget import State
from client.files import SiteFiles
from client.outbound import Entry, lines, read_entry, read_head
from client.site import Site
from federation import canonical, flower, masking, messages
from federation.accountant import epsilon
from federation.calls import CONTROL, ENROLMENT
from federation.messages import (
    EvaluateRequest,
    PrepareRequest,
    Refusal,
    Reply,
    Request,
    SurveyReply,
    SurveyRequest,
    TrainRequest,
    to_wire,
)
from federation.pki import Role
from federation.update import to_vector
from model.decoder import Decoder
from server.app import coordinate
from server.control import RULES
from simulation.engine import LocalGrid
from simulation.pool import Pool
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
    assert set(listed) == fields_of((*Reply.__args__, *masking.Reply.__args__)) | fields_of_control()


def fields_of_control() -> set[str]:
    """Every field of every message that a site may send over control, and of the one by which it joins."""
    sent = [ENROLMENT["Enrol"], *(call for name, call in CONTROL.items() if Role.SITE in RULES[name])]
    kinds = {call.request.DESCRIPTOR for call in sent}
    assert not [field.name for kind in kinds for field in kind.fields if field.message_type is not None]
    return {f"{kind.name}.{field.name}" for kind in kinds for field in kind.fields}


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
        "AssessReply",
        "Kept",
        "Lacking",
        "Refusal",
    }
    assert {answer.__name__ for answer in masking.Reply.__args__} == {"Keys", "Shares", "Masked", "Consent", "Opened"}


def delivered(files: SiteFiles, requests: list[Request]) -> list[FlowerMessage]:
    """Ask through the ClientApp that runs at real sites, and give the Flower messages that come back."""
    flower.assume_identity()
    node = tiny.honest(files)
    answers = []
    for number, request in enumerate(requests, 1):
        message = flower.request(flower.to_record(request), request.kind, 1, group="1", ttl_s=60.0)
        flower.number_(message, str(number))
        answer = node(message)
        assert answer is not None
        answers.append(answer)
    return answers


def all_requests(files: SiteFiles) -> list[Request]:
    plan = tiny.plan()
    elsewhere = Site(dataclasses.replace(files, state=files.state.with_name("elsewhere")))
    asked = SurveyRequest(plan.split, plan.tokenizer, FAR)
    codebook = Codebook.build(Survey.from_bytes(elsewhere.survey(asked).survey))
    manifest = plan.manifest(codebook)
    weights = to_vector(Decoder.create(manifest.model, manifest.seed))
    return [
        asked,
        PrepareRequest(manifest.to_bytes(), codebook.to_bytes(), FAR),
        TrainRequest(manifest.hash, 1, weights, FAR),
        TrainRequest(manifest.hash, 1, weights, FAR),
        EvaluateRequest(manifest.hash, 1, "tuning", weights, FAR),
        TrainRequest("0" * 64, 1, weights, FAR),
    ]


def wire_bytes(message: FlowerMessage) -> bytes:
    """All bytes of a message's content, as Flower cuts, names and sends them; equal objects are sent once."""
    objects = get_all_nested_objects(message.content)
    contents = {name: part.deflate() for name, part in objects.items()}
    for name, content in contents.items():
        assert hashlib.sha256(content).hexdigest() == name
    return b"".join(contents.values())


def entries_of(state: Path) -> list[Entry]:
    folder = state / "outbound"
    return [read_entry(line, place) for place, line in lines(folder, read_head(folder))]


def test_every_message_on_the_wire_is_on_the_list_with_its_bytes(files: SiteFiles) -> None:
    requests = all_requests(files)
    answers = delivered(files, requests)
    entries = entries_of(files.state)
    assert [entry.message.answers for entry in entries] == [request.kind for request in requests]
    for answer, entry in zip(answers, entries, strict=True):
        reply, listed = flower.read(answer), entry.message
        assert listed.kind == reply.kind
        assert listed.bytes == len(wire_bytes(answer))
        # The name of the whole is the sha256 of bytes that hold the names of all parts, each the sha256 of its bytes.
        assert listed.sha256 == hashlib.sha256(answer.content.deflate()).hexdigest()
        plain = {
            f.name for f in dataclasses.fields(reply) if not isinstance(getattr(reply, f.name), bytes | np.ndarray)
        }
        written = json.loads(canonical.encode({name: getattr(reply, name) for name in plain}))
        assert {name: listed.content[name] for name in plain} == written
        for name, part in to_wire(reply).payloads.items():
            data = part if isinstance(part, bytes) else part.tobytes()
            assert listed.content[name]["bytes"] == len(data)
            assert listed.content[name]["sha256"] == hashlib.sha256(data).hexdigest()
    assert audit(files.state).broken is None


def test_a_changed_byte_on_the_wire_is_not_the_one_on_the_list(files: SiteFiles) -> None:
    """The negative control of the test above."""
    (answer, *_) = delivered(files, all_requests(files)[2:3])
    (entry,) = entries_of(files.state)
    reply = flower.read(answer)
    assert isinstance(reply, Refusal)
    changed = flower.to_record(dataclasses.replace(reply, reason=reply.reason.replace("takes", "takez")))
    assert entry.message.sha256 != flower.on_the_wire(changed)[0]
    assert entry.message.bytes == flower.on_the_wire(changed)[1]


def test_a_survey_on_the_list_tells_how_much_it_tells(files: SiteFiles) -> None:
    (answer,) = delivered(files, all_requests(files)[:1])
    reply = flower.read(answer)
    assert isinstance(reply, SurveyReply)
    survey = Survey.from_bytes(reply.survey)
    (entry,) = entries_of(files.state)
    told = entry.message.content["survey"]
    assert (told["patients"], told["codes"], told["values"]) == (
        survey.patients,
        len(survey.codes),
        len(survey.values),
    )


def test_what_crosses_the_processes_of_the_engine_is_what_the_sites_wrote_down(ram_path: Path) -> None:
    sites = tiny.sites(ram_path, 2)
    received: dict[int, list[FlowerMessage]] = defaultdict(list)

    class Wire(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[FlowerMessage]:
            messages = list(super().pull_messages(message_ids))
            for message in messages:
                received[message.metadata.src_node_id].append(message)
            return messages

    with Pool(1) as pool:
        grid = Wire(lambda site, node, message: pool.submit(site.name, play, site, node, message), sites)
        coordinate(grid, ram_path / "run", tiny.plan(rounds=1), pause=grid.wait)
    assert sorted(received) == [1, 2]
    for node, site in enumerate(sites, 1):
        on_the_wire = [(message.content.object_id, len(wire_bytes(message))) for message in received[node]]
        written = [(entry.message.sha256, entry.message.bytes) for entry in entries_of(site.state)]
        assert on_the_wire == written
        assert len(written) == 4


def test_an_answer_that_can_not_be_written_down_does_not_leave(files: SiteFiles) -> None:
    requests = all_requests(files)
    delivered(files, requests[:2])
    (files.state / "outbound" / "head.json").write_bytes(b"{}")
    for answer in delivered(files, requests):
        reply = flower.read(answer)
        assert reply == Refusal(
            "icu", "This site can't write down what leaves (see its own log), so it gives no answer."
        )
    assert len(next((files.state / "outbound").glob("*.jsonl")).read_bytes().splitlines()) == 2
    assert "nothing may leave" not in json.dumps([str(flower.read(answer)) for answer in delivered(files, requests)])
    assert "head.json" in (files.state / "site.log").read_text()


def test_too_many_bytes_do_not_leave_but_the_refusal_does(files: SiteFiles, ram_path: Path) -> None:
    rules = 'version = 1\n[runs]\nmanifests = "any"\n[statistics]\nfloor = 5\n[traffic]\nmax_bytes_per_round = 2000\n'
    (ram_path / "policy.toml").write_text(rules)
    (answer,) = delivered(dataclasses.replace(files, policy=ram_path / "policy.toml"), all_requests(files)[:1])
    reply = flower.read(answer)
    assert isinstance(reply, Refusal)
    assert "traffic.max_bytes_per_round" in reply.reason
    (entry,) = entries_of(files.state)
    assert entry.message.kind == Refusal.kind
    assert entry.message.policy is not None


def test_a_private_survey_is_written_down_with_what_it_costs(files: SiteFiles, ram_path: Path) -> None:
    settings = ram_path / "settings.toml"
    settings.write_text("[survey_privacy]\nepsilon = 2.0\ndelta = 1e-6\n")
    private = dataclasses.replace(files, settings=str(settings))
    (answer,) = delivered(private, all_requests(files)[:1])
    assert isinstance(flower.read(answer), SurveyReply)
    with Site(private).gate.budget() as budget:
        (charge,) = budget.charges()
    assert charge.state == State.RELEASED
    (entry,) = entries_of(files.state)
    assert (entry.message.epsilon, entry.message.delta) == (epsilon(charge.release.mechanisms.all, 1e-6), 1e-6)
    assert entry.message.epsilon == pytest.approx(2.0, abs=1e-3)
    assert list(audit(files.state).epsilons.values()) == [1]

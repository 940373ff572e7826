import dataclasses
import errno
import os
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from client.app import app
from client.archive import Archive
from client.files import SiteFiles
from federation import flower
from federation.messages import PrepareRequest, Refusal, SurveyReply, SurveyRequest, TrainRequest
from tests import tiny
from tokenizer.codebook import Codebook, Survey, TokenizerOptions
from tokenizer.errors import DataError
from tokenizer.split import SplitRule

REQUEST = SurveyRequest(SplitRule("k"), TokenizerOptions(min_patients=5), 1e12)


def deliver(files: SiteFiles | None, message: Message) -> object:
    config = {} if files is None else files.node_config()
    return flower.read(app(message, Context(0, 7, config, RecordDict(), {})))


def address(request: SurveyRequest | PrepareRequest | TrainRequest) -> Message:
    flower.assume_identity()
    return flower.request(flower.to_record(request), request.kind, 7, group="1", ttl_s=60)


def test_a_request_is_answered(ram_path: Path) -> None:
    files = tiny.site(ram_path, "icu", 1)
    assert isinstance(deliver(files, address(REQUEST)), SurveyReply)


def test_a_corrupt_shard_is_named_at_the_site_and_only_there(ram_path: Path) -> None:
    files = tiny.site(ram_path, "icu", 1)
    (files.data / "data/train/0.parquet").write_bytes(b"PAR1 secret-subject-4711")
    answer = deliver(files, address(REQUEST))
    assert answer == Refusal("icu", "icu can't use its records or files; its own log says which and why.")
    log = (files.state / "site.log").read_text()
    assert "data/train/0.parquet" in log
    assert "query.survey" in log


@pytest.mark.parametrize("wrong", ["settings", "key"])
def test_what_is_wrong_with_a_site_s_own_files_is_told_at_the_site_and_only_there(ram_path: Path, wrong: str) -> None:
    files = tiny.site(ram_path, "icu", 1)
    path = ram_path / "settings.toml"
    path.write_text("[survey_privacy]\nepsilon = 2.0\ndelta = 1e-6\n")
    if wrong == "settings":
        path.write_text("[prepare]\nmaps = 4711\n")
    else:
        assert isinstance(deliver(files, address(REQUEST)), SurveyReply)
        path = files.state / "identity/site.key"
        path.chmod(0o644)
    files = dataclasses.replace(files, settings=str(ram_path / "settings.toml"))
    answer = deliver(files, address(REQUEST))
    assert isinstance(answer, Refusal)
    assert str(ram_path) not in answer.reason
    assert "4711" not in answer.reason
    assert "its own log" in answer.reason
    assert str(path) in (files.state / "site.log").read_text()
    assert f"an answer to query.survey could not be given: {files.state / 'site.log'} says why" in files.trouble()


def test_a_codebook_of_other_records_is_told_to_the_coordinator_too(ram_path: Path) -> None:
    files = tiny.site(ram_path, "icu", 1)
    told = deliver(files, address(REQUEST))
    assert isinstance(told, SurveyReply)
    codebook = Codebook.build(Survey.from_bytes(told.survey))
    manifest = tiny.plan(tokenizer=REQUEST.tokenizer, split=REQUEST.split).manifest(codebook)
    prepare = PrepareRequest(manifest.to_bytes(), codebook.to_bytes(), 1e12)
    answer = deliver(dataclasses.replace(files, settings="standard"), address(prepare))
    assert isinstance(answer, Refusal)
    assert "Use the federation's settings file" in answer.reason


def test_an_unexpected_error_travels_as_the_name_of_its_type(ram_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tiny.site(ram_path, "icu", 1)

    def fail(*_: object) -> None:
        raise RuntimeError("patient 4711 has a strange code")

    monkeypatch.setattr("client.site.survey", fail)
    answer = deliver(files, address(REQUEST))
    assert answer == Refusal("icu", "icu ran into an unexpected RuntimeError; its own log says more.")
    assert "patient 4711" in (files.state / "site.log").read_text()


def test_a_sites_own_log_does_not_grow_without_end(ram_path: Path) -> None:
    log, full = ram_path / "site.log", 10 << 20
    for number in range(11):
        Archive(ram_path).log("train", RuntimeError(f"error {number}"))
        os.truncate(log, full + number)  # a file of holes, which takes no room
    Archive(ram_path).log("train", RuntimeError("patient 4711 has a strange code"))
    assert "train\nRuntimeError: patient 4711" in log.read_text()
    older = [ram_path / f"site.log.{number}" for number in range(1, 10)]
    assert [path.stat().st_size - full for path in older] == [10, 9, 8, 7, 6, 5, 4, 3, 2]
    assert sorted(ram_path.iterdir()) == [log, *older]


def test_an_answer_without_room_is_noted_for_the_daemon_until_one_like_it_leaves(
    ram_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tiny.site(ram_path, "icu", 1)

    def fail(*_: object) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "state/survey")
        except OSError as problem:
            raise DataError("patient 4711 does not fit") from problem

    with monkeypatch.context() as broken:
        broken.setattr("client.site.survey", fail)
        answer = deliver(files, address(REQUEST))
    assert answer == Refusal("icu", "icu has no room left on its disk; it takes part again when there is.")
    told = "an answer to query.survey found too little room ([Errno 28] No space left on device: 'state/survey'); make"
    assert files.trouble().startswith(told)
    assert "4711" not in files.trouble()
    assert isinstance(deliver(files, address(REQUEST)), SurveyReply)
    assert files.trouble() == ""


def test_a_malformed_request_is_refused(ram_path: Path) -> None:
    files = tiny.site(ram_path, "icu", 1)
    flower.assume_identity()
    message = Message(RecordDict({"header": ConfigRecord(), "payloads": ArrayRecord()}), 7, "train")
    answer = deliver(files, message)
    assert isinstance(answer, Refusal)
    assert "one text named 'json'" in answer.reason


def test_a_request_that_came_as_another_kind_is_refused(ram_path: Path) -> None:
    files = tiny.site(ram_path, "icu", 1)
    answer = deliver(files, Message(flower.to_record(REQUEST), 7, "train"))
    assert isinstance(answer, Refusal)
    assert "came as train" in answer.reason
    reply = deliver(files, Message(flower.to_record(Refusal("x", "y")), 7, "train"))
    assert isinstance(reply, Refusal)
    assert "not a request" in reply.reason


def test_a_node_without_configuration_says_what_is_missing() -> None:
    answer = deliver(None, address(REQUEST))
    assert isinstance(answer, Refusal)
    assert answer.site == "node-7"
    assert "lacks 'name'" in answer.reason


def test_a_round_of_an_unknown_run_is_refused(ram_path: Path) -> None:
    files = tiny.site(ram_path, "icu", 1)
    answer = deliver(files, address(TrainRequest("0" * 64, 1, np.zeros(2, np.float32), 1e12)))
    assert isinstance(answer, Refusal)
    assert "takes no part in run" in answer.reason

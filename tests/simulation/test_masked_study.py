"""A study trains under masks from end to end, in worker processes, one of which dies in the middle of a sum."""

from pathlib import Path

import pytest

from server.journal import Journal
from server.rounds import Event
from simulation.config import read
from simulation.engine import run_federation
from simulation.findings import report_of
from simulation.pool import Pool
from simulation.study import run_study
from tests import masked, tiny
from tests.simulation import studies
from tokenizer.errors import ConfigError


def test_a_study_sums_its_federated_arm_under_masks_and_reports_what_only_sums_tell(ram_path: Path) -> None:
    summing = {"max_weight": 4096, "clip": 0.5}
    study = studies.study(tiny.sites(ram_path, 3), secure_aggregation=summing, arms=["federated"])
    result = run_study(study, ram_path / "study", workers=2)
    (arm,) = result.arms
    assert arm.outcome is not None
    chosen = arm.outcome.manifest.secure_aggregation
    assert chosen is not None
    assert (chosen.masking.threshold, chosen.min_sites, len(chosen.roster)) == (3, 3, 3)
    with Journal(arm.folder / "ledger.sqlite") as journal:
        entries = journal.sums("train")
        replies = [reply for number in (1, 2) for reply in journal.replies(number)]
        assert {entry.counts for entry in journal.sites()} == {'{"fallbacks":0,"splits":{}}'}
    assert [entry.sites for entry in entries] == ["site-0,site-1,site-2"] * 2
    assert {(r.tokens, r.loss, r.norm, r.update_sha256) for r in replies} == {(0, 0.0, 0.0, "")}
    report = report_of(result, "fedcomet simulate")
    assert "sees sums over 3 sites or more" in dict(report.settings)["Privacy"]
    assert [one.tokens for one in report.rounds] == [entry.tokens for entry in entries]
    assert all(one.accepted == 3 and one.loss is not None for one in report.rounds)
    assert report.training[0].tokens == sum(entry.tokens for entry in entries)
    assert [site.patients for site in report.sites] == [40, 40, 40]
    updates = [row for row in report.outbound if "under masks" in row.what]
    size = 4 * arm.outcome.manifest.model.parameters()
    assert {(row.messages, row.bytes_sent) for row in updates} == {(2, 2 * size)}


def test_a_worker_that_dies_in_the_middle_of_a_sum_does_not_stop_the_round(ram_path: Path) -> None:
    files = tiny.sites(ram_path, 4)
    killed: list[int] = []
    with Pool(1) as pool:

        def watch(event: Event) -> None:
            if event.text == "query.masked" and not killed:
                killed.extend(pool.pids())
                for pid in killed:
                    tiny.kill(pid)

        plan = masked.plan(files, rounds=1, evaluate_every=0)
        run_federation(plan, files, ram_path / "run", pool, watch)
    assert killed
    with Journal(ram_path / "run/ledger.sqlite") as journal:
        entry = journal.sum(1, "train")
        assert journal.committed() == 1
    assert entry is not None
    assert len(entry.sites.split(",")) >= 3


@pytest.mark.parametrize("privacy", ["", "[privacy]\nsampling_rate = 0.1\nepsilon = 4.0\n"])
def test_the_greatest_weight_must_be_told_where_it_does_not_follow(tmp_path: Path, privacy: str) -> None:
    text = (Path(__file__).parents[2] / "examples/demo.toml").read_text()
    path = tmp_path / "study.toml"
    path.write_text(f"{text}\n{privacy}[secure_aggregation]\n")
    if privacy or "local_epochs" in text:
        with pytest.raises(ConfigError, match=r"secure_aggregation.max_weight is missing"):
            read(path)
    path.write_text(f"{text}\n{privacy}[secure_aggregation]\nmax_weight = 100000\n")
    assert read(path).secure_aggregation is not None

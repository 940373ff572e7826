import json
from typing import Any

import pytest

from federation.manifest import LocalWork
from server.plan import FederationPlan, PrivacyPlan
from tests import tiny
from tokenizer.codebook import Codebook, Survey, TokenizerOptions
from tokenizer.errors import ConfigError

CODEBOOK = Codebook.build(Survey(TokenizerOptions(min_patients=5)))


def test_a_plan_survives_with_its_codebook() -> None:
    plan = tiny.plan(codebook=CODEBOOK.to_bytes(), max_norm=2.0, purposes=("death in 30 days",))
    assert FederationPlan.from_bytes(plan.to_bytes(), CODEBOOK.to_bytes()) == plan
    assert len(plan.to_bytes()) < len(CODEBOOK.to_bytes())
    with pytest.raises(ConfigError, match="names the codebook"):
        FederationPlan.from_bytes(plan.to_bytes())


def test_missing_settings_have_defaults() -> None:
    data = {"name": "a", "rounds": 1, "split": {"key": "k"}, "local": {"steps": 5}}
    assert FederationPlan.from_bytes(json.dumps(data).encode()).model == "1m"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"{", "not JSON"),
        (b"[]", "an object is expected"),
        (b'{"nme": "a"}', "unknown field 'nme'"),
        (b'{"name": "a"}', "lacks the field"),
    ],
)
def test_a_plan_that_can_not_be_read_says_why(data: bytes, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        FederationPlan.from_bytes(data)


@pytest.mark.parametrize(
    "changes",
    [{"rounds": 0}, {"min_sites": 0}, {"deadline_s": 0.0}, {"name": ""}, {"max_norm": 0.0}, {"evaluate_every": -1}],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        tiny.plan(**changes)


def test_the_manifest_has_the_codebooks_size_and_the_presets_shape() -> None:
    manifest = tiny.plan(model="0.3m", context=128, dropout=0.1).manifest(CODEBOOK)
    assert manifest.model.vocab == len(CODEBOOK)
    assert (manifest.model.context, manifest.model.dropout) == (128, 0.1)


def test_a_plan_that_does_not_fit_its_codebook_is_refused() -> None:
    with pytest.raises(ConfigError, match="options"):
        tiny.plan(tokenizer=TokenizerOptions(value_bins=5)).manifest(CODEBOOK)
    with pytest.raises(ConfigError, match="no model preset"):
        tiny.plan(model="7b").manifest(CODEBOOK)
    with pytest.raises(ConfigError, match="batch_tokens"):
        tiny.plan(local=LocalWork(steps=1, batch_tokens=8)).manifest(CODEBOOK)


def test_what_no_codebook_would_fit_is_refused_without_one() -> None:
    shared = PrivacyPlan(noise_multiplier=2.0, mechanism="distributed", honest_sites=2)
    for changes, told in (
        ({"model": "7b"}, "no model preset"),
        ({"local": LocalWork(steps=1, batch_tokens=8)}, "batch_tokens"),
        ({"privacy": shared}, "secure_aggregation|secure aggregation"),
    ):
        with pytest.raises(ConfigError, match=told):
            tiny.plan(**changes).check()
    tiny.plan(privacy=PrivacyPlan(sampling_rate=0.5, noise_multiplier=1.0)).check()

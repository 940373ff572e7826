import dataclasses
import json
from typing import Any

import pytest

from federation import canonical
from federation.fixed_point import Total
from federation.manifest import LocalWork, Manifest, OuterOptions, Privacy, SecureAggregation
from federation.masking import MaskingOptions
from federation.messages import ProtocolError
from tests import tiny
from tests.sums import agreement
from tokenizer.codebook import Codebook, Survey, TokenizerOptions
from tokenizer.errors import ConfigError

MANIFEST = tiny.plan(tokenizer=TokenizerOptions()).manifest(Codebook.build(Survey(TokenizerOptions())))


def with_field(**fields: Any) -> bytes:
    return canonical.encode({**json.loads(MANIFEST.to_bytes()), **fields})


def test_a_manifest_survives_and_its_hash_names_it() -> None:
    again = Manifest.from_bytes(MANIFEST.to_bytes())
    assert again == MANIFEST
    assert again.hash == MANIFEST.hash
    assert dataclasses.replace(MANIFEST, name="another").hash != MANIFEST.hash


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (with_field(surprise=1), "unknown field 'surprise'"),
        (with_field(version=2), "version 2; this software knows version 1"),
        (with_field(rounds="ten"), "rounds is 'ten'"),
        (with_field(local={"steps": 1, "epochs": 1}), "either steps or epochs"),
        (with_field(outer={"name": "lamb"}), "'fedavg', 'nesterov'"),
        (b"{}", "lacks the field"),
        (MANIFEST.to_bytes() + b" ", "canonical"),
    ],
)
def test_what_this_software_does_not_know_is_refused_by_name(data: bytes, told: str) -> None:
    with pytest.raises(ProtocolError, match=told):
        Manifest.from_bytes(data)


@pytest.mark.parametrize(
    "settings",
    [{"steps": 0}, {}, {"steps": 1, "epochs": 1}, {"epochs": 1, "batch_tokens": 0}, {"steps": 1, "warmup_share": 1.0}],
)
def test_local_work_that_makes_no_sense_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        LocalWork(**settings)


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"momentum": 0.9}, {"name": "nesterov", "momentum": 1.0}])
def test_outer_options_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        OuterOptions(**settings)


PRIVATE = Privacy("dp-sgd", epsilon=2, delta=1e-6, clip=1, noise_multiplier=1, sampling_rate=0.01)
MASKED = SecureAggregation(5, MaskingOptions(threshold=4, clip=1, max_weight=100), agreement(5, 4).roster)


def test_privacy_and_secure_aggregation_are_part_of_the_agreement() -> None:
    protected = dataclasses.replace(MANIFEST, privacy=PRIVATE, secure_aggregation=MASKED)
    assert Manifest.from_bytes(protected.to_bytes()) == protected
    assert protected.hash != MANIFEST.hash
    with pytest.raises(ProtocolError, match=r"privacy has the unknown field 'budget'"):
        Manifest.from_bytes(with_field(privacy={**dataclasses.asdict(PRIVATE), "budget": 1}))


@pytest.mark.parametrize(
    "wrong", [{"epsilon": 0}, {"delta": 1}, {"clip": 0}, {"noise_multiplier": 0}, {"sampling_rate": 2}]
)
def test_privacy_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        dataclasses.replace(PRIVATE, **wrong)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"min_sites": 3}, "threshold must be at least 2, and min_sites at most"),
        ({"min_sites": 6}, "the roster has 5 sites"),
        ({"roster": dict.fromkeys("abcde", f"ed25519:{7:064x}")}, "the same identity key"),
        ({"roster": {name: key.removeprefix("ed25519:") for name, key in MASKED.roster.items()}}, "fedcomet site key"),
        ({"masking": MaskingOptions(3, 1, 100, totals=(Total("steps", 9),))}, "they follow from the run"),
        ({"masking": MaskingOptions(2, 1, 100)}, "must be from 3 to 5"),
    ],
)
def test_secure_aggregation_that_makes_no_sense_is_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        dataclasses.replace(MASKED, **wrong)


@pytest.mark.parametrize("wrong", [{"name": "a\x1b[2Jb"}, {"name": "two\nlines"}, {"purposes": ("a\rb",)}])
def test_what_people_read_of_a_manifest_is_printable(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="printable"):
        dataclasses.replace(MANIFEST, **wrong)

"""What a site allows: `policy.toml`, which only the site's own, installed code reads, and the rules that it sets.

The file's path comes from the site's own configuration; nothing that a coordinator sends can name another or change a
rule. A site that has one answers nothing that breaks it, and says which rules are broken. What a rule means, and a
template with strict values, stands in docs/site-policy.md.
"""

import hashlib
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from client.budget import Limit
from client.hours import Hours
from federation import masking, protection
from federation.accountant import Mechanism, epsilon
from federation.identity import is_public_key
from federation.manifest import Manifest
from federation.messages import (
    AssessRequest,
    EvaluateRequest,
    PrepareRequest,
    Request,
    SiteRefusal,
    SurveyRequest,
    TrainRequest,
)
from federation.summed import update_bytes
from tokenizer.errors import ConfigError
from tokenizer.noisy_survey import SurveyPrivacy
from tokenizer.settings import explain

TEMPLATE = Path(__file__).parent / "templates" / "policy.toml"
"""A strict policy with a word on every rule."""

UNUSABLE = "unusable"
"""Stands in the place of a policy's sha256 where it can't be read."""

_HASH = r"[0-9a-f]{64}"
_Tuple = BeforeValidator(lambda given: tuple(given) if isinstance(given, list) else given)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Runs(_Section):
    """Whose runs: coordinators' public keys (empty: anybody's), software versions, and which manifests.

    `manifests` is "ask" (each one must be approved by `fedcomet site approve`), "any", or a list of manifest hashes.
    """

    coordinators: Annotated[tuple[str, ...], _Tuple] = ()
    software: Annotated[tuple[str, ...] | None, _Tuple] = None
    manifests: Literal["ask", "any"] | Annotated[tuple[Annotated[str, Field(pattern=_HASH)], ...], _Tuple] = "ask"

    @field_validator("coordinators")
    @classmethod
    def _keys(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for key in given:
            if not is_public_key(key):
                raise ValueError(f"{key!r} is not a public key; write ed25519: and 64 hexadecimal digits")
        return given


class _Tasks(_Section):
    """What may be asked: `allowed` requests, and questions that the model may be made for (None: any)."""

    allowed: Annotated[
        tuple[Literal["survey", "train", "evaluate tuning", "evaluate held_out", "evaluate tasks"], ...], _Tuple
    ] = (
        "survey",
        "train",
        "evaluate tuning",
        "evaluate held_out",
        "evaluate tasks",
    )
    purposes: Annotated[tuple[str, ...] | None, _Tuple] = None


class _Privacy(_Section):
    """Differential privacy: whether training and surveys must have it, and the most that a patient may be charged.

    The totals are the limit of the site's budget (`client.budget`); they are given together or not at all.
    `colluding_sites` is the least number of other sites that noise shared out over the sites must withstand.
    """

    training: Literal["required", "optional"] = "required"
    survey: Literal["required", "optional"] = "optional"
    epsilon_per_run: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    delta_per_run: float | None = Field(default=None, gt=0, lt=1)
    epsilon_total: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    delta_total: float | None = Field(default=None, gt=0, lt=1)
    colluding_sites: int = Field(default=1, ge=0)

    @model_validator(mode="after")
    def _both(self) -> "_Privacy":
        if (self.epsilon_total is None) != (self.delta_total is None):
            raise ValueError("epsilon_total and delta_total are one limit: give both, or neither")
        return self


class _Statistics(_Section):
    """Fewest patients: at the site that train, and behind any figure that leaves (of a survey, split or evaluation)."""

    min_patients: int = Field(default=1, ge=1)
    floor: int = Field(default=10, ge=1)


class _SecureAggregation(_Section):
    """Whether sums must be masked, and among how many sites at least."""

    required: bool = True
    min_sites: int = Field(default=3, ge=2)
    min_threshold: int = Field(default=2, ge=2)

    @model_validator(mode="after")
    def _fits(self) -> "_SecureAggregation":
        if self.min_threshold > self.min_sites:
            raise ValueError("min_threshold must not be above min_sites")
        return self


class _Work(_Section):
    """The most work of a run: None is as much as is asked."""

    max_rounds: int | None = Field(default=None, ge=1)
    max_steps_per_round: int | None = Field(default=None, ge=1)
    max_epochs_per_round: float | None = Field(default=None, gt=0)
    max_batch_tokens: int | None = Field(default=None, ge=1)
    max_parameters: int | None = Field(default=None, ge=1)
    optimizers: Annotated[tuple[Literal["adamw", "muon", "sgd"], ...], _Tuple] = ("adamw", "muon", "sgd")


class _Machine(_Section):
    """When and how hard the site's machines work: opening hours, devices, the share of a device's time."""

    hours: Annotated[tuple[str, ...], _Tuple] = ()
    devices: Annotated[tuple[str, ...] | None, _Tuple] = None
    share_of_time: float = Field(default=1.0, gt=0, le=1)

    @field_validator("hours")
    @classmethod
    def _spans(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        Hours(given)
        return given


class _Traffic(_Section):
    """The most bytes that may leave, with one answer of a round and within 24 hours; None is any number."""

    max_bytes_per_round: int | None = Field(default=None, ge=1)
    max_bytes_per_day: int | None = Field(default=None, ge=1)


@dataclass(frozen=True)
class Broken:
    """A rule that something breaks: its key in the policy, what is wrong, and figures that only the site sees."""

    rule: str
    told: str
    figures: str = ""

    def __str__(self) -> str:
        return f"{self.rule}: {self.told}"


class PolicyRefusal(SiteRefusal):
    """The site's policy forbids it; `broken` names every broken rule."""

    def __init__(self, site: str, broken: list[Broken]) -> None:
        self.broken = tuple(broken)
        super().__init__(f"The policy of {site} forbids it: {'; '.join(map(str, broken))}.")
        for each in broken:
            if each.figures:
                self.add_note(f"{each.rule}: {each.figures}")  # for the site's log; notes don't travel


class Policy(_Section):
    """All rules of a site; every table may be left out."""

    version: Literal[1]
    runs: _Runs = _Runs()
    tasks: _Tasks = _Tasks()
    privacy: _Privacy = _Privacy()
    statistics: _Statistics = _Statistics()
    secure_aggregation: _SecureAggregation = _SecureAggregation()
    work: _Work = _Work()
    machine: _Machine = _Machine()
    traffic: _Traffic = _Traffic()

    @classmethod
    def read(cls, path: Path) -> "Policy":
        """Read a policy.

        Raises:
            ConfigError: it can't be read, or a key or value is wrong; all of them are named.
        """
        try:
            data = path.read_bytes()
            return cls.model_validate(tomllib.loads(data.decode()))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
            raise ConfigError(f"{path}: can't be read ({problem}).") from None
        except ValidationError as problem:
            raise ConfigError(f"{path}: {explain(problem, cls)}") from None

    @cached_property
    def sha256(self) -> str:
        """Names the rules, whatever comments stand around them."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def limit(self) -> Limit | None:
        """The most that the site's budget allows for all private releases together; None if the policy sets none."""
        if self.privacy.epsilon_total is None or self.privacy.delta_total is None:
            return None
        return Limit(self.privacy.epsilon_total, self.privacy.delta_total)

    def check_request(self, request: Request | masking.Request, coordinator: str | None, now: datetime) -> list[Broken]:
        """Name the rules that a request breaks by itself, whatever run it belongs to.

        Args:
            request: what is asked.
            coordinator: the public key of whoever signed it; None if nobody did.
            now: the site's local time.
        """
        return [*self._wrong_sender(coordinator), *self._wrong_task(request), *self.check_time(now)]

    def check_time(self, now: datetime) -> list[Broken]:
        """Name the rule that work at a local time breaks."""
        hours = Hours(self.machine.hours)
        if not self.machine.hours or hours.open_at(now):
            return []
        opens = hours.opens_after(now)
        return [Broken("machine.hours", f"the site works at {hours}; ask again from {opens:%Y-%m-%d %H:%M} on")]

    def check(self, manifest: Manifest, *, device: str = "cpu") -> list[Broken]:
        """Name the rules that a run breaks, as far as its manifest tells; no data is touched.

        Args:
            manifest: the run.
            device: the torch device that the site would train on.
        """
        return [
            *self._wrong_run(manifest),
            *self._wrong_privacy(manifest),
            *self._wrong_sum(manifest),
            *self._wrong_work(manifest),
            *self._wrong_machine(manifest, device),
        ]

    def check_total(self, manifest: Manifest, before: Sequence[Mechanism]) -> list[Broken]:
        """Name the rule that a run as a whole breaks, together with what was released before.

        Args:
            manifest: the run.
            before: what the site's ledger holds but for this run.
        """
        if (limit := self.limit) is None or manifest.privacy is None:
            return []
        cost = epsilon([*before, *protection.of_run(manifest).all], limit.delta)
        if cost <= limit.epsilon:
            return []
        return [
            Broken(
                "privacy.epsilon_total",
                "with the whole run, patients would be charged more than this site allows",
                f"epsilon would be {cost:.4f} at delta {limit.delta:g}, {limit.epsilon:g} is allowed, and "
                f"{epsilon(before, limit.delta):.4f} is spent or reserved",
            )
        ]

    def check_patients(self, patients: int) -> list[Broken]:
        """Name the rule that a site with so many patients breaks."""
        least = self.statistics.min_patients
        return (
            [] if patients >= least else [Broken("statistics.min_patients", f"fewer than {least:,} patients are here")]
        )

    def check_figure(self, patients: int) -> list[Broken]:
        """Name the rule that a figure on so many patients breaks; it doesn't say how many they are."""
        floor = self.statistics.floor
        return (
            [] if patients >= floor else [Broken("statistics.floor", f"it would tell of fewer than {floor} patients")]
        )

    def check_steps(self, steps: int) -> list[Broken]:
        """Name the rule that a round of so many steps breaks, where the manifest tells only passes."""
        return [*_above("work.max_steps_per_round", "steps of a round", steps, self.work.max_steps_per_round)]

    def check_bytes(self, count: int) -> list[Broken]:
        """Name the rule that an answer of so many bytes breaks."""
        return [*_above("traffic.max_bytes_per_round", "an answer's bytes", count, self.traffic.max_bytes_per_round)]

    def check_day(self, sent: int, more: int) -> list[Broken]:
        """Name the rule that so many bytes more than were sent within 24 hours break."""
        most = self.traffic.max_bytes_per_day
        return [*_above("traffic.max_bytes_per_day", "bytes within 24 hours", sent + more, most)]

    def _wrong_sender(self, coordinator: str | None) -> Iterator[Broken]:
        allowed = self.runs.coordinators
        if allowed and coordinator not in allowed:
            told = "the request is not signed" if coordinator is None else f"{coordinator} signed the request"
            yield Broken("runs.coordinators", f"{told}; it must be signed with an allowed key")

    def _wrong_task(self, request: Request | masking.Request) -> Iterator[Broken]:
        task = _task(request)
        if task is not None and task not in self.tasks.allowed:
            yield Broken("tasks.allowed", f"{task!r} is not among them")
        if isinstance(request, SurveyRequest):
            yield from self._wrong_floor(request.tokenizer.min_patients)

    def _wrong_floor(self, floor: int) -> Iterator[Broken]:
        yield from _below("statistics.floor", "tokenizer.min_patients", floor, self.statistics.floor)

    def _wrong_run(self, manifest: Manifest) -> Iterator[Broken]:
        runs = self.runs
        if runs.software is not None and manifest.software not in runs.software:
            yield Broken("runs.software", f"the run is for version {manifest.software!r}, which is not listed")
        if isinstance(runs.manifests, tuple) and manifest.hash not in runs.manifests:
            yield Broken("runs.manifests", f"the manifest {manifest.hash} is not listed")
        if self.tasks.purposes is not None:
            asked = () if manifest.tasks is None else tuple(task.name for task in manifest.tasks.tasks)
            for purpose in dict.fromkeys((*manifest.purposes, *asked)):
                if purpose not in self.tasks.purposes:
                    yield Broken("tasks.purposes", f"{purpose!r} is not among them")
        yield from self._wrong_floor(manifest.tokenizer.min_patients)
        if manifest.tasks is not None and not manifest.tasks.form.noise:
            yield from _below("statistics.floor", "tasks.form.floor", manifest.tasks.form.floor, self.statistics.floor)

    def _wrong_privacy(self, manifest: Manifest) -> Iterator[Broken]:
        rules, asked = self.privacy, manifest.privacy
        if asked is None:
            if rules.training == "required":
                yield Broken("privacy.training", "the run has no differential privacy")
            return
        yield from _above("privacy.epsilon_per_run", "the run's ε", asked.epsilon, rules.epsilon_per_run)
        yield from _above("privacy.delta_per_run", "the run's δ", asked.delta, rules.delta_per_run)
        if (colluding := protection.colluding_sites(manifest)) is not None:
            what = "sites that its shared noise withstands beside the coordinator"
            yield from _below("privacy.colluding_sites", what, colluding, rules.colluding_sites)

    def check_survey(self, privacy: SurveyPrivacy | None) -> list[Broken]:
        """Name the rule that the site's survey breaks, by its privacy (None: none); the budget looks at its cost."""
        if privacy is not None or self.privacy.survey != "required":
            return []
        return [Broken("privacy.survey", "the site's settings hold no [survey_privacy]")]

    def _wrong_sum(self, manifest: Manifest) -> Iterator[Broken]:
        rules, asked = self.secure_aggregation, manifest.secure_aggregation
        if asked is None:
            if rules.required:
                yield Broken("secure_aggregation.required", "the run sums updates in clear")
            return
        yield from _below("secure_aggregation.min_sites", "min_sites", asked.min_sites, rules.min_sites)
        yield from _below("secure_aggregation.min_threshold", "threshold", asked.masking.threshold, rules.min_threshold)

    def _wrong_work(self, manifest: Manifest) -> Iterator[Broken]:
        rules, local = self.work, manifest.local
        parameters = manifest.model.parameters()
        yield from _above("work.max_rounds", "rounds", manifest.rounds, rules.max_rounds)
        yield from _above("work.max_steps_per_round", "local.steps", local.steps, rules.max_steps_per_round)
        yield from _above("work.max_epochs_per_round", "local.epochs", local.epochs, rules.max_epochs_per_round)
        yield from _above("work.max_batch_tokens", "local.batch_tokens", local.batch_tokens, rules.max_batch_tokens)
        yield from _above("work.max_parameters", "the model's parameters", parameters, rules.max_parameters)
        if manifest.train.optimizer not in rules.optimizers:
            yield Broken("work.optimizers", f"{manifest.train.optimizer!r} is not among them")
        update = update_bytes(manifest)
        yield from _above("traffic.max_bytes_per_round", "an update's bytes", update, self.traffic.max_bytes_per_round)

    def _wrong_machine(self, manifest: Manifest, device: str) -> Iterator[Broken]:
        if self.machine.devices is not None and device not in self.machine.devices:
            yield Broken("machine.devices", f"this site is set up to train on {device!r}, which is not listed")


def _task(request: Request | masking.Request) -> str | None:
    match request:
        case SurveyRequest():
            return "survey"
        case TrainRequest():
            return "train"
        case EvaluateRequest():
            return f"evaluate {request.split}"
        case AssessRequest():
            return "evaluate tasks"
        case PrepareRequest():
            return None
        case _:
            return request.place.purpose


def _above(rule: str, what: str, asked: Any, most: Any) -> Iterator[Broken]:
    if most is not None and asked is not None and asked > most:
        yield Broken(rule, f"{what} would be {asked:.6g}, {most:.6g} is allowed" if isinstance(asked, float) else
                     f"{what} would be {asked:,}, {most:,} is allowed")  # fmt: skip


def _below(rule: str, what: str, asked: int, least: int) -> Iterator[Broken]:
    if asked < least:
        yield Broken(rule, f"{what} would be {asked:,}, at least {least:,} is demanded")

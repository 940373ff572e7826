"""One TOML file says what a study is: records, sites, tokens, model, rounds, questions.

Read once, at the edge; everything below gets plain typed values. Every key that is unknown and every value that is out
of range is named with its place in the file, all of them at once, so that one reading mends the file.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, Field, PlainSerializer, PlainValidator, ValidationError, model_validator

from model.settings import DecoderConfig
from model.task_files import tasks_of
from model.tasks import Task, parse
from simulation import toml_file
from simulation.toml_file import Section
from tokenizer.errors import ConfigError

_Share = Annotated[float, Field(ge=0.0, lt=1.0)]
_Positive = Annotated[int, Field(ge=1)]


class Partition(Section):
    """How one dataset becomes sites.

    `code`: one site per value of the first prefix in `prefixes` that the dataset has; groups smaller than
    `min_patients` are put together. `iid`: `sites` equal shares at random. `dirichlet`: shares of each value of the
    prefix drawn from Dirichlet(`alpha`). `column`: one site per value of an extra column of the MEDS files.
    `chapters`: as `dirichlet`, by the ICD-10-CM chapter that a patient has most codes of (codes under `prefixes`).
    `quantity`: sites of sizes drawn from Dirichlet(`alpha`), patients at random. `time`: `sites` equal shares in the
    order of patients' first events. `system`: one site per prefix in `prefixes`, by that which most of a patient's
    codes are under.
    """

    by: Literal["code", "iid", "dirichlet", "column", "chapters", "quantity", "time", "system"]
    prefixes: tuple[str, ...] = ()
    column: str | None = None
    sites: Annotated[int, Field(ge=2)] | None = None
    alpha: Annotated[float, Field(gt=0.0)] = 0.5
    min_patients: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.by in ("code", "dirichlet", "chapters", "system") and not self.prefixes:
            raise ValueError(f'by = "{self.by}" needs prefixes = ["..."]')
        if self.by in ("iid", "dirichlet", "chapters", "quantity", "time") and self.sites is None:
            raise ValueError(f'by = "{self.by}" needs sites = N')
        if self.by == "column" and not self.column:
            raise ValueError('by = "column" needs column = "..."')
        return self


class Data(Section):
    """Where the records come from.

    `synthetic` makes hospitals up, with known risks (and, with a `partition`, splits their patients anew); `meds`
    splits one MEDS dataset into sites; `sites` takes one MEDS dataset for each site as it is.
    """

    kind: Literal["synthetic", "meds", "sites"]
    hospitals: tuple[str, ...] = ()
    patients: _Positive = 800
    path: Path | None = None
    partition: Partition | None = None
    sites: dict[str, Path] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.kind == "meds" and self.partition is None:
            raise ValueError('kind = "meds" needs a [data.partition] table')
        if self.kind == "sites" and not self.sites:
            raise ValueError('kind = "sites" needs a [data.sites] table: name = "path of a MEDS dataset"')
        return self


class Split(Section):
    """Shares of patients kept for tuning and held out, by a keyed hash of the subject id."""

    key: str = "fedcomet"
    tuning: _Share = 0.1
    held_out: _Share = 0.2

    @model_validator(mode="after")
    def _room_to_train(self) -> Self:
        if self.tuning + self.held_out >= 1.0:
            raise ValueError("tuning + held_out must leave patients to train on")
        return self


class Tokenizer(Section):
    """What one event becomes; see tokenizer/codebook.py."""

    values: Literal["separate", "fused"] = "separate"
    value_bins: Annotated[int, Field(ge=2, le=100)] = 10
    min_patients: Annotated[int, Field(ge=2)] = 10
    intervals: Literal["comet13", "ethos19"] = "comet13"
    icd10cm_split: tuple[_Positive, ...] = (3, 3)
    atc_split: tuple[_Positive, ...] = (3, 1)
    icd10pcs_split: tuple[_Positive, ...] = ()


class Model(Section):
    """The decoder: a preset by its size, or a shape of its own (`layers`, `width`, `heads`, `ff`); context, dropout."""

    preset: str = "0.3m"
    context: Annotated[int, Field(ge=16)] = 1024
    dropout: _Share = 0.0
    layers: _Positive | None = None
    width: _Positive | None = None
    heads: _Positive | None = None
    ff: _Positive | None = None

    @model_validator(mode="after")
    def _whole_shape(self) -> Self:
        given = [value is not None for value in (self.layers, self.width, self.heads, self.ff)]
        if any(given) and not all(given):
            raise ValueError("layers, width, heads and ff belong together: give all of them, or a preset")
        return self

    def shape(self) -> str | DecoderConfig:
        """Give the preset's name, or the shape, whose vocabulary is set by the codebook."""
        if self.layers and self.width and self.heads and self.ff:
            return DecoderConfig(
                8, self.layers, self.width, self.heads, self.heads, self.ff, context=self.context, dropout=self.dropout
            )
        return self.preset


class Training(Section):
    """Rounds and the local work in each: either `local_epochs` (0.25: a quarter of a pass) or `local_steps`.

    In the federated arm, `sites_per_round` sites are drawn for each round (all if left out), no site's weight is more
    than `max_share` of all, and updates, cut to `clip_norm`, become one by `outer_rule`, which bears `byzantine`
    hostile or broken sites; `proximal` is FedProx's μ, and `correct_drift` corrects every step as SCAFFOLD does (which
    needs `optimizer = "sgd"`, `local_steps` and `weights = "uniform"`); see docs/rounds.md.

    With `own_head` the output layer (with tied embeddings: these) stays at each site of the federated arm
    (client/heads.py). The federation's model is then none without a site's head: losses can be compared, each site's
    with its own head after the last round, the only one that is evaluated; questions can't be put to it.

    In the arm "personal" every site goes on alone from the federation's best model, for `personal_rounds` at
    `personal_learning_rate` (a tenth of `learning_rate` if left out), and ends with the best round on its own tuning
    patients; that may be the federation's model as it is.

    Every `evaluate_every` rounds, and after the last, the loss of the tuning patients is measured; an arm ends with the
    best of these rounds.
    """

    rounds: _Positive
    local_epochs: Annotated[float, Field(gt=0.0)] | None = None
    local_steps: _Positive | None = None
    batch_tokens: _Positive = 8192
    windows_per_patient: _Positive | None = None
    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0.0)] = 3e-3
    min_learning_rate_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    warmup_share: _Share = 0.03
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    clip: Annotated[float, Field(gt=0.0)] = 1.0
    optimizer_state: Literal["keep", "reset"] = "keep"
    proximal: Annotated[float, Field(ge=0.0)] = 0.0
    correct_drift: bool = False
    own_head: bool = False
    outer: Literal["fedavg", "nesterov", "adam", "yogi"] = "fedavg"
    outer_learning_rate: Annotated[float, Field(gt=0.0)] | None = None
    outer_momentum: _Share = 0.9
    outer_second: _Share = 0.99
    outer_floor: Annotated[float, Field(gt=0.0)] = 1e-3
    weights: Literal["tokens", "uniform"] = "tokens"
    outer_rule: Literal["mean", "median", "trimmed_mean", "krum"] = "mean"
    byzantine: Annotated[int, Field(ge=0)] = 0
    clip_norm: Annotated[float, Field(gt=0.0)] | None = None
    max_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    min_sites: _Positive = 1
    sites_per_round: _Positive | None = None
    personal_rounds: _Positive = 1
    personal_learning_rate: Annotated[float, Field(gt=0.0)] | None = None
    evaluate_every: _Positive = 1
    round_deadline_minutes: Annotated[float, Field(gt=0.0)] = 120.0

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if (self.local_epochs is None) == (self.local_steps is None):
            raise ValueError("give exactly one of local_epochs and local_steps")
        if self.own_head and self.evaluate_every < self.rounds:
            raise ValueError("own_head: sites keep their heads of the last round only; set evaluate_every to rounds")
        return self


class PrivateEvaluation(Section):
    """Noised tuning losses of a private study, from which every arm's best round is chosen; see docs/privacy.md.

    `every` so many rounds, and after the last, each site tells the sum over its tuning patients of their mean loss per
    token, cut at `bound` nats, with noise of `noise_multiplier` times `bound`.
    """

    every: _Positive = 1
    bound: Annotated[float, Field(gt=0.0, le=64.0)] = 8.0
    noise_multiplier: Annotated[float, Field(gt=0.0)]


class Transport(Section):
    """How the federated arm's vectors travel; see docs/rounds.md."""

    update: Literal["float32", "bfloat16", "int8"] = "float32"
    weights: Literal["float32", "bfloat16"] = "float32"


class Privacy(Section):
    """Private training at every site of every arm; see docs/privacy.md.

    `mechanism`: "dp-sgd" adds noise in every step, on patients drawn by `sampling_rate`; "local" adds it to each site's
    update; "distributed" to their sum, of which every site adds a share, under [secure_aggregation]: `honest_sites` of
    those in a sum are relied on for theirs. All updates count the same then; an arm of one site has "local" instead.
    Give `epsilon`, from which the noise follows, or `noise_multiplier`. The sites' tuning losses then stay where they
    are, and an arm ends with its last round, unless a table `[privacy.evaluation]` asks for them; `epsilon` pays for
    these, too. `clip` and `evaluation.every` take the place of `clip` and `evaluate_every` in `[training]`.
    """

    mechanism: Literal["dp-sgd", "local", "distributed"] = "dp-sgd"
    honest_sites: Annotated[int, Field(ge=2)] | None = None
    sampling_rate: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    epsilon: Annotated[float, Field(gt=0.0, le=50.0)] | None = None
    noise_multiplier: Annotated[float, Field(gt=0.0)] | None = None
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-6
    clip: Annotated[float, Field(gt=0.0)] = 1.0
    evaluation: PrivateEvaluation | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give exactly one of epsilon and noise_multiplier")
        if (self.mechanism == "dp-sgd") == (self.sampling_rate is None):
            raise ValueError('sampling_rate: mechanism = "dp-sgd" needs it, and no other has one')
        if (self.mechanism == "distributed") == (self.honest_sites is None):
            raise ValueError('honest_sites: mechanism = "distributed" needs it, and no other has them')
        return self


class Summing(Section):
    """Secure aggregation in the federated arm: of updates and losses only sums are seen; docs/secure-aggregation.md.

    `threshold` sites must stay to the end of a round's sum (when not given: more than two thirds), and `min_sites` be
    in it (`threshold`). Values of an update beyond `clip` count as that. `max_weight` is the most tokens (in private
    runs: patients) of a site in a round; with `local_steps`, it follows from these.
    """

    threshold: Annotated[int, Field(ge=2)] | None = None
    min_sites: Annotated[int, Field(ge=2)] | None = None
    clip: Annotated[float, Field(gt=0.0)] = 1.0
    max_weight: _Positive | None = None
    precision_bits: Annotated[int, Field(ge=1, le=44)] = 20


class Synthesis(Section):
    """The arm "synthesis": a server learns from timelines that the sites' own models make up; simulation/synthesis.py.

    Each site makes up `timelines` (as many as its train patients when not given) of `max_tokens` at most, which begin
    with fixed facts and an age that `least_patients` of its train patients share.
    """

    timelines: _Positive | None = None
    max_tokens: _Positive = 512
    least_patients: _Positive = 5


class Scenario(Section):
    """What goes wrong in the federated arm, decided by the study's seed; see simulation/scenario.py.

    Every site drops out of a round with the chance `dropout`; of the others, a `straggler` share answers late, by an
    exponential time of `straggler_minutes` on average (nobody waits for them: the clock is virtual); what comes after
    `training.round_deadline_minutes` is lost. `absent` names rounds in which a site is away.
    """

    dropout: _Share = 0.0
    straggler: _Share = 0.0
    straggler_minutes: Annotated[float, Field(gt=0.0)] = 10.0
    absent: dict[str, tuple[_Positive, ...]] = Field(default_factory=dict)


class Engine(Section):
    """What plays the federated arm's sites: same apps, same results.

    `local`: worker processes of this machine, with scenarios. `ray`: Flower's simulation on Ray, on one machine or a
    cluster. `processes`: a SuperLink and a SuperNode for each site, as real federations have, over TLS on loopback.
    `devices` are handed out to sites in turn (`["cuda:0", "cuda:1"]`); sites may share one.
    """

    kind: Literal["local", "ray", "processes"] = "local"
    devices: tuple[str, ...] = ()


class AtSites(Section):
    """Questions answered at the sites of the federated arm, told as tallies and merged; see docs/privacy.md.

    `every` rounds, 0 only at the end. Cells stand for `floor` patients or more, or have `noise` (with `bins` 256 at
    most, and `floor` 1) on counts of `most_per_patient` predictions of each patient. The report has merged and pooled
    figures side by side.
    """

    every: Annotated[int, Field(ge=0)] = 0
    split: Literal["tuning", "held_out"] = "held_out"
    bins: Annotated[int, Field(ge=16, le=65_536)] = 16_384
    floor: _Positive = 10
    noise: Annotated[float, Field(ge=0.0)] = 0.0
    most_per_patient: _Positive = 1
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-6


class Central(Section):
    """Questions that the server itself asks the federated arm's model between rounds; see docs/rounds.md.

    About the patients of the MEDS dataset `data`, none of whom is at a site; in a synthetic study, without it, of one
    more made-up hospital of so many `patients`. The best round follows from `metric`, and after `patience` evaluations
    in a row without a better one the arm ends early (0: never). `every` is `training.evaluate_every` if left out.
    """

    data: Path | None = None
    patients: _Positive = 300
    every: _Positive | None = None
    trajectories: _Positive = 16
    metric: Literal["auroc", "brier", "loss"] = "auroc"
    patience: Annotated[int, Field(ge=0)] = 0
    most: _Positive = 500


class Evaluation(Section):
    """How the questions are answered: trajectories for each patient, their cap, the bootstrap."""

    trajectories: _Positive = 64
    max_tokens: _Positive = 256
    resamples: Annotated[int, Field(ge=100)] = 2000
    at_sites: AtSites | None = None
    central: Central | None = None


def _taken(tasks: Any) -> tuple[Task, ...]:
    if not isinstance(tasks, list | tuple) or not all(isinstance(task, Task | Mapping) for task in tasks):
        raise ValueError("write [[task]] tables, or a list of task files and names")
    try:
        return tuple(
            task if isinstance(task, Task) else parse(task, f"task {number}") for number, task in enumerate(tasks, 1)
        )
    except ConfigError as problem:
        raise ValueError(str(problem)) from None


def _plain(tasks: tuple[Task, ...]) -> list[Any]:
    return [_given(asdict(task)) for task in tasks]


def _given(table: dict[str, Any]) -> dict[str, Any]:
    """A table as a file could have it, which knows no null."""
    return {
        name: _given(value) if isinstance(value, dict) else value for name, value in table.items() if value is not None
    }


# Questions that rollouts answer; `model.tasks` knows their schema.
_Tasks = Annotated[tuple[Task, ...], PlainValidator(_taken), PlainSerializer(_plain)]

Arm = Literal["federated", "alone", "personal", "pooled", "synthesis", "ensemble", "supervised"]


class Study(Section):
    """The whole file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    title: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    data: Data
    split: Split = Split()
    tokenizer: Tokenizer = Tokenizer()
    model: Model = Model()
    training: Training
    transport: Transport = Transport()
    engine: Engine = Engine()
    scenario: Scenario | None = None
    privacy: Privacy | None = None
    secure_aggregation: Summing | None = None
    arms: tuple[Arm, ...] = ("federated",)
    synthesis: Synthesis = Synthesis()
    task: _Tasks
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if "ensemble" in self.arms and "alone" not in self.arms:
            raise ValueError('arms: "ensemble" averages the sites\' own models, so it needs "alone" too')
        if "synthesis" in self.arms and "alone" not in self.arms:
            raise ValueError(
                'arms: "synthesis" learns from what the sites\' own models make up, so it needs "alone" too'
            )
        if self.training.own_head and {"personal", "ensemble", "supervised"} & set(self.arms):
            raise ValueError('arms: with training.own_head there are "federated", "alone", "pooled" and "synthesis"')
        if "federated" not in self.arms:
            raise ValueError('arms: "federated" can\'t be left out; it makes the codebook that all arms share')
        if self.privacy is not None and self.privacy.mechanism == "dp-sgd" and self.model.dropout:
            raise ValueError("model.dropout: private steps have none; take it out, or [privacy]")
        shared = self.privacy is not None and self.privacy.mechanism == "distributed"
        if shared and self.secure_aggregation is None:
            raise ValueError('privacy.mechanism = "distributed" needs [secure_aggregation]')
        clear = self.transport.update == "float32" and self.training.outer_rule == "mean"
        if self.secure_aggregation is not None and not (clear and self.training.clip_norm is None):
            raise ValueError(
                "secure_aggregation: nobody sees a single update, so training.outer_rule stays mean, "
                "training.clip_norm is left out and transport.update stays float32"
            )
        follows = shared or (self.training.local_steps is not None and self.privacy is None)
        if self.secure_aggregation is not None and self.secure_aggregation.max_weight is None and not follows:
            raise ValueError(
                "secure_aggregation.max_weight is missing: the most tokens (in private runs: patients) of a site in a "
                "round"
            )
        if self.scenario is not None and self.engine.kind == "processes":
            raise ValueError('scenario: real processes have real troubles; take engine.kind = "local" or "ray"')
        central = self.evaluation.central
        if central is not None and central.data is None and self.data.kind != "synthetic":
            raise ValueError("evaluation.central.data is missing: name a MEDS dataset whose patients are at no site")
        if central is not None and central.patience and self.evaluation.at_sites is not None:
            raise ValueError(
                "evaluation.central.patience: sites answer questions themselves after the last round that was agreed; "
                "leave out patience, or [evaluation.at_sites]"
            )
        if not self.task:
            raise ValueError("task: ask at least one question in a [[task]] table, or name a task file")
        names = [task.name for task in self.task]
        if len(set(names)) != len(names):
            raise ValueError(f"task: every name may stand once, found {', '.join(names)}")
        return self

    def trajectories(self, question: str) -> int:
        """Tell how many trajectories a prediction of a question gets."""
        own = next(task.trajectories for task in self.task if task.name == question)
        return own or self.evaluation.trajectories

    def digest(self) -> str:
        """SHA-256 of the canonical form: two files that mean the same give the same digest."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def read(path: Path, *, data: Path | None = None, records: bool = True) -> Study:
    """Read the study in the TOML file `path`.

    Args:
        path: the file.
        data: a MEDS dataset that takes the place of `data.path`.
        records: whether the study must say where its records are; its questions can be asked without.

    Returns:
        The study; a relative `data.path` or site path is taken from the folder of `path`.

    Raises:
        ConfigError: the file is missing or no TOML, or keys or values are wrong (all are named).
    """
    raw = toml_file.raw(path, "give the path of a study file")
    table = raw.get("data")
    if isinstance(table, dict):
        if data is not None:
            table["path"] = str(data.absolute())
        _anchor(table, path.parent)
    central = raw["evaluation"].get("central") if isinstance(raw.get("evaluation"), dict) else None
    if isinstance(central, dict) and isinstance(central.get("data"), str):
        central["data"] = str((path.parent / central["data"]).absolute())
    problems: list[str] = []
    if "task" in raw:
        raw["task"], problems = tasks_of(raw["task"], str(path), path.parent)
    try:
        study = Study.model_validate(raw)
    except ValidationError as error:
        told = [e for e in error.errors() if not (problems and "task: ask at least" in e["msg"])]
        problems = [*(f"{path}: {_explain(e)}" for e in told), *problems]
    if problems:
        raise ConfigError("\n".join(problems))
    if records and study.data.kind == "meds" and study.data.path is None:
        raise ConfigError(f"{path}: data.path is missing; name a MEDS dataset there or with --data")
    if data is not None and study.data.kind != "meds":
        raise ConfigError(f'{path}: --data needs data.kind = "meds", the file says "{study.data.kind}"')
    return study


def _anchor(table: dict[str, Any], folder: Path) -> None:
    """Make the paths in the data table absolute, in place."""
    if isinstance(table.get("path"), str):
        table["path"] = str((folder / table["path"]).absolute())
    if isinstance(table.get("sites"), dict):
        table["sites"] = {
            name: str((folder / value).absolute()) if isinstance(value, str) else value
            for name, value in table["sites"].items()
        }


def _explain(error: Any) -> str:
    place = error["loc"]
    # A person counts the [[task]] tables of a file from one.
    key = "".join(f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    if error["type"] == "extra_forbidden":
        known = _keys_at(place[:-1])
        close = difflib.get_close_matches(str(place[-1]), known, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(known)}"
        return f"{key} is not a known key{hint}"
    if error["type"] == "missing":
        return f"{key} is missing"
    said = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key or 'the file'}: {said}"
    return f"{key} = {error['input']!r}: {said}"


def _keys_at(place: tuple[Any, ...]) -> list[str]:
    """The keys that the section at `place` knows."""
    section: Any = Study
    for part in place:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        section = next(
            c for c in candidates if get_origin(c) is None and isinstance(c, type) and issubclass(c, BaseModel)
        )
    return sorted(section.model_fields)

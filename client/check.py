"""What a site sees before anything leaves: what became of its records, what they cost, and what its survey would say.

`check` gathers, `client.check_report` shows. The time for training is measured: real steps of the real model on tokens
of the site, on this machine.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from client.site import survey_bytes
from federation.manifest import software_version
from model.decoder import Decoder
from model.settings import TrainOptions, preset
from model.train import Trainer
from tokenizer.accounting import Accounting
from tokenizer.check import Timelines, count_timelines
from tokenizer.codebook import Codebook, Survey, TokenizerOptions, merge
from tokenizer.encode import encode
from tokenizer.errors import ConfigError
from tokenizer.events import MedsDataset
from tokenizer.noisy_survey import SurveyPrivacy
from tokenizer.prepare import Preparation, Prepared
from tokenizer.progress import Step, Watch
from tokenizer.shards import AS_IT_FITS, Crew
from tokenizer.sources.intake import Flow
from tokenizer.split import SPLITS, SplitRule
from tokenizer.store import TokenSplit
from tokenizer.windows import Windows

_BATCH_TOKENS = 4096
# Bytes per parameter beside the data: weights, two moments, and the update that is sent.
_BYTES_PER_PARAMETER = 16


@dataclass(frozen=True)
class Plan:
    """What the check supposes of the federation; its invitation says what it really is.

    Args:
        options: How events become tokens.
        rule: Which patients train.
        model: A preset's name.
        context: Most tokens of a window.
        passes: Over the train split.
        seconds: How long to measure the training for; 0 measures nothing.
        device: Torch's, to train on.
        privacy: Of the survey, where the site's settings ask for it; what is shown has no noise yet.
    """

    options: TokenizerOptions
    rule: SplitRule
    model: str = "1m"
    context: int = 1024
    passes: float = 10.0
    seconds: float = 8.0
    device: str = "cpu"
    privacy: SurveyPrivacy | None = None

    def __post_init__(self) -> None:
        if self.context < 16 or self.passes <= 0 or self.seconds < 0:
            raise ConfigError(
                f"check: context must be at least 16, passes above 0 and seconds 0 or more, got {self.context},"
                f" {self.passes} and {self.seconds}."
            )


@dataclass(frozen=True)
class Training:
    """An estimate of the time for training: what a pass takes at the rate that was measured.

    Attributes:
        model: The preset, its number of parameters, the context.
        device: What it was measured on.
        rate: Targets per second.
        steps: That were measured.
        targets: Of one pass.
        passes: Over the train split.
        state_bytes: Weights, optimizer and update, on disk.
    """

    model: str
    parameters: int
    context: int
    device: str
    rate: float
    steps: int
    targets: int
    passes: float
    state_bytes: int

    @property
    def seconds_per_pass(self) -> float:
        """The estimate for one pass."""
        return self.targets / self.rate

    @property
    def seconds(self) -> float:
        """The estimate for all passes."""
        return self.seconds_per_pass * self.passes


@dataclass(frozen=True)
class Outgoing:
    """What the site's answer to a survey request would carry, to the byte."""

    data: bytes
    survey: Survey

    @property
    def sha256(self) -> str:
        """Of the bytes, in hex."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class SiteCheck:
    """The whole check of a site.

    Attributes:
        name, fingerprint, subjects, events: Of the dataset; fingerprint is of its files and of what is done to them.
        source: What became of the rows of the source; None where another tool wrote the events.
        accounting: What the preparation saw and did.
        codebook: Its hash.
        vocabulary: Tokens per kind.
        own_codebook: Whether the codebook was made of this site's survey alone.
        prepared: Whether anything is done to the records; if not, `accounting` tells what would be found.
        timelines: The records as tokens.
        outgoing: What would be sent.
        training: None where nothing was measured; `training_note` says why.
        plan: What was supposed.
        notes: What was odd.
    """

    name: str
    fingerprint: str
    software: str
    subjects: int
    events: int
    source: Flow | None
    accounting: Accounting
    codebook: str
    vocabulary: Mapping[str, int]
    own_codebook: bool
    prepared: bool
    timelines: Timelines
    outgoing: Outgoing
    training: Training | None
    training_note: str
    plan: Plan
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """Everything, as JSON; what would be sent stands there parsed, with its size and hash."""
        return json.dumps(_plain(self), indent=2, ensure_ascii=False, sort_keys=True)


def check(
    records: MedsDataset | Prepared,
    plan: Plan,
    *,
    codebook: Codebook | None = None,
    source: Flow | None = None,
    watch: Watch | None = None,
    crew: Crew = AS_IT_FITS,
) -> SiteCheck:
    """Look at a site's records as a federation would.

    Args:
        records: With the preparation that the site would join with. Where they stay as they are, the accounting tells
            what the standard preparation would find in them.
        plan: What is supposed of the federation. With a codebook, its options count.
        codebook: The federation's, if it is known; otherwise one is made of this site's survey alone.
        source: What became of the rows of the source.
        watch: Told of progress.
        crew: Who works.
    """

    def progress(label: str) -> Callable[[int, int], None] | None:
        return None if watch is None else lambda done, total: watch(Step(label, done, total))

    if codebook is not None:
        plan = dataclasses.replace(plan, options=codebook.options)
    prepared = records if isinstance(records, Prepared) else Prepared(records, Preparation())
    accounting = prepared.account(progress("filters and units"), crew)
    if prepared is not records:
        accounting = dataclasses.replace(accounting, flow=accounting.flow[:1])
    data = survey_bytes(records, plan.rule, plan.options, progress("survey"), crew)
    told = Survey.from_bytes(data)
    book = codebook or Codebook.build(merge([told]))
    timelines = count_timelines(records, book, plan.rule, plan.context, progress("tokens"), crew)
    training, note = _measure(records, book, timelines.targets, plan)
    kinds = [token.kind for token in book.tokens]
    return SiteCheck(
        name=records.name,
        fingerprint=records.fingerprint(),
        software=software_version(),
        subjects=records.subjects,
        events=records.events,
        source=source,
        accounting=accounting,
        codebook=book.hash,
        vocabulary={kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        own_codebook=codebook is None,
        prepared=prepared is records,
        timelines=timelines,
        outgoing=Outgoing(data, told),
        training=training,
        training_note=note,
        plan=plan,
        notes=tuple(records.notes),
    )


def _measure(records: MedsDataset | Prepared, book: Codebook, targets: int, plan: Plan) -> tuple[Training | None, str]:
    """Take real steps on the tokens of one piece for a while."""
    if not plan.seconds:
        return None, "not measured, as asked"
    sample = _sample(records, book, plan.rule) if targets else None
    if sample is None:
        return None, "no patient of the train split has anything to predict"
    batch_tokens = max(_BATCH_TOKENS, plan.context)
    windows = Windows(sample, book, context=plan.context, batch_tokens=batch_tokens, seed=0)
    config = preset(plan.model, len(book), plan.context)
    trainer = Trainer(Decoder.create(config, 0).to(plan.device), TrainOptions(total_steps=1_000_000))
    trainer.step(windows.batch(0))
    begin, seen, steps = time.perf_counter(), 0, 0
    while (passed := time.perf_counter() - begin) < plan.seconds or not seen:
        seen += trainer.step(windows.batch(steps + 1)).tokens
        steps += 1
    threads = f", {torch.get_num_threads()} threads" if plan.device == "cpu" else ""
    training = Training(
        model=plan.model,
        parameters=config.parameters(),
        context=plan.context,
        device=plan.device + threads,
        rate=seen / passed,
        steps=steps,
        targets=targets,
        passes=plan.passes,
        state_bytes=config.parameters() * _BYTES_PER_PARAMETER,
    )
    return training, ""


def _sample(records: MedsDataset | Prepared, book: Codebook, rule: SplitRule) -> TokenSplit | None:
    """The training timelines of the first piece that has something to predict, in memory."""
    for piece in records.pieces:
        encoded = encode(records.read(piece), book)
        chosen = rule.assign(encoded.subject_ids) == SPLITS.index("train")
        lengths = np.diff(encoded.offsets)
        if (chosen & (encoded.events > 1)).any():
            tokens = np.repeat(chosen, lengths)
            offsets = np.concatenate([[0], np.cumsum(lengths[chosen])])
            return TokenSplit(encoded.tokens[tokens], encoded.times[tokens], offsets, encoded.subject_ids[chosen])
    return None


def _plain(value: Any) -> Any:
    """As JSON: survey bytes as what they say, keys that are tuples joined."""
    if isinstance(value, Outgoing):
        return {"bytes": len(value.data), "sha256": value.sha256, "survey": json.loads(value.data)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {" | ".join(key) if isinstance(key, tuple) else str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return value

"""An audit of a finished model, with the records of patients it was trained on and of others like them."""

import secrets
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from model import checkpoint
from model.decoder import Decoder
from server.futures import Model
from simulation.attacks import membership, memory
from simulation.attacks.audit_plan import Plan
from simulation.attacks.verdict import Audit, Target
from tokenizer.codebook import Codebook
from tokenizer.errors import ConfigError
from tokenizer.progress import Step, Watch
from tokenizer.store import TokenSplit, TokenStore


@dataclass(frozen=True)
class Subject:
    """A finished model and whom to ask it about.

    Attributes:
        name: of the model, for the report.
        model: the model.
        codebook: of its tokens.
        members: patients it was trained on.
        others: patients like them that it was not trained on.
        reference: a model trained in the same way on other patients; makes the attacks on membership sharper.

    Raises:
        ConfigError: nobody to compare, or a reference with another vocabulary.
    """

    name: str
    model: Decoder
    codebook: Codebook
    members: TokenSplit
    others: TokenSplit
    reference: Decoder | None = None

    def __post_init__(self) -> None:
        for kind, split in (("members", self.members), ("others", self.others)):
            if not len(split):
                raise ConfigError(f"audit: there are no {kind}; name a token store and a split with patients")
        if self.reference is not None and self.reference.config.vocab != self.model.config.vocab:
            raise ConfigError("audit: the reference has another vocabulary; take a model with the same codebook")


def open_subject(model: Path, members: Path, others: Path, reference: Path | None = None) -> Subject:
    """Open a model's folder and token stores: members are the train split of one, others the held-out split of one.

    Raises:
        DataError: a file is missing or damaged, or a store or the reference is of another codebook.
    """
    files = Model.at(model)
    words = Codebook.load(files.codebook)
    return Subject(
        model.resolve().name if model.resolve().name != "model" else model.resolve().parent.name,
        checkpoint.load(files.checkpoint, words.hash).decoder,
        words,
        TokenStore.open(members, words.hash).split("train"),
        TokenStore.open(others, words.hash).split("held_out"),
        None if reference is None else checkpoint.load(Model.at(reference).checkpoint, words.hash).decoder,
    )


def audit_model(
    subject: Subject,
    plan: Plan,
    *,
    command: str = "",
    watch: Watch = lambda step: None,
) -> Audit:
    """Attack a finished model.

    Args:
        subject: the model, and whom to ask it about.
        plan: `most`, `trajectories`, `tries`, `course_tokens`, `seed` and `device` count.
        command: that asked for it, for the report.
        watch: told how far the work is.
    """
    seed = secrets.randbits(48) if plan.seed is None else plan.seed
    model, codebook, members, others = subject.model, subject.codebook, subject.members, subject.others
    model = model.to(plan.device)
    reference = None if subject.reference is None else subject.reference.to(plan.device)
    effort = membership.Effort(plan.most, plan.trajectories, seed)
    found = membership.attack(
        *(model, reference, codebook, members, others, effort), lambda done, parts: watch(Step("members", done, parts))
    )
    rare = memory.rare(
        *(model, codebook, members, others),
        length=plan.course_tokens // 2,
        most=plan.most,
        tries=plan.tries,
        seed=seed,
    )
    watch(Step("rare courses", 1, 1))
    who = (f"{len(members):,} patients of its training", f"{len(others):,} other patients")
    target = Target("the model", *who, "" if reference is None else "the reference model", found)
    facts = {
        "model": f"{model.config.parameters():,} parameters, context {model.config.context:,}",
        "codebook": f"{codebook.hash[:16]}, {len(codebook):,} tokens",
        "seed of choices": str(seed),
    }
    return Audit(
        f"{subject.name}: a finished model",
        facts,
        targets=(target,),
        rare=rare,
        notes=("Canaries have to be in a training: only an audit of a run can bound epsilon from below.",),
        software=version("fedcomet"),
        command=command,
    )

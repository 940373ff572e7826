"""An audit of a finished model, with the records of patients it was trained on and of others like them."""

import secrets
from importlib.metadata import version

from model.decoder import Decoder
from simulation.attacks import membership, memory
from simulation.attacks.audit_plan import Plan
from simulation.attacks.verdict import Audit, Target
from tokenizer.codebook import Codebook
from tokenizer.errors import ConfigError
from tokenizer.progress import Step, Watch
from tokenizer.store import TokenSplit


def audit_model(
    model: Decoder,
    codebook: Codebook,
    members: TokenSplit,
    others: TokenSplit,
    plan: Plan,
    *,
    name: str,
    reference: Decoder | None = None,
    command: str = "",
    watch: Watch = lambda step: None,
) -> Audit:
    """Attack a finished model.

    Args:
        model: the model.
        codebook: of its tokens.
        members: patients it was trained on.
        others: patients like them that it was not trained on.
        plan: `most`, `trajectories`, `tries`, `course_tokens`, `seed` and `device` count.
        name: of the model, for the report.
        reference: a model trained in the same way on other patients; makes the attacks on membership sharper.
        command: that asked for it, for the report.
        watch: told how far the work is.

    Raises:
        ConfigError: nobody to compare, or a reference with another vocabulary.
    """
    for kind, split in (("members", members), ("others", others)):
        if not len(split):
            raise ConfigError(f"audit: there are no {kind}; name a token store and a split with patients")
    if reference is not None and reference.config.vocab != model.config.vocab:
        raise ConfigError("audit: the reference has another vocabulary; take a model with the same codebook")
    seed = secrets.randbits(48) if plan.seed is None else plan.seed
    model = model.to(plan.device)
    compared = None if reference is None else reference.to(plan.device)
    effort = membership.Effort(plan.most, plan.trajectories, seed)
    found = membership.attack(
        *(model, compared, codebook, members, others, effort), lambda done, all_: watch(Step("members", done, all_))
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
    target = Target(name, *who, "" if reference is None else "the reference model given", found)
    facts = {
        "model": f"{model.config.parameters():,} parameters, context {model.config.context:,}",
        "codebook": f"{codebook.hash[:16]}, {len(codebook):,} tokens",
        "seed of choices": str(seed),
    }
    return Audit(
        name,
        facts,
        targets=(target,),
        rare=rare,
        notes=("Canaries have to be in a training: only an audit of a run can bound epsilon from below.",),
        software=version("fedcomet"),
        command=command,
    )

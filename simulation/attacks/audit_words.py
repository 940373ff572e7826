"""What an audit found, in words for a privacy officer, and what it does not prove."""

from simulation.attacks.leakage import Leak
from simulation.attacks.membership import Separation
from simulation.attacks.memory import Rare, Repetition
from simulation.attacks.releases import Told
from simulation.attacks.verdict import Audit, Canaries, Claim, Stage, Target

# What anybody should know who reads the page.
LIMITS = (
    "A lower bound never proves privacy. Attacks that find nothing show that these attacks found nothing; a better "
    "one, or one with more patients, may find more. Only the noise and its accounting protect against all attacks.",
    "The bound on epsilon is about this training, these coins and these canaries. With the confidence stated it is not "
    "above the truth; it may lie far below it.",
    "Who attacks with the final model alone sees less than who sees every round; the bound is that of the final model.",
    "Success on average hides single patients: rare records are easier to tell than these averages say.",
    "An audit that is repeated until its alarm stays silent proves nothing. Keep the first.",
)


def headline(audit: Audit) -> str:
    """The outcome in a sentence."""
    if audit.alarm:
        return audit.alarm
    if audit.bound is not None and audit.claim is not None:
        return (
            "The attacks do not contradict the privacy that is claimed. That is no proof of privacy: below stands how "
            "much they could have seen."
        )
    return "No privacy guarantee is claimed; below stands what the attacks found."


def of_canaries(found: Canaries, claim: Claim | None) -> list[str]:
    """What the guesses prove about epsilon."""
    bound = found.bound
    said = [
        f"{bound.canaries:,} made-up patients were each put into the training or left out by a coin. From the final "
        f"model, {bound.correct:,} of {bound.guesses:,} guesses who was in were right; blind guessing gets about half."
    ]
    if bound.epsilon > 0:
        said.append(
            f"With {bound.confidence:.1%} confidence, epsilon of this training is at least {bound.epsilon:.2f} (delta "
            f"{bound.delta:g})."
        )
    else:
        said.append("That is too few right guesses to show any epsilon above 0.")
    if claim is not None:
        said.append(f"Claimed is epsilon {claim.epsilon:.2f} at delta {claim.delta:g} ({claim.basis}).")
    if claim is not None and claim.epsilon >= found.provable:
        said.append(
            f"This audit could not have contradicted that: even with every guess right, {bound.canaries:,} canaries "
            f"show no more than epsilon {found.provable:.2f}. Use more canaries."
        )
    else:
        said.append(f"With every guess right, it could have shown epsilon {found.provable:.2f} at most.")
    return said


def of_releases(found: Told, claim: Claim | None) -> list[str]:
    """What telling two noised updates apart proves about epsilon."""
    right = found.above_plus + found.minus - found.above_minus
    said = [
        f"{found.plus + found.minus:,} times a coin chose one of two opposite updates, which was cut and noised as in "
        f"the {found.rounds:,} rounds of the run. Called by a threshold of {found.threshold:g} clips, {right:,} were "
        "right; blind guessing gets about half."
    ]
    if found.epsilon > 0:
        said.append(
            f"With {found.confidence:.1%} confidence, epsilon of these rounds is at least {found.epsilon:.2f} (delta "
            f"{found.delta:g})."
        )
    else:
        said.append("That is too few to show any epsilon above 0.")
    if claim is not None:
        said.append(f"Claimed is epsilon {claim.epsilon:.2f} at delta {claim.delta:g} ({claim.basis}).")
        if claim.epsilon >= found.provable:
            said.append(f"This audit could not have contradicted that: it shows {found.provable:.2f} at most.")
    return said


def of_membership(target: Target, attack: Separation) -> str:
    """What an attack on membership found."""
    area = attack.auroc
    if area.value is None or area.low is None or area.high is None:
        return f"By {attack.attack}: not measured, {area.note}."
    if area.low > 0.5:
        said = "members can be told from others better than by guessing"
    elif area.high < 0.5:
        said = "scores run the other way; patients of the two kinds differ, or the reference fits one of them better"
    else:
        said = "no better than guessing, as far as so many patients can tell"
    calibrated = f", less that of {target.reference}" if target.reference else ""
    how = {
        "loss": f"how well the model foretells the record{calibrated}",
        "rollouts": f"how much of what comes next in the record simulated futures tell{calibrated}",
    }[attack.attack]
    return f"By {attack.attack} ({how}): {said}. AUROC {area.value:.3f} ({area.low:.3f}–{area.high:.3f})."


def of_courses(planted: tuple[Repetition, ...]) -> str:
    """What became of planted courses."""
    if not planted:
        return ""
    blind = next((each for each in planted if each.patients == 0), planted[0])
    # Twice what nobody's courses have: beyond what their few ranks scatter.
    known = [each for each in planted if each.patients and (each.exposure.low or 0.0) > (blind.exposure.high or 0.0)]
    told = [
        each for each in planted if each.patients and (each.extraction.greedy.value or each.extraction.sampled.value)
    ]
    if not known:
        said = "The model shows no sign of the planted courses: it ranks them like courses that nobody had."
    else:
        said = (
            f"The model knows courses that {known[0].patients:,} {'patient' if known[0].patients == 1 else 'patients'} "
            "had: it ranks them above made-up ones that nobody had."
        )
    if told:
        return said + f" From {told[0].patients:,} patients on, some come out word for word in simulated futures."
    return said + " None came out word for word in a simulated future."


def of_rare(found: Rare) -> str:
    """What came out of a finished model."""
    mine, theirs = found.members.greedy, found.others.greedy
    if mine.value is None or theirs.value is None:
        return "Too few records hold a course of their own; nothing could be asked."
    said = (
        f"Given what came before, the likeliest future tells the next {found.length} tokens exactly for "
        f"{mine.value:.1%} of {found.members.courses:,} courses that one patient of the training alone had, and for "
        f"{theirs.value:.1%} of {found.others.courses:,} of patients who were not in it."
    )
    if (mine.low or 0.0) > (theirs.high or 1.0):
        return said + " The difference is memory of single patients."
    return said + " That is no clear difference."


def of_stage(stage: Stage) -> str:
    """What the updates of a round tell, for the site where they tell most."""
    worst = max(stage.leaks, key=_told)
    seen = [("its own update", worst.plain), (f"only the sum over {worst.sites} sites", worst.summed)]
    said = []
    for name, view in seen:
        codes, patients = view.codes.value, view.patients.auroc.value
        told = f"AUROC {patients:.3f}" if patients is not None else "not measured"
        which = f"AUROC {codes:.3f}" if codes is not None else "not measured"
        said.append(f"with {name}: which codes its patients have {which}, which patients took part {told}")
    return f"In {stage.name}, {worst.site}: " + "; ".join(said) + "."


def _told(leak: Leak) -> float:
    return leak.plain.patients.auroc.value or 0.0

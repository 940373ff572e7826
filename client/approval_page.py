"""What a person reads before approving a run: what will run, what will leave, what it costs, and what forbids it."""

from collections.abc import Callable, Iterable

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from client.approval import Approvals, Asked
from client.policy import Broken, Policy
from federation import protection
from federation.accountant import epsilon
from federation.manifest import Manifest, Privacy
from federation.summed import shares_noise, update_bytes
from model.settings import DecoderConfig
from tokenizer.errors import FedcometError
from tokenizer.wording import several


def sections(asked: Asked) -> list[tuple[str, list[tuple[str, str]]]]:
    """Give the summary as titles, each with rows of words and what they say."""
    return [
        (f"What will run: {asked.manifest.name}", _what_runs(asked)),
        ("What will leave", _what_leaves(asked.manifest)),
        ("What it costs a patient", _what_it_costs(asked.manifest)),
    ]


def terminal(asked: Asked, policy: Policy | None, broken: Iterable[Broken]) -> RenderableType:
    """Lay the summary out for the terminal."""
    parts: list[RenderableType] = [_table(escape(title), rows) for title, rows in sections(asked)]
    found = list(broken)
    if policy is None:
        parts.append(
            "[yellow]This site has no policy: nothing but this approval stands between the run and the data.[/]"
        )
    elif found:
        parts.append(
            _table(
                "[red]What the policy forbids[/]",
                [(each.rule, f"{each.told} {each.figures}".strip()) for each in found],
            )
        )
    else:
        parts.append("[green]The run keeps every rule of the policy that can be checked before it begins.[/]")
    return Group(*parts)


def listed(approvals: Approvals, forbidden: Callable[[Manifest], list[Broken]]) -> list[str]:
    """Give a line for each manifest that waits, and for each that was refused, with the rules that it breaks.

    Each names the run, and says since when it asks and by whose key.
    """
    lines = [_line(approvals, digest, "waits for approval", lambda _: []) for digest in approvals.waiting()]
    lines += [_line(approvals, digest, "was refused by the policy", forbidden) for digest in approvals.refused()]
    return lines or ["No run waits for approval."]


def _line(approvals: Approvals, digest: str, state: str, forbidden: Callable[[Manifest], list[Broken]]) -> str:
    try:
        asked = approvals.find(digest)
        broken = forbidden(asked.manifest)
    except FedcometError as problem:
        return f"{digest} {state} ({problem})"
    told = f" ({'; '.join(map(str, broken))})" if broken else ""
    since = f", since {asked.since:%Y-%m-%d %H:%M} UTC" if asked.since else ""
    by = f", asked by {asked.coordinator[:24]}…" if asked.coordinator else ""
    return f"{digest} {state}{told}: {asked.manifest.name}{since}{by}"


def _what_runs(asked: Asked) -> list[tuple[str, str]]:
    manifest, local, train = asked.manifest, asked.manifest.local, asked.manifest.train
    work = f"{local.steps:,} steps" if local.steps is not None else f"{local.epochs:g} passes over the train patients"
    return [
        ("manifest", manifest.hash),
        ("asked by", asked.coordinator or "not known: it is checked when the run asks"),
        ("software", f"fedcomet {manifest.software}"),
        ("model", _model(manifest.model)),
        ("made for", ", ".join(manifest.purposes) or "no stated questions"),
        ("rounds", f"{manifest.rounds:,}, each with {work} of {local.batch_tokens:,} tokens at most"),
        ("optimizer", f"{train.optimizer}, peak learning rate {train.lr:g}"),
        ("sites", f"a round needs {manifest.min_sites} or more"),
        ("an answer is due in", f"{manifest.deadline_s / 3600:.3g} hours"),
    ]


def _what_leaves(manifest: Manifest) -> list[tuple[str, str]]:
    rounds, size = manifest.rounds, update_bytes(manifest)
    floor = manifest.tokenizer.min_patients
    masked = manifest.secure_aggregation
    if masked is None:
        shown = "in clear: the coordinator sees this site's own"
    else:
        enough = masked.masking.threshold
        shown = f"masked among {masked.min_sites} sites or more; only their sum can be unmasked, by {enough}"
    return [
        ("a survey, before", f"counts and histograms on {floor} patients or more (fedcomet site check shows it)"),
        *_sizes_and_figures(manifest),
        ("an update per round", f"{rounds:,} times {_bytes(size)}, {_bytes(rounds * size)} in all; {shown}"),
        *_questions(manifest),
        ("never", "records, tokens of patients, identifiers (docs/privacy.md has the whole list)"),
    ]


def _sizes_and_figures(manifest: Manifest) -> list[tuple[str, str]]:
    if manifest.secure_aggregation is not None:
        if shares_noise(manifest):
            return [("sizes and figures", "none: beside the noisy update, the sums hold constants")]
        what = "tokens, steps and losses" if manifest.privacy is None else "steps and drawn patients"
        return [("sizes and figures", f"none of this site by itself: {what} go into the sums"), *_losses(manifest)]
    if manifest.privacy is not None:
        told = "exact numbers of patients per split; no count of tokens or events"
        return [("sizes, once", told), *(_losses(manifest) or [("losses", "none")])]
    return [
        ("sizes, once", "exact numbers of patients, events and tokens per split"),
        ("figures per round", "tokens, steps, training loss, seconds; tuning loss and its tokens"),
    ]


def _questions(manifest: Manifest) -> list[tuple[str, str]]:
    """What a run tells of answers to questions about the site's own patients."""
    if (asked := manifest.tasks) is None:
        return []
    times = sum(asked.due(number, manifest.rounds) for number in range(1, manifest.rounds + 1))
    form, names = asked.form, ", ".join(task.name for task in asked.tasks)
    how = f"cells of {form.floor} patients or more"
    if form.noise:
        how = f"noise of deviation {form.noise * form.most_per_patient:g} on every count"
    told = f"{times:,} times, of {names}: counts of {asked.split} patients' risks by label, {how}"
    return [("statistics of questions", told)]


def _losses(manifest: Manifest) -> list[tuple[str, str]]:
    """What a private run tells of tuning losses."""
    if manifest.privacy is None or (told := manifest.privacy.evaluation) is None:
        return []
    times = sum(protection.evaluated(manifest, number) for number in range(1, manifest.rounds + 1))
    text = (
        f"{times:,} times the sum over the tuning patients of their mean loss per token, cut at {told.bound:g} nats, "
        f"with noise {told.noise_multiplier:g} × {told.bound:g}; and how many patients they are"
    )
    return [("losses", text)]


def _what_it_costs(manifest: Manifest) -> list[tuple[str, str]]:
    privacy = manifest.privacy
    if privacy is None:
        told = "none is stated: the run has no differential privacy, and its model may remember single patients"
        return [("ε", told)]
    return [
        ("ε, at most", f"{privacy.epsilon:g} for the whole run; {_composed(manifest, privacy)}"),
        *_relied_on(manifest, privacy),
        ("δ, at most", f"{privacy.delta:g}"),
        ("by", f"{privacy.mechanism}: noise {privacy.noise_multiplier:g} × clip {privacy.clip:g},"
         f" sampling rate {privacy.sampling_rate:g}"),
    ]  # fmt: skip


def _relied_on(manifest: Manifest, privacy: Privacy) -> list[tuple[str, str]]:
    """Whom the figure relies on, beside this site."""
    if (colluding := protection.colluding_sites(manifest)) is None:
        return []
    told = (
        f"{privacy.honest_sites} sites of every sum, this one among them, add their share of the noise as agreed; the "
        f"coordinator and {colluding} other sites may work together"
    )
    return [("provided that", told)]


def _composed(manifest: Manifest, privacy: Privacy) -> str:
    """What the site's own accountant makes of it."""
    sums = protection.releases_of_round(privacy, manifest.local) * manifest.rounds
    cost = epsilon(protection.of_run(manifest).all, privacy.delta)
    return f"{cost:.4f} by this site's accountant, for {sums:,} noised sums"


def _model(config: DecoderConfig) -> str:
    layers = several(config.layers, "layer")
    return f"{config.parameters():,} parameters, {layers} of width {config.width}, {config.vocab:,} tokens"


def _bytes(count: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))  # what the coordinator wrote is no markup
    return table

"""The check of a site for people: tables for a terminal of 80 columns, and one HTML page that needs no network."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape
from rich import box
from rich.console import Group
from rich.markup import escape as literally
from rich.table import Table
from rich.text import Text

from client.check import SiteCheck
from federation import page
from federation.page import show_bytes, show_count, show_duration, show_share
from tokenizer import durable, sketch
from tokenizer.check import Lengths
from tokenizer.codebook import Survey
from tokenizer.wording import several

# Longer lists are cut: the terminal shows the first few, the page many, the JSON all.
_FEW, _MANY = 8, 300


def write_page(path: Path, check: SiteCheck) -> None:
    """Write the page, at once or not at all."""
    durable.write_bytes(path, render(check).encode())


def render(check: SiteCheck) -> str:
    """Give the HTML page."""
    survey = check.outgoing.survey
    return (
        page.environment(Path(__file__).parent / "templates")
        .get_template("check.html.j2")
        .render(
            check=check,
            survey=survey,
            source=source_rows(check),
            histogram=_histogram(check.timelines.lengths, check.plan.context),
            codes=_code_lists(check),
            conflicts=_most(_conflicts(check), _MANY),
            converted=_most(_converted(check), _MANY),
            sketches=[(code, *_sketched(cells, survey)) for code, cells in sorted(survey.values.items())],
            gaps=[(text, sum(cells.values())) for text, cells in survey.gaps.items()],
            raw=check.outgoing.data.decode(),
            many=_MANY,
        )
    )


def terminal(check: SiteCheck) -> Group:
    """Give everything but the longest lists, for a terminal."""
    odd = {name: n for name, n in check.accounting.faults.items() if n}
    parts = [
        ("Records", _records(check)),
        ("What became of the source's rows", _source(check)),
        ("Filters and maps, in order" if check.prepared else "Nothing is done to the records", _flow(check)),
        *((title, _list(codes)) for title, _, codes in _code_lists(check)),
        ("Values whose units can't be brought together", _list(_conflicts(check), "values")),
        ("Times that are odd", _list(odd)),
        ("Tokens per patient", _lengths(check)),
        ("What a context costs", _contexts(check)),
        ("Tokens, disk and time", _cost(check)),
        ("What the survey would send", _outgoing(check)),
    ]
    notes = [Text(note, "yellow") for note in check.notes]
    shown = [Group(Text(title, "bold"), table, "") for title, table in parts if table.row_count]
    return Group(*shown, *notes)


def source_rows(check: SiteCheck) -> list[tuple[str, int, int, Mapping[str, int], Mapping[str, int]]]:
    """Per table of the source: rows read, events kept, rows dropped per filter, rows set aside per reason."""
    flow = check.source
    if flow is None:
        return []
    names = dict.fromkeys([*flow.rows, *flow.events, *flow.dropped, *flow.quarantined])
    return [
        (
            name,
            flow.rows.get(name, 0),
            flow.events.get(name, 0),
            flow.dropped.get(name, {}),
            flow.quarantined.get(name, {}),
        )
        for name in names
    ]


def _table(*headings: str, wide: int) -> Table:
    """A table whose first column is text and the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    first, *others = headings
    table.add_column(first, overflow="fold", min_width=min(wide, 24), max_width=wide)
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _facts(facts: Iterable[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, literally(value))
    return table


def _records(check: SiteCheck) -> Table:
    made = "of this site's survey alone" if check.own_codebook else "as given"
    return _facts(
        [
            ("dataset", check.name),
            ("patients", f"{check.subjects:,}"),
            ("events", f"{check.events:,}"),
            ("fingerprint", check.fingerprint[:16]),
            ("codebook", f"{check.codebook[:16]}, {sum(check.vocabulary.values()):,} tokens, {made}"),
        ]
    )


def _source(check: SiteCheck) -> Table:
    table = _table("table", "rows", "events", "dropped", "set aside", wide=40)
    for name, rows, events, dropped, aside in source_rows(check):
        counts = (rows, events, sum(dropped.values()), sum(aside.values()))
        table.add_row(literally(name), *(f"{n:,}" for n in counts))
        for reason, n in dropped.items():
            table.add_row(f"  [dim]{literally(reason)}[/]", "", "", f"{n:,}", "")
        for reason, n in aside.items():
            table.add_row(f"  [dim]{literally(reason)}[/]", "", "", "", f"{n:,}")
    return table


def _flow(check: SiteCheck) -> Table:
    table = _table("step", "patients", "events", "patients gone", "events gone", wide=24)
    for step in check.accounting.flow:
        table.add_row(
            literally(step.name),
            *(f"{n:,}" for n in (step.patients_after, step.events_after)),
            _gone(step.patients_before - step.patients_after),
            _gone(step.events_before - step.events_after),
        )
    return table


def _list(counts: Mapping[str, int], heading: str = "events") -> Table:
    table = _table("", heading, wide=64)
    for name, n in _most(counts, _FEW):
        table.add_row(literally(name), f"{n:,}")
    if len(counts) > _FEW:
        rest = sum(counts.values()) - sum(n for _, n in _most(counts, _FEW))
        table.add_row(f"[dim]and {len(counts) - _FEW:,} more[/]", f"{rest:,}")
    return table


def _lengths(check: SiteCheck) -> Table:
    lengths = check.timelines.lengths
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for share in lengths.quantiles:
        table.add_column(_quantile_name(share), justify="right")
    if lengths.quantiles:
        table.add_column("mean", justify="right")
        table.add_row(*(f"{n:,}" for n in lengths.quantiles.values()), f"{lengths.mean:,.0f}")
    return table


def _contexts(check: SiteCheck) -> Table:
    table = _table("tokens", "patients longer", "of all", "tokens unseen", "of all", "windows", wide=6)
    patients, tokens = max(check.timelines.patients, 1), max(check.timelines.tokens, 1)
    for cut in check.timelines.truncation:
        cells = (
            *(f"{cut.patients:,}", show_share(cut.patients / patients)),
            *(f"{cut.tokens:,}", show_share(cut.tokens / tokens), f"{cut.windows:,}"),
        )
        table.add_row(f"{cut.context:,}", *cells, style="bold" if cut.context == check.plan.context else "")
    return table


def _cost(check: SiteCheck) -> Table:
    facts = [
        (name.replace("_", " "), ", ".join(several(c[f"{each}s"], each) for each in ("patient", "event", "token")))
        for name, c in check.timelines.splits.items()
    ]
    disk = f"{show_bytes(check.timelines.store_bytes)} for the tokens"
    if (training := check.training) is None:
        return _facts([*facts, ("disk", disk), ("training", check.training_note)])
    disk += f", {show_bytes(training.state_bytes)} for the model's state"
    estimate = (
        f"about {show_duration(training.seconds_per_pass)} a pass, {show_duration(training.seconds)} for"
        f" {training.passes:g} passes. An estimate: {training.rate:,.0f} tokens/s, measured here in {training.steps}"
        f" step{'s' * (training.steps > 1)} of preset {training.model} on {training.device}"
    )
    return _facts([*facts, ("disk", disk), ("training", estimate)])


def _outgoing(check: SiteCheck) -> Table:
    survey = check.outgoing.survey
    cells = sum(map(len, survey.values.values()))
    parents = len(survey.prefixes) + len(survey.static_prefixes)
    return _facts(
        [
            ("size", f"{len(check.outgoing.data):,} bytes, sha256 {check.outgoing.sha256[:16]}"),
            ("patients", f"{survey.patients:,}, of the train split"),
            ("codes", f"{len(survey.codes):,} with a time, {len(survey.statics):,} without, each with its patients"),
            ("parents", f"{parents:,}, for codes that are too rare"),
            ("values", f"histograms of {len(survey.values):,} codes, {cells:,} cells"),
            ("gaps", f"histograms of {len(survey.gaps)} interval classes"),
            ("floor", f"no count and no cell stands for fewer than {survey.options.min_patients} patients"),
            *_noise(check),
            ("all of it", "in the page (--out) and in the JSON (--json)"),
        ]
    )


def _noise(check: SiteCheck) -> list[tuple[str, str]]:
    privacy = check.plan.privacy
    if privacy is None:
        return []
    told = f"{privacy.mechanism}, epsilon {privacy.epsilon:g}, delta {privacy.delta:g}; all this is shown before it"
    return [("noise", told)]


def _gone(number: int) -> str:
    """Write what went; what a map added has a plus."""
    return f"{number:,}" if number >= 0 else f"+{-number:,}"


def _quantile_name(share: float) -> str:
    return {0.0: "least", 0.5: "median", 1.0: "most"}.get(share, f"{100 * share:g} %")


def _code_lists(check: SiteCheck) -> list[tuple[str, str, Mapping[str, int]]]:
    """Title, explanation and events per code of what didn't become a token of its own."""
    levels = check.timelines.fallbacks
    return [
        (
            "Codes that a map was for, and that it does not have",
            "Add them to the map file, or leave them as they are.",
            check.accounting.unmapped,
        ),
        (
            "Codes of no shared vocabulary",
            "Other sites can't know these names: give them a map file with their LOINC, RxNorm or ICD codes.",
            check.accounting.local,
        ),
        (
            "Codes too rare to be named, told by an ancestor",
            "Fewer patients have them than the floor asks for, or the codebook doesn't know them.",
            levels.get("ancestor", {}),
        ),
        (
            "Codes of which only the system is told, if that",
            "No ancestor of theirs is in the codebook.",
            levels.get("unknown", {}),
        ),
    ]


def _conflicts(check: SiteCheck) -> dict[str, int]:
    """Values per code that is known in units that don't meet, and per unit that is not understood."""
    found = {}
    for code, keys in check.accounting.collisions.items():
        units = ", ".join(key.removeprefix(f"{code}//") if key != code else "no unit" for key in sorted(keys))
        found[f"{code} in {units}"] = sum(keys.values())
    for unit, n in check.accounting.unknown_units.items():
        found[f"unit {unit!r} is not understood"] = n
    return found


def _converted(check: SiteCheck) -> dict[str, int]:
    return {f"{code} from {unit} to {key}": n for (code, unit, key), n in check.accounting.converted.items()}


def _most(counts: Mapping[str, int], most: int) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:most]


def _sketched(cells: sketch.Sketch, survey: Survey) -> tuple[int, int, float, float, float]:
    """Events, cells, and the values at 5 %, 50 % and 95 % as far as the cells tell."""
    total, seen = sum(cells.values()), 0
    wanted = [0.05, 0.5, 0.95]
    found: list[float] = []
    for bucket in sorted(cells):
        seen += cells[bucket]
        while len(found) < len(wanted) and seen >= wanted[len(found)] * total:
            found.append(sketch.bucket_value(bucket, survey.options.sketch_accuracy))
    low, middle, high = found
    return total, len(cells), low, middle, high


def _histogram(lengths: Lengths, context: int) -> Markup:
    """Bars of patients per power of two of tokens, and a line at the context."""
    if not lengths.edges:
        return Markup("")
    width, height, left, bottom = 640.0, 240.0, 8.0, 44.0
    step = (width - 2 * left) / len(lengths.edges)
    most = max(lengths.patients)
    scale = (height - bottom - 26) / most
    parts: list[Any] = []
    for place, (edge, n) in enumerate(zip(lengths.edges, lengths.patients, strict=True)):
        x, tall = left + place * step, n * scale
        top = height - bottom - tall
        parts.append(f'<rect x="{x + 2:.1f}" y="{top:.1f}" width="{step - 4:.1f}" height="{tall:.1f}" rx="2"/>')
        parts.append(f'<text x="{x + step / 2:.1f}" y="{top - 6:.1f}" class="n">{show_count(n)}</text>')
        parts.append(f'<text x="{x + 2:.1f}" y="{height - bottom + 17:.1f}">{show_count(edge)}</text>')
    parts.append(f'<line x1="{left}" x2="{width - left}" y1="{height - bottom}" y2="{height - bottom}"/>')
    parts += _context_mark(lengths.edges, context, left, step, height - bottom)
    parts.append(f'<text x="{width / 2}" y="{height - 4}" class="n">tokens of a patient (from … on)</text>')
    said = "; ".join(f"from {edge}: {n}" for edge, n in zip(lengths.edges, lengths.patients, strict=True))
    label = escape(f"Patients by tokens. {said}.")
    return Markup(f'<svg role="img" aria-label="{label}" class="bars" viewBox="0 0 {width:g} {height:g}">') + Markup(
        "".join(parts) + "</svg>"
    )


def _context_mark(edges: Sequence[int], context: int, left: float, step: float, base: float) -> list[str]:
    place = next((n for n, edge in enumerate(edges) if edge <= context < 2 * edge), None)
    if place is None:
        return []
    x = left + (place + (context - edges[place]) / edges[place]) * step
    return [
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{base:g}"/>',
        f'<text class="mark" x="{x + 5:.1f}" y="13">context {show_count(context)}</text>',
    ]

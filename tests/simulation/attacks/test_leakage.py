"""One site's update tells which codes and patients it has; a sum over sites, and private noise, tell less."""

from dataclasses import replace

import numpy as np

from federation.update import to_vector
from model.decoder import Decoder
from model.private import PrivateOptions
from simulation.attacks import leakage
from simulation.attacks.canaries import alone, chosen
from simulation.attacks.leakage import Site, moved
from simulation.attacks.training import Recipe, train
from tests.simulation.attacks import small
from tokenizer.store import TokenSplit


def site(recipe: Recipe, name: str, members: TokenSplit, others: TokenSplit, start: Decoder | None = None) -> Site:
    begun = start or recipe.initial()
    after = train(recipe, members, small.words(), small.KEY, start=begun)
    return Site(name, members, others, to_vector(after) - to_vector(begun), float(members.tokens_total))


def without(split: TokenSplit, tokens: set[int]) -> TokenSplit:
    """The patients of a split who have none of these tokens."""
    timelines = [split.timeline(n)[0] for n in range(len(split))]
    return alone([timeline for timeline in timelines if not tokens & set(timeline.tolist())])


def codes(*names: str) -> set[int]:
    return {place for place, token in enumerate(small.words().tokens) if token.text in names}


def sites(recipe: Recipe, start: Decoder | None = None) -> list[Site]:
    """Each of three sites never writes two of the six tests."""
    lacking = [codes(f"LAB//{n}", f"LAB//{n + 1}") for n in (0, 2, 4)]
    return [
        site(recipe, f"s{n}", *(without(small.patients(seed + n, 200), lack) for seed in (40, 50)), start)
        for n, lack in enumerate(lacking)
    ]


def test_an_update_tells_the_codes_of_its_site_and_a_sum_over_sites_does_not() -> None:
    recipe = small.recipe(5, batch_tokens=2048)
    for leak in leakage.attack(recipe.initial(), small.words(), sites(recipe), most=20):
        assert leak.absent > 0
        assert leak.sites == 3
        assert leak.plain.codes.value > 0.95  # type: ignore[operator]
        assert leak.summed.codes.value < leak.plain.codes.value  # type: ignore[operator]


def test_an_update_tells_the_patients_of_its_site_and_a_sum_over_sites_less() -> None:
    """In a late round: the weights before it have learned from all of them alike; only updates tell who is in it."""
    everybody = small.patients(70, 160)
    start = train(small.recipe(150, batch_tokens=512), everybody, small.words(), small.KEY)
    groups = [chosen(everybody, np.arange(20 * n, 20 * n + 20)) for n in range(8)]
    parts = [site(small.recipe(15, batch_tokens=256), f"s{n}", groups[n], groups[n + 4], start) for n in range(4)]
    leaks = leakage.attack(start, small.words(), parts)
    plain = [leak.plain.patients.auroc.value for leak in leaks]
    summed = [leak.summed.patients.auroc.value for leak in leaks]
    assert np.mean(plain) > 0.62  # type: ignore[arg-type]
    assert np.mean(summed) < np.mean(plain) - 0.05  # type: ignore[arg-type]


def test_rows_of_an_untied_embedding_tell_exactly_which_tokens_were_there() -> None:
    recipe = small.recipe(10, decoder={"tied": False})
    members = without(small.patients(40, 400), codes("LAB//0"))
    one = site(recipe, "s", members, small.patients(50, 20))
    scores = moved(recipe.initial(), small.words(), one.update.astype(float))
    # The last token of a timeline is never an input.
    present = np.unique(np.asarray(members.tokens))
    assert set(np.flatnonzero(scores)) == set(present.tolist()) - {small.words().eot}
    leak = leakage.attack(recipe.initial(), small.words(), [one], most=20)[0]
    assert leak.plain.codes.value == 1


def test_private_noise_hides_codes_and_patients() -> None:
    recipe = small.recipe(10)
    private = replace(recipe, private=PrivateOptions(1.0, 20.0, 0.2))
    both = [leakage.attack(r.initial(), small.words(), sites(r)[:1], most=100)[0].plain for r in (recipe, private)]
    assert both[0].codes.value > 0.95  # type: ignore[operator]
    assert both[1].codes.value < 0.85  # type: ignore[operator]
    patients = both[1].patients.auroc
    assert patients.low < 0.5 < patients.high  # type: ignore[operator]


def test_a_site_with_all_tokens_has_nothing_to_tell() -> None:
    words = small.words()
    recipe = small.recipe(2)
    everything = alone([np.arange(len(words))[np.arange(len(words)) > 2], small.patients(1, 5).timeline(0)[0]])
    leak = leakage.attack(recipe.initial(), words, [site(recipe, "s", everything, small.patients(2, 5))], most=5)[0]
    assert leak.absent == 0
    assert leak.plain.codes.value is None
    assert "all tokens" in leak.plain.codes.note

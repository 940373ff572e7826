"""What one round's update gives away about a site's patients, and what is left of that in a sum over sites.

The attacker knows the weights before the round, as the coordinator does, and sees either the update of one site (rounds
without secure aggregation) or only the sum over all sites, weighted as they are (with it).

- Codes: which tokens do the site's patients have? A token that nobody has only ever gets pushed away from whatever was
  expected, like `pad` and `unk`, which no record holds: its row of the embedding moves the way theirs do. Rows that
  move otherwise belong to tokens that are there. Where input and output have matrices of their own, the input row of a
  token that is not there does not move at all, and the attack is exact.
- Patients: was this patient in the round? The gradient of a patient's loss points against an update that followed it
  (as in Nasr, Shokri, Houmansadr, S&P 2019, arXiv 1812.00910, gradients at the attacker's hands).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from model.decoder import Decoder
from server.results import Figure
from simulation.attacks.membership import Separation, auroc_interval, separate
from simulation.attacks.training import all_windows
from tokenizer.codebook import Codebook
from tokenizer.store import TokenSplit
from tokenizer.windows import Batch

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Site:
    """A site's part of a round.

    Attributes:
        name: of the site.
        members, others: patients who were trained on, and who were not.
        update: float32 [P], local minus global weights, in the order of the decoder's parameters.
        weight: with which the update goes into the sum.
    """

    name: str
    members: TokenSplit
    others: TokenSplit
    update: NDArray[np.float32]
    weight: float


@dataclass(frozen=True)
class Seen:
    """What an attacker makes of one view of the round.

    Attributes:
        codes: AUROC of telling the tokens that a site's patients have from those that they don't.
        patients: telling members from others.
    """

    codes: Figure
    patients: Separation


@dataclass(frozen=True)
class Leak:
    """One site's round under attack.

    Attributes:
        site: whose patients are asked about.
        sites: how many the sum is over.
        present, absent: tokens of the codebook that its patients have, and have not.
        plain: from the site's own update.
        summed: from the sum, which is all that is seen under secure aggregation.
    """

    site: str
    sites: int
    present: int
    absent: int
    plain: Seen
    summed: Seen


def attack(
    decoder: Decoder, codebook: Codebook, sites: Sequence[Site], *, most: int = 300, seed: int = 0
) -> tuple[Leak, ...]:
    """Attack every site's update and the sum.

    Args:
        decoder: with the weights before the round.
        codebook: of the tokens.
        sites: their parts.
        most: patients of each kind and site who are asked about.
        seed: of the choice.
    """
    total = np.sum([site.weight * site.update.astype(np.float64) for site in sites], axis=0)
    total /= sum(site.weight for site in sites)
    views = {site.name: (site.update.astype(np.float64), total) for site in sites}
    found = []
    for number, site in enumerate(sites):
        rng = np.random.default_rng([seed, number])
        present = np.zeros(len(codebook.tokens), bool)
        present[np.unique(np.asarray(site.members.tokens))] = True
        both = views[site.name]
        members = _alignments(decoder, _sample(decoder, codebook, site.members, most, rng), both)
        others = _alignments(decoder, _sample(decoder, codebook, site.others, most, rng), both)
        seen = [
            Seen(
                _codes(moved(decoder, codebook, view), present, codebook),
                separate("update", members[:, place], others[:, place]),
            )
            for place, view in enumerate(both)
        ]
        asked = _asked(codebook)
        found.append(
            Leak(site.name, len(sites), int(present[asked].sum()), int((~present[asked]).sum()), seen[0], seen[1])
        )
    return tuple(found)


def moved(decoder: Decoder, codebook: Codebook, update: Floats) -> Floats:
    """How unlike the rows of tokens that no record holds each token's row has moved: float64 [V].

    0 for a row that moved as theirs did, 2 for one that moved the opposite way; where rows of the embedding did not
    move at all, 1 for those that did.
    """
    rows = update[: decoder.embed_tokens.weight.numel()].reshape(decoder.embed_tokens.weight.shape)
    still = (rows == 0).all(1)
    if still.any():
        return (~still).astype(np.float64)
    never = rows[[codebook.pad, codebook.unk]].mean(0)
    lengths = np.linalg.norm(rows, axis=1) * max(float(np.linalg.norm(never)), 1e-300)
    turned: Floats = 1.0 - rows @ never / lengths
    return turned


def _asked(codebook: Codebook) -> NDArray[np.bool_]:
    """The tokens that a patient may have or not."""
    return ~np.isin(np.arange(len(codebook.tokens)), (codebook.pad, codebook.unk, codebook.eot))


def _codes(scores: Floats, present: NDArray[np.bool_], codebook: Codebook) -> Figure:
    asked = _asked(codebook)
    found = separate("codes", scores[asked & present], scores[asked & ~present])
    if found.auroc.value is None:
        return Figure(None, note="its patients have all tokens of the codebook, or none")
    return Figure(found.auroc.value, *auroc_interval(found.auroc.value, found.members, found.others))


def _sample(decoder: Decoder, codebook: Codebook, split: TokenSplit, most: int, rng: np.random.Generator) -> Batch:
    """One window of each of some patients: the first piece of a long timeline."""
    windows = all_windows(decoder, codebook, split)
    patients = np.sort(rng.permutation(len(split))[:most])
    return windows.draw(patients, np.tile([0.5, 0.0], (len(patients), 1)))


def _alignments(decoder: Decoder, batch: Batch, updates: Sequence[Floats]) -> Floats:
    """Cosine between each window's negative gradient and each update: float64 [S, U]."""
    weights = list(decoder.parameters())
    device = weights[0].device
    directions = torch.from_numpy(np.stack([u / max(float(np.linalg.norm(u)), 1e-300) for u in updates], 1)).to(device)
    found = np.empty((len(batch.lengths), len(updates)))
    for place in range(len(batch.lengths)):
        one = batch.windows(place, place + 1)
        tokens, targets = (torch.from_numpy(x).to(device) for x in (one.tokens, one.targets))
        nll, count = decoder.nll(decoder(tokens, torch.from_numpy(one.lengths)), targets)
        gradients = torch.autograd.grad(nll / max(count, 1), weights)
        flat = torch.cat([g.flatten() for g in gradients]).double()
        found[place] = (-(flat @ directions) / flat.norm().clamp(min=1e-300)).cpu().numpy()
    return found

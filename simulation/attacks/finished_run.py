"""What a finished study left that an audit needs: settings, codebook, every site's tokens, the released model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from client.archive import Archive
from federation import protection
from federation.manifest import LocalWork, Privacy
from model import checkpoint
from model.decoder import Decoder
from model.private import PrivateOptions
from model.settings import preset
from server.futures import Model
from simulation.arms import train_options
from simulation.attacks.canaries import plant
from simulation.attacks.training import Recipe
from simulation.config import Study
from tokenizer.codebook import Codebook
from tokenizer.errors import ConfigError, DataError
from tokenizer.store import TokenSplit, TokenStore


@dataclass(frozen=True)
class FinishedRun:
    """A finished study.

    Attributes:
        study: its settings.
        codebook: of its tokens.
        stores: every site's tokens.
        model: what the federation released.
        privacy: what its manifest states; None is none.
    """

    study: Study
    codebook: Codebook
    stores: Mapping[str, TokenStore]
    model: Decoder
    privacy: Privacy | None = None

    def most_exposed(self) -> str:
        """The site with the fewest patients in training: each of them weighs most."""
        return min(self.stores, key=lambda name: (len(self.stores[name].split("train")), name))

    def together(self, split: str) -> TokenSplit:
        """The patients of all sites, of `train`, `tuning` or `held_out`."""
        first, *rest = [store.split(split) for store in self.stores.values()]
        return plant(first, [each.timeline(n)[0] for each in rest for n in range(len(each))])

    def recipe(
        self, split: TokenSplit, *, private: PrivateOptions | None, steps: int | None, seed: int, device: str
    ) -> Recipe:
        """How a site trains on a split, by the study's settings.

        Args:
            split: the site's patients in training.
            private: how steps are made private.
            steps: how many in all; as many as the study's passes take if None.
            seed: of initial weights and batches.
            device: where it trains.
        """
        training, config = self.study.training, self.study.model
        decoder = preset(config.preset, len(self.codebook), config.context, config.dropout)
        recipe = Recipe(
            *(decoder, train_options(training), training.batch_tokens, training.windows_per_patient),
            private=private,
            seed=seed,
            device=device,
        )
        total = steps or self._steps(recipe, split)
        options = replace(
            recipe.options, total_steps=total, warmup_steps=min(round(total * training.warmup_share), total - 1)
        )
        return replace(recipe, options=options)

    def _steps(self, recipe: Recipe, split: TokenSplit) -> int:
        training = self.study.training
        if training.local_steps is not None:
            return training.rounds * training.local_steps
        if recipe.private is not None:
            local = LocalWork(epochs=training.local_epochs)
            return training.rounds * protection.steps_of_round(local, recipe.private.sampling_rate)
        passes = training.rounds * (training.local_epochs or 1.0)
        return max(1, round(passes * recipe.windows(split, self.codebook).steps(0)))


def open_run(folder: Path) -> FinishedRun:
    """Open a finished study's folder.

    Raises:
        ConfigError: it isn't one, or the study is not finished.
        DataError: a file in it is damaged.
    """
    try:
        study = Study.model_validate(json.loads((folder / "study.json").read_bytes()))
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} is no folder of a study: there is no study.json. Name the folder that fedcomet simulate made, "
            "or audit a finished model with --model and --members"
        ) from None
    except (ValueError, ValidationError) as problem:
        raise DataError(f"{folder / 'study.json'}: is no study of this version ({problem}); run it again") from None
    if not (folder / "model").exists():
        raise ConfigError(f"{folder}: the study is not finished; run fedcomet simulate to its end first")
    files = Model.at(folder / "model")
    codebook = Codebook.load(files.codebook)
    found = checkpoint.load(files.checkpoint, codebook.hash)
    stores, privacy = {}, None
    for state in sorted((folder / "state").iterdir()):
        archive = Archive(state)
        part = archive.run(str(found.extra["manifest_hash"]))
        agreement = part.agreement()
        if agreement is not None:
            privacy = part.manifest().privacy
            stores[state.name] = TokenStore.open(archive.store_path(agreement.store), codebook.hash)
    if not stores:
        raise DataError(f"{folder / 'state'}: no site has tokens of the released model's run; run the study again")
    return FinishedRun(study, codebook, stores, found.decoder, privacy)

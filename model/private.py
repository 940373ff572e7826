"""Differentially private training steps (DP-SGD): sampled patients, clipped shares, secret noise, any optimizer behind.

Unit: a patient at one site. Neighbouring: one patient's whole record more or less. Each step takes every patient with
the same probability, independently of the others (Poisson sampling), one window of each; clips each patient's gradient
(`model.clipping`); adds Gaussian noise of deviation noise multiplier times clip; and divides by the expected number of
patients, which doesn't depend on who was drawn. What the optimizer makes of it is post-processing. A run of steps is
thus a composition of Poisson-subsampled Gaussian mechanisms (Abadi et al. 2016, arXiv 1607.00133). How many patients a
site has counts as known.

Notable choices:
- All that must stay secret comes from one key of the site: which patients are drawn, which windows, and the noise. The
  key never leaves, so a round that is interrupted goes on with the same draws, and no second noise is drawn for what
  one request asks.
- Sum and noise are rounded to one fine grid before they are added, in integers that float64 holds exactly. The last
  bits of a floating-point sum would tell more than the noise hides (Mironov, CCS 2012). Rounding the sum lengthens a
  patient's share by at most grid x sqrt(P), which is subtracted from the clip beforehand.
- Gradients are summed in float32. That its rounding depends on who else is in the sum is not part of any claim.
- The noise itself is a float64 Box-Muller draw: its distance from a true Gaussian is not part of any claim.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray
from torch import Tensor

from model.clipping import clipped_sum
from model.decoder import Decoder
from model.settings import Machine, TrainOptions
from model.train import StepResult, Trainer, learning_rate
from tokenizer.errors import ConfigError

if TYPE_CHECKING:
    from tokenizer.windows import Batch, Windows

KEY_BYTES = 32
# The grid divides what rounding may add to a share, this part of the clip, evenly among all parameters.
_ROUNDING_SHARE = 2.0**-16
# Numbers that go through all operations of a draw together: a megabyte in float64.
_CHUNK = 2**17
# Largest multiple of the grid that float64 adds to exactly, with room for sums.
_LARGEST = 2.0**51


@dataclass(frozen=True)
class PrivateOptions:
    """How steps are made private.

    Attributes:
        clip: largest Euclidean norm of one patient's share of a step's gradient.
        noise_multiplier: deviation of the noise in clips.
        sampling_rate: probability of each patient to be in a step.

    Raises:
        ConfigError: for a value out of range.
    """

    clip: float
    noise_multiplier: float
    sampling_rate: float

    def __post_init__(self) -> None:
        checks = {
            "clip must be positive": 0 < self.clip < float("inf"),
            "noise_multiplier must be positive": 0 < self.noise_multiplier < float("inf"),
            "sampling_rate must lie in (0, 1]": 0 < self.sampling_rate <= 1,
        }
        if wrong := [rule for rule, holds in checks.items() if not holds]:
            raise ConfigError(f"private training: {'; '.join(wrong)}")


class Secret:
    """Random numbers that follow from a site's key and a purpose: the keystream of AES-256 in counter mode.

    Args:
        key: KEY_BYTES from the operating system's secure generator, kept at the site.
        purpose: what the numbers are for (run, request, step, use); each has numbers of its own.
    """

    def __init__(self, key: bytes, purpose: str) -> None:
        if len(key) != KEY_BYTES:
            raise ConfigError(f"a secret needs a key of {KEY_BYTES} bytes, not {len(key)}")
        material = HKDF(hashes.SHA256(), 48, salt=b"fedcomet secret", info=purpose.encode()).derive(key)
        self._stream = Cipher(algorithms.AES256(material[:32]), modes.CTR(material[32:])).encryptor()

    def __repr__(self) -> str:
        return "Secret(...)"

    def words(self, count: int) -> NDArray[np.uint64]:
        """Uniform 64-bit numbers, uint64 [count]."""
        out = bytearray(8 * count + 15)
        written = self._stream.update_into(bytes(8 * count), out)
        return np.frombuffer(memoryview(out)[:written], np.uint64)

    def chosen(self, count: int, rate: float) -> NDArray[np.int64]:
        """Places of 0 to count - 1 that are drawn, each with probability `rate` (to 2^-53), int64 ascending."""
        return np.flatnonzero(self.uniform(count) < rate)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Uniform multiples of 2^-53 in [0, 1), float64 [count]."""
        return (self.words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def gaussian(self, count: int) -> Tensor:
        """Standard normal numbers, float64 [count] (Box, Muller 1958)."""
        half = (count + 1) // 2
        first, second = (torch.from_numpy((self.words(half) >> np.uint64(11)).view(np.int64)) for _ in range(2))
        made = torch.empty(2, half, dtype=torch.float64)
        for some in _chunks(half):
            # In (0, 1], whose logarithm is finite.
            radius = first[some].double().mul_(-(2.0**-53)).add_(1.0).log_().mul_(-2.0).sqrt_()
            angle = second[some].double().mul_(2.0**-53).mul_(2.0 * np.pi)
            torch.mul(angle.cos(), radius, out=made[0, some])
            torch.mul(angle.sin_(), radius, out=made[1, some])
        return made.flatten()[:count]


class PrivateTrainer(Trainer):
    """Takes private steps; schedule, optimizers and state are those of `Trainer`.

    Args:
        decoder: trained in place, on the device where it lies; without dropout.
        options: see `TrainOptions`; clipping of the whole gradient must be off (`clip` 0), shares are clipped instead.
        private: clip, noise and sampling rate.
        patients: of the site that can be drawn; their number counts as known.
        secret: gives the secret of a step and a use ("patients", "noise"), the same one whenever it is asked again.
        start_step: global step of the first call to `step`.
        machine: see `Machine`; how passes are made is decided by `model.clipping`.
    """

    def __init__(
        self,
        decoder: Decoder,
        options: TrainOptions,
        private: PrivateOptions,
        patients: int,
        secret: Callable[[int, str], Secret],
        start_step: int = 0,
        machine: Machine | None = None,
    ) -> None:
        if options.clip:
            raise ConfigError("private training: set the training option clip to 0; each patient's share is clipped")
        super().__init__(decoder, options, start_step, machine)
        self._private, self._secret, self._patients = private, secret, patients

    @property
    def expected(self) -> float:
        """Expected number of patients in a step."""
        return self._private.sampling_rate * self._patients

    def batch(self, windows: "Windows", step: int | None = None) -> "Batch":
        """The patients of a global step, the next one if not said, and one window of each; empty if nobody is drawn."""
        secret = self._secret(self.global_step if step is None else step, "patients")
        chosen = secret.chosen(self._patients, self._private.sampling_rate)
        return windows.draw(chosen, secret.uniform(2 * len(chosen)).reshape(-1, 2))

    def step(self, batch: "Batch") -> StepResult:
        """Take a private step on what `batch` gave; one without patients is all noise, and counts.

        Returns:
            The patients' mean loss and number of targets, which are not private and must not leave the site.

        Raises:
            TrainingDiverged: when the noised gradient is not finite; the weights are as before the step. What a single
                patient's gradient is never stops the training (`model.clipping`).
        """
        lr = learning_rate(self.options, self.global_step)
        device = self.decoder.embed_tokens.weight.device
        narrow = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")
        found = clipped_sum(self.decoder, batch, clip_before_rounding(self._private.clip), autocast=narrow)
        private = noised(found.gradients, self._private, self._secret(self.global_step, "noise"))
        for weight, gradient in zip(self.decoder.parameters(), private, strict=True):
            weight.grad = gradient.div_(self.expected).to(weight)
        norm = self._update(lr)
        return StepResult(
            float(found.losses.mean()) if len(batch.lengths) else 0.0, int((batch.targets >= 0).sum()), norm, lr
        )


def clip_before_rounding(clip: float) -> float:
    """The norm to clip to so that a share rounded by `noised` has at most the norm `clip`."""
    return clip * (1.0 - _ROUNDING_SHARE)


def noised(gradients: list[Tensor], options: PrivateOptions, secret: Secret) -> list[Tensor]:
    """Add noise to a sum of shares that were clipped to `clip_before_rounding(options.clip)`.

    Args:
        gradients: float32, of any shapes; P numbers in all.
        options: clip and noise multiplier.
        secret: fresh for this step; its next numbers are taken.

    Returns:
        float64 tensors of the same shapes, on the CPU: rounded sum plus rounded noise, multiples of one grid.
    """
    total = sum(gradient.numel() for gradient in gradients)
    grid = options.clip * _ROUNDING_SHARE / total**0.5
    deviation = options.noise_multiplier * options.clip / grid
    made = []
    for gradient in gradients:
        total_P = gradient.detach().cpu().flatten()
        if total_P.abs().max() / grid >= _LARGEST or deviation * 10 > _LARGEST:
            raise ConfigError("private training: the sum of shares is too large for its grid; lower clip or batch")
        noise_P = secret.gaussian(len(total_P))
        for some in _chunks(len(total_P)):
            steps = total_P[some].double().div_(grid).round_()
            noise_P[some].mul_(deviation).round_().add_(steps).mul_(grid)
        made.append(noise_P.view(gradient.shape))
    return made


def noised_update(update: NDArray[np.float32], options: PrivateOptions, secret: Secret) -> NDArray[np.float32]:
    """Cut an update, float32 [P], to the norm `options.clip` and add noise; one that isn't finite counts as zeros."""
    exact = torch.from_numpy(update).double()
    norm = float(exact.norm())
    exact = exact * min(1.0, clip_before_rounding(options.clip) / norm) if math.isfinite(norm) and norm else exact * 0
    (noisy,) = noised([exact.nan_to_num(0.0, 0.0, 0.0)], options, secret)
    return noisy.float().numpy()


def _chunks(count: int) -> Iterator[slice]:
    """Parts of so many numbers that stay in the caches from one operation to the next."""
    for start in range(0, count, _CHUNK):
        yield slice(start, min(count, start + _CHUNK))

"""One file that holds a decoder and what belongs to it: safetensors, with a described header.

The header says which format version wrote it, the decoder's shape, the caller's own facts (the codebook's hash must be
among them), and a digest of header and tensors. Reading checks each of them, so a file that loads is the file that was
written. No pickle is involved: a checkpoint from elsewhere can't run code.

The facts of a checkpoint that a coordinator wrote are those of `Provenance`. One that came from a Hugging Face folder
without them (`model.interchange`) has `codebook_hash`, `preset` and `imported` instead.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from model.decoder import Decoder
from model.settings import DecoderConfig, preset_of
from tokenizer import durable
from tokenizer.codebook import Codebook, Token
from tokenizer.errors import ConfigError, DataError

_VERSION = 1
_KEY = "fedcomet"
_CODEBOOK = "codebook_hash"
_DECODER = "decoder."
_ARRAYS = "arrays."


class Checkpoint(NamedTuple):
    """What a checkpoint file holds.

    Attributes:
        decoder: on the CPU, as it was saved.
        extra: the caller's facts, as JSON gives them back (tuples are lists).
        arrays: the caller's tensors (moments of the optimizer, for example).
    """

    decoder: Decoder
    extra: dict[str, Any]
    arrays: dict[str, Tensor]


@dataclass(frozen=True)
class Protection:
    """The differential privacy that each patient of a site has against whoever holds the weights.

    Attributes:
        mechanism: what the noise was added to, as the manifest calls it.
        unit: whom it protects.
        neighbours: what differs between the two sets of records that are held against each other.
        epsilon, delta: of everything that was released until these weights, as the coordinator's plan computes it from
            the manifest; a site's own ledger holds what really ran there.
        epsilon_of_run: the most that the whole run may cost, at the same delta.
        accountant: how epsilon was found.
        compared: whether rounds are compared by noised losses. Then the choice of these weights may rest on later
            rounds, and `epsilon_of_run` is what counts.
    """

    mechanism: str
    unit: str
    neighbours: str
    epsilon: float
    delta: float
    epsilon_of_run: float
    accountant: str
    compared: bool = False


@dataclass(frozen=True)
class Provenance:
    """Where trained weights come from: the facts that a coordinator puts into every checkpoint.

    No time of day, no name of a site: equal runs give equal bytes, and a checkpoint that is passed on names nobody.

    Attributes:
        codebook_hash: of the vocabulary.
        manifest_hash: of the agreement that the sites trained under.
        preset: name of the preset that the decoder is (`model.settings.preset_of`), or None.
        round: the round after which this is the state.
        rounds: how many the run has.
        tokens: that all sites together trained on until then; tokens of repeated passes count again. 0 after private
            training, where their number stays at the sites.
        steps: of all sites' optimizers together until then.
        sites: how many sites had a part in it.
        software: version of fedcomet that wrote it.
        torch: version of torch that wrote it.
        privacy: of training under differential privacy; None if there was none.
    """

    codebook_hash: str
    manifest_hash: str
    preset: str | None
    round: int
    rounds: int
    tokens: int
    steps: int
    sites: int
    software: str
    torch: str
    privacy: Protection | None = None


def save(
    path: Path,
    decoder: Decoder,
    *,
    extra: dict[str, Any],
    arrays: dict[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint that is either there and whole, or not there.

    Args:
        path: file to write or replace.
        decoder: its weights are copied to the CPU.
        extra: facts that JSON can hold; `codebook_hash` (`Codebook.hash` of the training data) is needed.
        arrays: further tensors by name.

    Raises:
        ConfigError: when `extra` names no codebook: a reader couldn't tell what the tokens mean.
    """
    if _CODEBOOK not in extra:
        raise ConfigError(f"{path}: a checkpoint needs the codebook's hash; put {_CODEBOOK!r} into `extra`")
    named = {_DECODER + name: weight for name, weight in decoder.state_dict().items()}
    named |= {_ARRAYS + name: array for name, array in (arrays or {}).items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    described = {
        "version": _VERSION,
        "decoder": asdict(decoder.config),
        "extra": extra,
    }
    # As a reader will see it: JSON turns tuples into lists and keys into strings.
    header = json.loads(_canonical(described))
    metadata = {_KEY: _canonical(header | {"digest": _digest(header, tensors)})}
    with durable.file(path) as aside:
        safetensors.torch.save_file(tensors, aside, metadata)


def load(path: Path, codebook_hash: str | None = None) -> Checkpoint:
    """Read a checkpoint and check it.

    Args:
        path: file that `save` wrote.
        codebook_hash: hash of the codebook in use; None takes any.

    Returns:
        The decoder on the CPU, and what was saved with it.

    Raises:
        DataError: when the file is missing, cut short, altered, of another format version, or of another codebook.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            header = _header(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error}); check the path") from error
    except safetensors.SafetensorError as error:
        raise DataError(f"{path}: is cut short or not a checkpoint ({error}); take the copy before it") from error
    trained_with = header["extra"].get(_CODEBOOK)
    if codebook_hash not in (None, trained_with):
        raise DataError(
            f"{path}: was trained with codebook {trained_with}, and the one in use is {codebook_hash}; "
            "use the codebook that belongs to the checkpoint"
        )
    if _digest(header, tensors) != header["digest"]:
        raise DataError(f"{path}: its content is not what was saved; the file was altered, take the copy before it")
    return Checkpoint(
        decoder=_decoder(path, header["decoder"], _under(_DECODER, tensors)),
        extra=header["extra"],
        arrays=_under(_ARRAYS, tensors),
    )


def digest_of(tensors: dict[str, Tensor], described: bytes = b"") -> str:
    """SHA-256 (hex) over `described`, and names, types, shapes and bytes of all tensors, which lie on the CPU."""
    digest = hashlib.sha256(described)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe(checkpoint: Checkpoint) -> dict[str, str]:
    """What there is to tell about a checkpoint, in words: shape, size, provenance.

    Facts that it doesn't carry read `unknown`; keys are in the order in which a person wants them.
    """
    config, facts = checkpoint.decoder.config, checkpoint.extra
    tied, biased = ("tied" if config.tied else "untied"), ("with" if config.qkv_bias else "without")

    def told(text: str, *names: str) -> str:
        values = [facts.get(name) for name in names]
        if None in values:
            return "unknown"
        return text.format(*(f"{value:,}" if type(value) is int else _printable(value) for value in values))

    words = {
        "preset": preset_of(config) or "none",
        "parameters": f"{config.parameters():,}",
        "layers": str(config.layers),
        "width": f"{config.width}, feed-forward {config.ff}",
        "heads": f"{config.heads} of width {config.head_width}, {config.kv_heads} for keys and values",
        "vocabulary": f"{config.vocab} tokens, output matrix {tied}",
        "context": f"{config.context} tokens",
        "positions": f"rotary, base {config.rope_base:g}; {biased} biases on q, k and v",
        "codebook": told("{}", "codebook_hash"),
        "manifest": told("{}", "manifest_hash"),
        "round": told("{} of {}", "round", "rounds"),
        "trained on": told("{} tokens in {} steps at {} sites", "tokens", "steps", "sites"),
        "privacy": _protection(facts),
        "written by": told("fedcomet {}, torch {}", "software", "torch"),
    }
    if "imported" in facts:
        words["imported"] = "from a Hugging Face folder; its training is not known"
    if checkpoint.arrays:
        words["also holds"] = _printable(", ".join(sorted(checkpoint.arrays)))
    return words


def _protection(facts: dict[str, Any]) -> str:
    """The differential privacy that a checkpoint says it has."""
    if "privacy" not in facts:
        return "unknown"
    if facts["privacy"] is None:
        return "none: the training had no differential privacy"
    try:
        told = Protection(**facts["privacy"])
        cost = f"epsilon {told.epsilon:.4g} at delta {told.delta:g} until here, {told.epsilon_of_run:.4g} for the run"
    except (TypeError, ValueError):
        return "unknown"
    if told.compared:
        cost += ", which counts where the round was chosen by its loss"
    claim = f"{cost}; per {told.unit}; neighbours: {told.neighbours}"
    return _printable(f"{claim}; by {told.mechanism}; accountant: {told.accountant}", most=500)


def _printable(value: object, most: int = 200) -> str:
    """A fact on one line of a terminal, whatever a foreign file says."""
    return "".join(letter if letter.isprintable() else "�" for letter in str(value)[:most])


def grow(decoder: Decoder, old: Codebook, new: Codebook) -> Decoder:
    """Fit a decoder to a later version of its codebook; what it says about the old tokens stays the same.

    A new token's rows (embedding, and output layer if that is not tied) start as the mean of the rows of the tokens
    that told it before: those of its nearest ancestor, or of what was unknown of its system. A new piece of codes
    starts as the mean of the old pieces at the same place of the same system, any other new token as the mean of the
    old tokens of its kind. No randomness: all sites that grow a checkpoint get the same one.

    Args:
        decoder: a model of `old`; it is left as it is.
        old: the codebook that it was trained with.
        new: what `old.extend` gave, once or repeatedly.

    Returns:
        A decoder of the new vocabulary on the same device. An optimizer's momentum starts anew.

    Raises:
        ConfigError: the decoder is of another vocabulary, or `new` does not extend `old`.
    """
    if decoder.config.vocab != len(old):
        raise ConfigError(f"the decoder has {decoder.config.vocab} tokens and the codebook {len(old)}; give its own")
    if new.tokens[: len(old)] != old.tokens:
        raise ConfigError(f"codebook {new.hash[:12]} does not extend codebook {old.hash[:12]}; their tokens differ")
    kin = [_kin(token, old) for token in new.tokens[len(old) :]]
    with decoder.embed_tokens.weight.device:
        grown = Decoder(replace(decoder.config, vocab=len(new)))
    weights = decoder.state_dict()
    with torch.no_grad():
        for name, weight in grown.state_dict().items():
            before = weights[name]
            weight[: len(before)] = before
            if len(weight) > len(before):
                weight[len(before) :] = torch.stack([before[rows].mean(0) for rows in kin])
    return grown


def _kin(token: Token, old: Codebook) -> list[int]:
    """The old tokens that a new one starts from the mean of; never empty."""
    if token.kind in ("static", "code", "other"):
        return list(old.tell(token.text, static=token.kind == "static").tokens)
    place = token.text.rpartition("//")[0]
    same = [n for n, known in enumerate(old.tokens) if known.kind == token.kind]
    alike = [n for n in same if old.tokens[n].text.rpartition("//")[0] == place] if token.kind == "piece" else []
    return alike or same or [old.unk]


def _header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        header = json.loads(metadata[_KEY])
        version = header["version"]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: is a safetensors file, but no checkpoint of fedcomet") from error
    if version != _VERSION:
        raise DataError(
            f"{path}: has format version {version}, this program reads version {_VERSION}; "
            "use the program that wrote it"
        )
    missing = {"decoder", "digest", "extra"} - header.keys()
    if missing:
        raise DataError(f"{path}: its header lacks {', '.join(sorted(missing))}; the file was altered")
    return dict(header)


def _decoder(path: Path, shape: dict[str, Any], weights: dict[str, Tensor]) -> Decoder:
    try:
        with torch.device("meta"):
            decoder = Decoder(DecoderConfig(**shape))
        decoder.load_state_dict(weights, assign=True)
    except (TypeError, RuntimeError) as error:
        raise DataError(f"{path}: its weights don't fit the decoder that its header describes") from error
    return decoder


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _digest(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the header, and names, types, shapes and bytes of all tensors."""
    described = _canonical({key: value for key, value in header.items() if key != "digest"})
    return digest_of(tensors, described.encode())


def _canonical(header: dict[str, Any]) -> str:
    return json.dumps(header, sort_keys=True, allow_nan=False)

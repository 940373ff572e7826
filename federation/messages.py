"""What the two sides of a federation say to each other: five questions, their answers, and the refusal.

A message is a frozen dataclass. On the wire it is a JSON header (every plain field, the kind and the version) and named
payloads (every field of bytes or of float32). Whoever reads one trusts nothing: a header or payload that does not fit
is a `ProtocolError` that names the field, never another exception. How a transport carries a `Wire` is not known here.

A message with a `coding` holds vectors that were rounded to what that coding can tell, and its payloads are packed so.
Weights that a site has from the question before need not travel again: `known` names them in their place.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from federation import canonical, parts
from federation.coding import Coding, CodingError, Packed, Told, pack
from federation.parts import Bytes, Joined, Parts
from tokenizer.codebook import TokenizerOptions
from tokenizer.errors import FedcometError
from tokenizer.split import SplitRule

VERSION = 1
"""The version of this vocabulary; a message of another version is refused."""

Vector = NDArray[np.float32]
Words = NDArray[np.unsignedinteger]
"""Integers of a masked sum, little-endian uint32 or uint64."""
Payload = bytes | Vector | Words | Bytes | Joined
"""What travels beside a header; uint8 is a packed vector."""

_HEADER_LIMIT = 1 << 20
_SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ProtocolError(FedcometError):
    """A message that does not follow the protocol, or that does not fit the run it claims to belong to."""


class DeliveryError(ProtocolError):
    """No answer: the transport says that the site could not be reached, or broke down while it worked."""


class SiteRefusal(FedcometError):
    """A site's own decision not to answer; the text is meant for the other side and holds nothing about patients."""


@dataclass(frozen=True)
class SurveyRequest:
    """Asks what a site may tell about its codes.

    In every request, `deadline_s` is seconds since the epoch: past it nobody waits for the answer; and `signature` is
    made over all other fields with the key whose public half is `coordinator` (`federation.identity`); or both are
    empty.
    """

    kind: ClassVar[str] = "query.survey"
    split: SplitRule
    tokenizer: TokenizerOptions
    deadline_s: float
    coordinator: str = ""
    signature: str = ""


@dataclass(frozen=True)
class SurveyReply:
    """A site's released statistics: `tokenizer.codebook.Survey` bytes."""

    kind: ClassVar[str] = "query.survey.reply"
    site: str
    survey: bytes


@dataclass(frozen=True)
class PrepareRequest:
    """Carries the run manifest and the codebook, and asks the site to encode its records with them."""

    kind: ClassVar[str] = "query.prepare"
    manifest: bytes
    codebook: bytes
    deadline_s: float
    coordinator: str = ""
    signature: str = ""


@dataclass(frozen=True)
class SplitCounts:
    """How much a split of a site's store holds."""

    patients: int
    events: int
    tokens: int


@dataclass(frozen=True)
class PrepareReply:
    """A site's agreement to the manifest, and the size of its store.

    `fallbacks` counts the events whose code has no token of its own; which codes these are stays at the site. In a
    private run only patients are counted; the other counts are 0. In a run with secure aggregation `splits` is empty
    and `fallbacks` is 0.
    """

    kind: ClassVar[str] = "query.prepare.reply"
    site: str
    manifest_hash: str
    splits: Mapping[str, SplitCounts]
    fallbacks: int


@dataclass(frozen=True, eq=False)
class TrainRequest:
    """Asks for the local work of one round, from the global weights: float32 [P].

    Or, where `known` is their sha256, float32 [0]: the site has them.
    """

    kind: ClassVar[str] = "train"
    manifest_hash: str
    round: int
    weights: Told
    deadline_s: float
    coding: Coding = "float32"
    known: str = ""
    coordinator: str = ""
    signature: str = ""

    @cached_property
    def weights_sha256(self) -> str:
        """The sha256 of the weights' bytes as they travel."""
        return self.known or sha256_of_payload(_packed(self.weights, self.coding))

    @cached_property
    def digest(self) -> str:
        """Name what is asked: equal work has an equal digest, whenever it is due."""
        return _digest(self.kind, self.manifest_hash, str(self.round), self.weights_sha256)


@dataclass(frozen=True, eq=False)
class TrainReply:
    """A site's update: local minus global weights, float32 [P], with what went into it.

    `tokens` counts the targets trained on, `loss` is their mean negative log-likelihood in nats, `seconds` is the
    site's wall-clock time, for people only. Of private training they would tell of single patients: there, `tokens` is
    the number of patients that the round draws on average (`federation.protection`), `loss` and `seconds` are 0.
    """

    kind: ClassVar[str] = "train.reply"
    site: str
    manifest_hash: str
    round: int
    request_digest: str
    update: Told
    tokens: int
    steps: int
    loss: float
    seconds: float
    coding: Coding = "float32"


@dataclass(frozen=True, eq=False)
class EvaluateRequest:
    """Asks for the loss of the weights, float32 [P], after round `round` on one split of the site's patients.

    `known` is as in `TrainRequest`.
    """

    kind: ClassVar[str] = "evaluate"
    manifest_hash: str
    round: int
    split: str
    weights: Told
    deadline_s: float
    coding: Coding = "float32"
    known: str = ""
    coordinator: str = ""
    signature: str = ""

    @cached_property
    def weights_sha256(self) -> str:
        """The sha256 of the weights' bytes as they travel."""
        return self.known or sha256_of_payload(_packed(self.weights, self.coding))

    @cached_property
    def digest(self) -> str:
        """Name what is asked: equal work has an equal digest, whenever it is due."""
        return _digest(self.kind, self.manifest_hash, f"{self.round}/{self.split}", self.weights_sha256)


@dataclass(frozen=True)
class EvaluateReply:
    """The sum of negative log-likelihoods in nats over `tokens` targets of the split."""

    kind: ClassVar[str] = "evaluate.reply"
    site: str
    manifest_hash: str
    round: int
    split: str
    request_digest: str
    nll: float
    tokens: int


@dataclass(frozen=True, eq=False)
class AssessRequest:
    """Asks how well the weights, float32 [P], answer the manifest's questions about the site's patients.

    `round` is the one after which it is asked; `known` is as in `TrainRequest`.
    """

    kind: ClassVar[str] = "evaluate.tasks"
    manifest_hash: str
    round: int
    weights: Told
    deadline_s: float
    coding: Coding = "float32"
    known: str = ""
    coordinator: str = ""
    signature: str = ""

    @cached_property
    def weights_sha256(self) -> str:
        """The sha256 of the weights' bytes as they travel."""
        return self.known or sha256_of_payload(_packed(self.weights, self.coding))

    @cached_property
    def digest(self) -> str:
        """Name what is asked: equal work has an equal digest, whenever it is due."""
        return _digest(self.kind, self.manifest_hash, str(self.round), self.weights_sha256)


@dataclass(frozen=True, eq=False)
class AssessReply:
    """The site's tallies (`federation.tallies`) of the manifest's questions, one after another: float32 [Q x size]."""

    kind: ClassVar[str] = "evaluate.tasks.reply"
    site: str
    manifest_hash: str
    round: int
    request_digest: str
    tallies: Vector


@dataclass(frozen=True)
class Kept:
    """In a run with secure aggregation: the update or the evaluation is made, and stays at the site until it is masked.

    `request_digest` names what was asked. Nothing is told of what was found.
    """

    kind: ClassVar[str] = "kept"
    site: str
    manifest_hash: str
    round: int
    request_digest: str


@dataclass(frozen=True)
class Lacking:
    """The site doesn't have the weights that the request `request_digest` names as known: it is to be sent them."""

    kind: ClassVar[str] = "lacking"
    site: str
    manifest_hash: str
    request_digest: str


@dataclass(frozen=True)
class Refusal:
    """The answer of a site that does not answer: who, and why in words that hold nothing about patients."""

    kind: ClassVar[str] = "refusal"
    site: str
    reason: str


Weighted = TrainRequest | EvaluateRequest | AssessRequest
"""Requests that bring the global weights."""
Request = SurveyRequest | PrepareRequest | TrainRequest | EvaluateRequest | AssessRequest
Reply = SurveyReply | PrepareReply | TrainReply | EvaluateReply | AssessReply | Kept | Lacking | Refusal
Message = Request | Reply

KINDS: Mapping[str, type[Any]] = {kind.kind: kind for kind in (*Request.__args__, *Reply.__args__)}
"""The vocabulary of this module by name."""


@dataclass(frozen=True, eq=False)
class Wire:
    """A message as a transport carries it: a JSON header and named payloads."""

    header: bytes
    payloads: "Mapping[str, Payload]"


def to_wire(message: Any) -> Wire:
    """Lay a message out for the transport; vectors are not copied."""
    header: dict[str, Any] = {"kind": message.kind, "version": VERSION}
    payloads: dict[str, Payload] = {}
    for field in dataclasses.fields(message):
        value = getattr(message, field.name)
        if field.type == Words:
            payloads[field.name] = np.ascontiguousarray(value)
        elif isinstance(value, np.ndarray | Packed):
            payloads[field.name] = _packed(value, getattr(message, "coding", "float32"))
        elif isinstance(value, bytes):
            payloads[field.name] = value
        else:
            header[field.name] = value
    return Wire(canonical.encode(header), payloads)


def bytes_of(payload: Payload) -> Joined:
    """Give a payload's bytes as they travel; nothing is copied."""
    if isinstance(payload, Joined):
        return payload
    if isinstance(payload, np.ndarray):
        payload = np.ascontiguousarray(payload.astype(payload.dtype.newbyteorder("<"), copy=False)).view(np.uint8)
    return Joined([payload])


def sha256_of_payload(payload: Payload) -> str:
    """Give the sha256 of a payload's bytes as they travel."""
    return parts.sha256(bytes_of(payload))


def _packed(vector: Told, coding: Coding) -> Vector | Bytes | Joined:
    """Give a vector as it travels; of a message that came they are the very bytes that came."""
    if isinstance(vector, Packed) and vector.coding == coding != "float32":
        data = vector.data
        return data if isinstance(data, np.ndarray | Joined) else data[: data.size]
    whole = np.ascontiguousarray(vector, np.float32)
    return whole if coding == "float32" else pack(whole, coding)


def from_wire(wire: Wire, kinds: Mapping[str, type[Any]] = KINDS) -> Any:
    """Read a message that may come from anybody.

    Args:
        wire: what the transport carried.
        kinds: the vocabulary by name; that of this module unless told otherwise.

    Returns:
        A message of one of the kinds.

    Raises:
        ProtocolError: naming the version, kind, field or payload that does not fit.
    """
    fields = _header(wire.header)
    version, kind_name = fields.pop("version", None), fields.pop("kind", None)
    if version != VERSION:
        raise ProtocolError(f"The message has version {_short(version)}; this software speaks version {VERSION}.")
    kind = kinds.get(kind_name) if isinstance(kind_name, str) else None
    if kind is None:
        raise ProtocolError(f"There is no message of kind {_short(kind_name)}.")
    for field in dataclasses.fields(kind):
        if field.type in (bytes, Vector, Told, Words):
            if field.name in fields:
                raise ProtocolError(f"{kind_name}.{field.name} must be a payload, not part of the header.")
            fields[field.name] = _payload(wire.payloads, kind_name, field, fields.get("coding", "float32"))
    expected = {field.name for field in dataclasses.fields(kind)}
    if extra := sorted(set(wire.payloads) - expected):
        raise ProtocolError(f"{kind_name} has the unknown payload {_short(extra[0])}.")
    message = canonical.build(kind, fields, kind_name, ProtocolError)
    site = getattr(message, "site", None)
    if site is not None and not is_site_name(site):
        raise ProtocolError(f"{_short(site)} can't be the name of a site: use letters, digits, '.', '_' and '-'.")
    return message


def is_site_name(name: str) -> bool:
    """Tell whether a name may stand in files, ledgers and reports: 1 to 64 letters, digits, '.', '_' or '-'."""
    return _SITE_NAME.fullmatch(name) is not None


PRINTABLE = 500
"""How many characters of a text from elsewhere are kept."""


def printable(text: str) -> str:
    """Make a text from elsewhere fit for ledgers and terminals: one line of printable characters, at most 500."""
    return "".join(c if c.isprintable() else " " for c in text[:PRINTABLE])


def _header(data: bytes) -> dict[str, Any]:
    if len(data) > _HEADER_LIMIT:
        raise ProtocolError(f"The message's header has {len(data)} bytes; at most {_HEADER_LIMIT} are read.")
    try:
        header = json.loads(data.decode())
        json.dumps(header, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
    except (ValueError, RecursionError):
        raise ProtocolError("The message's header is not JSON.") from None
    if not isinstance(header, dict):
        raise ProtocolError("The message's header is not a JSON object.")
    return header


_DTYPES: dict[Any, tuple[str, ...]] = {Vector: ("float32",), Told: ("float32",), Words: ("uint32", "uint64")}


def _payload(payloads: Mapping[str, Any], kind: str, field: dataclasses.Field[Any], coding: Any) -> Any:
    value: Payload | None = payloads.get(field.name)
    if value is None:
        raise ProtocolError(f"{kind} lacks the payload {field.name!r}.")
    if field.type == Told and coding in ("bfloat16", "int8"):
        return _as_told(value, coding, f"The payload {field.name!r} of {kind}")
    fits = value.dtype.name in _DTYPES.get(field.type, ()) if isinstance(value, np.ndarray) else field.type is bytes
    if not fits:
        raise ProtocolError(f"The payload {field.name!r} of {kind} is of the wrong type.")
    return bytes(value) if isinstance(value, Joined) else value


def _as_told(value: Payload, coding: Coding, what: str) -> Packed:
    data: Parts | NDArray[Any] = np.frombuffer(value, np.uint8) if isinstance(value, bytes) else value
    if isinstance(data, np.ndarray) and data.dtype != np.uint8:
        raise ProtocolError(f"{what} is of the wrong type.")
    try:
        return Packed(data, coding)
    except CodingError as cause:
        raise ProtocolError(f"{what} can't be read: {cause}") from None


def _digest(kind: str, manifest_hash: str, what: str, weights_sha256: str) -> str:
    return hashlib.sha256(f"{kind}\n{manifest_hash}\n{what}\n{weights_sha256}\n".encode()).hexdigest()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

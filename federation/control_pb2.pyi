from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EnrolRequest(_message.Message):
    __slots__ = ("secret", "request", "proof")
    SECRET_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    secret: bytes
    request: bytes
    proof: str
    def __init__(self, secret: _Optional[bytes] = ..., request: _Optional[bytes] = ..., proof: _Optional[str] = ...) -> None: ...

class EnrolReply(_message.Message):
    __slots__ = ("certificate", "authority", "federation", "fleet_port", "control_port", "coordinator")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    AUTHORITY_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    FLEET_PORT_FIELD_NUMBER: _ClassVar[int]
    CONTROL_PORT_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_FIELD_NUMBER: _ClassVar[int]
    certificate: str
    authority: str
    federation: str
    fleet_port: int
    control_port: int
    coordinator: str
    def __init__(self, certificate: _Optional[str] = ..., authority: _Optional[str] = ..., federation: _Optional[str] = ..., fleet_port: _Optional[int] = ..., control_port: _Optional[int] = ..., coordinator: _Optional[str] = ...) -> None: ...

class RunName(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class Run(_message.Message):
    __slots__ = ("name", "manifest_hash", "state", "reason", "created_at", "started_at", "ended_at")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_HASH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    ENDED_AT_FIELD_NUMBER: _ClassVar[int]
    name: str
    manifest_hash: str
    state: str
    reason: str
    created_at: float
    started_at: float
    ended_at: float
    def __init__(self, name: _Optional[str] = ..., manifest_hash: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., created_at: _Optional[float] = ..., started_at: _Optional[float] = ..., ended_at: _Optional[float] = ...) -> None: ...

class ListRunsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListRunsReply(_message.Message):
    __slots__ = ("runs",)
    RUNS_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[Run]
    def __init__(self, runs: _Optional[_Iterable[_Union[Run, _Mapping]]] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("after", "run")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    after: int
    run: str
    def __init__(self, after: _Optional[int] = ..., run: _Optional[str] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("id", "at", "who", "what", "run", "round", "site", "text")
    ID_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    WHO_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    id: int
    at: float
    who: str
    what: str
    run: str
    round: int
    site: str
    text: str
    def __init__(self, id: _Optional[int] = ..., at: _Optional[float] = ..., who: _Optional[str] = ..., what: _Optional[str] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., site: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class ProposeRunRequest(_message.Message):
    __slots__ = ("run", "plan", "manifest")
    RUN_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    run: str
    plan: bytes
    manifest: bytes
    def __init__(self, run: _Optional[str] = ..., plan: _Optional[bytes] = ..., manifest: _Optional[bytes] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("hash", "manifest")
    HASH_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    hash: str
    manifest: bytes
    def __init__(self, hash: _Optional[str] = ..., manifest: _Optional[bytes] = ...) -> None: ...

class Approval(_message.Message):
    __slots__ = ("manifest_hash", "site", "policy", "time", "signature")
    MANIFEST_HASH_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    manifest_hash: str
    site: str
    policy: str
    time: str
    signature: str
    def __init__(self, manifest_hash: _Optional[str] = ..., site: _Optional[str] = ..., policy: _Optional[str] = ..., time: _Optional[str] = ..., signature: _Optional[str] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ("run", "reason")
    RUN_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    run: str
    reason: str
    def __init__(self, run: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("name", "role", "status", "ed25519", "fingerprint", "expires_at", "last_seen", "version", "state")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ED25519_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: str
    status: str
    ed25519: str
    fingerprint: str
    expires_at: float
    last_seen: float
    version: str
    state: str
    def __init__(self, name: _Optional[str] = ..., role: _Optional[str] = ..., status: _Optional[str] = ..., ed25519: _Optional[str] = ..., fingerprint: _Optional[str] = ..., expires_at: _Optional[float] = ..., last_seen: _Optional[float] = ..., version: _Optional[str] = ..., state: _Optional[str] = ...) -> None: ...

class ListSitesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSitesReply(_message.Message):
    __slots__ = ("members",)
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    members: _containers.RepeatedCompositeFieldContainer[Member]
    def __init__(self, members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ...) -> None: ...

class RevokeRequest(_message.Message):
    __slots__ = ("site", "reason")
    SITE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    site: str
    reason: str
    def __init__(self, site: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class BudgetReport(_message.Message):
    __slots__ = ("site", "epsilon", "delta", "limit_epsilon", "limit_delta")
    SITE_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    LIMIT_EPSILON_FIELD_NUMBER: _ClassVar[int]
    LIMIT_DELTA_FIELD_NUMBER: _ClassVar[int]
    site: str
    epsilon: float
    delta: float
    limit_epsilon: float
    limit_delta: float
    def __init__(self, site: _Optional[str] = ..., epsilon: _Optional[float] = ..., delta: _Optional[float] = ..., limit_epsilon: _Optional[float] = ..., limit_delta: _Optional[float] = ...) -> None: ...

class HealthReport(_message.Message):
    __slots__ = ("site", "version", "queue", "free_gigabytes", "entries", "entries_sha256", "known_sha256", "restored")
    SITE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    FREE_GIGABYTES_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_SHA256_FIELD_NUMBER: _ClassVar[int]
    KNOWN_SHA256_FIELD_NUMBER: _ClassVar[int]
    RESTORED_FIELD_NUMBER: _ClassVar[int]
    site: str
    version: str
    queue: int
    free_gigabytes: int
    entries: int
    entries_sha256: str
    known_sha256: str
    restored: bool
    def __init__(self, site: _Optional[str] = ..., version: _Optional[str] = ..., queue: _Optional[int] = ..., free_gigabytes: _Optional[int] = ..., entries: _Optional[int] = ..., entries_sha256: _Optional[str] = ..., known_sha256: _Optional[str] = ..., restored: _Optional[bool] = ...) -> None: ...

class Witness(_message.Message):
    __slots__ = ("entries", "sha256", "epsilon", "delta", "time")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    entries: int
    sha256: str
    epsilon: float
    delta: float
    time: float
    def __init__(self, entries: _Optional[int] = ..., sha256: _Optional[str] = ..., epsilon: _Optional[float] = ..., delta: _Optional[float] = ..., time: _Optional[float] = ...) -> None: ...

class Text(_message.Message):
    __slots__ = ("site", "text")
    SITE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    site: str
    text: str
    def __init__(self, site: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class ListMessagesRequest(_message.Message):
    __slots__ = ("site", "after")
    SITE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    site: str
    after: int
    def __init__(self, site: _Optional[str] = ..., after: _Optional[int] = ...) -> None: ...

class Message(_message.Message):
    __slots__ = ("id", "at", "who", "site", "text")
    ID_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    WHO_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    id: int
    at: float
    who: str
    site: str
    text: str
    def __init__(self, id: _Optional[int] = ..., at: _Optional[float] = ..., who: _Optional[str] = ..., site: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class ListMessagesReply(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[Message]
    def __init__(self, messages: _Optional[_Iterable[_Union[Message, _Mapping]]] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("request", "proof")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    request: bytes
    proof: str
    def __init__(self, request: _Optional[bytes] = ..., proof: _Optional[str] = ...) -> None: ...

class Certificate(_message.Message):
    __slots__ = ("certificate",)
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    certificate: str
    def __init__(self, certificate: _Optional[str] = ...) -> None: ...

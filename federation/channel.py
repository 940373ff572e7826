"""One end of a connection to a coordinator: calls by name, and errors that say what to do."""

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.message import Message

from federation.calls import CHANNEL_OPTIONS, Call
from federation.messages import printable
from tokenizer.errors import FedcometError

_CODE = grpc.StatusCode


class CallError(FedcometError):
    """The coordinator can't be reached, or refuses a call; `code` is gRPC's."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        self.code = code
        super().__init__(text)


class Channel:
    """A connection to one of a coordinator's services, over TLS that trusts one authority only."""

    def __init__(
        self,
        address: str,
        authority: bytes,
        key: bytes | None = None,
        certificate: bytes | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        """Connect lazily.

        Args:
            address: host and port, as "host:port".
            authority: the certificate that the server's must come from, PEM.
            key, certificate: of the caller, PEM; None where the server takes anybody.
            timeout_s: how long a call may take.
        """
        self.address, self._timeout_s = address, timeout_s
        credentials = grpc.ssl_channel_credentials(authority, key, certificate)
        self._channel = grpc.secure_channel(address, credentials, list(CHANNEL_OPTIONS))

    def call(self, call: Call, request: Message) -> Any:
        """Ask, and give the reply.

        Raises:
            CallError: no reply came, or it was a refusal.
        """
        ask = self._channel.unary_unary(call.path, _encode, call.reply.FromString)
        try:
            return ask(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise _told(error, self.address) from None

    def stream(self, call: Call, request: Message) -> Iterator[Any]:
        """Ask, and give the replies as they come; closing the iterator ends the call.

        Raises:
            CallError: the stream ended otherwise than the server wanted.
        """
        ask = self._channel.unary_stream(call.path, _encode, call.reply.FromString)
        replies = ask(request)
        try:
            yield from replies
        except grpc.RpcError as error:
            raise _told(error, self.address) from None
        finally:
            replies.cancel()

    def close(self) -> None:
        """End the connection and all its calls."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def _encode(message: Message) -> bytes:
    return message.SerializeToString(deterministic=True)


def _told(error: grpc.RpcError, address: str) -> CallError:
    """What a failed call means, for a person."""
    if not isinstance(error, grpc.Call):
        return CallError(_CODE.UNKNOWN, f"The coordinator at {address} gave no answer.")
    code, details = error.code(), printable(error.details() or "")
    if code in (_CODE.UNAVAILABLE, _CODE.UNKNOWN):
        return CallError(code, _unreachable(details, address))
    if code is _CODE.DEADLINE_EXCEEDED:
        return CallError(code, f"The coordinator at {address} did not answer in time; try again later.")
    if code is _CODE.UNIMPLEMENTED:
        return CallError(code, f"The coordinator at {address} doesn't know this call; one side needs an update.")
    return CallError(code, details or f"The coordinator at {address} refused: {code.name}.")


def _unreachable(details: str, address: str) -> str:
    if "ALERT" in details or "Socket closed" in details or "Broken pipe" in details:
        return (
            f"The coordinator at {address} ended the connection ({details}). If this site's certificate expired or is "
            "of another federation, ask the coordinator for a new invitation and join again."
        )
    if "certificate" in details.lower() or "Hostname" in details:
        return (
            f"What answers at {address} has no valid certificate of this federation for that address. It may be "
            "another server or somebody in between: check the address with the coordinator; if it is right, the "
            "coordinator runs fedcomet coordinator rotate."
        )
    return (
        f"The coordinator at {address} can't be reached ({details}); check the address, the network and the firewall."
    )

"""The calls of `control.proto` as a table, for both ends of a connection: names, messages, and limits on their size.

Both ends read the table from the compiled description, so a call that one of them has and the other lacks can't exist
without a test noticing, and no generated service code is needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from federation import control_pb2

FLEET_PORT, CONTROL_PORT, ENROL_PORT, UI_PORT = 8443, 8444, 8445, 8446
"""Where a coordinator listens unless it says otherwise."""

MOST_BYTES = 4 << 20
"""The largest message of `Control`: a manifest or plan has some kilobytes."""

MOST_ENROL_BYTES = 16 << 10
"""The largest message of `Enrolment`, which anybody may send."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MOST_BYTES),
    ("grpc.keepalive_time_ms", 30_000),  # a stream through a dead network ends instead of waiting for ever
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.enable_http_proxy", 0),  # an https_proxy of the machine is for others
)


@dataclass(frozen=True)
class Call:
    """A call: its path, the classes of its messages, and whether many replies come."""

    path: str
    request: type[Message]
    reply: type[Message]
    streams: bool


def calls_of(service: ServiceDescriptor) -> Mapping[str, Call]:
    """Give the calls of a service by their names."""
    return {
        method.name: Call(
            f"/{service.full_name}/{method.name}",
            GetMessageClass(method.input_type),
            GetMessageClass(method.output_type),
            method.server_streaming,
        )
        for method in service.methods
    }


ENROLMENT_SERVICE = control_pb2.DESCRIPTOR.services_by_name["Enrolment"]
CONTROL_SERVICE = control_pb2.DESCRIPTOR.services_by_name["Control"]
ENROLMENT, CONTROL = calls_of(ENROLMENT_SERVICE), calls_of(CONTROL_SERVICE)

"""The family of errors that a person may meet.

A message names the thing, the place and the next step; the command line prints it without a traceback. An error that
belongs to a later room (a refused manifest, a malformed reply) is defined in that room, as a child of `FedcometError`.
"""

from typing import ClassVar


class FedcometError(Exception):
    """Base of every error that fedcomet raises on purpose.

    Attributes:
        exit_code: of the command that ends with it.
    """

    exit_code: ClassVar[int] = 1


class DataError(FedcometError):
    """Records, stores or codebooks that can't be used as they are."""


class ConfigError(FedcometError):
    """A setting that is unknown, missing or out of range."""

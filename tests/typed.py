"""The command line as people type it, in this process: a new one costs seconds of imports each time."""

import io
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest import mock

import click
import typer

import fedcomet as command_line

PLAIN = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}


@dataclass(frozen=True)
class Said:
    """What a command printed, and its exit code."""

    returncode: int
    stdout: str
    stderr: str


def fedcomet(*arguments: object, **environment: str) -> Said:
    """Run `fedcomet` with these words and environment variables."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    variables: Mapping[str, str] = {**PLAIN, **environment}
    with (
        mock.patch.dict(os.environ, variables),
        mock.patch.object(sys, "argv", ["fedcomet", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            command_line.main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return Said(code, out.getvalue(), err.getvalue())


def commands() -> dict[tuple[str, ...], click.Command]:
    """Every command and group of the command line by its words, a group before what is in it."""

    def below(command: click.Command, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
        yield words, command
        if isinstance(command, click.Group):
            for name, each in command.commands.items():
                yield from below(each, (*words, name))

    return dict(below(typer.main.get_command(command_line.app), ()))

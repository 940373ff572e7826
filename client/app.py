"""The Flower ClientApp of a site: it takes Flower messages, asks `client.site.Site`, and never breaks down.

The site's own configuration comes from the node (`flower-supernode --node-config`): `name`, `data` (the folder of its
MEDS dataset) and `state` (a folder of its own); `settings` is the file that says what is done to the records (when not
given: "standard"; with "none" they stay as they are); `policy` is the file that says what the site allows
(`client.policy`; when not given, it answers whoever reaches it); `budget` is the SQLAlchemy URL of the privacy
budget's database (`client.budget`; when not given, a file in `state`). How its machine trains is its own choice:
`device`, `precision`, `micro_tokens`, `checkpointing`, `compile`, `processes` and `shard` are those of
`model.settings.Machine`, and `snapshot_minutes` is how much of a round's work may be lost when it is stopped.

This is the one place where messages leave, and each one is on the site's list first (`client.outbound`). Whatever goes
wrong is answered by a refusal. The text of an error travels only when it is about the protocol or settings; errors
about records travel as their mere fact, and unexpected ones as the name of their type. The full story is in
`state/site.log`.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.files import SiteFiles
from client.site import Site
from federation import flower, masking
from federation.messages import ProtocolError, Refusal, Reply, Request, SiteRefusal
from model.settings import Machine
from model.train import TrainingDiverged, WindowTooLarge
from tokenizer import durable
from tokenizer.errors import ConfigError, FedcometError
from tokenizer.settings import STANDARD, OtherPreparation

app = ClientApp()

_MAY_TRAVEL = (SiteRefusal, ProtocolError, TrainingDiverged, WindowTooLarge, OtherPreparation)
"""Errors whose texts are written for the other side, too: they name no file, and nothing of records."""


@app.query("survey")
def survey(message: Message, context: Context) -> Message:
    """Answer a survey request."""
    return _answer(message, context)


@app.query("prepare")
def prepare(message: Message, context: Context) -> Message:
    """Answer a prepare request."""
    return _answer(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer a train request."""
    return _answer(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Answer an evaluate request."""
    return _answer(message, context)


@app.evaluate("tasks")
def assess(message: Message, context: Context) -> Message:
    """Answer a request for the answers to the run's questions."""
    return _answer(message, context)


@app.query("mask_keys")
def mask_keys(message: Message, context: Context) -> Message:
    """Answer the first request of a masked sum."""
    return _answer(message, context)


@app.query("mask_shares")
def mask_shares(message: Message, context: Context) -> Message:
    """Answer the second request of a masked sum."""
    return _answer(message, context)


@app.query("masked")
def masked(message: Message, context: Context) -> Message:
    """Answer the third request of a masked sum: the only one that brings an update."""
    return _answer(message, context)


@app.query("mask_consent")
def mask_consent(message: Message, context: Context) -> Message:
    """Answer the fourth request of a masked sum."""
    return _answer(message, context)


@app.query("mask_open")
def mask_open(message: Message, context: Context) -> Message:
    """Answer the last request of a masked sum."""
    return _answer(message, context)


def play(site: SiteFiles, node: int, message: Message) -> Message:
    """Answer a message as a site with this number among Flower's nodes, but without a node: in a simulation.

    It is here because a worker process that plays sites imports what it calls, and needs nothing of the coordinator's.
    """
    return app(message, Context(0, node, site.node_config(), RecordDict(), {}))


def site_files(context: Context) -> SiteFiles:
    """Read the site's files off the node's configuration.

    Raises:
        ConfigError: naming the key that is missing or no text.
    """
    values = {}
    for key in ("name", "data", "state"):
        value = context.node_config.get(key)
        if not isinstance(value, str) or not value:
            raise ConfigError(f"The node's configuration lacks {key!r}; give it by --node-config '{key}=\"...\"'.")
        values[key] = value
    settings = str(context.node_config.get("settings", STANDARD))
    choices = {f.name: _value(context, f.name, f.default) for f in dataclasses.fields(Machine)}
    minutes = _value(context, "snapshot_minutes", SiteFiles.snapshot_minutes)
    folders = Path(values["data"]), Path(values["state"])
    policy, budget = _value(context, "policy", ""), _value(context, "budget", "")
    rules = Path(policy) if policy else None
    return SiteFiles(values["name"], *folders, settings, Machine(**choices), minutes, rules, budget)


def _value(context: Context, key: str, default: Any) -> Any:
    """A setting that need not be given, of the type of its default."""
    value = context.node_config.get(key, default)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise ConfigError(
            f"The node's configuration has {key} = {value!r}; a value of type {type(default).__name__} is expected."
        )
    return value


def _answer(message: Message, context: Context) -> Message:
    try:
        site = Site(site_files(context))
    except ConfigError as error:
        # Without a state folder there is no list to write on: this text, which tells of no record, is on none.
        return flower.reply(Refusal(f"node-{context.node_id}", str(error)), message)
    reply, place = _ask(site, message)
    return _send(site, reply, place, message)


def _send(site: Site, reply: Reply | masking.Reply, place: masking.Place | None, to: Message) -> Message:
    """Write down what is about to leave, and let it go; what can't be written down, or is too much, doesn't leave."""
    name, asked = site.files.name, to.metadata.message_type
    try:
        record = flower.to_record(reply)
        sha256, size = flower.on_the_wire(record)
        if not isinstance(reply, Refusal):
            try:
                site.gate.admit_bytes(size)
            except SiteRefusal as refusal:
                _log(site, asked, refusal)
                reply = Refusal(name, str(refusal))
                record = flower.to_record(reply)
                sha256, size = flower.on_the_wire(record)
        site.gate.note(reply, asked, sha256, size, place)
        answer = flower.packed_reply(record, to)
        site.gate.released(reply, place)
        if not isinstance(reply, Refusal):
            site.files.note_trouble(asked, "")
    except Exception as error:
        _log(site, asked, error)
        # The texts that leave without being on the list, for the list is what's broken: always one of these two.
        why = "its disk is full" if durable.out_of_room(error) else "see its own log"
        return flower.reply(
            Refusal(name, f"This site can't write down what leaves ({why}), so it gives no answer."), to
        )
    return answer


def _ask(site: Site, message: Message) -> tuple[Reply | masking.Reply, masking.Place | None]:
    """Give the site's answer and, if it is about a masked sum, the place of that."""
    name, place = site.files.name, None
    try:
        request = flower.read(message)
        if not isinstance(request, Request | masking.Request) or request.kind != message.metadata.message_type:
            raise ProtocolError(f"A {request.kind} is not a request that came as {message.metadata.message_type}.")
        place = getattr(request, "place", None)
        return site.answer(request), place
    except _MAY_TRAVEL as error:
        _log(site, message.metadata.message_type, error)
        return Refusal(name, str(error)), place
    except Exception as error:
        _log(site, message.metadata.message_type, error)
        return Refusal(name, _told(name, error)), place


def _told(name: str, error: Exception) -> str:
    """What the coordinator hears of an error: its kind, and nothing that it may say of records, files or settings."""
    if durable.out_of_room(error):
        return f"{name} has no room left on its disk; it takes part again when there is."
    if isinstance(error, ConfigError):
        return f"{name} is not set up as it must be; its own log says what is wrong."
    if isinstance(error, FedcometError):
        return f"{name} can't use its records or files; its own log says which and why."
    return f"{name} ran into an unexpected {type(error).__name__}; its own log says more."


def _log(site: Site, task: str, error: BaseException) -> None:
    """Write an error down for the site; where even that fails, its text would otherwise travel in Flower's error."""
    with contextlib.suppress(OSError):
        site.archive.log(task, error)
    if lacking := durable.lacking(error):
        why = f"found too little room ({lacking}); make room, and all goes on by itself"
        site.files.note_trouble(task, why)
    elif not isinstance(error, _MAY_TRAVEL):
        site.files.note_trouble(task, f"could not be given: {site.archive.log_file} says why")

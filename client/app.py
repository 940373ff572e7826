"""The Flower ClientApp of a site: it takes Flower messages, asks `client.site.Site`, and never breaks down.

The site's own configuration comes from the node (`flower-supernode --node-config`): `name`, `data` (the folder of its
MEDS dataset), `state` (a folder of its own) and, where it is not "cpu", the torch `device`; `settings` is the file that
says what is done to the records (when not given: "standard"; with "none" they stay as they are). Whatever goes
wrong is answered by a refusal. The text of an error travels only when it is about the protocol or settings; errors
about records travel as their mere fact, and unexpected ones as the name of their type. The full story is in
`state/site.log`.
"""

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.site import Site, SiteFiles
from federation import flower
from federation.messages import ProtocolError, Refusal, Reply, Request, SiteRefusal
from model.train import TrainingDiverged
from tokenizer.errors import ConfigError, FedcometError
from tokenizer.settings import STANDARD

app = ClientApp()

_MAY_TRAVEL = (SiteRefusal, ProtocolError, ConfigError, TrainingDiverged)


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
    device = str(context.node_config.get("device", "cpu"))
    settings = str(context.node_config.get("settings", STANDARD))
    return SiteFiles(values["name"], Path(values["data"]), Path(values["state"]), device, settings)


def _answer(message: Message, context: Context) -> Message:
    try:
        files = site_files(context)
    except ConfigError as error:
        return flower.reply(Refusal(f"node-{context.node_id}", str(error)), message)
    return flower.reply(_ask(Site(files), message), message)


def _ask(site: Site, message: Message) -> Reply:
    name = site.files.name
    try:
        request = flower.read(message)
        if not isinstance(request, Request) or request.kind != message.metadata.message_type:
            raise ProtocolError(f"A {request.kind} is not a request that came as {message.metadata.message_type}.")
        return site.answer(request)
    except _MAY_TRAVEL as error:
        site.archive.log(message.metadata.message_type, error)
        return Refusal(name, str(error))
    except FedcometError as error:
        site.archive.log(message.metadata.message_type, error)
        return Refusal(name, f"{name} can't use its records or files; its own log says which and why.")
    except Exception as error:  # the site must answer, and must not tell what it stumbled over
        site.archive.log(message.metadata.message_type, error)
        return Refusal(name, f"{name} ran into an unexpected {type(error).__name__}; its own log says more.")

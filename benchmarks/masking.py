"""Seconds, bytes and memory of masking an update, beside the primitives of Flower's SecAgg+ on the same vector.

    python -m benchmarks.masking [--params 62000000] [--sites 10] [--peer-params 25000000] [--peer-sites 4] [--rounds 3]

Ours: one site's masking among `--sites`, without noise and with a share of noise (5.7 clips by two thirds of the
sites); its small steps (keys, shares, consent, opening); and a whole sum at the
coordinator, with one site that drops out after it shared its secrets. The peer: what `secaggplus_mod` of flwr does to
one update (scale, quantize, own mask, a mask for each other site, modulo), by its own functions in its own order. Last,
whole rounds of sums, all sites and the coordinator in one process, every message of ours packed and read as Flower's
records: ours, and flwr's own `SecAggPlusWorkflow` with `secaggplus_mod` at its clients. Each runs in a process of its
own, so that its peak memory is its own; seconds are the best of the rounds, in turn.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.masked import MaskedSite
from federation import flower
from federation.identity import Identity
from federation.masking import (
    Agreement,
    ConsentRequest,
    KeysRequest,
    MaskingOptions,
    OpenRequest,
    Place,
    SharesRequest,
)
from federation.messages import to_wire
from server.unmask import Stage, Unmasking

VALUE = 0.001


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Sum:
    """All sites of a sum; they share one buffer for their updates."""

    def __init__(self, params: int, sites: int, noise: float = 0.0) -> None:
        identities = {f"site{n:02}": Identity(Ed25519PrivateKey.generate()) for n in range(sites)}
        roster = {name: key.public for name, key in identities.items()}
        options = MaskingOptions(2 * sites // 3 + 1, 0.1, 1000, noise=noise)
        agreed = Agreement(Place("00" * 32, 1, "train", 1), "", params, roster, options)
        self.noise_key = bytes(range(32)) if noise else b""
        self.server = Unmasking(agreed)
        self.sites = {name: MaskedSite(agreed, name, key) for name, key in identities.items()}
        self.update = np.empty(params, np.float32)

    def answer(self, name: str, request: Any) -> Any:
        site = self.sites[name]
        match request:
            case KeysRequest():
                return site.keys(request)
            case SharesRequest():
                return site.shares(request)
            case ConsentRequest():
                return site.consent(request)
            case OpenRequest():
                return site.open(request)
        return site.mask_(request, self.update, 500, {}, self.noise_key)

    def play(self, until: Stage, note: Callable[[str, float], None], dropout: bool = True) -> None:
        """Walk through the stages; the last site by name drops out before it masks, or nobody does."""
        last = max(self.sites) if dropout else ""
        while self.server.stage is not until:
            for name in self.server.asked:
                if self.server.stage is Stage.MASKED and name == last:
                    continue
                self.update[:] = VALUE
                request = self.server.request(name, 0)
                begin = perf_counter()
                reply = self.answer(name, request)
                answered = perf_counter()
                self.server.receive(name, reply)
                note(f"{name}/{self.server.stage.value}", answered - begin)
                note(f"add/{self.server.stage.value}", perf_counter() - answered)
            self.server.advance()


def noisy_site(params: int, sites: int) -> dict[str, float]:
    return site(params, sites, 0.1 * 5.7 / (2 * sites / 3) ** 0.5)


def site(params: int, sites: int, noise: float = 0.0) -> dict[str, float]:
    played = Sum(params, sites, noise)
    played.play(Stage.MASKED, lambda *_: None)
    name = played.server.asked[0]
    played.update[:] = VALUE
    before, begin = peak_mb(), perf_counter()
    reply = played.answer(name, played.server.request(name, 0))
    took = perf_counter() - begin
    extra = peak_mb() - before
    wire = to_wire(reply)
    sent = len(wire.header) + sum(memoryview(payload).nbytes for payload in wire.payloads.values())
    return {"seconds": took, "bytes": sent, "extra_mb": extra, "update_mb": played.update.nbytes / 2**20}


def coordinator(params: int, sites: int) -> dict[str, float]:
    played, noted = Sum(params, sites), dict[str, list[float]]()
    played.play(Stage.DONE, lambda what, seconds: noted.setdefault(what, []).append(seconds))
    first = min(played.sites)
    small = sum(sum(v) for k, v in noted.items() if k.startswith(first) and not k.endswith(Stage.MASKED.value))
    before, begin = peak_mb(), perf_counter()
    opening = played.server.open_()
    took = perf_counter() - begin
    return {
        "small_s": small,
        "add_s": min(noted[f"add/{Stage.MASKED.value}"]),
        "open_s": took,
        "extra_mb": peak_mb() - before,
        "off": float(np.max(np.abs(opening.mean - VALUE))),
    }


def peer(params: int, sites: int) -> dict[str, float]:
    """What flwr's secaggplus_mod does in its stage of masked vectors, with its defaults: 2²² levels, modulus 2³²."""
    from flwr.common.secure_aggregation import ndarrays_arithmetic as arithmetic
    from flwr.common.secure_aggregation.quantization import quantize
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

    update = [np.full(params, VALUE, np.float32)]
    before, begin = peak_mb(), perf_counter()
    vectors = arithmetic.factor_combine(2**21, quantize(arithmetic.parameters_multiply(update, 0.5), 8.0, 2**22))
    shapes = [vector.shape for vector in vectors]
    vectors = arithmetic.parameters_addition(vectors, pseudo_rand_gen(os.urandom(32), 2**32, shapes))
    for _ in range(sites - 1):
        vectors = arithmetic.parameters_addition(vectors, pseudo_rand_gen(os.urandom(32), 2**32, shapes))
    vectors = arithmetic.parameters_mod(vectors, 2**32)
    took = perf_counter() - begin
    sent = sum(vector.nbytes for vector in vectors)
    return {"seconds": took, "bytes": sent, "extra_mb": peak_mb() - before, "update_mb": update[0].nbytes / 2**20}


def our_round(params: int, sites: int) -> dict[str, float]:
    """A whole sum; what is sent goes through Flower's records both ways."""
    played, bytes_sent = Sum(params, sites), 0
    before, begin = peak_mb(), perf_counter()
    while played.server.stage is not Stage.DONE:
        for name in played.server.asked:
            played.update = np.full(params, VALUE, np.float32)
            request = flower.from_record(flower.to_record(played.server.request(name, 0)))
            record = flower.to_record(played.answer(name, request))
            bytes_sent += sum(len(array.data) for array in record.array_records["payloads"].values())
            played.server.receive(name, flower.from_record(record))
        played.server.advance()
    mean = played.server.open_().mean
    took = perf_counter() - begin
    off = float(np.max(np.abs(mean - VALUE)))
    return {"seconds": took, "peak_mb": peak_mb() - before, "bytes": bytes_sent / sites, "off": off}


def their_round(params: int, sites: int) -> dict[str, float]:
    """The same by flwr's workflow, over a grid that calls its clients' mod."""
    import logging

    from flwr.app import ConfigRecord, Context, Message, RecordDict
    from flwr.client.mod import secaggplus_mod
    from flwr.common import Code, FitIns, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS
    from flwr.common.secure_aggregation.secaggplus_constants import Key as Parts
    from flwr.compat.common import recorddict_compat as compat
    from flwr.server import LegacyContext, SimpleClientManager
    from flwr.server.strategy import FedAvg
    from flwr.server.workflow import SecAggPlusWorkflow
    from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key

    logging.getLogger("flwr").setLevel(logging.ERROR)
    flower.assume_identity()

    class Proxy:
        def __init__(self, node_id: int) -> None:
            self.node_id = self.cid = node_id

    class Strategy(FedAvg):
        def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> Any:
            return [(Proxy(node), FitIns(parameters, {})) for node in range(1, sites + 1)]

    contexts = {node: Context(0, node, {}, RecordDict(), {}) for node in range(1, sites + 1)}
    sent = 0

    def train(message: Message, _: Context) -> Message:
        update = ndarrays_to_parameters([np.full(params, VALUE, np.float32)])
        result = FitRes(Status(Code.OK, ""), update, 500, {})
        return Message(compat.fitres_to_recorddict(result, False), reply_to=message)

    class Calling:
        def send_and_receive(self, messages: Any, timeout: float | None = None) -> list[Message]:
            nonlocal sent
            replies = []
            for number, message in enumerate(messages):
                # The workflow's messages share a record, which a client's mod takes the stage out of.
                parts = {
                    k: ConfigRecord(dict(v)) if isinstance(v, ConfigRecord) else v for k, v in message.content.items()
                }
                node = message.metadata.dst_node_id
                own = flower.request(RecordDict(parts), "train", node, group="1", ttl_s=600.0)
                flower.number_(own, str(number))
                reply = secaggplus_mod(own, contexts[node], train)
                masked = reply.content.config_records[RECORD_KEY_CONFIGS].get(Parts.MASKED_PARAMETERS, [])
                sent += sum(map(len, masked))
                replies.append(reply)
            return replies

    context = LegacyContext(
        Context(0, 0, {}, RecordDict(), {}), strategy=Strategy(), client_manager=SimpleClientManager()
    )
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: 1})
    start = ndarrays_to_parameters([np.zeros(params, np.float32)])
    context.state.array_records[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(start, False)
    before, begin = peak_mb(), perf_counter()
    SecAggPlusWorkflow(num_shares=sites, reconstruction_threshold=2 * sites // 3 + 1)(Calling(), context)
    took = perf_counter() - begin
    summed = compat.arrayrecord_to_parameters(context.state.array_records[MAIN_PARAMS_RECORD], True)
    off = float(np.max(np.abs(parameters_to_ndarrays(summed)[0] - VALUE)))
    return {"seconds": took, "peak_mb": peak_mb() - before, "bytes": sent / sites, "off": off}


PARTS = {
    **{"our round": our_round, "their round": their_round, "site": site, "noisy site": noisy_site},
    **{"coordinator": coordinator, "peer": peer},
}


def best(rounds: int, params: int, sites: int, *parts: str) -> list[dict[str, float]]:
    """The least of each figure over the rounds, the parts taking turns."""
    size = ["--params", str(params), "--sites", str(sites)]
    results: dict[str, list[dict[str, float]]] = {part: [] for part in parts}
    for _ in range(rounds):
        for part in parts:
            command = [sys.executable, "-m", "benchmarks.masking", "--part", part, *size]
            results[part].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return [{name: min(one[name] for one in results[part]) for name in results[part][0]} for part in parts]


def told(name: str, result: dict[str, float]) -> str:
    share = result["bytes"] / (result["update_mb"] * 2**20)
    return (
        f"  {name:<8} {result['seconds']:6.2f} s, sends {share:.4f} of the update's fp32 bytes, "
        f"{result['extra_mb']:.0f} MB beside the update's {result['update_mb']:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=int, default=62_000_000)
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--peer-params", type=int, default=25_000_000)
    parser.add_argument("--peer-sites", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=PARTS)
    given = parser.parse_args()
    if given.part:
        print(json.dumps(PARTS[given.part](given.params, given.sites)))
        return
    large, noisy = best(given.rounds, given.params, given.sites, "site", "noisy site")
    (server,) = best(1, given.params, given.sites, "coordinator")
    print(f"{given.params:,} parameters, {given.sites} sites")
    print(told("a site", large) + f"; its other steps take {server['small_s']:.3f} s")
    print(told("noisy", noisy))
    print(
        f"  the coordinator adds one in {server['add_s']:.2f} s and opens the sum, one site having dropped out, in "
        f"{server['open_s']:.2f} s with {server['extra_mb']:.0f} MB beside it; a value is off by {server['off']:.1e}"
    )
    print(f"{given.peer_params:,} parameters, {given.peer_sites} sites, a site's masking")
    ours, peers = best(given.rounds, given.peer_params, given.peer_sites, "site", "peer")
    print(told("ours", ours))
    print(told("SecAgg+", peers))
    print(f"  SecAgg+ takes {peers['seconds'] / ours['seconds']:.1f} times the seconds")
    print(f"{given.peer_params:,} parameters, {given.peer_sites} sites, a whole round of sums in one process")
    mine, theirs = best(given.rounds, given.peer_params, given.peer_sites, "our round", "their round")
    for name, one in (("ours", mine), ("SecAgg+", theirs)):
        print(
            f"  {name:<8} {one['seconds']:6.2f} s, {one['peak_mb']:,.0f} MB more than before, a site sends "
            f"{one['bytes'] / 2**20:.0f} MB, a value is off by {one['off']:.1e}"
        )
    print(
        f"  SecAgg+ takes {theirs['seconds'] / mine['seconds']:.1f} times the seconds and "
        f"{theirs['peak_mb'] / mine['peak_mb']:.1f} times the memory"
    )


if __name__ == "__main__":
    main()

"""Seconds, bytes and memory of masking an update, beside the primitives of Flower's SecAgg+ on the same vector.

    python -m benchmarks.masking [--params 62000000] [--sites 10] [--peer-params 25000000] [--peer-sites 4] [--rounds 3]

Ours: the whole site side of a sum for one site among `--sites` (keys, shares, masks, opening) and the coordinator's
side, with one site that drops out after it shared its secrets. The other sites' masked vectors are made up, as only
their size matters to time; that sums are right is a matter of tests. The peer: what `secaggplus_mod` of flwr does with
one update (scale, quantize, own mask, a mask for each other site, modulo), by its own functions in its own order.
Each runs in a process of its own, so that its peak memory is its own; seconds are the best of the rounds, in turn.
"""

import argparse
import json
import resource
import subprocess
import sys
from time import perf_counter
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.masked import MaskedSite
from federation.masking import Agreement, Masked, MaskingOptions
from federation.messages import to_wire
from server.unmask import Stage, Unmasking


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def vector_of(size: int) -> np.ndarray:
    vector = np.random.default_rng(0).standard_normal(size, np.float32)
    vector *= 0.01
    return vector


def ours_site(params: int, sites: int) -> dict[str, float]:
    """One site's part, with the masked update timed apart from the small messages."""
    identities = {f"site{n:02}": Ed25519PrivateKey.generate() for n in range(sites)}
    roster = {name: key.public_key().public_bytes_raw().hex() for name, key in identities.items()}
    agreed = Agreement("00" * 32, 1, 1, params, roster, MaskingOptions(2 * sites // 3 + 1, 0.1, 1000))
    update = vector_of(params)
    before = peak_mb()
    server = Unmasking(agreed)
    players = {name: MaskedSite(agreed, name, key) for name, key in identities.items()}
    first, *others = players
    small, masking, sent = 0.0, 0.0, 0
    while server.stage is not Stage.DONE:
        for name in server.asked:
            request = server.request(name, 0)
            begin = perf_counter()
            if server.stage is Stage.MASKED:
                reply: Any = (
                    players[name].mask_(request, update, 500, {}) if name == first else skipped(players[name], request)
                )
            else:
                reply = getattr(players[name], STEPS[server.stage])(request)
            took = perf_counter() - begin
            if name == first:
                masking += took if server.stage is Stage.MASKED else 0
                small += took if server.stage is not Stage.MASKED else 0
                wire = to_wire(reply)
                sent += len(wire.header) + sum(memoryview(p).nbytes for p in wire.payloads.values())
            note(server, name, reply)
        server.advance()
    return {"mask_s": masking, "small_s": small, "bytes": sent, "peak_mb": peak_mb() - before + update.nbytes / 2**20}


STEPS = {Stage.KEYS: "keys", Stage.SHARES: "shares", Stage.CONSENT: "consent", Stage.OPENING: "open"}


def skipped(site: MaskedSite, request: Any) -> Masked:
    """Take another site through its step without masking: only its small answers are needed here."""
    import dataclasses

    shares = site._take_shares(site._held.sent, request.shares)
    site._held = dataclasses.replace(site._held, shares=shares, masked=True)
    return Masked("", request.agreement, request.keyring, (), np.empty(0, np.uint32))


def note(server: Unmasking, name: str, reply: Any) -> None:
    if server.stage is Stage.MASKED:
        server._replies[server.stage][name] = reply
    else:
        server.receive(name, reply)


def ours_server(params: int, sites: int) -> dict[str, float]:
    """Adding one masked update, and opening the sum of all sites but one that dropped out."""
    identities = {f"site{n:02}": Ed25519PrivateKey.generate() for n in range(sites)}
    roster = {name: key.public_key().public_bytes_raw().hex() for name, key in identities.items()}
    agreed = Agreement("00" * 32, 1, 1, params, roster, MaskingOptions(2 * sites // 3 + 1, 0.1, 1000))
    server = Unmasking(agreed)
    players = {name: MaskedSite(agreed, name, key) for name, key in identities.items()}
    update = np.zeros(params, np.float32)
    adding = []
    while server.stage is not Stage.DONE:
        for name in server.asked:
            request = server.request(name, 0)
            if server.stage is not Stage.MASKED:
                server.receive(name, getattr(players[name], STEPS[server.stage])(request))
            elif name != server.asked[-1]:
                update[:] = 0.001
                reply = players[name].mask_(request, update, 500, {})
                begin = perf_counter()
                server.receive(name, reply)
                adding.append(perf_counter() - begin)
        server.advance()
    before, begin = peak_mb(), perf_counter()
    opening = server.open_()
    took = perf_counter() - begin
    worst = float(np.max(np.abs(opening.mean - 0.001)))
    return {"add_s": min(adding), "open_s": took, "peak_mb": before, "open_extra_mb": peak_mb() - before, "off": worst}


def peer_site(params: int, sites: int) -> dict[str, float]:
    """What flwr's secaggplus_mod does in its stage of masked vectors, with 2²² levels and a modulus of 2³²."""
    import os

    from flwr.common.secure_aggregation.ndarrays_arithmetic import (
        factor_combine,
        parameters_addition,
        parameters_mod,
        parameters_multiply,
        parameters_subtraction,
    )
    from flwr.common.secure_aggregation.quantization import quantize
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

    update = [vector_of(params)]
    before, begin = peak_mb(), perf_counter()
    vectors = factor_combine(2**21, quantize(parameters_multiply(update, 0.5), 8.0, 2**22))
    shapes = [v.shape for v in vectors]
    vectors = parameters_addition(vectors, pseudo_rand_gen(os.urandom(32), 2**32, shapes))
    for number in range(sites - 1):
        mask = pseudo_rand_gen(os.urandom(32), 2**32, shapes)
        vectors = (parameters_addition if number % 2 else parameters_subtraction)(vectors, mask)
    vectors = parameters_mod(vectors, 2**32)
    took = perf_counter() - begin
    sent = sum(v.nbytes for v in vectors)
    return {"mask_s": took, "bytes": sent, "peak_mb": peak_mb() - before + update[0].nbytes / 2**20}


PARTS = {"site": ours_site, "server": ours_server, "peer": peer_site}


def measured(part: str, params: int, sites: int) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.masking",
        "--part",
        part,
        "--params",
        str(params),
        "--sites",
        str(sites),
    ]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(told)
    return result


def best(results: list[dict[str, float]]) -> dict[str, float]:
    return {name: min(result[name] for result in results) for name in results[0]}


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
    large = best([measured("site", given.params, given.sites) for _ in range(given.rounds)])
    plain = 4 * given.params
    print(f"a site, {given.params:,} parameters, {given.sites} sites: masks {large['mask_s']:.2f} s, all other steps")
    print(
        f"  {large['small_s']:.3f} s, sends {large['bytes'] / plain:.4f} of fp32, peak {large['peak_mb']:.0f} MB with"
    )
    print(f"  the update of {plain / 2**20:.0f} MB in it")
    server = measured("server", given.params, given.sites)
    print(f"the coordinator: adds one in {server['add_s']:.2f} s, opens with one dropout in {server['open_s']:.2f} s,")
    print(f"  which takes {server['open_extra_mb']:.0f} MB more; worst error {server['off']:.1e}")
    pairs = [
        (measured("site", given.peer_params, given.peer_sites), measured("peer", given.peer_params, given.peer_sites))
        for _ in range(given.rounds)
    ]
    ours, peer = best([pair[0] for pair in pairs]), best([pair[1] for pair in pairs])
    plain = 4 * given.peer_params
    print(f"beside SecAgg+ of flwr, {given.peer_params:,} parameters, {given.peer_sites} sites, a site's masking:")
    for name, result in (("ours", ours), ("SecAgg+", peer)):
        print(
            f"  {name:<8} {result['mask_s']:6.2f} s  {result['bytes'] / plain:.2f} of fp32  {result['peak_mb']:6.0f} MB"
        )
    print(
        f"  ratio of seconds {peer['mask_s'] / ours['mask_s']:.1f}, of memory {peer['peak_mb'] / ours['peak_mb']:.1f}"
    )


if __name__ == "__main__":
    main()

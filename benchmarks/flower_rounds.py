"""Flower's own simulation on Ray with a trivial client: what `benchmarks.engine_overhead --flower` sets beside ours.

    python -m benchmarks.flower_rounds [--sites 8] [--rounds 10] [--workers 2] [--values 3000]

Clients add one to a vector and remember nothing: no store, no ledger, no checks, no optimizer's step. Prints the time
until round 1 has ended, and of a round after it.
"""

import argparse
import logging
import statistics
import time

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    arrays = message.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    moved = {name: Array(array.numpy() + 1) for name, array in arrays.items()}
    content = {"arrays": ArrayRecord(moved), "metrics": MetricRecord({"num-examples": 64, "loss": 1.0})}
    return Message(RecordDict(content), reply_to=message)  # type: ignore[arg-type]


def main() -> None:
    from flwr.simulation import run_simulation

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("sites", 8), ("rounds", 10), ("workers", 2), ("values", 3000)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    server, ends = ServerApp(), []

    @server.main()
    def lead(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=given.sites, min_available_nodes=given.sites)
        first = ArrayRecord({"0": Array(np.zeros(given.values, np.float32))})

        def note(number: int, arrays: ArrayRecord) -> MetricRecord:
            ends.append(time.perf_counter())
            return MetricRecord({"time": time.time()})

        strategy.start(grid=grid, initial_arrays=first, num_rounds=given.rounds, evaluate_fn=note)

    begun = time.perf_counter()
    resources = {"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": given.workers}}
    run_simulation(server, client, given.sites, backend_config=resources)  # type: ignore[arg-type]
    rounds = np.diff(ends)[1:].tolist()
    print(f"Flower on Ray: {ends[1] - begun:.2f} s until round 1 has ended; a round: {statistics.median(rounds):.4f} s")


if __name__ == "__main__":
    main()

"""How many synthetic patients a second are made, records and exact risks, on one core and on several.

    python -m benchmarks.hospitals [--patients 20000] [--workers 2]

CPU seconds tell more than the clock where other work takes the cores; hospitals are independent, so workers make one
each.
"""

import argparse
import os
import time

from simulation.hospital import LIFELIKE, PROFILES, generate, profile_of
from simulation.pool import Pool


def make(name: str, patients: int) -> tuple[int, float]:
    """Make a hospital; gives its events and the CPU seconds."""
    begun = time.process_time()
    made = generate(profile_of(name), patients, seed=1)
    return made.events.height, time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patients", type=int, default=20_000, help="of each hospital")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    from benchmarks.hospitals import make  # workers can't call a function of the program that is run

    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with Pool(given.workers) as pool:
        for _ in [pool.submit("warm", make, "heart", 10).result() for _ in range(2 * given.workers)]:
            pass
        for profiles in (PROFILES, LIFELIKE):
            begun = time.perf_counter()
            futures = [pool.submit(name, make, name, given.patients) for name in profiles]
            found = [future.result() for future in futures]
            wall, cpu = time.perf_counter() - begun, sum(seconds for _, seconds in found)
            patients, events = given.patients * len(found), sum(count for count, _ in found)
            print(
                f"{', '.join(profiles)}: {patients} patients, {events} events; {patients / wall:.0f} patients a second "
                f"of the clock, {patients / cpu:.0f} a second of one core"
            )


if __name__ == "__main__":
    main()

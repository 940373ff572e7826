"""A coordinator in a process of its own: `leader.py URL SECONDS` leads, notes event after event, and says so."""

import sys
import time

from server.ledger import Ledger


def main(url: str, ttl_s: float) -> None:
    with Ledger.open(url) as ledger, ledger.lead(ttl_s=ttl_s) as token:
        print(token, flush=True)
        for number in range(100_000):
            ledger.note("leader", "step", told=str(number))
            print(number, flush=True)
            time.sleep(0.001)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))

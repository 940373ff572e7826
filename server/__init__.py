"""One coordinator: round engine, aggregation, ledger, the Flower ServerApp, the report."""

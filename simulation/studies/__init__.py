"""Studies as files: a grid of settings and seeds over one study, its ledger, its tables, and fits to them."""

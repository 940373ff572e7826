"""What both sides must agree on: manifest, messages, the flat update vector."""

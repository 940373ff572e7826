"""One hospital: its part of a round, and the Flower ClientApp."""

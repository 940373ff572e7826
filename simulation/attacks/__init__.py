"""Attacks on what a run trained, and what they prove about its privacy."""

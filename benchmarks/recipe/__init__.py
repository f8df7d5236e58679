"""Distil, then reinforce: what each step buys on two small tasks (docs/evidence.md)."""

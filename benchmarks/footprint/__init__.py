"""How many bytes cache and training need, and how near scoring is to the rollout."""

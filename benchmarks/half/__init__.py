"""Whether half precision keeps the policy."""

"""Which causal LMs of the installed transformers work."""

"""Every causal LM of the installed transformers, tried: ``python -m benchmarks.models`` writes ``docs/models.md``."""

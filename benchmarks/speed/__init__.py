"""How fast decoding, evictions, adapters and training steps are, on a GPU."""

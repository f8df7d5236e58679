"""How a call runs: where prompts end, rows side by side, chunks, one layer's work."""

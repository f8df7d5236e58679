"""What a step and a token cost beside LoRA, counted and timed on a CPU."""

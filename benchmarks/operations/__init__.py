"""How many operations a GRPO step takes."""

"""RL, small and real: a task whose chain of thought outgrows the window, from a random model to GRPO."""

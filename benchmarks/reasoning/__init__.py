"""Whether GRPO learns to reason in the bounded cache: SmolLM2-135M-Instruct on tasks that verify themselves."""

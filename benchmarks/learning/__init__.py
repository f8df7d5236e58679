"""What a model in a bounded cache recalls and learns: supervision, distillation, GRPO."""

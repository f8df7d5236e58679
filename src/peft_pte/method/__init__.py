"""What is computed: the thought state, who writes it, who reads it."""

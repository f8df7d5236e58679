"""What is known of transformers."""

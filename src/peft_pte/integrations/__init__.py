"""What needs more than peft and transformers; never imported by the package itself."""

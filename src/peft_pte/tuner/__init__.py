"""peft's side: injection, what is installed, files."""

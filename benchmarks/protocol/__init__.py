"""What the paper's protocol would take."""

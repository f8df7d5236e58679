"""Which thoughts leave the window: policies, what they see, and what they chose."""

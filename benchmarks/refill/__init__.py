"""What rows that are refilled save over rows that wait."""

"""The fewest bytes that each kernel must move, by arithmetic."""

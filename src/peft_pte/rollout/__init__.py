"""`generate_batch`: more requests than rows, where a row that ended is refilled at once."""

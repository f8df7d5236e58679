"""What choosing what leaves costs beside an eviction."""

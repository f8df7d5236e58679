"""Whether the thought state remembers: facts stated in a trace, evicted, and asked for later."""

def measure(session): yield from ()

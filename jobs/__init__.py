"""Commands: each module parses flags, calls the library once and prints where the result is."""

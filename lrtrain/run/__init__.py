"""One training run: the loop, its directory, and what happens between steps."""

"""Many runs from one command line: their identity, how they are started, and how they ended."""

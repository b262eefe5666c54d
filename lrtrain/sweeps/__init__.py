"""Sweeps: many runs from one command line, their names, launchers and outcomes."""

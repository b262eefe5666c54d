"""Tables and pictures of runs, from their files only."""

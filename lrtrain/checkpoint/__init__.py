"""Checkpoints, and models read from them: saving, loading, exporting."""

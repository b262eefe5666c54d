"""Text to batches: sources → tokenizer → packed rows → order → loader."""

"""Drawing: the style of all pictures and pictures made of single arrays."""

"""Drawing: the style of all pictures, and a heatmap."""

"""Findings about an image file, without changing it: the walk, the classes, the counts."""

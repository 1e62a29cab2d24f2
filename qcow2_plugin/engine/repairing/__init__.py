"""Putting an image file right: what a check found, and refcounts that lazy writers left behind."""

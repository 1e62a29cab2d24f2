"""Verbs over whole images, one module a verb: what a command or a script does with an image in one call."""

"""What the tests stand on: an image builder, a slow reference reader, and runners for the outside programs.

Nothing here imports qcow2_plugin, so that a mistake in the engine cannot hide behind the same mistake in its tests.
"""

"""Internal snapshots: reading, making, applying and deleting them, and what they keep."""

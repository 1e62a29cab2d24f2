"""Backups of disks: the flow, its hooks, and the targets that keep them."""

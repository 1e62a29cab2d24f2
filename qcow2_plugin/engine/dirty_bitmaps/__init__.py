"""Persistent dirty bitmaps: reading them, keeping them true, changing them."""

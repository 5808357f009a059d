"""Who wakes whom: one process by itself, or several that share a database."""

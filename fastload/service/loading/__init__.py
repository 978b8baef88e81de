"""Loads of checkpoints: read once for a node, in memory that its processes share."""

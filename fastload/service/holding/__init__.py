"""What the cache holds and keeps: data sets, pins, the catalog, checks of what is on disk, and removing."""

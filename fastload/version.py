"""The version of fastload."""

__version__ = "0.1.0"

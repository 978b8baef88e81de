"""Tests of what a user declares for a column."""

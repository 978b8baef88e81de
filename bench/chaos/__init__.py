"""Training jobs that share one cache, and everything that can happen to them; see docs/reliability.md."""

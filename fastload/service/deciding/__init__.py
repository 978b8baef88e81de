"""What is loaded next, into which buffer, and what goes for it: decisions without I/O."""

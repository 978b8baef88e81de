"""Where time goes: accounts of threads, the trainer's waits by cause, what they mean, and the trace."""

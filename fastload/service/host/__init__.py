"""What the service runs in: its process or threads, socket, log, and how a job starts it."""

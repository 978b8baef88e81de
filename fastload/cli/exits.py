"""How the `fastload` command ends: the exit codes of all verbs. 0 is success."""

from __future__ import annotations

FAILED = 1  # an error of ours, which is one line on stderr
USAGE = 2  # an unknown verb or option, or a value that cannot be one
PARTIAL = 3  # a part of what was asked for, or nothing there: a cache that is too small, no service
DAMAGED = 4  # what the cache holds, or a checkpoint, is not what was written
WORSE = 5  # what is compared is worse by more than may be
INTERRUPTED = 130  # by Ctrl-C
TERMINATED = 143  # by SIGTERM, by a verb that cleans up

"""For the cache service of a chaos run: disk trouble by a file, which Python imports when it starts.

While the file that FASTLOAD_CHAOS_TROUBLE names exists, system calls on what the cache holds fail. It has an error
number, how many of 1000 calls fail, seconds that each call takes, and, if it is to, bytes a second of one that reads
what is cached. The directory itself, its lock and its limits
stay usable: without them there is no cache, which is an error and no trouble. Each call that fails adds a byte to the
file with the ending .hits.
"""

import errno
import itertools
import os
import sys
import time

_CALLS = ("open", "pwritev", "preadv", "rename", "link", "unlink", "mkdir")


def _takes_room(name: str, arguments: tuple[object, ...]) -> bool:
    """Whether a full disk, with no inode left either, has none for this."""
    if name == "open":
        return bool(int(str(arguments[1])) & os.O_CREAT) and not os.path.lexists(str(arguments[0]))
    return name in ("pwritev", "link", "mkdir")


def _is_content(argument: object) -> bool:
    """A descriptor, or a path of what is cached."""
    return isinstance(argument, int) or any(f"/{name}/" in str(argument) for name in ("chunks", "index", "history"))


def _install(path: str) -> None:
    from fastload.cache import syscalls

    number = itertools.count()

    def troubled(name, call):  # type: ignore[no-untyped-def]
        def made(*arguments, **options):  # type: ignore[no-untyped-def]
            try:
                with open(path) as file:
                    code, per_mille, delay_s, *rate = file.read().split()
            except (FileNotFoundError, ValueError):
                return call(*arguments, **options)
            if _is_content(arguments[0]):
                time.sleep(float(delay_s))
                if rate and name == "preadv":
                    time.sleep(sum(memoryview(each).nbytes for each in arguments[1]) / float(rate[0]))
                hit = next(number) * 619 % 1000 < int(per_mille)
                if hit and (int(code) != errno.ENOSPC or _takes_room(name, arguments)):
                    with open(f"{path}.hits", "a") as hits:
                        hits.write(name[0])
                    raise OSError(int(code), os.strerror(int(code)))
            return call(*arguments, **options)

        return made

    for name in _CALLS:
        setattr(syscalls, name, troubled(name, getattr(syscalls, name)))  # type: ignore[no-untyped-call]


if "fastload.service" in sys.orig_argv and os.environ.get("FASTLOAD_CHAOS_TROUBLE"):
    _install(os.environ["FASTLOAD_CHAOS_TROUBLE"])

"""What of a job's environment its service begins with.

That is where programs, libraries and temporary files are, languages and time zones, numbers of threads, and settings of
Python, of memory and of fastload. Nothing says which store to ask, through whom, or as whom: the service has other
jobs' requests to make, too, and each brings its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping

_KEPT = {"PATH", "TMPDIR", "LANG", "LANGUAGE", "TZ", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "LD_PRELOAD"}
_KEPT |= {"GLIBC_TUNABLES", "OPENSSL_CONF", "OPENSSL_MODULES", "RUST_BACKTRACE", "TOKIO_WORKER_THREADS"}
_KEPT |= {"JAVA_HOME", "HADOOP_HOME", "CLASSPATH", "ARROW_LIBHDFS_DIR"}  # fsspec's hdfs
_KEPT_BEGIN = ("LC_", "PYTHON", "FASTLOAD_", "MALLOC_", "ASAN_", "COVERAGE_", "OMP_", "OPENBLAS_", "MKL_", "NUMBA_")
# Tools that look for credentials and settings in the home directory find those of whoever began there.
_NO_HOME = "/nonexistent"


def of_service(environ: Mapping[str, str]) -> dict[str, str]:
    """What is left of an environment."""
    kept = {name: value for name, value in environ.items() if name in _KEPT or name.startswith(_KEPT_BEGIN)}
    return {**kept, "HOME": _NO_HOME}


def leave(environ: MutableMapping[str, str] = os.environ) -> None:
    """Drop the rest, in the service's own process: somebody may have started it by hand."""
    kept = of_service(environ)
    for name in [name for name in environ if name not in kept]:
        del environ[name]
    environ.update(kept)

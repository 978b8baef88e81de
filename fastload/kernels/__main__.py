"""`python -m fastload.kernels FOLDER LEVEL ...`: compile all kernels into a folder, as pip does where it builds."""

from __future__ import annotations

import sys
from pathlib import Path

from fastload.kernels import objects


def main(folder: Path, levels: list[str]) -> None:
    """Ends with the cause and the cure where it cannot be done."""
    try:
        from fastload.kernels import compile_into, jit, loading, module_names

        folder.mkdir(parents=True, exist_ok=True)
        why = jit.why_plain()
        if why is not None:
            print(
                f"fastload's kernels are not compiled here but in each user's first job, since {why}", file=sys.stderr
            )
            return
        compile_into(folder, module_names(), [loading.level_here() if each == "here" else each for each in levels])
    except ImportError as error:
        sys.exit(
            f"fastload's kernels cannot be compiled: {error}, for {sys.executable}. pip brings what compiles them; "
            "with --no-build-isolation install it first: pip install 'numba>=0.60' 'scikit-build-core>=0.10'"
        )
    except (OSError, objects.UntrustedError) as error:
        sys.exit(f"fastload's kernels cannot be kept in {folder}: {error}. Remove that folder, and install again")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""`python -m fastload`: the command line, where the `fastload` script is not on the path."""

from fastload.cli import main

if __name__ == "__main__":
    main()

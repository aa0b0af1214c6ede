"""`python -m optimzoo` is the `optimzoo` command."""

from optimzoo.cli import main

if __name__ == "__main__":
    main()

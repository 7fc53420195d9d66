"""`python -m labkit`, which is also what `torchrun -m labkit` starts."""

from labkit.cli import main

if __name__ == "__main__":
    main()

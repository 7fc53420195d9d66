"""`python -m labkit`, which is also what `torchrun -m labkit` starts."""

from labkit.cli import main

main()

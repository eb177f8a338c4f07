"""`python -m kvarn.cli`."""

from kvarn.cli import main

main()

"""`python -m kvarn`."""

from kvarn.cli import main

main()

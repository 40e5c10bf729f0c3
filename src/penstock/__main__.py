"""`python -m penstock`: the same command line as the `penstock` script."""

from penstock.cli import main

main()

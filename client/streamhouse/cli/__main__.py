"""python -m streamhouse.cli: the `streamhouse` command where its script is not on PATH."""

from streamhouse.cli import main

main(prog_name="streamhouse")

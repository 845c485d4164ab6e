"""python -m streamhouse: the `streamhouse` command where its script is not on PATH."""

from streamhouse_cli import main

main(prog_name="streamhouse")

"""`python -m streamhouse`: the `streamhouse` command for machines on which its script is not on PATH."""

from streamhouse_cli import main

main(prog_name="streamhouse")

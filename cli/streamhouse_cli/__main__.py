"""python -m streamhouse_cli: the same as python -m streamhouse."""

from streamhouse_cli import main

main(prog_name="streamhouse")

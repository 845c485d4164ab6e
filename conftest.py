"""State of the test process that all tests share."""

from streamhouse.cli.serve_process import hear_interrupts

# Every process of a test inherits it. The workers of `pytest -n` load this file, too.
hear_interrupts()

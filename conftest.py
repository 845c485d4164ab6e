"""State of the test process that all tests share."""

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell script ignores it for what it runs in the background; every child would inherit that, and could not be
    # stopped with SIGINT by its test.
    signal.signal(signal.SIGINT, signal.default_int_handler)

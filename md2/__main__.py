"""`python -m md2`: the same as the command `md2`."""

from cli.start import start

start()

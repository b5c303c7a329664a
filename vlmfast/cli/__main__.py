"""`python -m vlmfast.cli` is `vlmfast`."""

from vlmfast.cli import main

main()

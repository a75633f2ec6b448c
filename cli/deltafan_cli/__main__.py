"""`python -m deltafan_cli`: the same as the `deltafan` command."""

from deltafan_cli import main

main()

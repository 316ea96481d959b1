"""`python -m huarizo` is the `huarizo` command."""

from huarizo.cli import main

main()

"""`python -m huarizo` is the `huarizo` command."""

from huarizo.commands.main import main

main()

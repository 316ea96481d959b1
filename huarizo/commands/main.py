"""The `huarizo` command.

Errors become one message on stderr and an exit code: 0 done; 2 the user's mistake; 3 a fault of the machine;
130 interrupted, with the training saved in a checkpoint.
"""

import errno
import io
import os
import sys

import typer

from huarizo.commands import about, results, talk, train
from huarizo.console import console, keep_terminal_plain
from huarizo.errors import HuarizoError, MachineError, UserError

app = typer.Typer(
    help="Fine-tune TinyLlama, or another causal language model, with LoRA on instruction data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for part in (train, talk, results, about):
    app.add_typer(part.app)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main() -> None:
    """Entry point of the `huarizo` command."""
    if sys.stdin is None:  # closed by the parent process
        sys.stdin = io.StringIO()
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the terminal may lack characters of an answer
    keep_terminal_plain()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # so that write errors are caught here
    except HuarizoError as error:
        console(stderr=True).print(f"huarizo: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("huarizo: interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            print(f"huarizo: {error.filename}: this name is too long for a file", file=sys.stderr)
            sys.exit(UserError.exit_code)
        if error.errno not in (*FULL, errno.EPIPE):
            raise
        if error.filename is not None:
            print(f"huarizo: {error.filename}: {error.strerror}", file=sys.stderr)
            sys.exit(MachineError.exit_code)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for buffered output
        if error.errno == errno.EPIPE:
            sys.exit(1)  # the reader has closed it
        print(f"huarizo: standard output can't be written: {error.strerror}", file=sys.stderr)
        sys.exit(MachineError.exit_code)


if __name__ == "__main__":
    main()

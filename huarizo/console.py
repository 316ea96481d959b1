"""What the commands write to a terminal, and keeping the libraries' own messages off it."""

import logging
import warnings

from rich.console import Console


def console() -> Console:
    """For text that is shown as it is, without markup."""
    return Console(markup=False, highlight=False, soft_wrap=True)


def write(text: str) -> None:
    """Text as it comes, without a line's end."""
    print(text, end="", flush=True)


def quiet_libraries() -> None:
    """Our own messages only; the libraries' warnings are not the user's business."""
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    logging.getLogger("huarizo").setLevel(logging.WARNING)

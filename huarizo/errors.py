"""The few exceptions a user sees.

Each carries the exit code of the command line and a message that says what is wrong and what to do. Nothing else
should reach a terminal: an exception of another type is a bug in Huarizo and keeps its traceback.
"""


class HuarizoError(Exception):
    """Base of all errors that are told in one clear message and without a traceback."""

    exit_code = 1


class UserError(HuarizoError):
    """Something the user can mend: the recipe, the data, a name, a token. Nothing was lost."""

    exit_code = 2


class RecipeError(UserError):
    """The recipe or an override of it is wrong. The message lists every mistake found."""


class DataError(UserError):
    """The training data can't be used as it is. The message names file, row, field and remedy."""


class HubError(UserError):
    """A model or data set could not be found or fetched. The message says why and how to go on."""


class ModelError(UserError):
    """The model is not one that Huarizo trains: another architecture, a broken or a pickled checkpoint."""


class MachineError(HuarizoError):
    """The machine gave out: no disk space, no memory after every fall-back. The message says what was saved."""

    exit_code = 3


class Interrupted(HuarizoError):
    """The user or the system asked to stop; a checkpoint was written first."""

    exit_code = 130

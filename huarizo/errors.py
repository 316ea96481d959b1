"""The exceptions that a user sees.

Each has an exit code and a message that says what is wrong and what to do. An exception of any other type is a bug in
Huarizo and keeps its traceback.
"""


class HuarizoError(Exception):
    """Base of all errors that are shown as one message without a traceback."""

    exit_code = 1


class UserError(HuarizoError):
    """Something the user can fix: the recipe, the data, a name, a token. Nothing was lost."""

    exit_code = 2


class RecipeError(UserError):
    """The recipe or an override of it is wrong. The message lists every mistake found."""


class DataError(UserError):
    """The training data can't be used as it is. The message names file, row, field and remedy."""


class HubError(UserError):
    """A model or data set could not be found or fetched. The message says why and what to do."""


class ModelError(UserError):
    """Huarizo can't train this model: another architecture, or damaged or pickled weights."""


class MachineError(HuarizoError):
    """The machine failed: no disk space, or no memory despite all fallbacks. The message says what was saved."""

    exit_code = 3


class Interrupted(HuarizoError):
    """The user or the system asked to stop; a checkpoint was written first."""

    exit_code = 130

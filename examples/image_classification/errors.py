"""What can go wrong in a run, in words for the person who began it."""


class RecipeError(Exception):
    """An error whose message says what to do; a command prints it, and ends."""


class CheckpointError(RecipeError):
    """A checkpoint cannot be written or read."""


class DatasetError(RecipeError):
    """A data set is missing or malformed."""


class DevicesError(RecipeError):
    """There are not so many devices, or a batch cannot be shared out among them."""


class HostsError(RecipeError):
    """The processes of a run do not find each other, or disagree."""


class RunError(RecipeError):
    """A run cannot begin or go on."""


class NotFiniteError(RunError):
    """A quantity is not finite."""

"""The errors that a user can act on. Each message is one sentence: what is wrong, where, and the remedy."""


class InputError(ValueError):
    """A recipe, data set or model that cannot be used as given; found before training starts (exit code 2)."""


class ProofError(RuntimeError):
    """A saved checkpoint is not equal to the model in memory, or to what its manifest says."""


class HubError(RuntimeError):
    """The Hub cannot be reached or refuses; everything that lies here is whole (exit code 5)."""


def one_line(error: BaseException) -> str:
    """What a library said, as a part of such a sentence."""
    return " ".join(str(error).split())

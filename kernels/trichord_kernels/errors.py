"""The one error class of the package, apart from plain ValueError for operands that do not fit."""


class KernelError(ValueError):
    """No kernel for this case: the message says what was expected, what came, and what to do."""

"""Why PEFT's own code computes a call of experts, as exceptions."""

import logging


class LeftToPeft(Exception):
    """PEFT's own code has to compute a call; the text says why, for the log.

    Attributes:
        level: level of the log line; `logging.NOTSET` for none.
    """

    # of classes, because torch.compile does not trace the __init__ of an exception
    level = logging.WARNING


class Expected(LeftToPeft):
    """A user asked for what this package does not compute, and loses nothing."""

    level = logging.INFO


class NotAtWork(Expected):
    """No adapter is at work: PEFT's own code calls the module, and changes no weight."""


class Unlogged(LeftToPeft):
    """Another call logs the reason, if there is one."""

    level = logging.NOTSET

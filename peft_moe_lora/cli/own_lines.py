"""Log lines and warnings of other libraries, kept off the terminal while a command runs."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

OURS = "peft_moe_lora"


@contextmanager
def own_lines() -> Iterator[None]:
    """Of all warnings and log lines below errors, let only those of this package through."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=OURS)
        _import_package()
        levels = {logger: logger.level for logger in _loggers_of_others()}
        try:
            for logger, level in levels.items():
                logger.setLevel(max(level, logging.ERROR))
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)


def _import_package() -> None:
    """Import the package; libraries set the levels of their loggers as they are imported."""
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        import peft_moe_lora  # noqa: F401
    finally:
        logging.disable(disabled)


def _loggers_of_others() -> list[logging.Logger]:
    """The loggers of other libraries: the first of each library, and those with a level."""
    return [
        logger
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger)
        and name.partition(".")[0] != OURS
        and ("." not in name or logger.level)
    ]

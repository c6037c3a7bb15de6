"""Pages and progress tell of the work: what goes wrong in them is a warning in the run's log, and never fails a node."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger


@contextmanager
def harmless(what: str) -> Iterator[None]:
    """Turns an error of what only tells of the work into a warning in the log of the run, where there is one."""
    try:
        yield
    except Exception as error:
        log: Any
        try:
            log = get_run_logger()
        except MissingContextError:
            log = logging.getLogger("pipelines")
        log.warning("%s cannot be shown: %s: %s", what, type(error).__name__, error)

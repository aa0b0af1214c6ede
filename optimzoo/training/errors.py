"""What is reported to people in one sentence, and where it is made."""

import importlib
from types import ModuleType

MISSING_EXTRA = "{what} needs the recipes extra ({missing} is missing): pip install 'optimzoo[recipes]'"


class UserError(Exception):
    """Something the user can mend: the command prints its one sentence and exits with code 2."""


def needs(module: str, what: str) -> ModuleType:
    """Import a module of the recipes extra, or say which extra `what` needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(MISSING_EXTRA.format(what=what, missing=error.name or module)) from error


def reason(error: BaseException) -> str:
    """The system's own words for a failed write or read, also where torch.save has hidden them behind its own error."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
        link = link.__cause__ or link.__context__
    return str(error).split("\n")[0]

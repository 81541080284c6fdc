"""The one family of errors that are the user's to mend: the command line prints them without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something in the input is wrong. The message says what, where, and what to do. Exit code 2."""


class ConfigError(UserError):
    """One or more configuration values are wrong; the message lists all of them."""

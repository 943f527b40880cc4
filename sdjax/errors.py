"""Exceptions that mean: the input is wrong, or the world, but the program is not."""


class UserError(ValueError):
  """A mistake that the user can mend, told in one line.

  The message names the value, the limit and the remedy. The command line prints it without a
  traceback and exits with `exit_code`; library callers may catch it as a ValueError.
  """
  exit_code = 2


class Diverged(UserError):
  """Training has gone astray: the same command would go astray again."""
  exit_code = 3


class Gone(UserError):
  """Data or checkpoints that were there are not, or are damaged."""
  exit_code = 4

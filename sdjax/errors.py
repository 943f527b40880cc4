"""The one exception that means: the input is wrong, the program is not."""


class UserError(ValueError):
  """A mistake that the user can mend, told in one line.

  The message names the value, the limit and the remedy. The command line prints it without a
  traceback and exits with code 2; library callers may catch it as a ValueError.
  """

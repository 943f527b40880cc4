"""What a door does to JAX before it computes."""

import logging
import os
import sys
from pathlib import Path


def cache_compilations() -> None:
  """Keeps compiled programs on disk, so that the second start of a command does not compile.

  In JAX_COMPILATION_CACHE_DIR if set, else ~/.cache/sdjax.
  """
  import jax
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "sdjax"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def log_to_stderr() -> None:
  """Shows sdjax's own messages, and of other packages warnings alone."""
  import jax
  handler = logging.StreamHandler(sys.stderr)
  handler.setFormatter(logging.Formatter("%(message)s"))
  logger = logging.getLogger("sdjax")
  logger.handlers = [handler]
  logger.setLevel(logging.INFO if jax.process_index() == 0 else logging.ERROR)
  logger.propagate = False

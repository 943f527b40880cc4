"""What a door does to the machine and to JAX before it computes."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

WORTH_TELLING_S = 0.1  # compilations that take less are those of single operations


def use_huge_pages() -> None:
  """Starts the running command again with huge pages for malloc, where Linux's libc can.

  XLA takes and gives back its buffers at every step on a CPU: in pages of 4 KiB, the faults cost a
  small model a fifth of its step. A GLIBC_TUNABLES that the user has set stays as it is.
  """
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"  # read when a process starts
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def cache_compilations() -> None:
  """Keeps compiled programs on disk, so that the second start of a command does not compile.

  In JAX_COMPILATION_CACHE_DIR if set, else ~/.cache/sdjax.
  """
  import jax
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "sdjax"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_TELLING_S)


@contextlib.contextmanager
def logged_compilations() -> Iterator[None]:
  """Logs each program that is compiled while the block runs, or read from disk: which, how long."""
  from jax import monitoring
  log = logging.getLogger("sdjax")
  read = []

  def tell(event: str, seconds: float, **facts) -> None:
    if event.endswith("/cache_retrieval_time_sec"):  # told of just before the program it is about
      read.append(seconds)
    elif event.endswith("/backend_compile_duration"):
      if seconds >= WORTH_TELLING_S:
        name = facts["fun_name"].removeprefix("jit(").strip("_)").replace("_", " ")
        what = "read %s from the cache in %.1f s" if read else "compiled %s in %.1f s"
        log.info(what, name, seconds)
      read.clear()

  monitoring.register_event_duration_secs_listener(tell)
  try:
    yield
  finally:
    monitoring.unregister_event_duration_listener(tell)


def log_to_stderr() -> None:
  """Shows sdjax's own messages, and of other packages warnings alone; of Orbax nothing."""
  import absl.logging
  import jax
  # Orbax logs the whole traceback of what it then raises.
  absl.logging.set_verbosity(absl.logging.FATAL)
  handler = logging.Handler()
  # The stderr of the moment: tests and notebooks put others in its place, and close them.
  handler.emit = lambda record: print(record.getMessage(), file=sys.stderr)
  logger = logging.getLogger("sdjax")
  logger.handlers = [handler]
  logger.setLevel(logging.INFO if jax.process_index() == 0 else logging.ERROR)
  logger.propagate = False

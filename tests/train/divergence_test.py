"""Which steps count as gone wrong."""

import math

import numpy as np
import pytest

from sdjax.errors import Diverged, UserError
from sdjax.train import divergence
from sdjax.train.divergence import Divergence

NAN = math.nan


def test_skipped_steps_are_counted_over_rows():
  watch = Divergence(max_skipped=3)
  assert watch.look(1, [(1.0, False), (NAN, True), (NAN, True)])["skipped_steps"] == 2
  assert watch.look(4, [(1.0, False), (NAN, True)])["skipped_steps"] == 1
  # The gradient alone may be not finite.
  assert watch.look(6, [(1.0, True)])["skipped_steps"] == 1
  with pytest.raises(Diverged, match="up to step 7") as raised:
    watch.look(7, [(NAN, True)])
  assert raised.value.exit_code == 3


def test_spikes_stand_out_from_the_last_losses():
  losses = np.random.default_rng(0).normal(1.0, 0.1, 1000)
  watch = Divergence(max_skipped=9)
  row = [(float(loss), False) for loss in losses]
  assert watch.look(1, [(9.0, False), *row])["loss_spikes"] == 0         # too early to tell
  assert watch.look(1002, [(1.5, False), (1.9, False), (0.1, False)])["loss_spikes"] == 1
  assert watch.look(1005, [(5.0, False)] * 2)["loss_spikes"] == 2
  # A new level is one after a while.
  assert watch.look(1007, [(5.0, False)] * divergence.WINDOW)["loss_spikes"] < 30
  assert watch.look(1300, [(5.0, False)] * 9)["loss_spikes"] == 0


def test_a_skipped_loss_is_no_measure():
  watch = Divergence(max_skipped=9)
  watch.look(1, [(1.0, False), (1.1, False)] * 50)
  watch.look(101, [(math.inf, True)])
  assert watch.look(102, [(3.0, False)])["loss_spikes"] == 1


def test_zero_is_refused():
  with pytest.raises(UserError, match="max_skipped is 0"):
    Divergence(0)

"""`sdjax train` around a model of a few numbers: it starts in seconds, and a step takes 30 ms.

The words after the script are those after `sdjax`. Loop, data and checkpoints are the real ones.
Before each step a process prints "process 0 pid 1234 step 5 rows {"0": 17, …}": which sample its
rows of the global batch are of, as the devices hold them.
"""

import json
import os
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.cli import experiment, main
from sdjax.diffusion.parts import WHOLE
from sdjax.train import loop, partitioning

STEP_S = 0.03
SHAPE = (8, 8, 8)  # of moments; [0, 0, -1] is the number of the sample
PARAMS = {name: {"kernel": np.ones(SHAPE[:2] + (4,), np.float32)}
          for name in ("unet", "text_encoder")}
SD = SimpleNamespace(
    is_xl=False, tokenize=lambda texts: np.zeros((len(texts), 1, 2), np.int32))


def loss(params, frozen, batch, key, part=WHOLE):
  x = batch["moments"][..., :4]
  noise = part.draw(lambda shape: jax.random.normal(key, shape), x.shape)
  found = jnp.mean(jnp.square(params["unet"]["kernel"] * (1 + 0.1 * noise) - x))
  return found, {"mse": found}


def draw(data, draw=loop.draw_batch):
  time.sleep(STEP_S)
  batch = draw(data)
  rows = {}
  for shard in batch["moments"].addressable_shards:
    first = shard.index[0].indices(batch["moments"].shape[0])[0]
    rows |= {first + i: int(row[0, 0, -1]) for i, row in enumerate(np.asarray(shard.data))}
  # One write: lines of two processes do not mix.
  os.write(1, f"process {jax.process_index()} pid {os.getpid()} step {data.position()['step']} "
              f"rows {json.dumps(rows)}\n".encode())
  return batch


if __name__ == "__main__":
  if "GLOO" in os.environ:  # sums over devices as several processes take them, in one process
    experiment.join("itself", 30, coordinator_address=os.environ["SDJAX_COORDINATOR"],
                    num_processes=1, process_id=0)
  partitioning.MIN_SHARDED_SIZE = 8  # a mesh with fsdp splits even these
  loop.model.build = lambda *_: (SD, PARAMS)
  loop.loss_of, loop.draw_batch = lambda run: loss, draw
  loop.export = lambda run, now: run.workdir
  sys.exit(main.main(sys.argv[1:]))

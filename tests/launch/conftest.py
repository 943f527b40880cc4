"""The launchers are scripts beside the package: their tests import them from launch/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))

import sys
from pathlib import Path

# The models of the optimisers' tests.
sys.path.insert(0, str(Path(__file__).parents[1] / "optim"))

"""RefCLEF: point accuracy of a checkpoint, or of every one in a folder.

    python grounding_eval_singlegpu_refclef.py --checkpoint FILE_OR_FOLDER --output_dir OUT

The data that it reads: configs/Grounding_refclef.yaml, or another --config.
"""

from grounding.benchmarks import REFCLEF
from grounding.evaluate import program

if __name__ == "__main__":
    program(REFCLEF)

"""RefCOCO+, RefCOCO or RefCOCOg: box and point accuracy of a checkpoint, or of every one in a folder.

    python grounding_eval_singlegpu.py --checkpoint FILE_OR_FOLDER --output_dir OUT

The data that it reads: configs/Grounding_refcoco.yaml (RefCOCO+), Grounding_refcoco_unc.yaml (RefCOCO),
Grounding_refcocog.yaml (RefCOCOg), or another --config. grounding_eval.py evaluates any benchmark.
"""

from grounding.benchmarks import REFCOCO_PLUS
from grounding.evaluate import program

if __name__ == "__main__":
    program(REFCOCO_PLUS)

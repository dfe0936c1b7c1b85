"""Flickr30k Entities: point accuracy of a checkpoint, or of every one in a folder.

    python grounding_eval_singlegpu_flickr.py --checkpoint FILE_OR_FOLDER --output_dir OUT

The data that it reads: configs/Grounding_flickr.yaml, or another --config.
"""

from grounding.benchmarks import FLICKR
from grounding.evaluate import program

if __name__ == "__main__":
    program(FLICKR)

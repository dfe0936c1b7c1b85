"""Any benchmark that a config names by its key `benchmark`: accuracy of a checkpoint, or of every one in a folder.

python grounding_eval.py --config configs/Grounding_own.yaml --checkpoint FILE_OR_FOLDER --output_dir OUT
"""

from grounding.evaluate import program

if __name__ == "__main__":
    program()

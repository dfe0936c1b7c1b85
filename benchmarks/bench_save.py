"""How long training waits for a checkpoint (the copy to host memory), and how long its writing takes meanwhile.

python benchmarks/bench_save.py [--config configs/Pretrain.yaml] [--folder FOLDER]
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from config import PretrainConfig, load_config
from models.pretrain import PretrainModel
from optim import create_optimizer
from training.saving import Every, Saver

PUBLISHED = Path(__file__).parents[1] / "configs" / "Pretrain.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=PUBLISHED)
    parser.add_argument("--folder", help="where to write; on the file system to be measured")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config(args.config, PretrainConfig)
    model = PretrainModel(config).to(device)
    optimizer = create_optimizer(config.optimizer, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # which makes the moments
    optimizer.zero_grad(set_to_none=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        saver = Saver(Path(folder), 1, None, Every())
        for step in (1, 2):
            if device.type == "cuda":
                torch.cuda.synchronize()
            begun = time.monotonic()
            saver.save(Path(folder, f"{step}.pth"), {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
            waited = time.monotonic() - begun
            saver.finish()
            written = time.monotonic() - begun - waited
            assert saver.path is not None
            size = saver.path.stat().st_size / 1e9
            print(f"{size:.2f} GB from {device}: training waits {waited:.2f} s, writing takes {written:.2f} s more")


if __name__ == "__main__":
    main()

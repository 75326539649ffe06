"""What `deepspeed launch/train.py --recipe NAME` runs; also starts under torchrun and plain python (one rank)."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The project's folder first, so that a checkout works without being installed.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from grpo_ds.train import main

    main(sys.argv[1:])

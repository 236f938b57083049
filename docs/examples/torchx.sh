#!/bin/bash
# torchx starts the same torchrun on a cluster it knows (slurm, kubernetes, aws_batch ...): 4 nodes of 8 ranks.
set -euo pipefail
torchx run --scheduler slurm dist.ddp -j 4x8 --max_retries 3 --env OMP_NUM_THREADS=8 -m puna -- train recipe.toml

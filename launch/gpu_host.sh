#!/usr/bin/env bash
# Trains on all GPUs of this machine, in one process.
#   pip install -e ".[cuda]" && launch/gpu_host.sh --config configs/code_search_transformer.py
# CUDA_VISIBLE_DEVICES chooses some of them. SIGTERM saves and stops; the same command goes on.
# Not run as it stands on a host with several GPUs; what it sets is read by JAX and XLA alone.
set -euo pipefail
# Most of the memory at once; without that JAX takes three quarters.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
# Collectives of several GPUs beside arithmetic that does not wait for them.
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"
exec python -m jaxcl.train "$@"

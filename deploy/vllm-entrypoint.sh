#!/bin/sh
# The cache is a volume that may be empty, and it has the location of vLLM's environment: record it at each start.
set -eu
tunewright engine install vllm --build "$VLLM_BUILD" --to /opt/vllm > /dev/null
exec tunewright "$@"

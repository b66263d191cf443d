"""`python -m vllm_scion ARGUMENTS`: vLLM's server; what `scion serve` becomes."""

import sys

from vllm_scion.private_vllm import run_server

if __name__ == "__main__":  # processes that vLLM spawns import this module again
    run_server(sys.argv[1:])

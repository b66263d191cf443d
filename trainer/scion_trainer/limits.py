"""The surroundings of a training process, set before torch reads them: cores, threads, output."""

from __future__ import annotations

import os

from scion_adapters.cores import parse_cores
from scion_adapters.errors import InvalidInputError

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_KEPT_KERNELS = "64"
"""oneDNN's for shapes that it has seen. Its own 1,024 are a kernel for every length that a batch ever had: they took
0.5 GiB of a reward run's 1.9, and with these it was 10% faster (2M base, 984 steps)."""

_QUIET = {
    "TQDM_DISABLE": "1",  # a run shows one progress, its own
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def bind_process(cores: str | None, threads: int | None) -> None:
    """Bind this process to `cores` (Linux) and its libraries to `threads`; None leaves things as they are.

    OpenMP's threads wait asleep: awake, as by default, they take the cores from each other and from the server. On two
    cores with one other busy process, training took 45 s instead of 7 s.

    To be called before torch is imported, also where little is computed: MKL counts cores by moving the process to each
    one that it may use, and on one where vLLM's worker spins Linux 6.18 let it wait for minutes.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KEPT_KERNELS)
    if cores is not None and hasattr(os, "sched_setaffinity"):
        wanted = parse_cores(cores, "trainer.cores")
        allowed = os.sched_getaffinity(0)
        if not wanted & allowed:
            raise InvalidInputError(
                f"trainer.cores = {cores!r}: this machine allows the cores {sorted(allowed)}", field="trainer.cores"
            )
        os.sched_setaffinity(0, wanted & allowed)
        threads = threads or len(wanted & allowed)
    if threads is not None:
        for variable in _THREAD_VARIABLES:
            os.environ[variable] = str(threads)


def quiet_libraries() -> None:
    """Keep the libraries' progress bars and notices off stderr, unless the environment asks for them."""
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)

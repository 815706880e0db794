# docker build --file docker/cuda.Dockerfile --tag lora-core:cuda .
# docker run --rm --gpus all --shm-size 8g --volume "$PWD:/work" lora-core:cuda train --cfg qwen0.5b data.train_file=chats.jsonl
# Several GPUs: docker run ... --entrypoint accelerate lora-core:cuda launch -m lora_core train --cfg qwen7b
# PyTorch's wheels bring CUDA's libraries; the driver comes from the host. Triton compiles with gcc.
FROM python:3.11-slim
ENV HF_HOME=/work/.cache/huggingface PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/lora_core
COPY constraints.txt setup.cfg pyproject.toml README.md LICENSE ./
COPY configs configs
COPY examples examples
COPY launch launch
COPY lora_core lora_core
RUN pip install --constraint constraints.txt '.[demo]'
WORKDIR /work
ENTRYPOINT ["lora-core"]
CMD ["--help"]

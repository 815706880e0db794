# docker build --file docker/cpu.Dockerfile --tag lora-core:cpu .
# docker run --rm --volume "$PWD:/work" lora-core:cpu demo
FROM python:3.11-slim
ENV HF_HOME=/work/.cache/huggingface PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/lora_core
COPY constraints.txt setup.cfg pyproject.toml README.md LICENSE ./
COPY configs configs
COPY examples examples
COPY launch launch
COPY lora_core lora_core
# PyTorch for CPUs: what PyPI has brings 2.7 GB of CUDA with it.
RUN pip install --no-deps --index-url https://download.pytorch.org/whl/cpu "$(grep -o '^torch==[0-9.]*' constraints.txt)"
RUN pip install --constraint constraints.txt '.[demo]'
WORKDIR /work
ENTRYPOINT ["lora-core"]
CMD ["--help"]

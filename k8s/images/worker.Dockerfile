# Ray head and workers: drivers, DeepSpeed, vLLM, rewards, Ray Serve. KubeRay gives the command.
#     docker build -f k8s/images/worker.Dockerfile --build-arg LOCK=cpu -t sedsft-worker:0.1.0-cpu .
#     docker build -f k8s/images/worker.Dockerfile --build-arg LOCK=gpu -t sedsft-worker:0.1.0-gpu .
# The API image starts from the same base: drivers are started with the path of that image's Python.
FROM python:3.11-slim
ARG LOCK=cpu
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# A C++ compiler for torch.compile and Triton, libnuma for vLLM on CPU, wget for the probes of older KubeRay.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential libnuma1 wget \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY requirements/${LOCK}.txt lock.txt
RUN if [ "$LOCK" = cpu ]; then \
        pip install --no-cache-dir --no-deps "$(grep '^torch==' lock.txt)" --extra-index-url "$TORCH_CPU_INDEX"; \
    fi \
    && pip install --no-cache-dir --no-deps -r lock.txt
COPY pyproject.toml README.md LICENSE ./
COPY sedsft sedsft
COPY services services
COPY api api
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    && useradd --uid 10001 --user-group --create-home sedsft
USER 10001:10001
WORKDIR /home/sedsft

# `tomoe serve` on vLLM's own image of the release in constraints.txt (a test compares them).
#   docker build -t tomoe-vllm . && docker run --gpus all --read-only --tmpfs /tmp -v ./model:/model:ro -v tomoe-cache:/cache -p 8000:8000 tomoe-vllm
ARG VLLM_VERSION=0.32.0

FROM vllm/vllm-openai:v${VLLM_VERSION} AS build
COPY pyproject.toml README.md LICENSE /src/
COPY tomoe_vllm /src/tomoe_vllm
COPY training /src/training
COPY serving /src/serving
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM vllm/vllm-openai:v${VLLM_VERSION}
# The constraints keep the image's versions of these packages; pip may only add small libraries that are missing.
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    python3 -m pip freeze | grep -E '^(torch|triton|vllm|transformers|numpy)==' > /tmp/constraints.txt \
    && python3 -m pip install --no-cache-dir --constraint /tmp/constraints.txt "$(ls /wheels/*.whl)[serve]" \
    && rm /tmp/constraints.txt \
    && groupadd --gid 10001 tomoe \
    && useradd --uid 10001 --gid tomoe --no-create-home --home-dir /cache tomoe \
    && install -d -o tomoe -g tomoe /cache

# The root file system is read-only. At run time the server writes only to /cache (a volume) and /tmp (a tmpfs).
ENV HOME=/cache \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    HF_HUB_OFFLINE=1 \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton \
    VLLM_CACHE_ROOT=/cache/vllm \
    VLLM_NO_USAGE_STATS=1 \
    TOMOE_CACHE_ROOT=/cache/tomoe \
    TOMOE_HOST=0.0.0.0 \
    PYTHONDONTWRITEBYTECODE=1

USER tomoe
WORKDIR /tmp
VOLUME ["/cache"]
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["tomoe", "serve"]
CMD ["/model"]

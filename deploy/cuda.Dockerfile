# syntax=docker/dockerfile:1
# Server and trainer on NVIDIA GPUs: vLLM's own image with this package added and nothing in it replaced.
# Build from the repository's root: docker build -f deploy/cuda.Dockerfile -t vllm-scion:cuda .
FROM vllm/vllm-openai:v0.32.0
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY adapters adapters
COPY feedback feedback
COPY trainer trainer
COPY plugin plugin
COPY deploy/demo deploy/demo
# Every version that the image holds becomes a constraint: the trainer's requirements (peft, trl, bitsandbytes, alembic…) are
# added beside vLLM's torch and transformers, and a requirement that would replace one of them fails the build instead.
# vllm-bnb-plugin comes without its requirements: it requires vllm, which is here.
RUN python3 -m pip list --format=freeze --exclude pip --exclude setuptools > /tmp/image.txt \
 && python3 -m pip install --no-cache-dir --no-deps vllm-bnb-plugin==0.0.3 \
 && python3 -m pip install --no-cache-dir --constraint /tmp/image.txt '.[postgres,s3]' \
 && python3 -c "import scion_adapters, scion_feedback, scion_trainer, vllm_scion"
RUN useradd --uid 10001 --home-dir /var/lib/scion --create-home scion
ENV HOME=/var/lib/scion \
    PYTHONUNBUFFERED=1 \
    VLLM_NO_USAGE_STATS=1 \
    SCION_SERVER__HOST=0.0.0.0
USER scion
WORKDIR /var/lib/scion
VOLUME /var/lib/scion
EXPOSE 8000
# Loading and compiling a large base takes minutes.
HEALTHCHECK --interval=10s --timeout=5s --start-period=900s --retries=3 \
  CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ.get('SCION_SERVER__PORT', '8000')}/health\", timeout=4)"]
ENTRYPOINT ["scion"]
CMD ["serve"]

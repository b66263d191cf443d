# syntax=docker/dockerfile:1
# Server and trainer on CPUs. Build from the repository's root: docker build -f deploy/cpu.Dockerfile -t vllm-scion:cpu .
FROM python:3.11-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++  # for a pin that has no wheel on this architecture
WORKDIR /src
# The lock first: its layer (gigabytes) is rebuilt only when a pin changes.
COPY deploy/requirements/ deploy/requirements/
RUN PYTHON=python3.11 VENV=/opt/scion LOCK=deploy/requirements/cpu.lock PROJECT= bash deploy/requirements/install.sh \
 && rm -rf /root/.cache
COPY pyproject.toml README.md LICENSE ./
COPY adapters adapters
COPY feedback feedback
COPY trainer trainer
COPY plugin plugin
COPY deploy/demo deploy/demo
RUN /opt/scion/bin/python -m pip install --no-deps --no-build-isolation --no-cache-dir .

FROM python:3.11-slim-bookworm
# libnuma1: vLLM's CPU kernels link it. g++: torch.compile makes CPU code at the first start.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ libnuma1 \
 && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --home-dir /var/lib/scion --create-home scion
COPY --from=build /opt/scion /opt/scion
ENV PATH=/opt/scion/bin:$PATH \
    HOME=/var/lib/scion \
    PYTHONUNBUFFERED=1 \
    VLLM_NO_USAGE_STATS=1 \
    SCION_SERVER__HOST=0.0.0.0
USER scion
WORKDIR /var/lib/scion
VOLUME /var/lib/scion
EXPOSE 8000
# A first start compiles kernels: it is not unhealthy for that.
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ.get('SCION_SERVER__PORT', '8000')}/health\", timeout=4)"]
ENTRYPOINT ["scion"]
CMD ["serve"]

# The same install as `make install-runtime`, serving the quickstart. docs/operations.md: how to run it, keys first.
FROM python:3.11-slim-bookworm AS build
RUN apt-get update && apt-get install --yes --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/moerge
COPY pyproject.toml README.md LICENSE Makefile ./
COPY requirements requirements
COPY adapters_registry adapters_registry
COPY router router
COPY serving serving
COPY eval eval
ENV PIP_NO_CACHE_DIR=1
RUN make install-runtime

FROM python:3.11-slim-bookworm
# libnuma1: vLLM's CPU kernels are linked against it.
RUN apt-get update && apt-get install --yes --no-install-recommends libnuma1 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10001 --create-home --home-dir /data moerge
# The same path as in the build stage: a virtual environment knows where it lives.
COPY --from=build /opt/moerge /opt/moerge
ENV PATH=/opt/moerge/.venv/bin:$PATH PYTHONUNBUFFERED=1 \
    HF_HOME=/data/huggingface \
    MOERGE_REGISTRY__DATA_DIR=/data/registry \
    MOERGE_MANIFEST=/opt/moerge/eval/testbed/data/manifest.yaml \
    MOERGE_SERVER__HOST=0.0.0.0
USER moerge
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
# Beyond loopback a key is needed: without one this ends at once and says how to make it.
ENTRYPOINT ["moerge"]
CMD ["serve"]

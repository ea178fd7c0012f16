# The sidecar: `docker build -t trunkline .` for CPU; for CUDA
# `docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 -t trunkline:cuda .`
ARG PYTHON_VERSION=3.12
ARG DEBIAN_OS=slim-bookworm

FROM python:${PYTHON_VERSION}-${DEBIAN_OS} AS build
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m venv /opt/trunkline
ENV PATH=/opt/trunkline/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# torch first and from its own index: what the rest would choose is the largest build there is.
RUN if [ -n "${TORCH_INDEX}" ]; then pip install --index-url "${TORCH_INDEX}" --extra-index-url https://pypi.org/simple "${TORCH}"; \
    else pip install "${TORCH}"; fi
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY template/python3-trunkline/trunkline template/python3-trunkline/trunkline
COPY sidecar sidecar
RUN pip install ".[otel,kubernetes]" && pip uninstall --yes pip setuptools && find /opt/trunkline -name tests -type d -prune -exec rm -rf {} +

# Not part of the image: `docker build --target sbom --output . .` writes sbom.cdx.json, a list of all Python packages in it.
FROM build AS listed
RUN python -m venv /opt/sbom && /opt/sbom/bin/pip install 'cyclonedx-bom>=7,<8' \
    && /opt/sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
       --output-file /sbom.cdx.json /opt/trunkline/bin/python
FROM scratch AS sbom
COPY --from=listed /sbom.cdx.json /

# Nothing that compiles is in here: the environment comes ready from the stage above.
FROM python:${PYTHON_VERSION}-${DEBIAN_OS} AS ship
RUN groupadd --gid 10001 trunkline && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin trunkline \
    && install -d -o 10001 -g 10001 -m 0755 /run/trunkline && install -d -o 10001 -g 10001 -m 0700 /var/lib/trunkline
COPY --from=build /opt/trunkline /opt/trunkline
ENV PATH=/opt/trunkline/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp
USER 10001:10001
# Sockets, and models. Everything else may be read-only; give /tmp a small tmpfs then.
VOLUME ["/run/trunkline", "/var/lib/trunkline"]
# The admin endpoint stays on its Unix socket: a published port would be everybody's.
ENV TRUNKLINE_ADMIN_PORT=0
# `docker stop` kills after 10 s; the drain, and up to 4 s to end both processes after it, must fit into that.
ENV TRUNKLINE_DRAIN_TIMEOUT_S=5
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python", "-m", "sidecar.probe"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["trunkline"]
CMD ["serve"]

# What runs on nodes: this project, its locked environment and the bundled models. The command line is its entry point:
# run it as `superres`, or as `python -m infra.pools.node` in a job.
#
# GPUs need nothing from the base: CUDA comes with torch's wheels, the driver with the host.
ARG BASE=docker.io/library/debian:bookworm-slim
# hadolint ignore=DL3006
FROM ${BASE} AS python
# The versions are those of the base's release, which security fixes replace.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM python AS build
# cpu or cuda.
ARG TORCH=cuda
# Where packages come from, for those who build behind a mirror.
ARG PIP_CERT
ARG PIP_FIND_LINKS
ARG PIP_INDEX_URL
ARG PIP_NO_INDEX
WORKDIR /opt/superres
COPY pyproject.toml README.md LICENSE ./
COPY infra/images/worker.lock infra/images/sbom.lock /build/
# The CPU build of torch has an index of its own; a mirror that is named is expected to have it.
RUN python3 -m venv .venv \
    && if [ "$TORCH" = cpu ] && [ -z "$PIP_INDEX_URL$PIP_FIND_LINKS" ]; then \
        export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu; fi \
    && .venv/bin/pip install --no-cache-dir "$(sed -n 's/^ *"\(torch==[^"]*\)",$/\1/p' pyproject.toml)" \
    && .venv/bin/pip install --no-cache-dir --no-deps --requirement /build/worker.lock \
    && python3 -m venv /build/sbom \
    && /build/sbom/bin/pip install --no-cache-dir --no-deps --requirement /build/sbom.lock
COPY blocks blocks
COPY deployments deployments
COPY flows flows
COPY infra infra
COPY tasks tasks
COPY prefect.yaml ./
RUN .venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && /build/sbom/bin/cyclonedx-py environment --output-file sbom.json .venv/bin/python

FROM python
# The same number as on the nodes of a cluster.
RUN useradd --uid 4200 --create-home superres
COPY --from=build /opt/superres /opt/superres
ENV PATH=/opt/superres/.venv/bin:$PATH \
    PYTHONPATH=/opt/superres \
    PYTHONDONTWRITEBYTECODE=1
USER 4200
WORKDIR /home/superres
# Where all else is read-only, this is not: a volume has the rights that the folder has here.
VOLUME /tmp
# A job that hangs is known by its lease; this says whether the image itself is sound.
HEALTHCHECK --interval=60s --timeout=30s CMD ["superres", "--help"]
ENTRYPOINT ["superres"]
CMD ["--help"]

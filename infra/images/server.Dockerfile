# The Prefect server: API, UI and services, on port 4200. The database is named at run time:
# PREFECT_SERVER_DATABASE_CONNECTION_URL, PREFECT_SERVER_API_AUTH_STRING (see docs/administrators.md).
ARG BASE=docker.io/library/debian:bookworm-slim
# hadolint ignore=DL3006
FROM ${BASE} AS python
# The versions are those of the base's release, which security fixes replace.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM python AS build
# Where packages come from, for those who build behind a mirror.
ARG PIP_CERT
ARG PIP_FIND_LINKS
ARG PIP_INDEX_URL
ARG PIP_NO_INDEX
WORKDIR /build
COPY infra/images/server.lock infra/images/sbom.lock ./
RUN python3 -m venv /opt/superres \
    && /opt/superres/bin/pip install --no-cache-dir --no-deps --requirement server.lock \
    && python3 -m venv /build/sbom \
    && sbom/bin/pip install --no-cache-dir --no-deps --requirement sbom.lock \
    && sbom/bin/cyclonedx-py environment --output-file /opt/superres/sbom.json /opt/superres/bin/python \
    && /opt/superres/bin/pip uninstall --yes pip

FROM python
# The same number as on the nodes of a cluster.
RUN useradd --uid 4200 --create-home superres
COPY --from=build /opt/superres /opt/superres
ENV PATH=/opt/superres/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PREFECT_HOME=/home/superres/prefect \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    PREFECT_SERVER_API_HOST=0.0.0.0 \
    PREFECT_SERVER_API_PORT=4200 \
    PREFECT_SERVER_UI_STATIC_DIRECTORY=/home/superres/ui
# The server writes the pages of the UI when it starts, by default into its own code.
USER 4200
WORKDIR /home/superres
EXPOSE 4200
# Where all else is read-only, this is not: a volume has the rights that the folder has here.
VOLUME /tmp
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import os, urllib.request as r; \
    r.urlopen('http://127.0.0.1:' + os.environ['PREFECT_SERVER_API_PORT'] + '/api/health', timeout=4)"]
CMD ["prefect", "server", "start"]

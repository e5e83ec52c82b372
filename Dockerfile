# An image with `nystrom`; docs/containers.md shows how to build and run it. Docker 23 or newer, podman or buildah:
#     docker build -t nystrom:cpu .
#     docker build -t nystrom:cuda --build-arg BASE=nvidia/cuda:13.0.2-base-ubuntu24.04 .
# torch brings the CUDA libraries itself, so a base without them is enough. The driver is the host's.
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

LABEL org.opencontainers.image.title="nystrom-pretrain" \
    org.opencontainers.image.description="Pretrain and evaluate Nyströmformer language models" \
    org.opencontainers.image.licenses="Apache-2.0"

COPY launch/containers/install.sh /opt/install.sh
RUN sh /opt/install.sh system

# Dependencies are a layer of their own: a change of the code does not install torch again. Settings of pip come as
# build arguments, or with passwords as a secret: --secret id=pip,src=pip.conf. Neither stays in the image's environment.
ARG EXTRAS=""
ARG PIP_INDEX_URL=""
ARG PIP_EXTRA_INDEX_URL=""
COPY pyproject.toml constraints.txt /opt/dependencies/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf sh /opt/install.sh dependencies /opt/dependencies

COPY . /opt/source/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf sh /opt/install.sh project /opt/source

# /tmp is what any user can write to, also with a read-only root and a user id that the image does not know. Python asks
# USER for a name where the id has none.
ENV PATH=/opt/nystrom/bin:$PATH \
    HOME=/tmp \
    USER=nystrom \
    LANG=C.UTF-8 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /work
USER 10001:10001
ENTRYPOINT ["nystrom"]
CMD ["--help"]

# The service and its shipped checkpoints, for CPUs or for NVIDIA GPUs:
#
#   docker build --build-arg TORCH_VARIANT=cpu  --tag slimpajama:0.1.0-cpu  .     (x86-64 and arm64)
#   docker build --build-arg TORCH_VARIANT=cu13 --tag slimpajama:0.1.0-cu13 .     (x86-64)
#
# torch's CUDA wheels bring CUDA with them, so that both variants stand on the same slim base. A release sets PYTHON_IMAGE
# to a digest (`docker buildx imagetools inspect python:3.11-slim-bookworm`), so that a build can be repeated.
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

# What the service stands on: torch and the other dependencies, and the compiler that the next stage needs.
FROM ${PYTHON_IMAGE} AS dependencies
ARG TORCH_VARIANT=cpu
# Where torch's CPU wheels are: `2.x+cpu` outranks `2.x` of the package index that is configured. That one is asked too,
# as this place lacks some exact versions of what torch needs. Empty: the configured index has torch for CPUs.
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
# The compiler is for the CPU operators; it never leaves these stages, so its exact version matters to nobody.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/slimpajama
ENV PATH=/opt/slimpajama/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
WORKDIR /build
COPY constraints.txt .
RUN case "${TORCH_VARIANT}" in \
        cpu) if [ -n "${TORCH_CPU_INDEX}" ]; then \
                 pip install --constraint constraints.txt --extra-index-url "${TORCH_CPU_INDEX}" torch; \
             else \
                 pip install --constraint constraints.txt torch; \
             fi ;; \
        cu13) pip install --constraint constraints.txt torch ;; \
        *) echo "TORCH_VARIANT is '${TORCH_VARIANT}': must be cpu or cu13" >&2; exit 2 ;; \
    esac \
    && python -c "import sys, torch; cuda = torch.version.cuda; \
        sys.exit(f'TORCH_VARIANT is ${TORCH_VARIANT}, and this torch is made for CUDA {cuda}' \
                 if bool(cuda) != ('${TORCH_VARIANT}' != 'cpu') else 0)"
COPY pyproject.toml .
# With what tracing needs: whether there is any is a setting.
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        print(*project['dependencies'], *project['optional-dependencies']['otel'], sep='\n')" > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt "setuptools>=77"

# The service itself, apart from what it stands on: a new version is a layer of a few megabytes, the large one stays.
FROM dependencies AS application
COPY LICENSE README.md ./
COPY model model
COPY service service
# The operators are compiled against the installed torch. The source beside us goes first, so that `model` is what was
# installed.
# hadolint ignore=DL3003
RUN pip install --no-deps --no-build-isolation --target /opt/application . \
    && rm -rf model service \
    && cd /opt/application \
    && python -m model.ops.build \
    && python -c "from model.ops.files import LIBRARY; assert LIBRARY.stat().st_size"

# Without what only building needs: headers, torch's own tests, the installer. On GPUs Triton compiles a C module for the
# host when it launches its first kernel: with no compiler in the image, that is done here.
FROM dependencies AS runtime
ARG TORCH_VARIANT=cpu
COPY docker/prebuilt_cc.py /opt/slimpajama/bin/prebuilt-cc
RUN if [ "${TORCH_VARIANT}" = cu13 ]; then python /opt/slimpajama/bin/prebuilt-cc --build; \
    else rm /opt/slimpajama/bin/prebuilt-cc; fi
# hadolint ignore=DL3003
RUN site_packages="$(python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')" \
    && cd "${site_packages}" \
    && echo /opt/application > slimpajama.pth \
    && rm -rf torch/include torch/test torch/share torch/bin/test_* torch/bin/protoc* \
              torch/lib/*test*.so torch/lib/libbackend_with_compiler.so \
              pip pip-* setuptools setuptools-* wheel wheel-* _distutils_hack pkg_resources distutils-precedence.pth \
    && find . -name '*.a' -delete \
    && rm -rf /opt/slimpajama/bin/pip* /opt/slimpajama/bin/wheel*

FROM ${PYTHON_IMAGE} AS service
# A name for the number, as some libraries ask for it; no installer, and nothing that could raise privileges.
RUN echo "slimpajama:x:10001:10001:SlimPajama:/tmp:/usr/sbin/nologin" >> /etc/passwd \
    && echo "slimpajama:x:10001:" >> /etc/group \
    && rm -rf /usr/local/bin/pip* /usr/local/bin/idle* /usr/local/lib/python3.*/site-packages/* \
              /usr/local/lib/python3.*/ensurepip /usr/lib/python3.*/ensurepip /usr/share/python-wheels \
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
# From what changes least to what changes most.
COPY --from=runtime /opt/slimpajama /opt/slimpajama
COPY checkpoints /models
COPY --from=application /opt/application /opt/application
# The root is read-only in a cluster: everything that anything may want to write goes to /tmp. The number is not always
# ours either (some clusters choose it), so nothing depends on a home folder.
ENV PATH=/opt/application/bin:/opt/slimpajama/bin:$PATH \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/cache \
    HF_HOME=/tmp/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor \
    TRITON_CACHE_DIR=/tmp/cache/triton \
    CC=/opt/slimpajama/bin/prebuilt-cc \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
ARG TORCH_VARIANT=cpu
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="slimpajama" \
      org.opencontainers.image.description="Every text task of Transformer checkpoints behind one REST service" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}-${TORCH_VARIANT}" \
      org.opencontainers.image.revision="${REVISION}"
# By number: only so can a cluster see that it is not root.
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ.get('SLIMPAJAMA_PORT', '8000')}/readyz\", timeout=2)"]
ENTRYPOINT ["slimpajama", "serve"]
# What a bare `docker run` serves. Whoever gives arguments replaces all of these, --no-auth among them.
CMD ["--host", "0.0.0.0", "--no-auth", "--model", "/models/slimpajama-tiny-lm", "--model", "/models/slimpajama-tiny-encoder"]

# syntax=docker/dockerfile:1
# Two images: `operator` (the control plane, no torch) and `trainer` (the data plane).
#
#   docker build --target operator --tag tuneyard-operator:0.3.0 .
#   docker build --target trainer  --tag tuneyard-trainer:0.3.0 .
#
# With vLLM, which compiles code when it starts and therefore needs a base with a C compiler:
#
#   docker build --target trainer --build-arg REQUIREMENTS=image-vllm.txt \
#     --build-arg BASE=python:3.12 --tag tuneyard-trainer-vllm:0.3.0 .
#
# BASE can be any Linux with glibc, bash, and Python 3.11 or newer as `python3` with the venv module.
ARG BASE=python:3.12-slim

FROM ${BASE} AS base
# Every stage uses the same path, because the scripts of a virtual environment name their interpreter.
ENV PATH=/opt/tuneyard/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    LANG=C.UTF-8

FROM base AS wheel
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/tuneyard
COPY requirements/build.txt /src/requirements/
RUN pip install --require-hashes -r /src/requirements/build.txt
COPY pyproject.toml README.md LICENSE /src/
COPY operator /src/operator
COPY trainer /src/trainer
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /dist /src \
 && pip install --no-deps --no-index --prefix /wheel /dist/*.whl

# ---- operator ------------------------------------------------------------------------------------

FROM base AS operator-packages
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/tuneyard
COPY requirements/operator.txt /src/
# No code uses the synchronous half of the Kubernetes client, and its classes are a fifth of the image.
RUN pip install --no-compile --require-hashes -r /src/operator.txt \
 && cd /opt/tuneyard/lib/python3*/site-packages/kubernetes/client \
 && find api models -name '*.py' ! -name __init__.py -delete \
 && pip freeze --all | grep -E '^(pip|setuptools)==' | xargs pip uninstall --yes

FROM base AS operator
COPY --from=operator-packages /opt/tuneyard /opt/tuneyard
COPY --from=wheel /wheel /opt/tuneyard
# Compiles bytecode for the modules that the operator imports, because the file system of the container
# is read-only. The build fails here if a module is missing.
RUN python -c "import tuneyard.cli.main, tuneyard.controller.app"
# HOME: only /tmp is writable in the pod.
ENV HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 1000:1000
WORKDIR /tmp
EXPOSE 8080 8443
ENTRYPOINT ["tuneyard"]
CMD ["operator"]

# ---- trainer -------------------------------------------------------------------------------------

FROM base AS trainer-packages
ARG REQUIREMENTS=image.txt
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/tuneyard
COPY requirements/${REQUIREMENTS} /src/
RUN pip install --require-hashes -r /src/${REQUIREMENTS}

FROM base AS trainer
ENV HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 RAY_USAGE_STATS_ENABLED=0
# KubeRay can start bash as a login shell, and Debian's /etc/profile would then reset the PATH.
RUN echo 'PATH=/opt/tuneyard/bin:$PATH' > /etc/profile.d/tuneyard.sh
# These 6 GB change only with the requirements; the layer of the wheel has less than a megabyte.
COPY --from=trainer-packages /opt/tuneyard /opt/tuneyard
COPY --from=wheel /wheel /opt/tuneyard
USER 1000:1000
WORKDIR /tmp
# KubeRay sets the command: `ray start` in the pods of a cluster, the driver's in the submitter pod.
CMD ["bash"]

#!/usr/bin/env bash
# Runs the cluster tests on kind instead of the rig: real images, KubeRay with its own RBAC, our chart.
#
#   scripts/kind.sh test [PYTEST ARGUMENTS]   up, run the tests, and down if the tests succeed
#   scripts/kind.sh up | down                 create or delete the cluster
#
# Needs docker, kind, helm and kubectl. KUBERAY_CHART is KubeRay's chart: a folder, an archive, or, by
# default, a name in a helm repository that was added as `kuberay`.
set -euo pipefail
cd "$(dirname "$0")/.."

NAME=${KIND_CLUSTER:-tuneyard-test}
KUBERAY_CHART=${KUBERAY_CHART:-kuberay/kuberay-operator}
KUBERAY_VERSION=1.6.0
OPERATOR=tuneyard-operator:kind
TRAINER=tuneyard-trainer:kind
KUBECONFIG=$PWD/.tuneyard-cache/kind.kubeconfig
export KUBECONFIG

need() {
  for program in docker kind helm kubectl; do
    command -v "$program" >/dev/null || { echo "$program is not on PATH: install it" >&2; exit 1; }
  done
  helm show chart "$KUBERAY_CHART" --version "$KUBERAY_VERSION" >/dev/null || {
    echo "helm did not find KubeRay's chart $KUBERAY_CHART $KUBERAY_VERSION: add KubeRay's repository" \
      "with 'helm repo add kuberay ADDRESS', or set KUBERAY_CHART" >&2
    exit 1
  }
}

build() {
  docker build --target operator --tag "$OPERATOR" .
  docker build --target trainer --tag "$TRAINER-bare" .
  # The model of the tests is a file in a Python package, which production images do not contain.
  docker build --build-arg "TRAINER=$TRAINER-bare" --tag "$TRAINER" --file - . <<'DOCKERFILE'
ARG TRAINER
FROM ${TRAINER}
USER root
COPY requirements/demo.txt /tmp/
RUN /usr/local/bin/python3 -m pip install --no-cache-dir --require-hashes --no-deps \
      --target "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
      --requirement /tmp/demo.txt
USER 1000:1000
DOCKERFILE
}

up() {
  need
  build
  mkdir -p "$(dirname "$KUBECONFIG")"
  kind get clusters | grep -qx "$NAME" || kind create cluster --name "$NAME" --wait 180s
  kind export kubeconfig --name "$NAME"
  kind load docker-image --name "$NAME" "$OPERATOR" "$TRAINER"
  helm upgrade --install kuberay "$KUBERAY_CHART" --version "$KUBERAY_VERSION" \
    --namespace kuberay-system --create-namespace --wait
  helm upgrade --install tuneyard charts/tuneyard \
    --namespace tuneyard-system --create-namespace --wait \
    --set image.repository="${OPERATOR%:*}" --set image.tag="${OPERATOR#*:}" \
    --set trainerImage.repository="${TRAINER%:*}" --set trainerImage.tag="${TRAINER#*:}"
}

check() {
  TUNEYARD_TEST_KUBECONFIG=$KUBECONFIG TUNEYARD_TEST_IMAGE=$TRAINER TUNEYARD_REQUIRE_CLUSTER=1 \
    .venv/bin/pytest -m cluster "$@"
}

down() {
  kind delete cluster --name "$NAME"
  rm -f "$KUBECONFIG"
}

case "${1:-}" in
  up) up ;;
  down) down ;;
  test)
    shift
    up
    check "$@"  # a failure keeps the cluster, so that it can be inspected
    down
    ;;
  *)
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac

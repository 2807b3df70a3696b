#!/usr/bin/env bash
# Fills the volumes of a mesh from a copy of backup.sh and starts it:  deploy/compose/restore.sh FOLDER
# With the secrets of then, the broker of then, and no volumes: docker compose down --volumes.
set -euo pipefail

[[ $# == 1 ]] || { echo "usage: restore.sh FOLDER" >&2; exit 1; }
folder=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
project=$(docker compose config | sed -n 's/^name: //p')
image=$(docker compose config --images | grep '^postgres:' | sort -u)
volumes() { docker volume ls --quiet --filter "label=com.docker.compose.project=$project" "$@"; }

[[ -z $(volumes) ]] || {
    echo "there is data already; remove it first: docker compose down --volumes" >&2
    exit 1
}
docker compose up --no-start
for archive in "$folder"/*.tgz; do
    name=$(basename "$archive" .tgz)
    volume=$(volumes --filter "label=com.docker.compose.volume=$name")
    [[ -n $volume ]] || { echo "no service has the volume $name: check COMPOSE_PROFILES" >&2; exit 1; }
    docker run --rm --user root --network none --entrypoint tar \
        --volume "$volume:/data" --volume "$folder:/from:ro" "$image" \
        --extract --gzip --numeric-owner --file "/from/$name.tgz" --directory /data
    echo "restored $name"
done
docker compose up --detach --wait

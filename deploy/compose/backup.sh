#!/usr/bin/env bash
# Copies every volume of the mesh into a folder:  deploy/compose/backup.sh FOLDER
# Positions in Postgres point into the broker's log, so all is stopped while it is copied, and
# started again. The secrets belong to the copy: keep them too, elsewhere.
set -euo pipefail

[[ $# == 1 ]] || { echo "usage: backup.sh FOLDER" >&2; exit 1; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
project=$(docker compose config | sed -n 's/^name: //p')
image=$(docker compose config --images | grep '^postgres:' | sort -u)

[[ -z $(ls -A "$folder") ]] || { echo "$folder is not empty" >&2; exit 1; }
trap 'docker compose up --detach --wait' EXIT
docker compose stop
for volume in $(docker volume ls --quiet --filter "label=com.docker.compose.project=$project"); do
    name=$(docker volume inspect --format '{{index .Labels "com.docker.compose.volume"}}' "$volume")
    docker run --rm --user root --network none --entrypoint tar \
        --volume "$volume:/data:ro" --volume "$folder:/to" "$image" \
        --create --gzip --numeric-owner --file "/to/$name.tgz" --directory /data .
    echo "copied $name"
done

#!/usr/bin/env bash
# A role and a database of the same name for each of $DATABASES. Runs at every start: a database that
# a new version needs is added, and each role's password is set to what its secret says.
set -euo pipefail

PGPASSWORD=$(</run/secrets/postgres_password)
export PGPASSWORD

for name in $DATABASES; do
    # psql reads the password itself, so it is on no command line. A pipe, as the root is read-only
    # and a here-document is a file.
    printf '%s\n' \
        "\\set name $name" \
        "\\set password \`cat /run/secrets/postgres_$name\`" \
        "SELECT format('CREATE ROLE %I LOGIN', :'name')" \
        "WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'name') \\gexec" \
        "ALTER ROLE :\"name\" PASSWORD :'password';" \
        "SELECT format('CREATE DATABASE %I OWNER %I', :'name', :'name')" \
        "WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = :'name') \\gexec" \
        "REVOKE ALL ON DATABASE :\"name\" FROM PUBLIC;" |
        psql --quiet --no-psqlrc --set ON_ERROR_STOP=1
    printf 'database %s: ready\n' "$name"
done

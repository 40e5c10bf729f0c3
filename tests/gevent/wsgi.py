"""What gunicorn serves in test_gunicorn.py: Flask over two databases' pools, made when it is imported.

It is the application of the people who came from psycopg_pool with a pool of psycopg's per database.
"""

import os

from flask import Flask

from penstock import Pools

pools = Pools.from_mapping(
    {
        name: {
            "conninfo": os.environ["SCENE_DSN"],
            "driver": os.environ["SCENE_DRIVER"],
            "min_size": 0,
            "max_size": 50,
            "timeout": 60.0,
        }
        for name in ("default", "reports")
    }
)
if os.environ["SCENE_MASTER"] == "uses the pool":
    with pools["default"].connection() as conn:
        conn.cursor().execute("select 1")

app = Flask(__name__)


@app.get("/<name>")
def wait_for_the_lock(name):
    with pools[name].connection() as conn:
        cursor = conn.cursor()
        cursor.execute("select pg_advisory_xact_lock_shared(4712), pg_backend_pid()")
        return str(cursor.fetchone()[1])

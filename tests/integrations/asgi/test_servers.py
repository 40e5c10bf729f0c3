"""Real servers: the FastAPI example under gunicorn and uvicorn, an app of every framework under uvicorn.

Each request says who it is and gets its own back, over an HTTP connection of its own: an answer that
was meant for somebody else shows.
"""

import secrets
from pathlib import Path

import pytest
from tests.forks import until
from tests.integrations.serving import Served, free_port

EXAMPLE = Path(__file__).parents[3] / "examples" / "fastapi_app"
UVICORN = ["-m", "uvicorn", "--uds={socket}", "--log-level=warning", "--lifespan=on"]
GUNICORN = ["-m", "gunicorn", "--bind=unix:{socket}", "--no-control-socket", "--workers=2"]
WAYS = {
    "uvicorn": ["-m", "uvicorn", "--port={port}", "--log-level=warning", "--lifespan=on"],
    "gunicorn's asgi worker": [*GUNICORN, "-k", "asgi", "--preload"],
    "uvicorn's worker": [*GUNICORN, "-k", "uvicorn_worker.UvicornWorker"],
}


@pytest.fixture
def database(server):
    """One of the test's own, to see sessions of nobody else in it."""
    name = f"served_{secrets.token_hex(4)}"
    server.execute(f"create database {name}")
    yield server.conninfo(dbname=name, over="tcp")
    server.execute(f"drop database {name} with (force)")


def sessions(server, conninfo):
    name = dict(part.split("=", 1) for part in conninfo.split())["dbname"]
    of = f"datname = '{name}' and backend_type = 'client backend'"  # autovacuum is none of ours
    query = f"select count(*) from pg_stat_activity where {of}"
    return int(server.execute(query)[0][0])


@pytest.mark.parametrize("way", WAYS)
def test_the_fastapi_example_gives_everybody_his_own_and_leaves_no_session(way, server, database):
    port = free_port() if way == "uvicorn" else None
    arguments = [*(part.replace("{port}", str(port)) for part in WAYS[way]), "shop:app"]
    with Served(arguments, EXAMPLE, port, DATABASE_URL=database) as served:
        added = served.ask(*(("POST", f"/orders?item=item{n}") for n in range(100)))
        assert {answer.status_code for answer in added} == {201}, served.log()
        shown = served.ask(*(("GET", f"/orders/{each.json()['id']}") for each in added))
        assert [answer.json() for answer in shown] == [{"item": f"item{n}"} for n in range(100)]
        (missing, lines, health) = served.ask(
            ("GET", "/orders/0"), ("GET", "/orders.csv"), ("GET", "/healthz")
        )
        assert missing.status_code == 404
        assert len(lines.text.splitlines()) == 100
        assert health.status_code == 200
        if port is not None:
            assert served.talk("/feed", "tea", "coffee") == ["ordered"] * 2
            assert served.ask(("GET", "/orders.csv"))[0].text.endswith(",tea\n102,coffee\n")
        assert 1 <= sessions(server, database) <= 20
        served.stop()
        until(lambda: sessions(server, database) == 0, "no session is left")
        assert "Traceback" not in served.log(), served.log()


APPS = {
    "starlette": """
        from starlette.applications import Starlette
        from starlette.responses import PlainTextResponse
        from starlette.routing import Route

        async def echo(request):
            return PlainTextResponse(await echoed(request.path_params["word"]))

        app = Starlette(routes=[Route("/echo/{word}", echo)])
        app.add_middleware(db.middleware)
    """,
    "quart": """
        from quart import Quart

        app = Quart("echo")
        app.asgi_app = db.middleware(app.asgi_app)

        @app.get("/echo/<word>")
        async def echo(word):
            return await echoed(word)
    """,
    "connexion": """
        from pathlib import Path

        import connexion
        from connexion.middleware import MiddlewarePosition

        Path("echo.yaml").write_text('''
        openapi: 3.0.0
        info: {title: echo, version: "1"}
        paths:
          /echo/{word}:
            get:
              operationId: echoed
              parameters: [{name: word, in: path, required: true, schema: {type: string}}]
              responses: {"200": {description: it, content: {text/plain: {}}}}
        ''')
        app = connexion.AsyncApp("echo", specification_dir=".")
        app.add_middleware(db.middleware, MiddlewarePosition.BEFORE_EXCEPTION)
        app.add_api("echo.yaml", resolver=connexion.Resolver(lambda name: echoed))
    """,
    "none": """
        async def answer(scope, receive, send):
            assert scope["type"] == "http"
            body = (await echoed(scope["path"].rpartition("/")[2])).encode()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": body})

        app = db.middleware(answer)
    """,
}
DATABASES = {
    "psycopg": """
        async def echoed(word):
            rows = await db.execute("select %s::text from pg_sleep(0.001)", (word,))
            return (await rows.fetchone())[0]
    """,
    "asyncpg": """
        async def echoed(word):
            conn = await db.connection()
            return await conn.fetchval("select $1::text from pg_sleep(0.001)", word)
    """,
}
HEAD = """
        import os
        from penstock import AsyncConnectionPool
        from penstock.integrations.asgi import Penstock

        pool = AsyncConnectionPool(os.environ["DATABASE_URL"], driver="{driver}", max_size=3)
        db = Penstock(pool)
"""


@pytest.mark.parametrize(
    ("framework", "driver"),
    [
        ("starlette", "asyncpg"),  # with psycopg FastAPI's example is Starlette's, too
        ("quart", "psycopg"),
        ("connexion", "asyncpg"),
        ("none", "psycopg"),
    ],
)
def test_an_app_of_each_framework_is_served_by_three_connections(
    framework, driver, server, database, tmp_path
):
    parts = (HEAD.format(driver=driver), DATABASES[driver], APPS[framework])
    source = "\n".join(part.replace("\n        ", "\n") for part in parts)
    (tmp_path / "echo.py").write_text(source)
    knows_lifespan = framework != "none"
    uvicorn = UVICORN if knows_lifespan else UVICORN[:-1]
    with Served([*uvicorn, "echo:app"], tmp_path, DATABASE_URL=database) as served:
        words = [secrets.token_hex(4) for _ in range(100)]
        answers = served.ask(*(("GET", f"/echo/{word}") for word in words))
        assert [answer.text.strip('"\n') for answer in answers] == words, served.log()
        assert 1 <= sessions(server, database) <= 3
        served.stop()
        until(lambda: sessions(server, database) == 0, "no session is left")
        assert "Traceback" not in served.log(), served.log()


def test_a_client_that_hangs_up_in_the_middle_of_a_stream_frees_its_connection(
    server, database, tmp_path
):
    (tmp_path / "endless.py").write_text(
        (HEAD.format(driver="psycopg"))
        .replace("\n        ", "\n")
        .replace("max_size=3", "max_size=1")
        + """
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

async def endless(request):
    async def rows():
        conn = await db.connection()
        while True:
            await conn.execute("select 1")
            yield "x" * 1000
    return StreamingResponse(rows())

async def short(request):
    await db.execute("select 1")
    return PlainTextResponse(f"{pool.stats().in_use}")

app = Starlette(routes=[Route("/endless", endless), Route("/short", short)])
app.add_middleware(db.middleware)
"""
    )
    with Served([*UVICORN, "endless:app"], tmp_path, DATABASE_URL=database) as served:
        with served.connect() as client:
            client.sendall(b"GET /endless HTTP/1.1\r\nHost: shop\r\n\r\n")
            assert client.recv(1000)
        (answer,) = served.ask(("GET", "/short"))  # waits for the pool's one connection
        assert (answer.status_code, answer.text) == (200, "1"), served.log()

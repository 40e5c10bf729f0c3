"""The bank on Connexion 3, an ASGI application: `gunicorn -w 4 -k asgi bank.asgi`."""

from __future__ import annotations

import configparser

import connexion
from connexion.jsonifier import Jsonifier
from connexion.middleware import MiddlewarePosition
from starlette.middleware.cors import CORSMiddleware

from bank import config_file, encoder
from bank.database import db

jsonifier = Jsonifier(cls=encoder.JSONEncoder)
application = connexion.App(__name__, specification_dir=".", jsonifier=jsonifier)
application.add_middleware(
    CORSMiddleware, MiddlewarePosition.BEFORE_EXCEPTION, allow_origins=["*"], allow_methods=["*"]
)
application.add_api("openapi.yaml", arguments={"title": "The Bank"})

config = configparser.ConfigParser(interpolation=None)
config.read_file(config_file.PATH.open())
application.app.config["PENSTOCK_DATABASE_URI"] = config["POSTGRES"]
application.app.config["PENSTOCK_POOL_OPTIONS"] = {"min_size": 1, "max_size": 10}
db.init_app(application)

if __name__ == "__main__":
    application.run(port=8080)

"""The bank on Connexion 2.14, a WSGI application: `gunicorn -w 4 bank.wsgi`."""

from __future__ import annotations

import configparser

import connexion
from flask_cors import CORS

from bank import config_file, encoder
from bank.database import db

application = connexion.App(__name__, specification_dir=".")
CORS(application.app)
application.app.json_encoder = encoder.JSONEncoder
application.add_api("openapi.yaml", arguments={"title": "The Bank"})

config = configparser.ConfigParser(interpolation=None)
config.read_file(config_file.PATH.open())
application.app.config["PENSTOCK_DATABASE_URI"] = config["POSTGRES"]
application.app.config["PENSTOCK_POOL_OPTIONS"] = {"min_size": 1, "max_size": 20}
db.init_app(application)

if __name__ == "__main__":
    application.run(port=8080)

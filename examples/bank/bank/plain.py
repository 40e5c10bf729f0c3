"""The bank on Flask alone, a WSGI application: `gunicorn -w 4 --threads 8 bank.plain`.

What Connexion reads from the OpenAPI file is written out here: paths, methods, and arguments.
"""

from __future__ import annotations

import configparser

from flask import Flask, Response, make_response, request
from flask.json.provider import DefaultJSONProvider

from bank import config_file, encoder
from bank.controllers import account_controller, branch_controller, transfer_controller
from bank.database import db


class JSONProvider(DefaultJSONProvider):
    """Flask's, with the bank's encoder."""

    default = staticmethod(encoder.JSONEncoder().default)


application = Flask(__name__)
application.json = JSONProvider(application)


def respond(answer: object) -> Response:
    """A controller answers with a model, or with an error and its status."""
    content, status = answer if isinstance(answer, tuple) else (answer, 200)
    return make_response(application.json.response(content), status)


@application.get("/balance/<int:aid>")
def get_balance(aid: int) -> Response:
    """Answer what an account holds."""
    return respond(account_controller.get_balance(aid, request.args["nonce"]))


@application.get("/history/<int:aid>")
def get_history(aid: int) -> Response:
    """Answer an account's last transfers."""
    limit = request.args.get("limit", 20, type=int)
    return respond(account_controller.get_history(aid, request.args["nonce"], limit))


@application.post("/transfer")
def make_transfer() -> Response:
    """Move money."""
    return respond(transfer_controller.make_transfer(request.get_json()))


@application.get("/branches")
def get_branches() -> Response:
    """Answer what each branch holds."""
    return respond(branch_controller.get_branches())


config = configparser.ConfigParser(interpolation=None)
config.read_file(config_file.PATH.open())
application.config["PENSTOCK_DATABASE_URI"] = config["POSTGRES"]
application.config["PENSTOCK_POOL_OPTIONS"] = {"min_size": 1, "max_size": 20}
db.init_app(application)

if __name__ == "__main__":
    application.run(port=8080)

"""A bank on pgbench's tables, in the layout that Swagger's generator gives an application.

Three ways to serve it: `wsgi.py` on Connexion 2.14, `asgi.py` on Connexion 3, `plain.py` on Flask
alone. Controllers, models, encoder and OpenAPI file are the same in all three.
"""
